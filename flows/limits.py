"""Concurrency limits: a stage that names a resource never runs without a limit on it."""

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import ObjectNotFound


def create_limit(client: SyncPrefectClient, name: str) -> None:
    """See to it that there is a limit; it is 1 unless somebody has set it otherwise."""
    try:
        client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
