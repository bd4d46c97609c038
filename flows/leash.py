"""A command that ends with whoever started it, however that one ends.

The command gets a process group of its own, so that nothing of it can stay behind. When standard input closes, by the
will of the one who holds its other end or by a SIGKILL of that one, the group is asked to end (SIGTERM), then made to.
Only the standard library, so that it starts in milliseconds.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL: a training may write down where it is."""


def leashed(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start `command` on a leash, which is the process returned: it ends when its `stdin` is closed, or we are gone.

    Args:
        options: as for `subprocess.Popen`.
    """
    leash = [sys.executable, "-S", "-E", __file__, *command]  # without site-packages, for speed
    return subprocess.Popen(leash, stdin=subprocess.PIPE, process_group=0, **options)


def main() -> int:
    """Run the command; its exit code is ours, 128 + n after signal n."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, process_group=0)
    threading.Thread(target=_end_with_starter, args=(command.pid,), daemon=True).start()
    code = command.wait()
    _end(command.pid)  # what it has left behind, as dvc does when it alone is killed
    return code if code >= 0 else 128 - code


def _end_with_starter(group: int) -> None:
    os.read(0, 1)  # returns when the other end is closed, for nobody writes
    _end(group)


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # as soon as nobody is left in it
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
