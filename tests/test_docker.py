"""The images: what the Dockerfile promises, read without a daemon, and that a published model needs no more than `predict` has."""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from packaging.requirements import Requirement
from prefect.settings import PREFECT_WORKER_WEBSERVER_PORT

from flows.cli import _parser
from tests.bundles import bundle, picture

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
TARGETS = ["predict", "worker"]
SECRET = re.compile(r"(?i)(token|secret|passw|credential|api_?key|auth)")
LOCKS = {"predict": "requirements-predict.txt", "worker": "requirements.txt"}


def _instructions() -> Iterator[tuple[str, str]]:
    """(name, arguments) of each instruction, a continued one as one line."""
    text = re.sub(r"^ *#.*\n", "", DOCKERFILE, flags=re.M)
    for line in re.sub(r"\\\n *", " ", text).splitlines():
        if line:
            name, _, arguments = line.partition(" ")
            yield name, arguments


def _stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, those of the stage that it begins from first."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for name, arguments in _instructions():
        if name == "FROM":
            image, _, stage = arguments.partition(" AS ")
            instructions = stages[stage] = list(stages.get(image, []))
        instructions.append((name, arguments))
    return stages


STAGES = _stages()
each_target = pytest.mark.parametrize("target", TARGETS)


def _arguments(target: str, name: str) -> list[str]:
    return [arguments for instruction, arguments in STAGES[target] if instruction == name]


def _environment(target: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", " ".join(_arguments(target, "ENV"))))


@each_target
def test_it_begins_from_a_python_of_one_version_and_release(target: str) -> None:
    (base, *stages) = [image.partition(" AS ")[0] for image in _arguments(target, "FROM")]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", base)
    assert set(stages) <= set(STAGES)


@each_target
def test_it_runs_as_a_user_of_a_fixed_number(target: str) -> None:
    (user,) = _arguments(target, "USER")
    uid = user.split(":")[0]
    assert int(uid) > 0
    assert f"--uid {uid} " in " ".join(_arguments(target, "RUN"))
    assert STAGES[target].index(("USER", user)) > max(
        number for number, (name, _) in enumerate(STAGES[target]) if name == "RUN"
    )


@each_target
def test_it_says_how_it_is_and_sends_nothing_home(target: str) -> None:
    (health,) = _arguments(target, "HEALTHCHECK")
    assert (health == "NONE") == (target == "predict")
    sent = re.findall(r"^export (\w+) := (\w+)", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert sent
    assert dict(sent).items() <= _environment(target).items()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_the_probe_succeeds_if_the_worker_answers_that_it_is_well(status: int | None, code: int) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status or 0 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    (health,) = _arguments("worker", "HEALTHCHECK")
    _, *probe = json.loads(health.partition("CMD ")[2])
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        probe[-1] = probe[-1].replace("//127.0.0.1:8080/", f"//127.0.0.1:{server.server_port}/")
        if status is None:
            server.server_close()
        else:
            Thread(target=server.handle_request, daemon=True).start()
        assert subprocess.run([sys.executable, *probe], capture_output=True).returncode == code


def test_the_worker_answers_the_probe() -> None:
    assert "--with-healthcheck" in json.loads(_arguments("worker", "CMD")[0])
    assert _environment("worker")["PREFECT_WORKER_WEBSERVER_HOST"] == "127.0.0.1"
    assert PREFECT_WORKER_WEBSERVER_PORT.default() == 8080


def test_nothing_is_fetched_from_a_place_that_is_named_here() -> None:
    assert "ADD" not in {name for name, _ in _instructions()}
    assert not re.search(r"https?://(?!127\.0\.0\.1)|index-url|--find-links", DOCKERFILE)


def test_no_secret_is_kept_in_a_layer() -> None:
    assert "ARG" not in {name for name, _ in _instructions()}  # whose values are in the history of the image
    assert not [name for target in TARGETS for name in _environment(target) if SECRET.search(name)]
    fetching = [
        run for name, run in _instructions() if name == "RUN" and "pip install" in run and "--no-index" not in run
    ]
    assert fetching
    assert all("--mount=type=secret,id=pip,target=/etc/pip.conf " in run for run in fetching)


@each_target
def test_it_installs_what_is_pinned_and_hashed(target: str) -> None:
    ours = [run for run in _arguments(target, "RUN") if "pip install" in run]
    pinned = [run for run in ours if "--require-hashes" in run]
    assert [re.findall(r"source=([\w.-]+)", run) for run in pinned] == [[LOCKS[target]]]
    assert all("--no-deps" in run for run in pinned)
    assert all("--no-index --no-deps --no-build-isolation" in run for run in ours if run not in pinned)


def _pins(target: str) -> dict[str, tuple[str, frozenset[str]]]:
    """The version and the hashes of each package."""
    lines = (ROOT / LOCKS[target]).read_text("utf-8").replace("\\\n", " ").splitlines()
    found = [re.match(r"([\w.-]+)==(\S+)", line) for line in lines]
    return {
        f"{pin[1]}=={pin[2]}": (pin[2], frozenset(re.findall(r"sha256:\w+", line)))
        for pin, line in zip(found, lines, strict=True)
        if pin
    }


def test_what_predict_has_is_a_part_of_the_whole_environment() -> None:
    assert _pins("predict").items() <= _pins("worker").items()


def test_predict_has_what_every_use_of_the_project_depends_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["build"]])
    assert {requirement.name for requirement in needed} <= {pin.partition("==")[0] for pin in _pins("predict")}


