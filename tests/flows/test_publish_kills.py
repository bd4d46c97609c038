"""A publish, killed before each system call that changes something: the commit and its tags are there, or neither is.

The calls are counted first (traced.py). The next publish is, as an unattended run's is, from a clone of its own.

Where the git that serves the remote is killed itself, while it moves one ref after the other (it keeps each in a file),
even `--atomic` leaves the first ones: the branch, the version, and then what is in production. That is counted.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.git_command import git
from flows.publish import changed, commit
from flows.registry import in_production
from flows.workspace import Workspace
from tests.campaigns.counts import keep, table
from tests.flows.test_publish import SETTLED, decision, files_of, tags_of

ROOT = Path(__file__).parents[2]
VICTIMS = ("here", "all", "one")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(
        (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="knows the system calls of x86-64"
    ),
]


@pytest.fixture
def publish(tmp_path: Path) -> Iterator[Callable[[Path, int, str], tuple[list[str], int]]]:
    """A function that publishes from a folder, killed before a call: the calls there were, and the exit code."""
    command = [sys.executable, "-m", "tests.flows.traced"]
    git = Path(shutil.which("git") or "").parent  # comes first, or execve would be tried elsewhere, too
    environment = os.environ | {"PATH": f"{git}{os.pathsep}{os.environ['PATH']}"}
    with (
        (tmp_path / "said").open("wb") as said,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        ) as process,
    ):
        assert process.stdin
        assert process.stdout

        def order(root: Path, at: int, victims: str) -> tuple[list[str], int]:
            order = {"root": str(root), "branch": "main", "decision": "decisions/1.json", "at": at, "victims": victims}
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline() or "null")
            if not answer:
                pytest.skip(f"processes cannot be traced here: {(tmp_path / 'said').read_text().splitlines()[-1]}")
            return answer["calls"], answer["code"]

        yield order


def test_a_publish_that_is_killed_anywhere_is_whole_or_did_not_happen(
    project: Any,
    trained: Workspace,
    publish: Callable[[Path, int, str], tuple[list[str], int]],
    tmp_path: Path,
    long: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    decision(trained.root)
    before, origin = project.tip(), project.origin
    pristine = shutil.copytree(origin, tmp_path / "pristine.git")

    def again() -> Path:
        """A clone that is yet to be published; the origin is as it was."""
        shutil.rmtree(origin)
        shutil.copytree(pristine, origin)
        shutil.rmtree(tmp_path / "clone", ignore_errors=True)
        return shutil.copytree(trained.root, tmp_path / "clone")

    publish(again(), 0, "all")  # makes what all others find, such as DVC's databases
    calls, code = publish(again(), 0, "all")
    assert code == 0
    _assert_published(project, before)
    many = Counter(calls)
    points = range(1, len(calls) + 1, 1 if long else len(calls) // 4)
    counts: Counter[tuple[str, str]] = Counter()
    visible = locked = torn = 0
    for victims in VICTIMS if long else VICTIMS[:1]:
        for number in points:
            seen, code = publish(again(), number, victims)
            name = seen[number - 1] if len(seen) >= number else "none any more"
            counts[name, f"kills of {victims}"] += 1
            visible += project.tip() != before
            shutil.rmtree(tmp_path / "clone")
            if victims != "here" and project.tip() != before and len(tags_of(project)) < 2:
                torn += 1
                assert set(tags_of(project)) <= {"classifier@v1.0.0"}
                project.git("fsck", "--no-dangling", at=project.origin)
                continue
            _assert_whole(project, before)
            locked += _publish_again(project, trained, tmp_path / "next")
            _assert_published(project, before)
            keep("publish", counts, calls=many, visible=visible, locked=locked, torn=torn)
    with capsys.disabled():
        print(f"\n{many.total()} calls: {dict(many)}")
        print(f"{visible} were published before the kill, {locked} left a lock in the remote, {torn} some of the refs")
        print(table(counts, "before the call", "kills"))


def _assert_whole(project: Any, before: str) -> None:
    tip = project.tip()
    if tip == before:
        assert tags_of(project) == {}
    else:
        _assert_published(project, before)
    project.git("fsck", "--no-dangling", at=project.origin)


def _assert_published(project: Any, before: str) -> None:
    tip = project.tip()
    assert tags_of(project) == {"classifier#prod#1": tip, "classifier@v1.0.0": tip}
    assert project.git("rev-parse", "main~1", at=project.origin) == before
    assert files_of(project, "main") == SETTLED | {"decisions/1.json"}


def _publish_again(project: Any, trained: Workspace, root: Path) -> bool:
    """What the next run does; whether a lock of the remote's git had to be removed for it."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(trained.root, root)
    git(root, "fetch", "--quiet", "--tags", "origin")
    git(root, "reset", "--quiet", "origin/main")
    locks = [path for path in project.origin.rglob("*.lock") if path.is_file()]
    for lock in locks:
        lock.unlink()
    if changed(root):
        commit(Workspace(root, "main"), "ours", "decisions/1.json")
    else:
        assert in_production(root)
    return bool(locks)
