"""The doctor: each fault of a working folder is named, what is safe is repaired, and looking changes nothing."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from breedline.files import cache_dir, cache_root, folder_key
from flows import checks
from flows.doctor import examine, main
from flows.plan import Action, plan
from flows.remote import stored

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SHA = "ab" * 32
MONTHS_AGO = time.time() - 90 * 86_400
DEAD = 2**22 + 1
"""More than any process has."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(checks, "FREE", 0)


@pytest.fixture
def healthy(project: Any) -> Any:
    """The published project, whose remote is the folder `store`."""
    Path(".dvc/config").write_text(f"[core]\nremote = store\n['remote \"store\"']\nurl = {project.work.parent}/store\n")
    project.git("commit", "--quiet", "--all", "--message", "a folder is the remote")
    project.git("push", "--quiet")
    return project


def findings() -> dict[str, str]:
    """What is wrong in the working folder, by check."""
    return {check: " | ".join(one.what for one in some) for check, some in examine(Path()).items() if some}


def tree(*folders: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder with its time and bytes, but for the notes that DVC makes as it opens a repository."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for folder in folders
        for path in ([folder, *folder.rglob("*")] if folder.exists() else [])
        if not re.search(r"\.dvc(/tmp/btime|/tmp)?$", str(path))
    }


def in_cache(name: str) -> Path:
    """The object of a file in DVC's cache."""
    (oid,) = (item.oid for item in stored(Path(), cache_only=True) if item.name == name)
    return Path(".dvc/cache/files/md5") / oid[:2] / oid[2:]


def overwrite(path: Path, content: bytes) -> None:
    """Other bytes in a file that is as read-only as DVC makes its own, which then takes it for whole."""
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)


def damage(name: str) -> None:
    overwrite(in_cache(name), in_cache(name).read_bytes()[:-1] + b"?")


def lost_on_the_remote(_: Any) -> None:
    (oid,) = (item.oid for item in stored(Path()) if item.name == "models/weights")
    Path("../store/files/md5", oid[:2], oid[2:]).unlink()


def leftovers(_: Any) -> None:
    for name in (".raw.partial", ".bundle.old"):
        Path(name).mkdir()
        Path(name, "half").touch()
    Path(".params.yaml.partial").touch()
    Path("data/.corrections.csv.partial").touch()


def cut_off(_: Any) -> None:
    """DVC's own: beside outputs, and in a cache that another dvc may be writing to."""
    name = f".{'aB3_-' * 4}xY.tmp"
    Path(name).touch()
    for path in (in_cache("models").with_name(name), in_cache("raw").parents[2] / name):
        path.touch()
        os.utime(path, (MONTHS_AGO, MONTHS_AGO))


def clone(_: Any) -> None:
    (cache_dir("workspaces") / "1/.git").mkdir(parents=True)
    (cache_dir("workspaces") / "1.lock").touch()


def unused(name: str) -> None:
    folder = cache_dir(name) / "0123"
    folder.mkdir()
    (folder / "epoch-000001.pt").touch()
    os.utime(folder, (MONTHS_AGO, MONTHS_AGO))


def rwlock(content: object) -> None:
    Path(".dvc/tmp").mkdir(exist_ok=True)
    Path(".dvc/tmp/rwlock").write_text(content if isinstance(content, str) else json.dumps(content))


def dead_server(_: Any) -> None:
    path = cache_dir("serve") / "4200.env"
    path.write_text("export PREFECT_API_URL=http://127.0.0.1:9/api\nexport PREFECT_API_AUTH_STRING=b:c\n")
    os.utime(path, (MONTHS_AGO, MONTHS_AGO))


def not_named(_: Any) -> None:
    """An object that only the run-cache may name, of which a power loss has left the beginning."""
    path = in_cache("models").parents[1] / "00" / ("0" * 30)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"the beginn")
    path.chmod(0o444)


def cut(share: float) -> Callable[[Any], None]:
    whole = Path("dvc.lock")
    return lambda _: whole.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)]) and None


