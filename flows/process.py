"""Running one stage as a process: `dvc repro --single-item`, its output streamed line by line, ended with this process."""

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self, cast

from rich.text import Text

from breedline.errors import BreedlineError
from flows.leash import leashed
from flows.policy import Policy
from flows.states import Outcome

SECONDS_BETWEEN_REDRAWN = 10.0
LINES_KEPT = 12
TIMED_OUT = 124

UNCHANGED = re.compile(r"(?:Stage )?'.*' didn't change, skipping")
RESTORED = re.compile(r"Stage '.*' is cached - skipping run, checking out outputs")
ADVICE = re.compile(
    r"To track the changes with git, run:|git add .*|To enable auto staging, run:|dvc config core\.autostage true"
    r"|Use `dvc push` to send your updates to remote storage\."
)
"""Hints that dvc prints after each stage for people at a terminal."""
EXITED = re.compile(r", exited with (-?\d+)$")


@dataclass(frozen=True)
class Ended:
    """How `dvc repro` of one stage ended."""

    state: Outcome
    """UP_TO_DATE, RESTORED, COMPLETED or FAILED."""
    code: int
    """The exit code: of the stage if it ran, else of dvc; 124 after a timeout, 128 + n after signal n."""
    said: list[str]
    """The last lines that the stage printed, without dvc's message about its failure."""


class RunEnded(BreedlineError):
    """A stage was to start after the end of its run."""


class Processes:
    """Runs stages inside a `with` block; leaving the block, even by an exception, ends those still running."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self.open = True
        """Whether a stage may still start."""
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.open, running = False, list(self._running)
        for process in running:
            self._end(process)

    def run(self, root: Path, stage: str, policy: Policy, say: Callable[[str], object], force: bool = False) -> Ended:
        """Let dvc bring one stage up to date in the repository at `root`; `say` gets each line of output as it is printed.

        Raises:
            RunEnded: the `with` block has been left, so nothing may start any more.
        """
        options = ["--force"] if force else []
        state, exited = Outcome.COMPLETED, None
        said: deque[str] = deque(maxlen=LINES_KEPT)

        def read(line: str) -> None:
            nonlocal state, exited
            if ADVICE.fullmatch(line):
                return
            say(line)
            if found := EXITED.search(line):
                exited = int(found[1])
            elif UNCHANGED.fullmatch(line):
                state = Outcome.UP_TO_DATE
            elif RESTORED.fullmatch(line):
                state = Outcome.RESTORED
            elif line.startswith(("Running stage ", "> ")):
                said.clear()
            else:
                said.append(line)

        code = self.dvc(root, ["repro", "--single-item", *options, stage], read, policy.timeout)
        if code == 0:
            return Ended(state, 0, [])
        if code == TIMED_OUT:
            return Ended(
                Outcome.FAILED, code, [*said, f"it was ended after {policy.timeout:g} s (meta.prefect.timeout)"]
            )
        code = code if exited is None else exited
        return Ended(Outcome.FAILED, code if code >= 0 else 128 - code, list(said))

    def dvc(self, root: Path, arguments: list[str], say: Callable[[str], object], timeout: float | None = None) -> int:
        """Run `dvc --wait-for-lock ARGUMENTS` in `root`, and return its exit code: 124 if it timed out after `timeout` seconds."""
        process = self._start(["dvc", "--wait-for-lock", *arguments], root)
        late = threading.Timer(timeout or threading.TIMEOUT_MAX, self._end, [process])
        late.start()
        try:
            for line in _lines(cast(IO[bytes], process.stdout)):
                say(line)
        finally:
            in_time = not late.finished.is_set()
            late.cancel()
            self._end(process)
            code = process.wait()
        return code if in_time else TIMED_OUT

    def check_open(self) -> None:
        """Raise RunEnded if the `with` block has been left."""
        if not self.open:
            raise RunEnded("the run has ended, so no further stage starts")

    def _start(self, command: list[str], root: Path) -> subprocess.Popen[bytes]:
        here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # dvc, and the `python` of the stages
        with self._lock:
            self.check_open()
            process = leashed(
                command,
                cwd=root,
                env={**os.environ, "PATH": here, "PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self._running.add(process)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Ask the wrapper to end its command; a no-op once the process has exited."""
        with self._lock:
            self._running.discard(process)
        cast(IO[bytes], process.stdin).close()


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """The lines of the stream without colours, and no empty ones; a progress bar that is redrawn gives one now and then."""
    shown = time.monotonic()
    with io.TextIOWrapper(stream, "utf-8", "replace", newline="") as lines:
        for line in lines:
            if line.endswith("\r"):
                if time.monotonic() - shown < SECONDS_BETWEEN_REDRAWN:
                    continue
                shown = time.monotonic()
            if text := Text.from_ansi(line).plain.strip():
                yield text
