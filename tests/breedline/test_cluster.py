"""Presizing on a cluster: a real Dask scheduler and workers, as processes of their own."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import distributed
import joblib
import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

import breedline.presized
from breedline.cluster import cluster
from breedline.errors import BreedlineError
from breedline.files import fingerprint, sha256_of
from breedline.params import Presize
from breedline.presized import Presizer
from breedline.shards import COLUMNS, pack, write_index
from breedline.tables import write_csv
from stages.presize import presize

ROOT = Path(__file__).parents[2]
PARAMS = Presize(shorter_side=24, quality=90)
Start = Callable[..., list[psutil.Popen]]


@pytest.fixture
def raw() -> pd.DataFrame:
    """A raw set of many small volumes in `raw`, and the table of its labels; its index."""
    pictures = np.random.default_rng(0).integers(0, 255, (40, 40, 50, 3), dtype="uint8")

    def files() -> Iterator[tuple[str, int, io.BytesIO]]:
        for number, picture in enumerate(pictures):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            yield f"{number}.png", buffer.tell(), io.BytesIO(buffer.getvalue())

    Path("raw").mkdir()
    index = pd.DataFrame(list(pack(files(), Path("raw"), "00", volume_bytes=30_000)), columns=COLUMNS)
    write_index(index, Path("raw"))
    write_csv(index[["name", "sha256"]], Path("labels.csv"))
    return index


@pytest.fixture
def dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A function that starts a scheduler, which BREEDLINE_BACKEND then names, and workers; they see the test's cache."""
    started: list[psutil.Popen] = []

    def run(what: str, *options: str, **environment: str) -> psutil.Popen:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--no-dashboard", *options]
        variables = {"PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "100", **environment}
        with (tmp_path / f"{what}{len(started)}.log").open("w") as log:
            started.append(psutil.Popen(command, cwd=tmp_path, env=os.environ | variables, stdout=log, stderr=log))
        return started[-1]

    def start(workers: int, **environment: str) -> list[psutil.Popen]:
        address = tmp_path / "scheduler.json"
        run("scheduler", "--host=127.0.0.1", "--port=0", f"--scheduler-file={address}")
        while not address.exists() or not address.read_text():
            time.sleep(0.1)
        found = json.loads(address.read_text())["address"]
        monkeypatch.setenv("BREEDLINE_BACKEND", found.replace("tcp://", "dask://"))
        options = (found, "--host=127.0.0.1", "--nthreads=1", "--memory-limit=0")
        started_workers = [run("worker", *options, **environment) for _ in range(workers)]
        with distributed.Client(found) as client:  # with one thread in all, joblib would work here
            client.wait_for_workers(workers, timeout=120)
        return started_workers

    yield start
    for process in reversed(started):
        for each in [*process.children(recursive=True), process]:
            each.kill()
        process.wait()


def contents(folder: str) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in Path(folder).iterdir()}


@pytest.fixture
def here(raw: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What this machine alone makes of the raw set, with a cache of its own."""
    with monkeypatch.context() as patch:
        patch.setenv("BREEDLINE_CACHE", str(tmp_path / "cache of this machine"))
        presize(PARAMS, Path("raw"), Path("labels.csv"), presized=Path("here"))
    return contents("here")


@pytest.mark.slow
def test_a_cluster_makes_the_same_bytes_and_this_machine_decodes_nothing(
    here: dict[str, str], dask: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dask(workers=2)
    caplog.set_level("INFO", "breedline")
    monkeypatch.setattr(breedline.presized, "presize_image", lambda *_: pytest.fail("decoded here"))
    for cached in (0, 40):
        presize(PARAMS, Path("raw"), Path("labels.csv"), presized=Path("there"))
        assert contents("there") == here
        assert caplog.messages[-1] == f"presize: 40 images: 40 resized, 0 rejected; {cached} of them from the cache"


@pytest.mark.slow
def test_workers_that_are_killed_cost_no_byte(here: dict[str, str], dask: Start, tmp_path: Path) -> None:
    workers = dask(workers=2)
    command = [sys.executable, "-m", "stages.presize", "--raw=raw", "--labels=labels.csv", "--presized=there"]
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text().replace("shorter_side: 32", "shorter_side: 24"))
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as run:
        killed = 0
        cached = tmp_path / "cache" / "presize"
        while run.poll() is None:
            if len(list(cached.glob("*/*.csv"))) > 2 * killed and killed < 2:
                for worker in workers[killed % 2].children():  # a nanny starts it anew
                    worker.send_signal(signal.SIGKILL)
                killed += 1
            time.sleep(0.01)
    assert run.returncode == 0
    assert killed
    assert contents("there").keys() == here.keys()


@pytest.mark.slow
def test_a_worker_with_another_cache_is_told(raw: pd.DataFrame, dask: Start, tmp_path: Path) -> None:
    dask(workers=2, BREEDLINE_CACHE=str(tmp_path / "elsewhere"))
    with pytest.raises(BreedlineError, match=r"elsewhere.* give all machines the same environment and the same"):
        presize(PARAMS, Path("raw"), Path("labels.csv"), presized=Path("there"))
    assert not Path("there").exists()


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("dask://127.0.0.1:1", r"BREEDLINE_BACKEND is dask://127\.0\.0\.1:1, where no Dask scheduler answers"),
        ("dask://nowhere", r"where no Dask scheduler answers"),
        ("ray://127.0.0.1:1", r"asks for ray, which is not installed: install breedline\[ray\]"),
        ("spark://host", r"is spark://host: make it dask://HOST:PORT, ray://HOST:PORT or ray://auto"),
    ],
)
def test_a_cluster_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, address: str, told: str) -> None:
    monkeypatch.setenv("BREEDLINE_BACKEND", address)
    monkeypatch.setattr("breedline.cluster.SECONDS", 1)
    with pytest.raises(BreedlineError, match=told), cluster():
        pass


def test_without_a_cluster_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BREEDLINE_BACKEND", raising=False)
    with cluster() as lost:
        assert lost == ()
        assert joblib.parallel.get_active_backend()[0].__class__.__name__ == "LokyBackend"


def test_what_a_killed_worker_was_making_is_removed_after_a_day(tmp_path: Path) -> None:
    presizer = Presizer(PARAMS, 1)
    old, new = (tmp_path / "cache" / "scratch" / name for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    before = fingerprint([new])
    presizer.prune()
    assert not old.exists()
    assert fingerprint([new]) == before
    assert new.exists()