REPAIRED: dict[str, tuple[Callable[[Any], object], str, str]] = {
    "object": (lambda _: damage("raw/a.txt"), "results", r"^raw/a\.txt: damaged in DVC's cache"),
    "list": (lambda _: damage("raw"), "results", r"^raw: damaged in DVC's cache"),
    "missing": (lambda _: in_cache("raw/a.txt").unlink(), "results", r"^raw/a\.txt: missing in DVC's cache"),
    "list missing": (lambda _: in_cache("models").unlink(), "results", r"^models: missing in DVC's cache"),
    "remote": (lost_on_the_remote, "remote", r"^models/weights: missing or altered on the DVC remote$"),
    "lock cut": (cut(0.5), "pipeline", r"dvc\.lock"),
    "lock garbage": (lambda _: Path("dvc.lock").write_bytes(b"\xff\0{"), "pipeline", r"dvc\.lock"),
    "lock list": (lambda _: Path("dvc.lock").write_text("[1]"), "pipeline", r"dvc\.lock"),
    "rwlock garbage": (lambda _: rwlock('{"write": '), "work", r"rwlock makes no sense"),
    "rwlock list": (lambda _: rwlock([]), "work", r"rwlock makes no sense"),
    "rwlock dead": (
        lambda _: rwlock({"write": {"raw": {"pid": DEAD, "cmd": "dvc repro"}}, "read": {}}),
        "work",
        r"rwlock: names a dvc that was killed$",
    ),
    "leftovers": (leftovers, "leftovers", r"^\.raw\.partial, \.bundle\.old, \.params\.yaml\.partial and 1 more: a run"),
    "cut off": (cut_off, "leftovers", r"^\.aB3_\S+\.tmp, \S+\.tmp, \S+\.tmp: a run that was killed was writing it$"),
    "not named": (not_named, "leftovers", r"md5/00/0+: damaged in DVC's cache, from which dvc would restore it$"),
    "no run": (lambda _: Path(".dvc/cache/runs/00/00").mkdir(parents=True), "leftovers", r"runs/00/00: empty"),
    "clone": (clone, "leftovers", r"workspaces/1: the clone of a run that was killed$"),
    "checkpoints": (lambda _: unused("checkpoints"), "leftovers", r"checkpoints/0123: unused for over 30 days$"),
    "scratch": (lambda _: unused("scratch"), "leftovers", r"scratch/0123: unused for over 1 days$"),
    "server": (dead_server, "server", r"serve/4200\.env: the address of a server that was killed$"),
}


