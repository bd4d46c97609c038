"""The edge, from outside: small stages as processes of their own, in a folder with a params.yaml."""

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import breedline.edge

ROOT = Path(__file__).parents[2]
ARGUMENTS = ["--raw", "raw", "--count", "3", "--out", "out.txt"]
STAGE = """
import errno, logging, os, subprocess, time
from pathlib import Path
from breedline.edge import run
from breedline.errors import BreedlineError, NetworkError

log = logging.getLogger("breedline")

def wait():
    "Say that the stage runs, and go on when the test says so."
    Path("started.part").write_text(str(os.getpid()))
    os.rename("started.part", "started")
    end = time.monotonic() + 30
    while not Path("go").exists() and time.monotonic() < end:
        time.sleep(0.02)

IMPORTS

def label(params, raw: Path, count: int, *, out: Path, workers: int = -1) -> None:
    BODY
    out.write_text(f"{type(params).__name__} {raw} {count!r} {workers!r}")

if __name__ == "__main__":
    run(label)
"""
DVC = """
import os, subprocess, sys
subprocess.run(sys.argv[1:], env={**os.environ, "DVC_STAGE": "label"})
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """A function that starts a stage with this body: `start(body, *arguments)`; Popen's keywords go through."""
    Path("raw").mkdir()
    Path("raw/index.csv").write_text("name\n")
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    Path("dvc.py").write_text(DVC)
    started = []

    def start(
        body: str, *arguments: str, imports: str = "", before: tuple[str, ...] = (), **options: object
    ) -> subprocess.Popen[str]:
        Path("label.py").write_text(STAGE.replace("BODY", body).replace("IMPORTS", imports))
        own = {"stderr": subprocess.PIPE, "text": True, "env": _environment(ROOT), "start_new_session": True}
        command = [*before, sys.executable, "label.py", *(arguments or ARGUMENTS)]
        started.append(subprocess.Popen(command, **own | options))  # type: ignore[call-overload]
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


def _environment(project: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    return {**kept, "PYTHONPATH": str(project), **more}


def _error(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code, and what was said on standard error."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def _running() -> psutil.Process:
    """The stage, once it is at work."""
    _until(Path("started").exists, 30)
    return psutil.Process(int(Path("started").read_text()))


def _until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def _gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("more", "workers"), [((), "-1"), (("--workers", "2"), "2")])
def test_the_signature_is_the_command_line(start: Start, more: tuple[str, ...], workers: str) -> None:
    assert _error(start("pass", *ARGUMENTS, *more)) == (0, "")
    assert Path("out.txt").read_text() == f"Label raw 3 {workers}"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(ARGUMENTS[2:], "--raw"), ([*ARGUMENTS, "--count", "many"], "--count"), ([*ARGUMENTS, "--typo", "1"], "--typo")],
)
def test_wrong_arguments_are_named(start: Start, arguments: list[str], named: str) -> None:
    code, said = _error(start("pass", *arguments))
    assert code == 2
    assert named in said.splitlines()[-1]
    assert not Path("out.txt").exists()


def test_a_missing_input_is_one_line_with_a_remedy(start: Start) -> None:
    code, said = _error(start("pass", "--raw", "elsewhere", *ARGUMENTS[2:]))
    assert code == 1
    assert said.startswith("error: label: elsewhere is missing: ")
    assert "dvc checkout" in said
    assert said.count("\n") == 1
    assert not Path("out.txt").exists()


def test_wrong_params_are_told_all_at_once_before_the_stage_runs(start: Start) -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("seed: 42", "seed: soon").replace("quality: 92", "quality: 920"))
    code, said = _error(start("pass"))
    assert code == 2
    assert all(key in said for key in ("label.seed", "train.seed", "presize.quality"))
    assert "Traceback" not in said
    assert not Path("out.txt").exists()


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise BreedlineError('mend it')", 1, "label: mend it"),
        ("raise NetworkError('try later')", 75, "label: try later"),
        ("open('/dev/full', 'wb', 0).write(b'x')", 1, "label: No space left on device: free some space"),
        ("raise OSError(errno.EACCES, 'Permission denied', 'raw')", 1, "label: Permission denied (raw): mend that"),
        ("raise OSError(errno.EROFS, 'Read-only', 'raw', None, out)", 1, "label: Read-only (out.txt): mend that"),
    ],
)
def test_an_expected_error_is_one_line_and_its_exit_code(start: Start, body: str, code: int, line: str) -> None:
    exit_code, said = _error(start(body))
    assert exit_code == code
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("body", ["[][0]", "open('nowhere')"])
def test_a_bug_keeps_its_traceback(start: Start, body: str) -> None:
    code, said = _error(start(body))
    assert code == 1
    assert said.startswith("Traceback")
    assert f"    {body}\n" in said


def test_a_log_line_without_a_terminal_is_its_message(start: Start) -> None:
    body = "log.info('%d of [four]', 3); log.debug('detail'); logging.getLogger('httpx').info('chatter')"
    assert _error(start(body)) == (0, "3 of [four]\n")


def test_a_log_line_on_a_terminal_is_its_message(start: Start) -> None:
    terminal, stderr = pty.openpty()
    process = start("log.info('3 of [four]')", stderr=stderr, env=_environment(ROOT, TERM="dumb"))
    process.wait(timeout=60)
    assert os.read(terminal, 1000).decode().split() == ["3", "of", "[four]"]
    os.close(stderr)
    os.close(terminal)


def test_ctrl_c_is_one_line(start: Start) -> None:
    process = start("wait()")
    _running().send_signal(signal.SIGINT)
    code, said = _error(process)
    assert code == 130
    assert said.startswith("error: label: interrupted")
    assert said.count("\n") == 1