def test_predict_has_none_of_what_trains_and_schedules() -> None:
    names = {pin.partition("==")[0] for pin in _pins("predict")}
    assert names & {"torch", "torchvision", "fastai", "timm", "scikit-learn", "prefect", "dvc", "matplotlib"} == set()


def _let_in(path: str) -> bool:
    """Whether .dockerignore lets a file of the project into the build; its last line that matches decides."""
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line[:1] not in ("", "#")]
    assert lines[0] == "*"
    parents = [str(parent) for parent in (Path(path), *Path(path).parents)]
    allowed = False
    for line in lines[1:]:
        pattern = line.removeprefix("!")
        if any(
            fnmatch(f"/{parent}", f"*/{pattern.removeprefix('**/')}" if "**" in line else f"/{pattern}")
            for parent in parents
        ):
            allowed = line.startswith("!")
    return allowed


def test_the_build_sees_what_it_takes_and_nothing_else() -> None:
    taken = {source for _, run in _instructions() for source in re.findall(r"source=([\w./-]+)", run)}
    assert taken
    code = {
        str(path.relative_to(ROOT)) for name in ("breedline", "stages", "flows") for path in (ROOT / name).glob("*.*")
    }
    wanted = {*taken, *code, "pyproject.toml", "README.md", "LICENSE"}
    assert [path for path in wanted if not ((ROOT / path).is_file() and _let_in(path))] == []
    for path in (
        ".git/config",
        ".dvc/config.local",
        "data/labels.csv",
        "models/model.onnx",
        "flows/__pycache__/cli.pyc",
    ):
        assert not _let_in(path)


def test_the_commands_in_the_docs_are_of_these_images() -> None:
    text = (ROOT / "docs/deploy.md").read_text("utf-8").replace("\\\n", " ")
    assert set(re.findall(r"--target (\w+)", text + DOCKERFILE)) == set(TARGETS)
    commands = re.findall(r"^docker run .* breedline:predict (.+)$", text, re.M)
    assert commands
    for command in commands:
        _parser().parse_args(shlex.split(command, comments=True))
    paths = set(re.findall(r":(/(?:work|cache|home)[\w/.-]*)", text)) | set(
        re.findall(r'mountPath: "([\w/.-]+)"', text)
    )
    assert paths <= {"/srv/models", "/srv/photos", "/cache", "/home/breedline/.netrc"}
    (base,) = set(_arguments("predict", "FROM")) - {"base AS predict"}
    assert base.partition(" ")[0] in text


# A published model at work where nothing else is installed

PREDICT_ALONE = f"""
import sys
from importlib.metadata import packages_distributions

def canonical(name):
    return name.lower().replace("_", "-").replace(".", "-")

pinned = {sorted(pin.partition("==")[0] for pin in _pins("predict"))}
absent = {{
    module for module, names in packages_distributions().items() if not {{canonical(name) for name in names}} & {{*pinned, "breedline"}}
}}
assert {{"torch", "dvc", "prefect", "sklearn"}} <= absent

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
COMMAND = "from flows.cli import main; main()"
LOOK = """
from pathlib import Path
import breedline.app
from breedline import Classifier
from breedline.classifier import Photo
observer = breedline.app.Observer.load("models")
breedline.app.application(observer, 8000)
print(observer.look(Photo("b.png", Path("b.png").read_bytes())).prediction.label)
print(Classifier.load("models").predict("b.png")[0].label)
"""


def _with_predict_alone(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREDICT_ALONE + code, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True,
    )  # fmt: skip


@pytest.fixture
def photos() -> None:
    """A bundle in models, a photo, and archives of it."""
    bundle()
    Path("b.png").write_bytes(picture("blue"))
    for kind in ("gz", "xz"):
        with tarfile.open(f"b.{kind}", f"w:{kind}") as archive:  # type: ignore[call-overload]
            archive.add("b.png")


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize("arguments", [["b.png"], ["--json", "."], ["--csv", "b.gz"], ["--csv", "b.xz"]], ids=" ".join)
def test_predict_needs_no_more(arguments: list[str]) -> None:
    done = _with_predict_alone(COMMAND, "predict", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "blue" in done.stdout


@pytest.mark.usefixtures("photos")
def test_the_page_and_the_class_need_no_more() -> None:
    assert _with_predict_alone(LOOK).stdout.split() == ["blue", "blue"]


def test_what_does_need_more_says_so_in_one_line() -> None:
    done = _with_predict_alone(COMMAND, "plan")
    assert done.returncode == 1
    assert done.stderr == (
        "error: dvc is not installed; only predict and app do without: `make plan` in a clone sets up the whole environment\n"
    )
