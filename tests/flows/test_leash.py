"""A leash ends what it holds, however its starter ended."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import leash

ROOT = Path(__file__).parents[2]


def _leashed(command: str, folder: Path) -> subprocess.Popen[bytes]:
    return leash.leashed(["sh", "-c", command], cwd=folder, stdout=subprocess.PIPE)


@pytest.mark.parametrize(("command", "code"), [("exit 0", 0), ("exit 75", 75), ("kill -9 $$", 137), ("kill $$", 143)])
def test_the_exit_code_of_the_command_is_passed_on(tmp_path: Path, command: str, code: int) -> None:
    with _leashed(command, tmp_path) as process:
        assert process.wait() == code


@pytest.mark.parametrize("end", ["close", "exit"])
def test_nothing_stays_behind(tmp_path: Path, running: Callable[[], list[psutil.Process]], end: str) -> None:
    with _leashed("sleep 61 & echo; " + ("sleep 62" if end == "close" else "exit 3"), tmp_path) as process:
        assert process.stdout
        assert process.stdin
        process.stdout.readline()
        if end == "close":
            process.stdin.close()
        assert process.wait(4) == (143 if end == "close" else 3)
    assert not running()


@pytest.mark.slow
def test_who_does_not_listen_is_killed_after_some_grace(
    tmp_path: Path, running: Callable[[], list[psutil.Process]]
) -> None:
    with _leashed("trap '' TERM; echo; while :; do sleep 1; done", tmp_path) as process:
        assert process.stdout
        assert process.stdin
        process.stdout.readline()
        started = time.monotonic()
        process.stdin.close()
        assert process.wait(10) == 137
    assert leash.GRACE <= time.monotonic() - started < leash.GRACE + 3
    assert not running()


@pytest.mark.slow
def test_a_starter_that_is_killed_takes_dvc_and_the_stage_with_it(
    make_repository: Callable[..., Any], running: Callable[[], list[psutil.Process]]
) -> None:
    repository = make_repository("stages: {a: {cmd: echo started; sleep 63}}")
    starter = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from flows.policy import Policy
from flows.process import Processes
with Processes() as processes:
    processes.run(Path(), "a", Policy(), lambda line: print(line, flush=True))
"""
    command = [sys.executable, "-c", starter]
    with subprocess.Popen(command, cwd=repository.root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert "started\n" in process.stdout
        assert len(running()) >= 4  # the starter, the leash, dvc, the stage
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running()
