"""A disk that gets full, or is read-only, under each stage: one line that names it, no output that looks done, and then the right bytes."""

import random
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.campaigns.counts import keep, table
from tests.project import STAGES, Project, hashes

pytestmark = [pytest.mark.slow, pytest.mark.long]
COUNTS: Counter[tuple[str, str]] = Counter()
PAGE = 4096


class Disk:
    """A file system in memory, of as many bytes as wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=False, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.unmount()


@pytest.fixture(scope="module", autouse=True)
def _kept() -> Iterator[None]:
    """The counts, printed at the end."""
    yield
    keep("disk", COUNTS)
    if COUNTS:
        print(f"\n{table(COUNTS, 'stage', 'runs')}")


def _started(project: Project, words: list[str]) -> tuple[int, str]:
    """The exit code of a stage and the last line that it said; it has no traceback."""
    done = subprocess.run(words, cwd=project.folder, env=project.environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip().split("\n")[-1]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size + PAGE for path in folder.rglob("*"))


def _ready(project: Project, deps: list[str], folder: Path) -> None:
    """Put what a stage reads into `folder`, as links to the project's."""
    for name in ["stages", "breedline", "params.yaml", *deps]:
        link = folder / name
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(project.folder / name)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("where", ["outputs", "cache"])
def test_a_stage_without_room_says_so_and_has_the_right_bytes_once_there_is(
    ran: tuple[Project, list[str]], preloaded: str, tmp_path: Path, disk: Disk, where: str, long: bool
) -> None:
    finished = ran[0]
    own = tmp_path / "own"
    cache, folder = (own, disk.folder) if where == "outputs" else (disk.folder, own)
    project = Project(folder, PATH=preloaded, BREEDLINE_CACHE=str(cache))
    for stage in STAGES if long else ["presize"]:
        recorded = YAML(typ="safe").load(finished.lock())["stages"][stage]
        words, outs = shlex.split(recorded["cmd"]), [out["path"] for out in recorded["outs"]]
        truth = {path: hashes(finished.folder / path) for path in outs}

        def begin(options: str) -> None:
            """With nothing done, on a disk of another size."""
            disk.unmount()
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir()
            disk.mount(options)
            _ready(finished, [dep["path"] for dep in recorded["deps"]], folder)  # noqa: B023 - called in its turn

        begin("size=1g")
        assert _started(project, words)[0] == 0
        size = _size(disk.folder)
        for share in [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95] if long else [random.random()]:  # noqa: S311
            begin(f"size={max(int(size * share), PAGE)}")
            code, line = _started(project, words)
            COUNTS[stage, f"{where}: {'disk full' if code else 'enough room'}"] += 1
            if code:
                assert code == 1
                assert line.startswith(f"error: {stage}: No space left on device"), line
                assert "free some space" in line
            for path in outs:  # what has the name of an output is all of it, or DVC would remove it
                assert code or hashes(folder / path) == truth[path]
            disk.remount("size=1g")
            shutil.rmtree(folder / "reports", ignore_errors=True)  # as DVC does
            _ready(finished, [dep["path"] for dep in recorded["deps"]], folder)
            assert _started(project, words)[0] == 0
            assert {path: hashes(folder / path) for path in outs} == truth
            assert not [*folder.rglob(".*.partial"), *folder.rglob(".*.old")]
        begin("size=1g")
        disk.remount("ro")
        code, line = _started(project, words)
        COUNTS[stage, f"{where}: {'read-only' if code else 'not needed'}"] += 1
        assert not code or line.startswith(f"error: {stage}: Read-only file system"), line
        if where == "outputs":
            assert code == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_dvc_s_cache_without_room_is_told_and_filled_by_dvc_commit(
    ran: tuple[Project, list[str]], fresh: Project, preloaded: str, tmp_path: Path, disk: Disk, share: float, long: bool
) -> None:
    """DVC says so, but goes on: what it records is right, though its cache lacks it. A publish finds that out."""
    if share != 0.3 and not long:
        pytest.skip("`make test-long` has disks of other sizes")
    project = fresh.copy(tmp_path / "project", PATH=preloaded)
    raw = project.folder / "data/raw"
    disk.mount(f"size={max(int(_size(ran[0].folder / 'data/raw') * share), PAGE)}")
    project.run("dvc", "cache", "dir", "--local", str(disk.folder))
    _, said = project.repro("download")
    assert "No space left on device" in said
    disk.remount("size=1g")
    project.run("dvc", "commit", "--force", "download")
    assert project.outs("download") == ran[0].outs("download")
    shutil.rmtree(raw)
    project.run("dvc", "checkout", "download")
    assert hashes(raw) == hashes(ran[0].folder / "data/raw")
    COUNTS["dvc's cache", "outputs: disk full"] += 1
