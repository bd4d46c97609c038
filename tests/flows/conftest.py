"""Small DVC repositories whose stages are a line of shell."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from dvc.repo import Repo
from moto.server import ThreadedMotoServer
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness
from s3fs import S3FileSystem

from flows.git_command import git
from flows.plan import Action, plan
from flows.publish import changed
from flows.remote import stored, upload
from flows.workspace import Workspace, override
from tests.flows.served import Served, serving
from tests.flows.tiny import images

ROOT = Path(__file__).parents[2]

DIAMOND = """
stages:
  a: {cmd: cat in params.yaml > a, deps: [in], params: [a], outs: [a]}
  b: {cmd: (cat a; date +%N) > b, deps: [a], outs: [b]}
  c: {cmd: wc -c < a > c, deps: [a], outs: [c]}
  d: {cmd: cat b c > d, deps: [b, c], outs: [d]}
"""
PARAMS = "a: {depth: 1, size: 1, colour: {hue: red}}\n"
SAID = re.compile(
    r"^(?:Running stage |Stage |Verifying .* in (?:frozen )?stage: )?'([^']+)'(?::?$| (is cached)| (didn't))", re.M
)


class Repository:
    """A DVC repository with `dvc.yaml` and other files."""

    def __init__(self, root: Path, dvc_yaml: str, files: dict[str, str], log: pytest.LogCaptureFixture) -> None:
        self._log = log
        self.root = root
        for name, content in {"dvc.yaml": dvc_yaml, "in": "1\n", "params.yaml": PARAMS, **files}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
        Repo.init(str(root), no_scm=True).close()

    def shell(self, command: str) -> str:
        """What the command prints."""
        done = subprocess.run(command, shell=True, cwd=self.root, text=True, capture_output=True)  # noqa: S602
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def repro(self) -> list[tuple[str, Action]]:
        """What `dvc repro` does, stage by stage."""
        self._log.clear()
        with contextlib.chdir(self.root), self._log.at_level("INFO", "dvc"), Repo() as repo:
            repo.reproduce()
        return self.done()

    def done(self) -> list[tuple[str, Action]]:
        """What the last `dvc repro` has done, stage by stage, though it may have failed in the end."""
        return [
            (stage, Action.RESTORE if cached else Action.UP_TO_DATE if same else Action.RUN)
            for stage, cached, same in SAID.findall("\n".join(self._log.messages))
        ]

    def content(self) -> dict[str, bytes]:
        """Every file that is not DVC's own."""
        files = [path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file()]
        return {str(path): (self.root / path).read_bytes() for path in files if path.parts[0] not in (".dvc", ".git")}


@pytest.fixture
def make_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[..., Repository]:
    """A function that makes a repository of a dvc.yaml, by default of a diamond a -> b, c -> d, and of {name: content}."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))

    def make(dvc_yaml: str | None = None, files: dict[str, str] | None = None, name: str = "repository") -> Repository:
        (tmp_path / name).mkdir()
        return Repository(tmp_path / name, dvc_yaml or DIAMOND, files or {}, caplog)

    return make


@pytest.fixture
def running(tmp_path: Path) -> Callable[[], list[psutil.Process]]:
    """A function that finds the processes which work in the folder of this test, other than the test."""

    def find() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["pid", "cwd", "status"]):
            here = process.info["cwd"] and Path(process.info["cwd"]).is_relative_to(tmp_path)
            if here and process.pid != psutil.Process().pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    return find


PUBLISHED = """
stages:
  download:
    cmd: echo download >> $RAN; mkdir raw && cp source.txt raw/a.txt && echo ${label.seed} > raw/b.txt
    deps: [source.txt]
    params: [label]
    outs: [raw]
  train:
    cmd: echo train >> $RAN; python train.py ${train.epochs}
    deps: [raw, train.py]
    params: [train]
    outs: [models, bundle]
    metrics:
      - metrics/evaluate.json: {cache: false}
artifacts:
  classifier: {path: bundle, type: model}
"""
TRAIN = f"""
import json, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.flows.tiny import train
epochs = int(sys.argv[1])
pathlib.Path("models").mkdir()
pathlib.Path("models/weights").write_text(pathlib.Path("raw/a.txt").read_text() * epochs)
pathlib.Path("models/bundle").write_text(f"{{epochs}} epochs")
pathlib.Path("metrics").mkdir(exist_ok=True)
pathlib.Path("metrics/evaluate.json").write_text(json.dumps({{"test": {{"accuracy": 1 - 1 / (1 + epochs)}}}}))
train(1 / (1 + epochs), pathlib.Path("bundle"))
"""


class Project:
    """A project that was published once: `origin` in git, the data on an S3 server, and a checkout of it in `work`."""

    def __init__(self, folder: Path, s3: S3FileSystem, bucket: str) -> None:
        self.origin, self.work = folder / "origin.git", folder / "work"
        self.s3, self._bucket = s3, bucket
        self._ran = folder / "ran"

    def git(self, *arguments: str, at: Path | None = None) -> str:
        return self.run("git", *arguments, at=at)

    def run(self, *command: str, at: Path | None = None) -> str:
        """What the command prints; in `work`, unless it says where."""
        done = subprocess.run(command, cwd=at or self.work, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def clone(self, name: str) -> Path:
        """A fresh clone, which knows nothing of the cache in `work`."""
        self.git("clone", "--quiet", str(self.origin), f"../{name}")
        return self.work.parent / name

    def tip(self, branch: str = "main") -> str:
        """The commit that everybody can see."""
        return self.git("rev-parse", branch, at=self.origin)

    def push_elsewhere(self, **files: str) -> str:
        """The commit that somebody else pushes to main: the files by name, with _ for a dot."""
        other = self.work.parent / "other"
        if not other.exists():
            self.clone("other")
        for name, content in files.items():
            (other / name.replace("_", ".")).write_text(content)
        self.git("add", "--all", at=other)
        self.git("commit", "--quiet", "--message", "somebody else's", at=other)
        self.git("push", "--quiet", "origin", "HEAD:main", at=other)
        return self.tip()

    def ran(self) -> list[str]:
        """The stages that have run since the last call."""
        stages = self._ran.read_text().split()
        self._ran.write_text("")
        return stages

    def remote(self, oid: str) -> str:
        """The path of an object on the S3 server."""
        return f"{self._bucket}/files/md5/{oid[:2]}/{oid[2:]}"

    def objects(self) -> set[str]:
        """What the S3 server has."""
        return {"".join(path.split("/")[-2:]) for path in self.s3.find(f"{self._bucket}/files/md5")}


@pytest.fixture(scope="session")
def s3() -> Iterator[S3FileSystem]:
    """An S3 server."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3FileSystem(key="test", secret="test", endpoint_url=f"http://{host}:{port}", use_listings_cache=False)  # noqa: S106
    server.stop()


