"""What every test has: a working folder and a cache of its own, small pictures, and the default settings to vary.

How the tests are quick. Files of tests run at the same time, in one process more than there are cores: some tests wait
for a server, a schedule or a kill, and those start first. Each process computes with one thread. Trainings are of a tiny
network (`ARCH` in tests/stages/conftest.py), and those with the settings of the fixture `trained` share one. Stages that
run as processes of their own are forked from a server that has imported torch and fastai already
(tests/preloaded.py); only where a test is about the start, or about the death of dvc, is it a new process. Campaigns of
hundreds of kills and edits are marked `long`: `make test` does a few of each, `make test-long` all.
"""

import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings
from PIL import Image

from breedline.params import Params, load_params
from tests.project import Project, fresh_project

ROOT = Path(__file__).parents[1]
PRELOADED = Path(__file__).with_name("preloaded.py")
# a shell starts what it puts in the background deaf to Ctrl-C, which the programs that tests start would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["DO_NOT_TRACK"] = os.environ["DVC_NO_ANALYTICS"] = "1"
# equal numbers on every machine; and no threads that wait for each other, as trainings run side by side
os.environ["OMP_NUM_THREADS"] = "1"
# without bytecode, as containers are often set up, each process compiles torch, Prefect and DVC anew for 9 s
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(Path(sys.prefix) / "bytecode")
# so all is computed on the CPU, but for `make test-gpu`
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPU", "")
# `make test-long` sets it: a test marked `long` asks the fixture of that name, a property-based one does as many examples
LONG = "BREEDLINE_TEST_LONG" in os.environ
settings.register_profile("breedline", deadline=None, max_examples=500 if LONG else 20)
settings.load_profile("breedline")


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: while a test waits for a server, a kill or a schedule, another computes."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that no process works alone at the end; but what runs flows comes last.

    For Prefect's threads stay in the process that runs a flow, and draw from the `random` that training is seeded with.
    Projects that are served take longest, and run in processes of their own.
    """
    if "TEST_GPU" in os.environ:
        import torch  # not for those who test without it

        if not torch.cuda.is_available():
            raise pytest.UsageError("there is no CUDA GPU to test on: leave TEST_GPU unset")
    else:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="`make test-gpu` runs it where there is a CUDA GPU"))

    def files(fixture: str) -> set[Path]:
        return {item.path for item in items if fixture in getattr(item, "fixturenames", ())}

    served, flows = files("served"), files("prefect_server")

    def rank(item: pytest.Item) -> tuple[bool, ...]:
        folders = item.path.parts
        return item.path not in served, "flows" in folders, item.path not in flows, "breedline" in folders

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a test lands in the repository or in the user's cache."""
    monkeypatch.setenv("BREEDLINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with a `python` whose stages start at once (tests/preloaded.py), of one server for all workers of pytest."""
    folder, owner = tmp_path_factory.getbasetemp(), os.getpid()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder, owner = folder.parent, os.getppid()
    folder /= "preloaded"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, (folder / "log").open("wb") as log:
                listener.bind(str(folder / "socket"))
                listener.listen()
                command = [sys.executable, "-P", str(PRELOADED), "serve", str(listener.fileno()), str(owner)]
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                subprocess.run(command, cwd=folder, pass_fds=[listener.fileno()], check=True, **streams)
            python = folder / "python"
            python.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {PRELOADED} ask {folder / "socket"} "$@"\n')
            python.chmod(0o755)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in git, of which nothing has run yet."""
    return fresh_project(tmp_path_factory.mktemp("pipeline") / "project")


@pytest.fixture(scope="session")
def ran(fresh: Project, tmp_path_factory: pytest.TempPathFactory, preloaded: str) -> tuple[Project, list[str]]:
    """The project after `dvc repro`, committed; and the stages that ran."""
    project = fresh.copy(tmp_path_factory.mktemp("ran") / "project", PATH=preloaded)
    stages, _ = project.repro()
    project.commit()
    return project, stages


@pytest.fixture
def long() -> bool:
    """Whether this is `make test-long`, in which a test marked `long` does all of its campaign rather than a short form."""
    return LONG


@pytest.fixture
def defaults() -> Params:
    """The project's params.yaml; vary a section with `section.model_copy(update={…})`."""
    return load_params(ROOT / "params.yaml")


def picture(shade: int, size: tuple[int, int] = (48, 40), kind: str = "JPEG", **options: object) -> bytes:
    """A picture file of (width, height) pixels: noise around `shade`, different for each shade."""
    noise = np.random.default_rng(shade).integers(-20, 20, (size[1], size[0], 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(shade + noise, 0, 255).astype("uint8")).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., Path]:
    """A function that packs {name: bytes} into a tar; the mode says how it is compressed."""

    def make(files: dict[str, bytes], name: str = "data.tar", mode: str = "w") -> Path:
        path = tmp_path / name
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
            for member, content in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return make
