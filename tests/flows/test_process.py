"""One stage as a process: how it ended, what it said meanwhile, and that it ends with its starter."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from breedline.errors import BreedlineError
from flows.policy import Policy
from flows.process import LINES_KEPT, Ended, Processes

Make = Callable[[str], Path]


@pytest.fixture
def stage(make_repository: Callable[..., Any]) -> Make:
    """A function that makes a repository of one stage `a`, given what its script does."""

    def make(script: str) -> Path:
        return make_repository(
            "stages: {a: {cmd: sh script, deps: [in, script], outs: [out]}}", {"script": script}
        ).root

    return make


def _run(root: Path, say: Callable[[str], object] = print, force: bool = False, **policy: Any) -> Ended:
    with Processes() as processes:
        return processes.run(root, "a", Policy(**policy), say, force)


@pytest.mark.slow
def test_a_stage_is_completed_then_up_to_date_then_restored_and_runs_when_forced(stage: Make) -> None:
    root = stage("echo x > out")
    states = [_run(root), _run(root)]
    (root / "out").unlink()
    states += [_run(root), _run(root, force=True)]
    assert [ended.state for ended in states] == ["Completed", "UpToDate", "Restored", "Completed"]
    assert {ended.code for ended in states} == {0}
    assert (root / "out").read_text() == "x\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("echo one; echo two >&2; exit 75", 75, ["one", "two"]),
        ("echo one; kill -9 $$", 137, ["one"]),
        ("exit 1", 1, []),
        (f"seq {LINES_KEPT + 5}; exit 1", 1, [str(number) for number in range(6, LINES_KEPT + 6)]),
        ("echo no output", 255, ["no output", "ERROR: failed to reproduce 'a': output 'out' does not exist"]),
    ],
    ids=["exit code", "signal", "silent", "long", "by dvc itself"],
)
def test_a_failed_stage_has_its_exit_code_and_its_last_words(
    stage: Make, script: str, code: int, said: list[str]
) -> None:
    ended = _run(stage(script))
    own = [line for line in ended.said if line != "Killed"]  # a shell's word, where dvc's shell is one that stays
    assert (ended.state, ended.code, own) == ("Failed", code, said)


@pytest.mark.slow
def test_a_stage_past_its_timeout_is_ended(stage: Make, running: Callable[[], list[psutil.Process]]) -> None:
    ended = _run(stage("echo started; sleep 60; echo x > out"), timeout=4)
    assert (ended.state, ended.code) == ("Failed", 124)
    assert ended.said[-1] == "it was ended after 4 s (meta.prefect.timeout)"
    assert not running()


@pytest.mark.slow
def test_lines_come_while_the_stage_runs_without_colours_and_redrawn_bars(stage: Make) -> None:
    script = r"""
    printf '\033[31mred\033[0m\n'
    for i in 1 2 3 4 5 6 7 8 9; do printf "$i%%\r"; done; printf '100%%\n\n'
    sleep 2; echo x > out; echo last
    """
    said: dict[str, float] = {}
    _run(stage(script), lambda line: said.setdefault(line, time.monotonic()))
    mine = [line for line in said if line in ("red", "100%", "last") or line.endswith("%")]
    assert mine == ["red", "100%", "last"]
    assert said["last"] - said["red"] > 1.5


@pytest.mark.slow
def test_after_the_end_nothing_runs_and_nothing_starts(
    stage: Make, running: Callable[[], list[psutil.Process]]
) -> None:
    root = stage("trap '' TERM; echo started; sleep 60; sleep 60")  # deaf to SIGTERM
    started, ended = threading.Event(), []
    with Processes() as processes:
        run = threading.Thread(
            target=lambda: ended.append(
                processes.run(root, "a", Policy(), lambda line: line == "started" and started.set())
            )
        )
        run.start()
        assert started.wait(20)
        assert running()
    run.join(20)
    assert ended[0].state == "Failed"
    assert not running()
    with pytest.raises(BreedlineError, match="no further stage starts"):
        processes.run(root, "a", Policy(), print)


@pytest.mark.slow
def test_a_dvc_that_is_killed_alone_leaves_no_stage_behind(
    stage: Make, running: Callable[[], list[psutil.Process]]
) -> None:
    def kill_dvc(line: str) -> None:
        if line == "started":
            os.kill(
                next(
                    found.pid
                    for found in running()
                    if "repro" in found.cmdline() and "leash.py" not in str(found.cmdline())
                ),
                signal.SIGKILL,
            )

    ended = _run(stage("echo started; sleep 60"), kill_dvc)
    assert (ended.state, ended.code) == ("Failed", 137)
    assert not running()
