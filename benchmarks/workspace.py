"""A folder in which a benchmark runs stages, each in a process of its own, as `dvc repro` does."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import psutil

from breedline.tables import write_json

ROOT = Path(__file__).parents[1]
LOOK_EVERY = 0.05
"""Seconds between two looks at the memory of a process."""


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    """Imports and all."""
    cpu: float
    """Seconds of the processor, of it and its children, which other work on the machine changes little."""
    megabytes: float
    """The most resident memory that it and its children had together."""
    said: str


def write_params(folder: Path, sections: dict[str, Any]) -> None:
    """Write params.yaml into the folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(sections, folder / "params.yaml")  # JSON is YAML, too


def stage(name: str, *options: str) -> list[str]:
    """The command of a stage."""
    return [sys.executable, "-m", f"stages.{name}", *options]


def environment(folder: Path, code: Path = ROOT) -> dict[str, str]:
    """Variables with which the stages of the checkout `code` run, with caches of their own in `folder`."""
    caches = {"BREEDLINE_CACHE": folder / "cache", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    return os.environ | {"PYTHONPATH": str(code), **{name: str(path) for name, path in caches.items()}}


def keep_bytecode(folder: Path) -> None:
    """Have the processes that follow keep what they compile in `folder`: a user's imports compile nothing, either."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)


def seconds_of(command: list[str], folder: Path, code: Path = ROOT) -> float:
    """Run the command in the folder, imports and all; if it fails, this process ends with what the command said."""
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment(folder, code), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(done.stdout)
    return time.perf_counter() - began


def cost_of(command: list[str], folder: Path, variables: dict[str, str]) -> Cost:
    """Run the command in the folder and watch it; if it fails, this process ends with what the command said."""
    began, before, peak = time.perf_counter(), _cpu_of_children(), 0
    with (
        TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        psutil.Popen(command, cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        ended = None
        while ended is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends when it likes
                tree = [process, *process.children(recursive=True)]
                peak = max(peak, sum(each.memory_info().rss for each in tree))
            with contextlib.suppress(psutil.TimeoutExpired):
                ended = process.wait(LOOK_EVERY)
        seconds = time.perf_counter() - began
        log.seek(0)
        said = log.read()
    if ended:
        sys.exit(said)
    return Cost(seconds, _cpu_of_children() - before, peak / 1e6, said)


def _cpu_of_children() -> float:
    """Seconds of the processor that all ended children had."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
