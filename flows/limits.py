"""Concurrency limits: the limit on a resource exists before a stage that needs the resource runs."""

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import ObjectNotFound


def create_limit(client: SyncPrefectClient, name: str) -> None:
    """Create the global concurrency limit `name` with one slot, unless it exists already."""
    try:
        client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
