"""A wrapper that ends a command together with the process that started it, even if that process gets a SIGKILL.

The command runs in a process group of its own, so that its children can be ended with it. The wrapper's standard input
is a pipe from the starter: when it closes, because the starter closed it or has died, the whole group gets SIGTERM and,
after a grace period, SIGKILL. The wrapper imports only the standard library, so that it starts in milliseconds.
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
"""Seconds between SIGTERM and SIGKILL."""


def leashed(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start `command` under the wrapper, and return the wrapper's process: closing its `stdin`, or our death, ends both.

    Args:
        options: as for `subprocess.Popen`.
    """
    leash = [sys.executable, "-S", "-E", __file__, *command]  # without site-packages, for speed
    return subprocess.Popen(leash, stdin=subprocess.PIPE, process_group=0, **options)


def main() -> int:
    """Run the command, and return its exit code: 128 + n after signal n."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, process_group=0)
    threading.Thread(target=_end_with_starter, args=(command.pid,), daemon=True).start()
    code = command.wait()
    _end(command.pid)  # a dvc that gets a SIGKILL leaves the stage it runs behind
    return code if code >= 0 else 128 - code


def _end_with_starter(group: int) -> None:
    os.read(0, 1)  # nothing is ever written, so this returns only when the other end is closed
    _end(group)


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # raised as soon as the group is empty
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
