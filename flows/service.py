"""A program that is kept running: restarted whenever it exits, with exponential back-off and a limit on failures."""

import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Self

import httpx
import psutil

from breedline.errors import BreedlineError
from flows.leash import leashed

FAILURES = 5
"""Exits in a row after which the program is not restarted any more."""
SERVER_START = 120.0
"""Seconds that a server may take to answer for the first time; on a slow disk it makes its database meanwhile."""
STEADY = 60.0
"""A program that ran for this many seconds has recovered: its next exit is the first of a row."""


class Service:
    """A program that runs inside the `with` block. Leaving the block ends it, along with all it has started."""

    def __init__(self, name: str, command: list[str], say: Callable[[str], object], **options: Any) -> None:
        """`say` is given a line for each restart; `options` are those of `subprocess.Popen`."""
        self._name, self._command, self._say, self._options = name, command, say, options
        self._failures = 0

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.look()
        self._end()

    def _start(self) -> None:
        self.started, self._began = datetime.now(UTC), time.monotonic()
        self._descendants: set[psutil.Process] = set()
        self._process = leashed(self._command, **self._options)

    def look(self) -> int | None:
        """The program's exit code; None while it runs."""
        if (code := self._process.poll()) is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._descendants |= set(psutil.Process(self._process.pid).children(recursive=True))
        self._descendants = {process for process in self._descendants if process.is_running()}
        return code

    def keep_running(self) -> None:
        """Restart the program if it has exited, after a pause that doubles with each exit in a row.

        Raises:
            BreedlineError: it has ended too many times in a row.
        """
        if (code := self.look()) is None:
            return
        self._end()
        steady = time.monotonic() - self._began > STEADY
        self._failures = 1 if steady else self._failures + 1
        if self._failures == FAILURES:
            raise BreedlineError(f"{self._name} ended {FAILURES} times in a row, at last with exit code {code}")
        pause = 2.0 ** (self._failures - 1)
        self._say(f"{self._name} ended with exit code {code}; it starts again in {pause:g} s")
        _pause(pause)
        self._start()

    def _end(self) -> None:
        """End the program; and what it has started, which a SIGKILL of its leash leaves behind."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        for process in self._descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for survivor in psutil.wait_procs(self._descendants, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()


def answers(url: str) -> bool:
    """Whether there is a Prefect server at the url of an API."""
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def _pause(seconds: float) -> None:
    time.sleep(seconds)
