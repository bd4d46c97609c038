"""A program that is kept running: pauses that grow, an end to trying, and nothing left behind."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from breedline.errors import BreedlineError
from flows import service as module
from flows.service import FAILURES, Service


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What services say; they do not really pause."""
    monkeypatch.setattr(module, "_pause", lambda _: None)
    return []


def _restart(service: Service, times: int) -> None:
    for _ in range(times):
        while service.look() is None:
            time.sleep(0.02)
        service.keep_running()


def test_it_is_started_again_after_pauses_that_grow_and_given_up_after_some_failures_in_a_row(said: list[str]) -> None:
    with Service("It", ["sh", "-c", "exit 3"], said.append) as service:
        _restart(service, FAILURES - 1)
        with pytest.raises(BreedlineError, match=f"It ended {FAILURES} times in a row, at last with exit code 3"):
            _restart(service, 1)
    assert said == [f"It ended with exit code 3; it starts again in {2**n} s" for n in range(FAILURES - 1)]


def test_a_failure_after_a_steady_time_is_the_first_of_a_row(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEADY", 0)
    with Service("It", ["true"], said.append) as service:
        _restart(service, FAILURES + 1)
    assert set(said) == {"It ended with exit code 0; it starts again in 1 s"}


def test_what_is_alive_is_left_alone(said: list[str]) -> None:
    with Service("It", ["sleep", "64"], said.append) as service:
        started = service.started
        service.keep_running()
        assert (service.started, said) == (started, [])


def test_a_sigkill_of_the_leash_leaves_nothing_behind(
    said: list[str], tmp_path: Path, running: Callable[[], list[psutil.Process]]
) -> None:
    with Service("It", ["sleep", "65"], said.append, cwd=tmp_path) as service:
        while not (sleeping := [process for process in running() if process.name() == "sleep"]):
            time.sleep(0.02)
        service.look()
        sleeping[0].parent().kill()
        _restart(service, 1)
        assert not sleeping[0].is_running()
        assert service.look() is None
    assert not running()