def test_ctrl_c_while_a_stage_imports_is_no_traceback() -> None:
    Path("pandas.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n")
    command = [sys.executable, "-m", "stages.label"]
    done = subprocess.run(command, env=_environment(ROOT), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.slow
def test_sigterm_ends_the_stage_and_its_workers_at_once(start: Start) -> None:
    process = start("subprocess.Popen(['sleep', '60']); wait()")
    stage = _running()
    (worker,) = stage.children()
    stage.terminate()
    _until(lambda: _gone(stage) and _gone(worker), 3)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project's code, to change while a stage runs with it."""
    shutil.copytree(ROOT / "breedline", tmp_path / "project/breedline")
    return tmp_path / "project"


def _edit(path: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda project: Path(path).write_text(Path(path).read_text().replace(old, new))


CHANGES: dict[str, Callable[[Path], object]] = {
    "raw/index.csv": lambda project: Path("raw/index.csv").write_text("other\n"),
    "raw/new.tar": lambda project: Path("raw/new.tar").touch(),
    "raw": lambda project: shutil.rmtree("raw"),
    "label in params.yaml": _edit("params.yaml", "min_per_class: 10", "min_per_class: 11"),
    "label.py": lambda project: Path("label.py").touch(),
    "breedline/tables.py": lambda project: (project / "breedline/tables.py").touch(),
}
LEAVES: dict[str, Callable[[Path], object]] = {
    "another section": _edit("params.yaml", "top_k: 3", "top_k: 4"),
    "another section, wrongly": _edit("params.yaml", "top_k: 3", "top_k: many"),
    "code that decides no bytes": lambda project: (project / "breedline/errors.py").touch(),
    "code of another stage": lambda project: (project / "breedline/learner.py").touch(),
    "an output": lambda project: Path("out.txt").touch(),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_what_a_stage_reads_may_not_change_while_it_runs(start: Start, project: Path, what: str) -> None:
    process = start("wait()", imports="import breedline.tables", env=_environment(project))
    _running()
    CHANGES[what](project)
    Path("go").touch()
    code, said = _error(process)
    assert code == 1
    assert what in said
    assert "changed while it ran" in said
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", LEAVES)
def test_what_it_does_not_read_may_change(start: Start, project: Path, what: str) -> None:
    process = start("wait()", env=_environment(project))
    _running()
    LEAVES[what](project)
    Path("go").touch()
    assert _error(process) == (0, "")


@pytest.mark.slow
def test_a_stage_runs_once_at_a_time_in_a_folder(start: Start, tmp_path: Path) -> None:
    first = start("wait()")
    _running()
    code, said = _error(start("pass"))
    assert code == 1
    assert said.startswith("error: label: already running in this folder")
    assert said.count("\n") == 1
    shutil.copytree(".", tmp_path / "elsewhere")
    assert _error(start("pass", cwd=tmp_path / "elsewhere")) == (0, "")
    first.kill()
    first.wait(timeout=10)
    assert _error(start("pass")) == (0, "")


SHELLS = {
    "directly": (),
    "through sh": ("/bin/sh", "-c", '"$@"; exit $?', "-"),
    "through bash": ("/bin/bash", "-c", '"$@"', "-"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SHELLS)
def test_a_stage_ends_with_the_dvc_that_started_it(start: Start, how: str) -> None:
    dvc = start("subprocess.Popen(['sleep', '60']); wait()", before=(sys.executable, "dvc.py", *SHELLS[how]))
    stage = _running()
    worker = stage.children()[0]
    dvc.kill()
    _until(lambda: _gone(stage) and _gone(worker), 3)
    assert not Path("out.txt").exists()


@pytest.mark.slow
def test_a_stage_ends_with_the_shell_that_dvc_started_it_through(start: Start) -> None:
    start("wait()", before=(sys.executable, "dvc.py", *SHELLS["through sh"]))
    stage = _running()
    stage.parent().kill()
    _until(lambda: _gone(stage), 3)


@pytest.mark.slow
@pytest.mark.parametrize("how", SHELLS)
def test_a_stage_whose_dvc_ended_during_its_imports_does_not_start(start: Start, how: str) -> None:
    dvc = start("pass", imports="wait()", before=(sys.executable, "dvc.py", *SHELLS[how]))
    stage = _running()
    dvc.kill()
    dvc.wait(timeout=10)
    Path("go").touch()
    _until(lambda: _gone(stage), 10)
    assert not Path("out.txt").exists()


@pytest.mark.slow
def test_a_stage_started_by_hand_outlives_its_parent(start: Start) -> None:
    parent = start("wait()", before=("/bin/sh", "-c", '"$@"; exit $?', "-"))
    stage = _running()
    parent.kill()
    parent.wait(timeout=10)
    time.sleep(1.5)
    assert stage.is_running()
    Path("go").touch()
    _until(lambda: _gone(stage), 10)
    assert Path("out.txt").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root may make a first process")
def test_dvc_may_be_the_first_process_of_a_container(start: Start) -> None:
    unshare = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    assert _error(start("time.sleep(1.5)", before=(*unshare, sys.executable, "dvc.py"))) == (0, "")
    assert Path("out.txt").exists()


def test_another_process_than_the_first_tells_what_the_first_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(breedline.edge.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in "01":
        monkeypatch.setenv("RANK", number)
        with pytest.raises(SystemExit):
            breedline.edge._fail("train: too little memory here")
    assert waited == [breedline.edge.SECONDS_FOR_THE_FIRST]
    assert capsys.readouterr().err.splitlines() == ["error: train: too little memory here"] * 2
