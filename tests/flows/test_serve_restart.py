"""What `breedline serve` does when the server or the worker under it is killed, and how cancelled runs end."""

import contextlib
import time
from datetime import datetime
from typing import Any

import httpx
import psutil
import pytest

from tests.flows.served import Served, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SERVER, WORKER, ENGINE = "prefect server start|uvicorn", "prefect worker start", "prefect.engine|flow-run execute"


@pytest.fixture(scope="module", autouse=True)
def _only_runs_that_are_asked_for(served: Served) -> None:
    served.pause("retrain/nightly")


def _kill(served: Served, pattern: str) -> None:
    """SIGKILL for what looks like `pattern`, without the leashes around it."""
    killed = [process for process in served.processes(pattern) if "leash.py" not in " ".join(process.cmdline())]
    assert killed
    for process in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _answers(served: Served) -> bool:
    try:
        return httpx.get(f"{served.api}/health").is_success
    except httpx.TransportError:
        return False


def _task_states(served: Served, run: str) -> dict[str, str]:
    tasks: list[dict[str, Any]] = served.ask("task_runs/filter", flow_runs={"id": {"any_": [run]}})
    return {task["name"]: task["state"]["name"] for task in tasks}


def _seconds_until_crashed(served: Served, run: str, since: float) -> float:
    assert served.ended(run) == "Crashed"
    return datetime.fromisoformat(served.state(run)["timestamp"]).timestamp() - since


def test_a_run_that_is_cancelled_ends_as_cancelled_and_so_do_its_tasks(served: Served) -> None:
    run = served.start(overrides={"train.epochs": 30, "train.base_lr": 9})
    until(lambda: served.processes("train.py"))
    served.ask(f"flow_runs/{run}/set_state", state={"type": "CANCELLING"})
    assert served.ended(run) == "Cancelled"
    until(lambda: _task_states(served, run).get("train") != "Running")
    assert _task_states(served, run) == {"pull": "Completed", "download": "Completed", "train": "Cancelled"}
    assert not served.processes("train.py")


def test_a_server_that_is_killed_is_started_again_and_the_runs_go_on(served: Served) -> None:
    run = served.start(overrides={"train.epochs": 31, "train.base_lr": 9})
    until(lambda: served.processes("train.py"))
    _kill(served, SERVER)
    until(lambda: not _answers(served))
    until(lambda: _answers(served))
    assert served.ended(run) == "Completed"
    assert served.log.read_text().count("The server ended with exit code 137; it starts again in 1 s\n") == 1
    assert served.ended(served.start(overrides={"train.epochs": 31})) == "Completed"


def test_runs_that_die_with_the_server_or_the_worker_are_marked_within_a_minute(served: Served) -> None:
    run = served.start(overrides={"train.epochs": 32, "train.base_lr": 9})
    until(lambda: served.processes("train.py"))
    killed = time.time()
    _kill(served, f"{SERVER}|{WORKER}|{ENGINE}")
    assert _seconds_until_crashed(served, run, killed) < 60
    assert not served.processes("train.py")
    log = served.log.read_text()
    assert "The worker ended with exit code 137; it starts again in 1 s\n" in log
    assert served.ended(served.start(overrides={"train.epochs": 33})) == "Completed"
