"""dvc.lock cut short, objects of DVC's cache damaged, two runs at once: one clear line, or the right bytes."""

import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.campaigns.counts import keep, table
from tests.project import STAGES, Project, hashes

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]
FOLDERS = ("data", "metrics", "models", "reports")


@pytest.fixture
def project(ran: tuple[Project, list[str]], tmp_path: Path, preloaded: str) -> Project:
    """A copy of the finished project, to work on."""
    return ran[0].copy(tmp_path / "project", PATH=preloaded)


def _all(project: Project) -> dict[str, dict[str, str]]:
    return {folder: hashes(project.folder / folder) for folder in FOLDERS}


def test_a_lock_that_is_cut_short_anywhere(project: Project, long: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path, whole, truth = project.folder / "dvc.lock", project.lock(), _all(project)
    counts: Counter[tuple[str, str]] = Counter()
    places = range(20) if long else random.sample(range(20), 1)
    for place in places:
        path.write_bytes(whole[: len(whole) * place // 20])
        done = subprocess.run(
            ["dvc", "repro"], cwd=project.folder, env=project.environment, capture_output=True, text=True, timeout=240
        )
        if done.returncode:
            counts["dvc.lock", "named in a line"] += 1
            assert "'./dvc.lock'" in done.stderr
            assert "Traceback" not in done.stderr
            path.unlink()
            assert project.repro()[0] == []  # all from the run-cache
        else:
            counts["dvc.lock", "whole again"] += 1
        assert project.lock() == whole
        assert _all(project) == truth
    keep("lock", counts)
    with capsys.disabled():
        print(f"\n{table(counts, 'cut', 'cuts')}")


def _objects(project: Project, stage: str) -> list[Path]:
    """The objects of the cache that the outputs of a stage consist of."""
    objects = []
    for out in YAML(typ="safe").load(project.lock())["stages"][stage]["outs"]:
        path = project.folder / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]
        objects += [path] if path.exists() else []
        if path.suffix == ".dir":
            entries = YAML(typ="safe").load(path.read_text())
            objects += [path.parents[1] / each["md5"][:2] / each["md5"][2:] for each in entries]
    return objects


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "gone"])
def test_damaged_objects_of_the_cache(
    project: Project, tmp_path: Path, damage: str, long: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a program that made them writable; DVC takes an object that is read-only, as it leaves them, for whole."""
    lock, truth = project.lock(), _all(project)
    counts: Counter[tuple[str, str]] = Counter()
    for stage in STAGES if long else random.sample(STAGES, 1):
        damaged = project.copy(tmp_path / stage, PATH=project.environment["PATH"])
        outs = [damaged.folder / out["path"] for out in damaged.outs(stage)]
        path = random.choice([path for path in _objects(damaged, stage) if path.stat().st_size])  # noqa: S311
        path.chmod(0o644)
        content = bytearray(path.read_bytes())
        if damage == "gone":
            path.unlink()
        elif damage == "cut short":
            path.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        for out in outs:
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        done = subprocess.run(
            ["dvc", "repro"], cwd=damaged.folder, env=damaged.environment, capture_output=True, text=True, timeout=240
        )
        assert "Traceback" not in done.stderr, done.stderr
        right = damaged.lock() == lock and _all(damaged) == truth
        counts[stage, f"{damage}: {'the right bytes' if right else 'a line' if done.returncode else 'WRONG'}"] += 1
        assert right or done.returncode, f"{stage}, {path}: {done.stdout} {done.stderr}"
        shutil.rmtree(damaged.folder)
    keep(f"cache-{damage.replace(' ', '-')}", counts)
    with capsys.disabled():
        print(f"\n{table(counts, 'stage', 'objects')}")


def test_two_runs_at_once(fresh: Project, ran: tuple[Project, list[str]], tmp_path: Path, preloaded: str) -> None:
    project = fresh.copy(tmp_path / "project", PATH=preloaded)
    options = {"cwd": project.folder, "env": project.environment, "text": True, "stderr": subprocess.PIPE}
    with subprocess.Popen(["dvc", "repro"], **options) as one, subprocess.Popen(["dvc", "repro"], **options) as other:
        said = [run.communicate(timeout=240)[1] for run in (one, other)]
    assert 0 in (one.returncode, other.returncode), said
    assert not any("Traceback" in each for each in said), said
    project.repro()
    assert (project.lock(), _all(project)) == (ran[0].lock(), _all(ran[0]))
