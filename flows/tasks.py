"""The Prefect tasks of our flows: made as a flow runs, with neither cache nor stored results, as DVC keeps the record."""

from collections.abc import Callable
from typing import Any, TypeVar

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.tasks import Task

from breedline.errors import BreedlineError, NetworkError
from flows.states import Outcome

T = TypeVar("T")
RETRIES, RETRY_DELAY = 3, 60
"""Of what needs the network, and the seconds between."""


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


def in_task(name: str, work: Callable[[], T]) -> T:
    """Do `work` as a task, and return its result; the task is retried after a NetworkError.

    Raises:
        BreedlineError: what `work` raised last; the task has failed with the same message.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def attempt() -> State[Any]:
        try:
            results.append(work())
        except BreedlineError as error:
            errors.append(error)
            return Outcome.FAILED.state(str(error))
        except TerminationSignal as error:  # else this task would count as crashed
            errors.append(error)
            return Outcome.CANCELLED.state("its run has ended")
        return Outcome.COMPLETED.state(str(results[-1]))

    def the_network_failed() -> bool:
        return bool(errors) and isinstance(errors[-1], NetworkError)

    task = task_of(name, attempt, retries=RETRIES, delay=RETRY_DELAY, again=the_network_failed)
    state: State[Any] = task(return_state=True)
    if state.is_completed():
        return results[-1]
    if errors:
        raise errors[-1]
    return state.result()
