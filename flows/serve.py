"""`breedline serve`: the deployments of prefect.yaml on this machine, until Ctrl-C.

Starts a Prefect server of its own where none is configured. Afterwards nothing is running and no schedule is due.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import UUID

import httpx
import psutil
from prefect import get_client
from prefect.automations import Automation, EventTrigger, Posture, ResourceSpecification
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_API_PORT, get_current_settings, temporary_settings
from prefect.states import Cancelled
from rich.console import Console
from ruamel.yaml import YAML

from breedline.errors import BreedlineError
from breedline.files import cache_dir
from flows.leash import leashed
from flows.limits import create_limit

DEPLOYMENTS = Path("prefect.yaml")
POOL = "breedline"
PAUSE = 5.0
SERVER_START = 120.0
"""Seconds that a server may take to answer for the first time; on a slow disk it makes its database meanwhile."""
HEARTBEAT, SILENCE = 30, 120
"""Seconds between signs of life of a run, and without one until it counts as crashed."""
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
}
console = Console()


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.update(ENVIRONMENT)
    try:
        with (
            running_server() as url,
            temporary_settings({PREFECT_API_URL: url}),
            get_client(sync_client=True) as client,
        ):
            os.environ["PREFECT_API_URL"] = url
            _prepare(client)
            with _deployed(client) as names:
                console.print(f"Serving {', '.join(names)}\nLook at {url.removesuffix('/api')}; Ctrl-C ends all of it.")
                while True:
                    with _running(
                        leashed(["prefect", "worker", "start", "--pool", POOL, "--type", "process"])
                    ) as worker:
                        code = worker.wait()
                    console.print(f"The worker ended with exit code {code}; the next one starts in {PAUSE:g} s")
                    time.sleep(PAUSE)
    except KeyboardInterrupt:
        console.print("Ended.")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """The API of the server that is configured (PREFECT_API_URL, or the profile), or of one that ends with this."""
    if configured := get_current_settings().api.url:
        yield str(configured)
        return
    port = PREFECT_SERVER_API_PORT.value()
    log = cache_dir("logs") / "server.log"
    with log.open("wb") as output:
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        with _running(leashed(command, stdout=output, stderr=output)) as server:
            url = f"http://127.0.0.1:{port}/api"
            console.print(f"Starting a Prefect server at {url.removesuffix('/api')}, which logs to {log}")
            deadline = time.monotonic() + SERVER_START
            while not _answers(url):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise BreedlineError(
                        f"the Prefect server did not start, see {log}: if port {port} is taken by one already, "
                        f"set PREFECT_API_URL={url}, else another PREFECT_SERVER_API_PORT"
                    )
                time.sleep(0.5)
            yield url


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


def _prepare(client: SyncPrefectClient) -> None:
    """What runs need on a server: a work pool, the limit on the GPU, and somebody who notices runs that are no more."""
    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    create_limit(client, "gpu")
    name = "Crash runs that have gone silent"
    if not client.read_automations_by_name(name):
        Automation(
            name=name,
            description=f"{SILENCE} s without a heartbeat: the process was killed, or its machine is gone",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.*"},  # a heartbeat, or any state: ours have names of their own
                match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=SILENCE),
            ),
            actions=[
                ChangeFlowRunState(
                    name="Crashed", force=False, state=StateType.CRASHED, message=f"No heartbeat for {SILENCE} s"
                )
            ],
        ).create()


def _declared() -> list[dict[str, Any]]:
    """The deployments as prefect.yaml has them."""
    try:
        return YAML(typ="safe").load(DEPLOYMENTS)["deployments"]
    except FileNotFoundError:
        raise BreedlineError(f"there is no {DEPLOYMENTS} here: run this in the project's folder") from None


@contextlib.contextmanager
def _deployed(client: SyncPrefectClient) -> Iterator[list[str]]:
    """Register the deployments; afterwards their schedules are paused, and runs that had not ended are cancelled."""
    done = subprocess.run(["prefect", "--no-prompt", "deploy", "--all"], capture_output=True, text=True)
    if done.returncode:
        raise BreedlineError(f"prefect deploy: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    names = [f"{d['entrypoint'].rpartition(':')[2]}/{d['name']}" for d in _declared()]
    ids = [client.read_deployment_by_name(name).id for name in names]
    for deployment in ids:
        client.resume_deployment(deployment)
    try:
        yield names
    finally:
        for deployment in ids:
            client.pause_deployment(deployment)
        _cancel_unfinished(client, ids)


def _cancel_unfinished(client: SyncPrefectClient, deployments: list[UUID]) -> None:
    unfinished = [StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED, StateType.CANCELLING, StateType.PAUSED]
    for run in client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=deployments)),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=unfinished))),
    ):
        client.set_flow_run_state(run.id, Cancelled(message="its server was ended"), force=True)


@contextlib.contextmanager
def _running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Afterwards neither the process is running nor what it has started; unless it had ended before, as by a kill."""
    try:
        yield process
    finally:
        descendants = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if process.stdin:
            process.stdin.close()
        process.wait()
        for descendant in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.terminate()
        for survivor in psutil.wait_procs(descendants, timeout=10)[1]:
            survivor.kill()
