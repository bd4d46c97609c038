"""Tie processes together: a stage ends when the dvc that started it does, and its workers end with the stage."""

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
    """End this process as soon as the dvc that started it has ended: after a SIGKILL of dvc the orphan would go on writing.

    No-op for a stage that was started by hand, which may outlive its terminal.
    """
    if "DVC_STAGE" not in os.environ:
        return
    starters = _starters()
    if not starters:
        print("error: the dvc that started this has ended", file=sys.stderr)
        sys.exit(TERMINATED)

    def watch() -> None:
        while all(map(_is_alive, starters)):
            time.sleep(0.5)
        end()

    threading.Thread(target=watch, daemon=True).start()


def _starters() -> list[psutil.Process]:
    """The dvc that started this process and any shell in between; empty if dvc has ended already.

    Their process group tells them from the process that adopts orphans: dvc starts a stage in its own group.
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


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(*_: object) -> None:
    """End this process and its workers at once, also as a signal handler; the next run removes temporary files."""
    for worker in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.terminate()
    os._exit(TERMINATED)
