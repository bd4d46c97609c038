"""A small project that `breedline serve` serves: a real Prefect server, a real worker, real schedules."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil
from ruamel.yaml import YAML

from tests.flows.tiny import images

ROOT = Path(__file__).parents[2]
TRAIN = f"""
import json, pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.flows.tiny import train
epochs, seconds = int(sys.argv[1]), float(sys.argv[2])
time.sleep(seconds)
for folder in ("models", "metrics"):
    pathlib.Path(folder).mkdir(exist_ok=True)
pathlib.Path("models/model").write_text("x" * epochs)
pathlib.Path("metrics/evaluate.json").write_text(json.dumps({{"test": {{"accuracy": 1 - 1 / epochs}}}}))
train(1 / epochs, pathlib.Path("bundle"))
"""
DVC_YAML = """
stages:
  download:
    cmd: mkdir raw && sleep 0.5 && cp source.txt raw/${label.seed}
    deps: [source.txt]
    params: [label]
    outs: [raw]
    meta: {prefect: {retries: 3, retry_on: [137, 143]}}
  train:
    cmd: python train.py ${train.epochs} ${train.base_lr}
    deps: [raw, train.py]
    params: [train]
    outs: [models, bundle]
    metrics: [metrics/evaluate.json: {cache: false}]
    meta: {prefect: {retries: 3, retry_on: [137, 143], resources: [gpu]}}
artifacts:
  classifier: {path: bundle, type: model}
