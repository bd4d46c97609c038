"""A folder in which a benchmark runs stages, each in a process of its own, as `dvc repro` does."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from breedline.tables import write_json

ROOT = Path(__file__).parents[1]


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
