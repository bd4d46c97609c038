"""The processes that started this one: a stage ends with its dvc, and its workers end with the stage."""

import contextlib
import os
import signal
import sys
import threading
import time

import psutil

SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}
TERMINATED = 128 + signal.SIGTERM


def end_with_dvc() -> None:
    """Follow the dvc that started this process: a SIGKILL of it cannot be passed on, and the orphan would write on.

    A stage that was started by hand is a program like any other, and may outlive its terminal.
    """
    if "DVC_STAGE" not in os.environ:
        return
    starters = _starters()
    if not starters:
        print("error: the dvc that started this has ended", file=sys.stderr)
        sys.exit(TERMINATED)

    def watch() -> None:
        while all(map(_lives, starters)):
            time.sleep(0.5)
        end()

    threading.Thread(target=watch, daemon=True).start()


def _starters() -> list[psutil.Process]:
    """The dvc that started this process, and the shell in between where there is one; none if it has ended already.

    It is told from whoever adopts orphans by its process group: dvc starts a stage in its own.
    """
    starters = []
    process = psutil.Process().parent()
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        while process and os.getpgid(process.pid) == os.getpgrp():
            starters.append(process)
            if process.name() not in SHELLS:
                return starters
            process = process.parent()
    return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(*_: object) -> None:
    """End this process and its workers, at once; the next run removes what was temporary."""
    for worker in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.terminate()
    os._exit(TERMINATED)