def test_a_healthy_folder_has_no_findings(healthy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert findings() == {}
    assert main(repair=False) == 0
    assert capsys.readouterr().out.split() == [
        word for check in checks.CHECKS for word in ("ok", check.__name__)
    ]  # and nothing else


@pytest.mark.parametrize("fault", REPAIRED)
def test_a_fault_is_named_and_repaired(healthy: Any, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    make, check, said = REPAIRED[fault]
    make(healthy)
    found = findings()
    assert list(found) == [check]
    assert re.search(said, found[check])
    problem = any(one.problem for one in examine(Path())[check])
    before = tree(healthy.work, cache_root())
    assert main(repair=False) == int(problem)
    assert "--repair does it" in capsys.readouterr().out
    assert tree(healthy.work, cache_root()) == before
    assert main(repair=True) == 0
    assert "repair   " in capsys.readouterr().out
    assert findings() == {}
    assert healthy.git("status", "--porcelain") == ""
    assert {step.action for step in plan(Path())} == {Action.UP_TO_DATE}


@pytest.mark.parametrize("name", ["raw/a.txt", "raw"])
def test_what_the_output_has_no_more_comes_from_the_remote(healthy: Any, name: str) -> None:
    whole = in_cache(name).read_bytes()
    damage(name)
    shutil.rmtree("raw")
    assert main(repair=True) == 0
    assert in_cache(name).read_bytes() == whole
    assert findings() == {"results": "raw: missing"}
    healthy.run("dvc", "checkout")
    assert findings() == {}


def test_what_is_nowhere_is_made_again_by_its_stage(healthy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    damage("models/weights")
    shutil.rmtree("models")
    lost_on_the_remote(healthy)
    assert main(repair=True) == 1
    said = capsys.readouterr().out
    assert "DVC's cache: 0 objects put back, 1 found nowhere" in said
    assert "`dvc repro train` makes it" in said
    assert not in_cache("models/weights").exists(), "DVC would take it for whole"
    healthy.run("dvc", "repro", "train")
    healthy.run("dvc", "push")
    assert main(repair=True) == 0
    assert findings() == {}


def test_what_was_restored_from_a_damaged_object_is_told(healthy: Any) -> None:
    """The remote mends the object, and DVC remembers for the output the hash that it should have."""
    whole = Path("models/weights").read_bytes()
    overwrite(in_cache("models/weights"), b"")
    shutil.rmtree("models")
    healthy.run("dvc", "checkout")
    assert Path("models/weights").read_bytes() == b""
    assert main(repair=True) == 0
    assert findings() == {"results": "models: not as its stage has left it"}
    healthy.run("dvc", "checkout", "--force")
    assert Path("models/weights").read_bytes() == whole


def test_a_lock_that_makes_no_sense_and_was_never_committed_is_removed(healthy: Any) -> None:
    healthy.git("rm", "--cached", "--quiet", "dvc.lock")
    healthy.git("commit", "--quiet", "--message", "without dvc.lock")
    Path("dvc.lock").write_bytes(b"")
    main(repair=True)
    assert not Path("dvc.lock").exists()
    healthy.run("dvc", "repro")
    assert set(findings()) <= {"pipeline", "remote"}


def test_what_the_remote_has_altered_is_not_taken(healthy: Any) -> None:
    oid = "".join(in_cache("models/weights").parts[-2:])
    damage("models/weights")
    shutil.rmtree("models")
    overwrite(Path("../store/files/md5", oid[:2], oid[2:]), b"another")
    main(repair=True)
    assert not in_cache("models/weights").exists()
    assert "models/weights: missing in DVC's cache" in findings()["results"]


def test_without_a_remote_the_cache_is_filled_from_the_outputs(healthy: Any) -> None:
    Path(".dvc/config").write_text("")
    damage("raw")
    damage("models/weights")
    assert main(repair=True) == 0
    assert findings() == {"remote": "there is no DVC remote, so these results are on this machine only"}


def test_a_fresh_clone_is_told_how_to_begin(healthy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(healthy.clone("fresh"))
    before = tree(Path.cwd())
    assert findings() == {"results": "nothing has run here yet"}
    assert main(repair=True) == 0
    assert tree(Path.cwd()) == before
    Path("dvc.lock").unlink()
    assert findings()["results"] == "nothing has run here yet"


def conflict(name: str) -> None:
    Path(name).write_text(f"<<<<<<< HEAD\n{Path(name).read_text()}=======\n>>>>>>> theirs\n")


def append(name: str, text: str) -> None:
    Path(name).write_text(Path(name).read_text() + text)


def settings(_: Any) -> None:
    Path("breedline").mkdir()
    Path("breedline/params.py").touch()
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("seed:", "sead:"))


def tables(kept: str, corrections: str = "") -> None:
    Path("data/kept.csv").write_text(kept)
    Path("data/corrections.csv").write_text(corrections or f"name,sha256,action,label,reason\na,{SHA},drop,,\n")


def no_commit(project: Any) -> None:
    """A tag whose commit is lost."""
    project.git("checkout", "--quiet", "--detach")
    project.git("commit", "--quiet", "--allow-empty", "--message", "lost")
    project.git("tag", "--annotate", "--message", "first", "classifier@v1.0.0")
    oid = project.git("rev-parse", "HEAD")
    project.git("checkout", "--quiet", "main")
    Path(".git/objects", oid[:2], oid[2:]).unlink()
    shutil.rmtree(".git/logs")


def gate(content: str) -> None:
    Path("decisions").mkdir()
    Path("decisions/20260101T000000Z-abababab.json").write_text(content)


NAMED: dict[str, tuple[Callable[[Any], object], str, str, bool]] = {
    "settings": (settings, "pipeline", r"sead", True),
    "params conflict": (lambda _: conflict("params.yaml"), "pipeline", r"^params\.yaml has git's marks", True),
    "lock conflict": (lambda _: conflict("dvc.lock"), "pipeline", r"^dvc\.lock has git's marks", True),
    "stages": (lambda _: Path("dvc.yaml").write_text("stages: {a: 1"), "pipeline", r"dvc\.yaml", True),
    "config": (lambda _: Path(".dvc/config").write_text("[core\nx"), "pipeline", r"config", True),
    "uncommitted": (lambda _: append("dvc.lock", "\n"), "pipeline", r"is not committed", False),
    "edited": (lambda _: append("raw/a.txt", "x"), "results", r"^raw: not as its stage", False),
    "deleted": (lambda _: shutil.rmtree("bundle"), "results", r"^bundle: missing$", False),
    "remote away": (
        lambda _: Path(".dvc/config").write_text("[core]\nremote = s\n['remote \"s\"']\nurl = http://127.0.0.1:9/\n"),
        "remote",
        r"DVC remote",
        True,
    ),
    "decision": (lambda _: gate("{}"), "decisions", r"is no decision of the gate", True),
    "corrections": (
        lambda _: tables("name,sha256,label,reason\n", f"name,sha256,action,label,reason\na,{SHA},burn,,\n"),
        "decisions",
        r"line 2: action 'burn'",
        True,
    ),
    "kept": (lambda _: tables("name\n"), "decisions", r"kept\.csv lacks the column", True),
    "both": (
        lambda _: tables(f"name,sha256,label,reason\na,{SHA.upper()},red,\n"),
        "decisions",
        r"^a: kept in data/kept\.csv, but data/corrections\.csv says otherwise",
        False,
    ),
    "tag": (no_commit, "versions", r"^the commit of classifier@v1\.0\.0 is not here$", True),
}


# DVC does not close the sessions of a remote that it cannot reach
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", NAMED)
def test_what_people_must_mend_is_named_and_left_alone(healthy: Any, fault: str) -> None:
    make, check, said, problem = NAMED[fault]
    make(healthy)
    found = findings()
    assert list(found) == [check]
    assert re.search(said, found[check])
    before = tree(healthy.work, cache_root())
    assert main(repair=True) == int(problem)
    assert tree(healthy.work, cache_root()) == before
    gc.collect()


def test_labels_that_are_kept_as_they_were_corrected_agree(healthy: Any) -> None:
    tables(f"name,sha256,label,reason\na,{SHA},red,\n", f"name,sha256,action,label,reason\na,{SHA},relabel,red,\n")
    assert findings() == {}


def test_results_that_are_not_committed_need_not_be_on_the_remote(healthy: Any) -> None:
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("epochs: 12", "epochs: 13"))
    healthy.run("dvc", "repro")
    assert set(findings()) == {"pipeline", "remote"}
    assert main(repair=False) == 0
    assert main(repair=True) == 0
    assert set(findings()) == {"pipeline"}


def test_while_a_stage_runs_its_files_are_left_alone(healthy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    leftovers(healthy)
    shutil.rmtree("raw")
    with FileLock(cache_dir("locks") / f"{folder_key(Path.cwd())}-label.lock"):
        assert main(repair=True) == 0
        assert set(findings()) == {"work"}
    assert "is at work here" in capsys.readouterr().out
    assert Path(".raw.partial/half").exists()
    rwlock({"write": {}, "read": {"raw": [{"pid": os.getpid(), "cmd": "dvc repro"}]}})
    assert set(findings()) == {"work"}
    os.utime(".dvc/tmp/rwlock", (MONTHS_AGO, MONTHS_AGO))  # then this process has only got the number of that one
    assert main(repair=True) == 0
    assert not Path(".dvc/tmp/rwlock").exists()
    assert not Path(".raw.partial").exists()


def test_after_a_jump_of_the_clock_what_lives_is_left_alone(healthy: Any) -> None:
    """All that was written before looks old, and who has noted what later looks as if it had come later."""
    unused("checkpoints")
    with FileLock(cache_dir("locks") / "elsewhere-train.lock"):
        assert findings() == {}
    assert set(findings()) == {"leftovers"}
    with subprocess.Popen([sys.executable, "-c", "input()", "dvc", "repro"], stdin=subprocess.PIPE) as dvc:
        rwlock({"write": {"raw": {"pid": dvc.pid, "cmd": "dvc repro"}}, "read": {}})
        os.utime(".dvc/tmp/rwlock", (MONTHS_AGO, MONTHS_AGO))
        assert "work" in findings()
        main(repair=True)
        assert Path(".dvc/tmp/rwlock").exists()
        dvc.communicate()
    assert main(repair=True) == 0
    assert not Path(".dvc/tmp/rwlock").exists()


def test_a_living_run_keeps_its_clone(healthy: Any) -> None:
    clone(healthy)
    with FileLock(cache_dir("workspaces") / "1.lock"):
        assert findings() == {}
        (cache_dir("workspaces") / "2").mkdir()
        (cache_dir("workspaces") / "2.lock").touch()
        assert main(repair=True) == 0
        assert (cache_dir("workspaces") / "1/.git").exists()
        assert not (cache_dir("workspaces") / "2").exists()


def test_what_only_looks_like_a_leftover_stays(healthy: Any) -> None:
    written = in_cache("raw").with_name(f".{'aB3_-' * 4}xY.tmp")  # by another dvc
    for name in (".notes.partial", "data/.mine.old", "raw.partial", ".mine.tmp", written):
        Path(name).write_text("precious")
    unused("downloads")
    assert main(repair=True) == 0
    assert Path(".notes.partial").exists()
    assert Path("data/.mine.old").exists()
    assert Path("raw.partial").exists()
    assert Path(".mine.tmp").exists()
    assert written.exists()
    assert (cache_dir("downloads") / "0123").exists()


def test_the_environment_is_compared_with_what_the_project_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ["dvc>=99", "no-such-package>=1; extra == 'pipeline'", "ray>=99; extra == 'ray'", "psutil>=1"]
    monkeypatch.setattr(checks.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(checks, "FREE", 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(5 * 10**8))
    cache = tmp_path / "cache" / "not/yet"
    monkeypatch.setenv("BREEDLINE_CACHE", str(cache))
    first, second, *full = checks.environment(Path())
    assert re.fullmatch(r"dvc is 3\.[\d.]+, not >=99", first.what)
    assert second.what == "no-such-package is absent, not >=1"
    assert [one.problem for one in (first, second, *full)] == [True, True, False, False]
    assert all("has 0.5 GB left" in one.what for one in full)
    assert not cache.exists()
    (tmp_path / "cache").write_text("a file")
    assert "is no folder that can be written to" in list(checks.environment(Path()))[-1].what


def test_a_server_that_is_set_and_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    (one,) = checks.server(Path())
    assert "no Prefect server answers at http://127.0.0.1:9/api" in one.what


def test_a_server_that_starts_is_given_time() -> None:
    dead_server(None)
    os.utime(cache_dir("serve") / "4200.env")
    assert not list(checks.server(Path()))


def test_a_name_cannot_command_the_terminal(healthy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tables(f"name,sha256,label,reason\n[red]\x1b[2J\u202e,{SHA},red,\n")
    main(repair=False)
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "[red] [2J" in said


BREAKABLE = [
    "params.yaml", "dvc.yaml", "dvc.lock", ".dvc/config", ".dvc/tmp/rwlock", ".dvc/tmp/lock", ".git/HEAD", ".git/index",
    ".git/config", "data/corrections.csv", "data/kept.csv", "decisions/x.json", "raw", "metrics/evaluate.json",
    ".dvc/cache", "../cache/serve/1.env", "../cache/workspaces/1.lock", "../cache/checkpoints", "../cache",
]  # fmt: skip


def absent(_: Path) -> None:
    pass


BREAKS: dict[str, Callable[[Path], object]] = {
    "absent": absent,
    "empty": lambda path: path.touch(),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "words": lambda path: path.write_text("- {a: [\n"),
    "folder": lambda path: (path / "in/it").mkdir(parents=True),
    "loop": lambda path: path.symlink_to(path),
}


@pytest.mark.long
@pytest.mark.parametrize("how", BREAKS)
def test_whatever_is_broken_is_a_finding_and_no_traceback(
    healthy: Any, monkeypatch: pytest.MonkeyPatch, how: str, long: bool
) -> None:
    cache, whole = healthy.work.parent / "cache", healthy.work.parent / "whole"
    monkeypatch.setenv("BREEDLINE_CACHE", str(cache))
    shutil.copytree(healthy.work, whole, symlinks=True)
    for name in BREAKABLE if long else BREAKABLE[list(BREAKS).index(how) :: len(BREAKS)]:
        path = healthy.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        BREAKS[how](path)
        assert main(repair=True) in (0, 1), name
        monkeypatch.chdir(healthy.work.parent)
        for folder in (healthy.work, cache):
            shutil.rmtree(folder, ignore_errors=True)
            folder.unlink(missing_ok=True)
        shutil.copytree(whole, healthy.work, symlinks=True)
        monkeypatch.chdir(healthy.work)


def test_in_a_folder_that_is_no_project_it_says_so(tmp_path: Path) -> None:
    program = "import sys; from flows.doctor import main; code = main(True); print(sorted({'prefect', 'torch', 'fastai'} & set(sys.modules))); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "work", env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "problem  pipeline: there is no DVC repository here" in done.stdout
    assert done.stdout.endswith("\n[]\n")
    assert done.stderr == ""
    assert not list((tmp_path / "work").iterdir())
