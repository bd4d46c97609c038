"""The Prefect tasks of our flows: made as a flow runs, with neither cache nor stored results, as DVC keeps the record."""

from collections.abc import Callable
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.tasks import Task


def task_of(
    name: str, work: Callable[[], State[Any]], *, retries: int, delay: float, again: Callable[[], bool]
) -> Task[[], State[Any]]:
    """A task that ends in the state that `work` returns; after a failure it is tried again if `again()` says so.

    Args:
        retries: how often it is tried again at most.
        delay: seconds before the next attempt.
    """
    return Task(
        work,
        name=name,
        task_run_name=name,
        retries=retries,
        retry_delay_seconds=delay,
        retry_condition_fn=lambda *_: again(),
        cache_policy=NO_CACHE,
        persist_result=False,
    )