"""


@contextlib.contextmanager
def serving(folder: Path, interval: int | None = None) -> Iterator["Served"]:
    """A project in `folder` that is served during the block."""
    served = Served(folder, interval)
    try:
        until(lambda: "Serving" in served.log.read_text() or served.process.poll() is not None)
        yield served
    finally:
        served.stop()


class Served:
    """A project with its bare origin and its DVC remote, served on a port of its own.

    The nightly run is due at night, unless there is an `interval` of seconds: a run costs as much as a test.
    """

    def __init__(self, folder: Path, interval: int | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.work = folder, folder / "work"
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.log = folder / "serve.log"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT")},
            **{f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "BREEDLINE_CACHE": str(folder / "cache"),
            "DVC_SITE_CACHE_DIR": str(folder / "site"),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        self._make(interval)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("breedline"), "serve"],
                cwd=self.work,
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def _make(self, interval: int | None) -> None:
        self.shell("git init -q --bare -b main origin.git && git clone -q origin.git work 2> clone.log", self.folder)
        for package in ("flows", "breedline"):
            shutil.copytree(ROOT / package, self.work / package, ignore=shutil.ignore_patterns("__pycache__"))
        deployments = YAML(typ="safe").load(ROOT / "prefect.yaml")
        for deployment in deployments["deployments"]:
            if interval and deployment["name"] == "nightly":
                deployment["schedules"] = [{"interval": interval}]
        YAML(typ="safe").dump(deployments, self.work / "prefect.yaml")
        for name in ("params.yaml", "prefect.toml"):
            shutil.copyfile(ROOT / name, self.work / name)
        for name, content in {"train.py": TRAIN, "dvc.yaml": DVC_YAML, "source.txt": "1"}.items():
            (self.work / name).write_text(content)
        images(self.work)
        self.shell(f"git checkout -q -B main && dvc init -q && dvc remote add -q -d store {self.folder / 'store'}")
        self.push(label={"seed": 1}, train={"epochs": 10, "base_lr": 0.5}, gate={"max_slowdown": 1000})

    def stop(self) -> None:
        """As by Ctrl-C."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
        if "client" in vars(self):
            self.client.close()

    def shell(self, command: str, folder: Path | None = None) -> str:
        """What the command prints."""
        folder = folder or self.work
        done = subprocess.run(command, shell=True, cwd=folder, env=self.environment, capture_output=True, text=True)  # noqa: S602
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def push(self, **settings: dict[str, Any]) -> None:
        """Change settings on the branch."""
        path = self.work / "params.yaml"
        if self.log.exists():
            self.shell("git pull -q --rebase")
        params = YAML(typ="safe").load(path)
        for section, values in settings.items():
            params[section].update(values)
        YAML(typ="safe").dump(params, path)
        self.shell("git add -A && git commit -qm settings && git push -q origin main")

    @property
    def exported(self) -> dict[str, str]:
        """The settings with which other terminals find the server."""
        lines = (self.folder / f"cache/serve/{self.port}.env").read_text().splitlines()
        return dict(line.removeprefix("export ").split("=", 1) for line in lines)

    @cached_property
    def client(self) -> httpx.Client:
        """A client of the server: it logs in, and asks for a token against forged requests, as Prefect's own do."""
        name, _, secret = self.exported["PREFECT_API_AUTH_STRING"].partition(":")
        client = httpx.Client(base_url=self.api, auth=(name, secret), timeout=30)
        token = client.get("/csrf-token", params={"client": "test"}).raise_for_status().json()["token"]
        client.headers.update({"Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": token})
        return client

    def ask(self, path: str, method: str = "POST", **body: Any) -> Any:
        """What the server answers; as every client of it does, this asks again while it is away or busy (503)."""
        content = {} if method == "GET" else {"json": body}

        def answer() -> httpx.Response | None:
            try:
                said = self.client.request(method, path, **content)
            except httpx.TransportError:
                return None
            return None if said.status_code == 503 else said

        said = until(answer).raise_for_status()
        return said.json() if said.content else None

    def deployment(self, name: str) -> dict[str, Any]:
        return self.ask(f"deployments/name/{name}", "GET")

    def runs(self, deployment: str, *states: str) -> list[dict[str, Any]]:
        """The runs of a deployment that are in one of `states`, by name; the earliest first."""
        found = self.ask(
            "flow_runs/filter",
            deployments={"id": {"any_": [self.deployment(deployment)["id"]]}},
            flow_runs={"state": {"name": {"any_": list(states)}}},
            sort="EXPECTED_START_TIME_ASC",
        )
        return list(found)

    def pause(self, deployment: str) -> None:
        """Nothing more is due by its schedule."""
        self.ask(f"deployments/{self.deployment(deployment)['id']}/pause_deployment")

    def start(self, **parameters: Any) -> str:
        """Start a run on demand; its id."""
        deployment = self.deployment("retrain/on-demand")["id"]
        return str(self.ask(f"deployments/{deployment}/create_flow_run", parameters=parameters)["id"])

    def state(self, run: str) -> dict[str, Any]:
        return self.ask(f"flow_runs/{run}", "GET")["state"]

    def ended(self, run: str, *others: str) -> str:
        """The name of the state in which the run has ended, or is, if that is among `others`."""
        ends = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        until(lambda: self.state(run)["type"] in ends or self.state(run)["name"] in others)
        return str(self.state(run)["name"])

    def tasks(self, run: str, *others: str) -> dict[str, str]:
        """The states of the stages of a run, by name; and of the tasks `others`."""
        tasks = self.ask("task_runs/filter", flow_runs={"id": {"any_": [run]}})
        wanted = ("download", "train", *others)
        return {task["name"]: task["state"]["name"] for task in tasks if task["name"] in wanted}

    def slots(self) -> int:
        """How many hold the GPU."""
        return next(
            limit["active_slots"] for limit in self.ask("v2/concurrency_limits/filter") if limit["name"] == "gpu"
        )

    def processes(self, pattern: str) -> list[psutil.Process]:
        """What was started here, at whatever remove, and looks like `pattern`; not dead yet."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                ours = process.environ().get("PREFECT_HOME") == self.environment["PREFECT_HOME"]
                if ours and re.search(pattern, " ".join(process.cmdline())):
                    found.append(process)
        return found

    def kill(self, pattern: str) -> int:
        """SIGKILL for what looks like `pattern`, without the leashes around it; how many that were."""
        killed = 0
        for process in self.processes(pattern):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "leash.py" not in " ".join(process.cmdline()):
                    process.kill()
                    killed += 1
        return killed

    def commits(self) -> list[str]:
        return self.shell("git log --format=%s main", self.folder / "origin.git").splitlines()


def until(true: Callable[[], Any], seconds: float = 600) -> Any:
    """What `true` says, once it says so; it is asked for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while not (said := true()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return said
