"""The pipeline as DVC runs it: the project's own files in a git repository of their own, on a few tiny pictures."""

import contextlib
import csv
import http.server
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from moto.server import ThreadedMotoServer
from ruamel.yaml import YAML

from tests.project import COLOURS, PICTURES_PER_CLASS, STAGES, Project, hashes, pictures

pytestmark = pytest.mark.slow


@pytest.fixture
def project(ran: tuple[Project, list[str]], tmp_path: Path, preloaded: str) -> Project:
    """A copy of the finished project, to work on."""
    return ran[0].copy(tmp_path / "project", PATH=preloaded)


def test_repro_runs_every_stage_once(ran: tuple[Project, list[str]]) -> None:
    finished, stages = ran
    assert stages == STAGES
    assert finished.repro()[0] == []
    assert finished.run("git", "status", "--porcelain") == ""


def test_metrics_and_plots_are_shown(project: Project) -> None:
    metrics = project.json("dvc", "metrics", "show", "--json")[""]["data"]
    assert metrics["metrics/label.json"]["data"]["images"] == len(COLOURS) * PICTURES_PER_CLASS
    assert {"test", "valid"} <= set(metrics["metrics/evaluate.json"]["data"])
    declared = YAML(typ="safe").load(project.folder / "dvc.yaml")["plots"]
    shown = project.json("dvc", "plots", "show", "--json")
    assert set(shown["data"]) == {name for plot in declared for name in ([plot] if isinstance(plot, str) else plot)}
    assert "errors" not in shown
    project.run("dvc", "plots", "show", "--out", "plots")
    assert "confusion" in (project.folder / "plots/index.html").read_text("utf-8")


def test_an_experiment_runs_what_its_setting_concerns(project: Project) -> None:
    said = project.run("dvc", "exp", "run", "--set-param", "evaluate.top_k=2")
    assert re.findall(r"^Running stage '(\w+)'", said, re.M) == ["evaluate", "report", "bundle"]
    (changed,) = project.json("dvc", "params", "diff", "--json")["params.yaml"].items()
    assert changed == ("evaluate.top_k", {"old": 3, "new": 2, "diff": -1})
    metrics = project.json("dvc", "metrics", "diff", "--json")["metrics/evaluate.json"]
    assert {"test.top_2_accuracy", "test.top_3_accuracy"} <= set(metrics)


def test_another_architecture_fetches_weights_and_no_images(project: Project) -> None:
    project.set("train", arch="resnet34")
    assert set(project.json("dvc", "status", "--json")) == {"weights", "suspects", "train", "report"}


def _rows(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text("utf-8").splitlines()))


def test_a_correction_reruns_label_and_what_depends_on_it(project: Project) -> None:
    labels = project.folder / "data/labels.csv"
    first = _rows(labels)[0]
    with (project.folder / "data/corrections.csv").open("a") as corrections:
        corrections.write(f"{first['name']},{first['sha256']},drop,,blurred\n")
    assert set(project.json("dvc", "status", "--json")) == {"label"}
    assert project.repro("presize")[0] == ["label", "presize"]
    assert first["name"] not in [row["name"] for row in _rows(labels)]
    assert set(project.json("dvc", "status", "--json")) == {"suspects", "train", "evaluate", "report", "bundle"}


def test_a_failed_stage_changes_no_record_and_checkout_brings_its_outputs_back(project: Project) -> None:
    lock, raw = project.lock(), hashes(project.folder / "data/raw")
    (source,) = YAML(typ="safe").load(project.folder / "params.yaml")["download"]["sources"]
    project.set("download", sources=[{"url": source, "sha256": "0" * 64}])
    stages, said = project.repro(fails=True)
    assert stages == ["download"]
    assert len(re.findall(r"^error: download: .* has sha256", said, re.M)) == 1
    assert "Traceback" not in said
    assert project.lock() == lock
    project.run("dvc", "checkout")
    assert hashes(project.folder / "data/raw") == raw
    project.run("git", "checkout", "params.yaml")
    assert project.repro("bundle")[0] == []


