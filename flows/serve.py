"""`breedline serve`: runs the deployments of prefect.yaml on this machine until Ctrl-C.

It starts a Prefect server of its own where none is configured. After it ends, nothing is running and no schedule is active.
"""

import contextlib
import os
import secrets
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
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
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.context import refresh_global_settings_context
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_SERVER_API_PORT, get_current_settings
from prefect.states import Cancelled, Crashed
from ruamel.yaml import YAML

from breedline.errors import BreedlineError
from breedline.files import cache_dir
from flows.limits import create_limit
from flows.service import SERVER_START, Service, answers

DEPLOYMENTS = Path("prefect.yaml")
POOL = "breedline"
SILENCE = 120
"""Seconds without a heartbeat, of which there is one every 30 s, until a run counts as crashed."""
LOOK_FOR_LOST = 10.0
"""Seconds between looks for runs whose process is gone. The second look that misses it marks the run."""
UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED, StateType.CANCELLING, StateType.PAUSED]


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with running_server() as server:
            os.environ.update(server.settings)
            refresh_global_settings_context()
            with get_client(sync_client=True) as client:
                _prepare(client)
                command = ["prefect", "worker", "start", "--pool", POOL, "--type", "process"]
                with _deployed(client) as names, Service("The worker", command, say) as worker:
                    say(f"Serving {', '.join(names)}; Ctrl-C ends all of it.\n{server.how_to_reach}")
                    _watch_over(server, worker, client)
    except KeyboardInterrupt:
        say("Ended.")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def say(line: str) -> None:
    """Print a line for the person who serves."""
    print(line, flush=True)


@dataclass(frozen=True)
class Server:
    """A Prefect server."""

    settings: dict[str, str]
    """How Prefect's clients find it, as environment variables."""
    how_to_reach: str
    """The same for people."""
    service: Service | None
    """The server that this process runs; None for one that was configured."""


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """The server that is configured (PREFECT_API_URL, or the profile), or one of our own, which ends with the block.

    Ours listens on the loopback interface, which any web page open in a browser on this machine can reach. So each
    request needs a secret that is new for every serve, CORS admits no other origin, and CSRF protection is on.

    Raises:
        BreedlineError: ours does not start.
    """
    if configured := get_current_settings().api.url:
        yield Server({"PREFECT_API_URL": configured}, f"Look at {configured.removesuffix('/api')}", None)
        return
    port = PREFECT_SERVER_API_PORT.value()
    origin = f"http://127.0.0.1:{port}"
    login = f"breedline:{secrets.token_urlsafe(24)}"
    settings = {"PREFECT_API_URL": f"{origin}/api", "PREFECT_API_AUTH_STRING": login}
    environment = {
        **os.environ,
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origin,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    }
    log = cache_dir("logs") / "server.log"
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output, _exports(cache_dir("serve") / f"{port}.env", settings) as exports:
        say(f"Starting a Prefect server at {origin}, which logs to {log}")
        with Service("The server", command, say, env=environment, stdout=output, stderr=output) as service:
            deadline = time.monotonic() + SERVER_START
            while not answers(settings["PREFECT_API_URL"]):
                if service.look() is not None or time.monotonic() > deadline:
                    raise BreedlineError(
                        f"the Prefect server did not start, see {log}: if port {port} is taken by one already, "
                        f"set PREFECT_API_URL={origin}/api, else another PREFECT_SERVER_API_PORT"
                    )
                time.sleep(0.5)
            reach = f"Look at {origin} and log in with {login}\nIn another terminal, first: source {shlex.quote(str(exports))}"
            yield Server(settings, reach, service)


@contextlib.contextmanager
def _exports(path: Path, settings: dict[str, str]) -> Iterator[Path]:
    """A file for other terminals to `source`, which only its owner may read; it is there during the block."""
    path.unlink(missing_ok=True)  # of a serve that was killed
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(f"export {name}={value}\n" for name, value in settings.items())
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _watch_over(server: Server, worker: Service, client: SyncPrefectClient) -> NoReturn:
    """Keep the worker and our own server running, and mark the runs that have died with one of them."""
    suspects: set[UUID] = set()
    looked = time.monotonic()
    while True:
        if server.service:
            server.service.keep_running()
        worker.keep_running()
        if server.service and time.monotonic() - looked > LOOK_FOR_LOST:
            with contextlib.suppress(httpx.HTTPError):  # the server has just ended; the next look asks the next one
                suspects = _mark_lost(client, worker.started, suspects)
            looked = time.monotonic()
        time.sleep(1)


def _mark_lost(client: SyncPrefectClient, worker_started: datetime, suspects: set[UUID]) -> set[UUID]:
    """Mark the runs that were among the suspects and still have no process; return the runs without one as new suspects.

    A worker that is killed together with its runs cannot report their end. One that lives reports it shortly after the
    process has exited, hence the second look.
    """
    lost = [
        run
        for run in client.read_flow_runs(
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
            flow_run_filter=_in_states([StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]),
        )
        if not _has_process(run, worker_started)
    ]
    for run in lost:
        if run.id in suspects:
            end = Cancelled if run.state_type is StateType.CANCELLING else Crashed
            client.set_flow_run_state(run.id, end(message="its process was killed"), force=True)
    return {run.id for run in lost}


def _has_process(run: FlowRun, worker_started: datetime) -> bool:
    """Whether the process of the run is alive, or the present worker has yet to start it."""
    if run.state_type is StateType.PENDING or not run.infrastructure_pid:
        return run.state is not None and run.state.timestamp > worker_started
    try:
        return psutil.Process(int(run.infrastructure_pid)).environ().get("PREFECT__FLOW_RUN_ID") == str(run.id)
    except psutil.NoSuchProcess:
        return False


def _prepare(client: SyncPrefectClient) -> None:
    """Create what runs need on a server: a work pool, the limit on the GPU, and an automation that marks silent runs."""
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
    """The deployments that prefect.yaml declares."""
    try:
        return YAML(typ="safe").load(DEPLOYMENTS)["deployments"]
    except FileNotFoundError:
        raise BreedlineError(f"there is no {DEPLOYMENTS} here: run this in the project's folder") from None


@contextlib.contextmanager
def _deployed(client: SyncPrefectClient) -> Iterator[list[str]]:
    """Register the deployments; leaving the block pauses their schedules and cancels their unfinished runs."""
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
        if answers(str(client.api_url).rstrip("/")):
            for deployment in ids:
                client.pause_deployment(deployment)
            _cancel_unfinished(client, ids)
        else:
            say("The server does not answer, so what is scheduled there stays so")


def _cancel_unfinished(client: SyncPrefectClient, deployments: list[UUID]) -> None:
    for run in client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=deployments)),
        flow_run_filter=_in_states(UNFINISHED),
    ):
        client.set_flow_run_state(run.id, Cancelled(message="its server was ended"), force=True)


def _in_states(types: list[StateType]) -> FlowRunFilter:
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)))
