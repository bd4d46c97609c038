"""A process that reads bad input within limits which the kernel keeps, and tells what became of it.

The sandbox of a kind of input (kinds.py) is a process of its own, which has imported what reads it and made the valid
files. It forks one worker after the other, and each worker reads some hundred examples:

- **Memory:** RLIMIT_DATA is MEGABYTES above what the worker has at its start; more is a MemoryError, which no reader may
  raise. What an example really takes is read from ru_maxrss.
- **Time:** the worker's ITIMER_PROF, which counts the CPU time of all its threads, is set anew for each example. Nothing
  handles its signal, so the kernel ends a worker that takes longer, wherever it is; and SIGALRM one that waits.
- **Files:** an example has an empty folder, in a folder with canaries, which have to be as they were, and alone, after it.
- **Words:** a refusal is a BreedlineError of one line, of at most LETTERS characters, none of which controls a terminal.
"""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaigns.damage import ABSOLUTE

MEGABYTES = 500
SECONDS_TO_WAIT = 60
LETTERS = 500
BATCH = 500
"""Examples that one worker reads."""
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
CANARY = b"nobody may touch this"


class Kind(NamedTuple):
    """A kind of input."""

    files: dict[str, bytes]
    """What is valid."""
    read: Callable[[Path], None]
    """Reads the files in a folder; it returns, or raises one of `refusals`."""
    seal: Callable[[Path], None] = lambda folder: None
    """Makes the hashes in the files right again, where they have any, so that damage is not refused for these alone."""
    seconds: float = 1
    """Of the CPU, at most, for one example."""
    refusals: tuple[type[Exception], ...] = ()
    lines: int = 1
    """At most, of a refusal."""
    reserved: int = 0
    """Megabytes that a library only reserves, by which RLIMIT_DATA is larger."""


class Answer(NamedTuple):
    """What became of an example."""

    outcome: str
    """accepted, refused, or what it must not be."""
    said: str = ""
    seconds: float = 0
    megabytes: float = 0
    """Above the start, at most, of all that the worker has read so far."""


class Sandbox:
    """The process of a kind, by the name of a function of kinds.py."""

    def __init__(self, kind: str, folder: Path) -> None:
        here, there = multiprocessing.Pipe()
        self._connection = here
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(kind, folder, there), daemon=True
        )
        self._process.start()
        there.close()
        self.names: list[str] = here.recv()

    def read(self, *example: Any) -> Answer:
        """What becomes of the files that kinds.py makes of `example`."""
        self._connection.send(example)
        answer: Answer = self._connection.recv()
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.kill()


def _serve(name: str, folder: Path, connection: Connection) -> None:
    from tests.campaigns import kinds

    folder.mkdir(parents=True)
    with (folder / "log").open("wb") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    os.environ |= {name: str(folder / name.lower()) for name in ("BREEDLINE_CACHE", "DVC_SITE_CACHE_DIR", "HOME")}
    (folder / "made").mkdir()
    os.chdir(folder / "made")
    kind, files_of = kinds.made(name)
    outside = folder / "outside"
    outside.mkdir()
    for canary in ("canary", "canary.csv", "passwd"):
        (outside / canary).write_bytes(CANARY)
    connection.send(list(kind.files))
    while True:
        if not (worker := os.fork()):
            _work(kind, files_of, outside, connection)
        _, status = os.waitpid(worker, 0)
        if os.WIFSIGNALED(status):
            ended = signal.Signals(os.WTERMSIG(status))
            why = {signal.SIGPROF: f"over {kind.seconds} s", signal.SIGALRM: f"waits for {SECONDS_TO_WAIT} s"}
            connection.send(Answer(why.get(ended, f"ended by {ended.name}")))
        elif os.WEXITSTATUS(status):
            return


def _work(kind: Kind, files_of: Callable[..., dict[str, bytes]], outside: Path, connection: Connection) -> None:
    """Read examples; the exit code is 0 after a batch, and 1 when nobody asks any more."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    data = int(re.findall(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + (MEGABYTES + kind.reserved) * 10**6,) * 2)
    start = _peak()
    try:
        for _ in range(BATCH):
            example = connection.recv()
            connection.send(_answer(kind, files_of(*example), example, outside, start))
    except (EOFError, OSError):
        os._exit(1)
    os._exit(0)


def _answer(kind: Kind, files: dict[str, bytes], example: tuple[Any, ...], outside: Path, start: float) -> Answer:
    folder = outside / "work"
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    os.chdir(folder)
    outcome, said = "accepted", ""
    signal.alarm(SECONDS_TO_WAIT)
    signal.setitimer(signal.ITIMER_PROF, kind.seconds)
    before = time.process_time()
    try:
        if example[-1] is True:
            kind.seal(folder)
        kind.read(folder)
    except kind.refusals as error:
        outcome, said = "refused", str(error)
    except BaseException:  # whatever escapes is what the campaign looks for
        outcome, said = "traceback", traceback.format_exc()
    seconds = time.process_time() - before
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    os.chdir("/")
    if outcome == "refused":
        lines = said.split("\n")
        if not said or len(lines) > kind.lines or any(map(CONTROLS.search, lines)):
            outcome = "not a plain line"
        elif max(len(line.strip()) for line in lines) > LETTERS:
            outcome = f"over {LETTERS} characters"
    found = {path.name: path.read_bytes() for path in outside.iterdir() if path != folder}
    if found != dict.fromkeys(("canary", "canary.csv", "passwd"), CANARY) or Path(ABSOLUTE).parent.exists():
        outcome = "touched what is outside"
    if (megabytes := _peak() - start) > MEGABYTES:
        outcome = f"over {MEGABYTES} MB"
    return Answer(outcome, said, seconds, megabytes)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