def test_a_training_that_dvc_was_killed_before_recording_is_not_repeated(project: Project) -> None:
    project.set("train", seed=7)
    recorded = YAML(typ="safe").load(project.lock())["stages"]["train"]
    project.run(*shlex.split(recorded["cmd"]))
    stages, said = project.repro("evaluate")
    assert stages == ["train", "evaluate"]
    assert "train: resuming after epoch 1 of 1" in said
    assert not any(Path(project.environment["BREEDLINE_CACHE"], "checkpoints").iterdir())


class Server(http.server.ThreadingHTTPServer):
    """Serves the pictures, but keeps their second half back until `go`, or 20 s."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.go = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/pictures.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content = pictures()
        half = len(content) // 2
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:half])
        self.server.asked.set()
        self.server.go.wait(20)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[half:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.go.set()
        server.shutdown()


def _until(true: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def _stages_below(dvc: int) -> list[psutil.Process]:
    return [process for process in psutil.Process(dvc).children(recursive=True) if _is_stage(process)]


def _is_stage(process: psutil.Process) -> bool:
    try:
        return "stages.download" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def _gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("shell", "at_work"), [("/bin/sh", True), ("/bin/bash", True), ("/bin/sh", False), ("/bin/bash", False)]
)
def test_a_killed_dvc_leaves_nothing_behind_but_a_repro_to_repeat(
    ran: tuple[Project, list[str]], tmp_path: Path, server: Server, shell: str, at_work: bool
) -> None:
    project = ran[0].copy(tmp_path / "project", SHELL=shell)
    project.set("download", sources=[server.url])
    lock, outs = project.lock(), project.outs("download")
    command = ["dvc", "repro", "download"]
    with subprocess.Popen(command, cwd=project.folder, env=project.environment, stdout=subprocess.DEVNULL) as dvc:
        _until(lambda: _stages_below(dvc.pid), 60)
        assert not at_work or server.asked.wait(60)
        stages = _stages_below(dvc.pid)
        dvc.kill()
    _until(lambda: all(map(_gone, stages)), 3 if at_work else 20)  # imports come first
    assert server.asked.is_set() == at_work
    assert project.lock() == lock
    server.go.set()
    assert project.repro("download")[0] == ["download"]
    assert project.outs("download") == outs
    assert list((project.folder / "data").rglob(".*.partial")) == []


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server with a bucket named `bucket`."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    httpx.put(f"http://{host}:{port}/bucket", timeout=30).raise_for_status()
    yield f"http://{host}:{port}"
    server.stop()


def test_a_clone_pulls_from_s3_what_was_pushed(ran: tuple[Project, list[str]], tmp_path: Path, s3: str) -> None:
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    project = ran[0].copy(tmp_path / "project", **credentials)
    project.run("dvc", "remote", "add", "--default", "store", "s3://bucket/breedline")
    project.run("dvc", "remote", "modify", "store", "endpointurl", s3)
    project.commit()
    project.run("dvc", "push")
    project.run("git", "clone", "--quiet", str(project.folder), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone", **credentials)
    clone.run("dvc", "pull")
    for path in ("data", "models", "metrics", "reports"):
        assert hashes(clone.folder / path) == hashes(project.folder / path)
    assert clone.repro()[0] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_repeats_bit_for_bit(ran: tuple[Project, list[str]], tmp_path: Path, stage: str) -> None:
    project = ran[0].copy(tmp_path / "project")  # its `python` starts anew, with hashes of another seed
    recorded = YAML(typ="safe").load(project.lock())["stages"][stage]
    outs = [project.folder / out["path"] for out in recorded["outs"]]
    before = [hashes(path) for path in outs]
    for path in outs:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    project.run(*shlex.split(recorded["cmd"]))
    assert [hashes(path) for path in outs] == before
