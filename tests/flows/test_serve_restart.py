"""What `breedline serve` does when the server or the worker under it is killed."""

import time
from datetime import datetime

import httpx
import pytest

from tests.flows.served import Served, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SERVER, WORKER, ENGINE = "prefect server start|uvicorn", "prefect worker start", "prefect.engine|flow-run execute"


def _answers(served: Served) -> bool:
    try:
        return httpx.get(f"{served.api}/health").is_success
    except httpx.TransportError:
        return False


def _seconds_until_crashed(served: Served, run: str, since: float) -> float:
    assert served.ended(run) == "Crashed"
    return datetime.fromisoformat(served.state(run)["timestamp"]).timestamp() - since


def test_a_wrong_override_is_one_line_in_the_terminal_too(served: Served) -> None:
    assert served.ended(served.start(overrides={"train.epoch": 33})) == "Failed"
    until(lambda: "did you mean epochs?" in served.log.read_text())
    assert served.ended(served.start(overrides={"train.epochs": -1})) == "Failed"  # by when all of the first is written
    assert "Traceback" not in served.log.read_text()


def test_a_server_that_is_killed_is_started_again_and_the_runs_go_on(served: Served) -> None:
    run = served.start(overrides={"train.epochs": 31, "train.base_lr": 9})
    until(lambda: served.processes("train.py"))
    assert served.kill(SERVER)
    until(lambda: not _answers(served))
    until(lambda: _answers(served))
    assert served.ended(run) == "Completed"
    assert served.log.read_text().count("The server ended with exit code 137; it starts again in 1 s\n") == 1
    assert served.ended(served.start(overrides={"train.epochs": 31})) == "Completed"


def test_runs_that_die_with_the_server_or_the_worker_are_marked_within_a_minute(served: Served) -> None:
    run = served.start(overrides={"train.epochs": 32, "train.base_lr": 9})
    until(lambda: served.processes("train.py"))
    killed = time.time()
    assert served.kill(f"{SERVER}|{WORKER}|{ENGINE}")
    assert _seconds_until_crashed(served, run, killed) < 60
    assert not served.processes("train.py")
    log = served.log.read_text()
    assert "The worker ended with exit code 137; it starts again in 1 s\n" in log
    assert served.ended(served.start(overrides={"train.epochs": 33})) == "Completed"