@pytest.fixture(scope="session")
def _published(tmp_path_factory: pytest.TempPathFactory, s3: S3FileSystem) -> Path:
    """As a `Project`, but with the data in the folder `store`."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        _settle(patch, folder)
        project = Project(folder, s3, "")
        folder.joinpath("work").mkdir()
        project.git("init", "--quiet", "--bare", "--initial-branch", "main", str(project.origin))
        project.git("init", "--quiet", "--initial-branch", "main")
        project.git("remote", "add", "origin", str(project.origin))
        Repo.init(str(project.work)).close()
        files = {"dvc.yaml": PUBLISHED, "train.py": TRAIN, "source.txt": "a picture\n"}
        for name, content in {
            **files,
            "params.yaml": ROOT.joinpath("params.yaml")
            .read_text()
            .replace("epochs: 6", "epochs: 12")
            .replace("max_slowdown: 2", "max_slowdown: 1000"),
        }.items():
            project.work.joinpath(name).write_text(content)
        images(project.work)
        project.run("dvc", "remote", "add", "--quiet", "--local", "--default", "store", str(folder / "store"))
        project.run("dvc", "repro", "--quiet")
        project.run("dvc", "push", "--quiet")
        (project.work / ".dvc/config.local").unlink()
        project.git("add", "--all")
        project.git("commit", "--quiet", "--message", "first")
    return folder


@pytest.fixture
def project(_published: Path, s3: S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of the published project, with a bucket of its own; the working folder is its checkout."""
    folder = tmp_path / "project"
    shutil.copytree(_published, folder)
    _settle(monkeypatch, folder)
    bucket = f"bucket-{len(s3.ls(''))}"
    s3.mkdir(bucket)
    s3.put(str(folder / "store/files"), f"{bucket}/files", recursive=True)
    project = Project(folder, s3, bucket)
    with (project.work / ".dvc/config").open("a") as config:
        config.write(
            f"[core]\nremote = store\n['remote \"store\"']\nurl = s3://{bucket}\nendpointurl = {s3.endpoint_url}\n"
        )
    project.git("commit", "--quiet", "--all", "--message", "a remote")
    project.git("remote", "set-url", "origin", str(project.origin))
    project.git("push", "--quiet", "--set-upstream", "origin", "main")
    monkeypatch.chdir(project.work)
    return project


@pytest.fixture(scope="session")
def _trained(_published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which a model has been trained."""
    root = tmp_path_factory.mktemp("trained") / "clone"
    shutil.copytree(_published / "work", root)
    override(root, {"train.epochs": 24})
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(root):
        patch.setenv("DVC_SITE_CACHE_DIR", str(root.parent / "site"))
        patch.setenv("RAN", str(root.parent / "ran"))
        with Repo() as repo:
            repo.reproduce()
    return root


@pytest.fixture
def trained(project: Project, _trained: Path) -> Workspace:
    """A clone in which a model has been trained, whose data is on the remote, and which is yet to be published."""
    root = project.work.with_name("clone")
    shutil.copytree(_trained, root)
    shutil.copy(project.work / ".dvc/config", root / ".dvc/config")
    git(root, "remote", "set-url", "origin", str(project.origin))
    git(root, "fetch", "--quiet")
    git(root, "reset", "--quiet", "origin/main")
    assert changed(root)
    assert {step.action for step in plan(root)} == {Action.UP_TO_DATE}
    upload(root, stored(root))
    return Workspace(root, "main")


def _settle(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Settings and caches of the test's own, for everything that starts."""
    (folder / "ran").write_text("")
    settings = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAN": str(folder / "ran"),
        "DVC_SITE_CACHE_DIR": str(folder / "site"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        **{f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in settings.items():
        patch.setenv(name, value)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """The address of a Prefect server that flows in this process report to; it takes 17 s to start."""
    with prefect_test_harness(server_startup_timeout=90):
        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The project, served; one for each file of tests."""
    with serving(tmp_path_factory.mktemp("served")) as served:
        yield served
