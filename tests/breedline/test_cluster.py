"""Presizing and features on a cluster: a real Dask scheduler and workers, as processes of their own."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import distributed
import joblib
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

import breedline.cluster
import breedline.features
import breedline.presized
from breedline.checkpoints import Checkpoints
from breedline.cluster import cluster, each
from breedline.errors import BreedlineError
from breedline.features import Extractor
from breedline.files import fingerprint, sha256_of
from breedline.params import Presize
from breedline.presized import Presizer
from breedline.probe import compute_features
from breedline.shards import COLUMNS, pack, write_index
from breedline.tables import write_csv
from breedline.training import Training
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
        if workers:
            with distributed.Client(found) as client:  # with one thread in all, joblib would work here
                client.wait_for_workers(workers, timeout=120)
        return started_workers

    yield start
    for process in reversed(started):
        for one in [*process.children(recursive=True), process]:
            one.kill()
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
    text = (ROOT / "params.yaml").read_text().replace("shorter_side: 32", "shorter_side: 24")
    Path("params.yaml").write_text(text.replace("quality: 92", "quality: 90"))
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
    assert contents("there") == here


@pytest.mark.slow
def test_a_worker_with_another_cache_is_told(raw: pd.DataFrame, dask: Start, tmp_path: Path) -> None:
    dask(workers=2, BREEDLINE_CACHE=str(tmp_path / "elsewhere"))
    with pytest.raises(BreedlineError, match=r"elsewhere.* give all machines the same environment and the same"):
        presize(PARAMS, Path("raw"), Path("labels.csv"), presized=Path("there"))
    assert not Path("there").exists()


class Lost(Exception):
    pass


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], Callable[[int], int]]:
    """A cluster that is this process; what it was given to do, and a function that loses the worker as often as its number says."""
    given: list[int] = []

    @contextmanager
    def here() -> Iterator[tuple[type[Exception], ...]]:
        yield (Lost,)

    def work(times: int) -> int:
        given.append(times)
        if given.count(times) <= times:
            raise Lost
        return times

    def in_order(**_: object) -> Callable[[Iterable[Any]], Iterator[int]]:
        return lambda tasks: (function(*arguments) for function, arguments, _ in tasks)

    monkeypatch.setattr(breedline.cluster, "cluster", here)
    monkeypatch.setattr(breedline.cluster, "Parallel", in_order)
    return given, work


def test_what_a_lost_worker_was_doing_is_done_again(losing: tuple[list[int], Callable[[int], int]]) -> None:
    given, work = losing
    assert list(each(work, [0, 2, 1], "presize")) == [0, 2, 1]
    assert given == [0, 2, 2, 2, 1, 1]


def test_a_cluster_that_only_loses_workers_is_given_up(losing: tuple[list[int], Callable[[int], int]]) -> None:
    given, work = losing
    with pytest.raises(Lost):
        list(each(work, [1, 9], "presize"))
    assert given == [1, 1, 9, 9, 9, 9]


@pytest.mark.slow
def test_a_cluster_computes_the_same_features_and_this_machine_none(
    training: Callable[..., Training], dask: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = training()
    model, (items, _) = one.model()[0].eval(), one.split("train")
    monkeypatch.setattr(breedline.features, "CHUNK", 8)
    here = compute_features(replace(one, checkpoints=Checkpoints({"computed": "here"})), model, items, 10)
    dask(workers=2)
    monkeypatch.setattr(Extractor, "_features", lambda *_: pytest.fail("computed here"))
    there = compute_features(one, model, items, 10)
    assert torch.allclose(there, here, atol=1e-5)


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


@pytest.mark.slow
def test_a_cluster_without_workers_is_told(dask: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    dask(workers=0)
    monkeypatch.setattr("breedline.cluster.SECONDS", 5)
    with pytest.raises(BreedlineError, match="which has no workers: start some"):
        list(each(abs, [-1, -2], "presize"))


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
