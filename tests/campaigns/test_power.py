"""The power fails at random moments, on a disk that loses what was not synced (tests/campaigns/lazy_fs.py).

What was answered as saved stays: a decision about a suspect, a checkpoint, a download, a fetched bundle. `dvc repro` is
started again, and its power cut again, until it has run through: then there are the bytes of an undisturbed run. DVC syncs
nothing, neither the objects of its cache nor dvc.lock, and takes an object for whole whatever is left of it: so after a
power loss `breedline doctor --repair` comes first. What becomes of a run that goes on without it is counted, too.
"""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from breedline.bundle import read_bundle
from breedline.checkpoints import Checkpoints
from breedline.decisions import Decisions
from breedline.fetch import fetch
from flows.predict import fetched_bundle
from flows.repo import cut_off
from tests.breedline.test_fetch import CONTENT, Server, host
from tests.breedline.test_fetch import serve as serve
from tests.campaigns.counts import keep, table
from tests.campaigns.lazy_fs import ROOT, Disk, lacking
from tests.campaigns.run import SECONDS_TO_FINISH, Run, left
from tests.project import Project

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(bool(lacking()), reason=lacking()),
]
SECONDS = 6.0
"""Within which the power fails, once a stage has begun."""
MOST = 5
"""Power losses of one project, since little is left of a run that was cut."""
CAREFUL = 0.8
"""Share of runs in which the doctor looks after each power loss."""
FIRST = "duplicates"
"""The stage that the short form makes, with those before it."""
NAMED = re.compile(r"'(?:\./)?(dvc\.lock|\.dvc/tmp/rwlock)'")
KINDS = {
    "dvc.lock": "dvc.lock",
    "rwlock": ".dvc/tmp/rwlock",
    "cache": "objects of DVC's cache",
    "": "what was half written",
}
"""What the doctor has mended, by a word of the line that says so."""
DECIDE = """
import sys
from pathlib import Path
from breedline.decisions import Decision, Decisions

first, *tables = sys.argv[1:]
images = {f"{int(first) + number:064x}": "cat" for number in range(1000)}
decisions = Decisions(*map(Path, tables), images)
for image in images:
    for action, label in (("keep", "cat"), ("relabel", "dog"), ("drop", "")):
        former = {"keep": None, "relabel": "cat", "drop": "dog"}[action]
        decisions.decide(Decision(f"{image}.jpg", image, action, label, "a reason"), former)
        print(image, action, flush=True)
"""
FETCH = """
import sys
from breedline.fetch import fetch

print("begins", flush=True)
print(fetch(sys.argv[1], None, timeout=60, max_bytes=1e9), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def chance() -> random.Random:
    seed = int(os.environ.get("BREEDLINE_SEED", random.randrange(1 << 32)))  # noqa: S311 - not a secret
    print(f"seed {seed}")
    return random.Random(seed)  # noqa: S311


@pytest.fixture
def disk(tmp_path: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk that is on, and has the cache."""
    disk = Disk(tmp_path / "behind", tmp_path / "disk", chance)
    monkeypatch.setenv("BREEDLINE_CACHE", str(disk.mounted / "cache"))
    disk.on()
    yield disk
    disk.off()


def until_cut(disk: Disk, seconds: float, program: str, *arguments: str) -> list[str]:
    """What a program has said before the power fails, `seconds` after its first line."""
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        first = process.stdout.readline()
        time.sleep(seconds)
        process.kill()
        said = [first, *process.stdout]
    disk.cut()
    return [line.rstrip("\n") for line in said if line.endswith("\n")]


def test_a_decision_that_was_answered_as_saved_is_there(disk: Disk, chance: random.Random, long: bool) -> None:
    tables = disk.mounted / "corrections.csv", disk.mounted / "kept.csv"
    told: dict[str, str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for first in range(0, 100_000 if long else 3000, 1000):
        said = until_cut(disk, chance.uniform(0, 0.5), DECIDE, str(first), *map(str, tables))
        told.update(line.split() for line in said)
        labels = dict.fromkeys((f"{first + number:064x}" for number in range(1000)), "cat") | dict.fromkeys(told, "cat")
        found = Decisions(*tables, labels).read()
        last = said[-1].split()[0]
        for image, action in told.items():  # the last one may have been replaced, and the answer not given
            assert found[image].action == action or (image == last and found[image].action in ("relabel", "drop"))
        told = {image: decision.action for image, decision in found.items()}
        counts["decisions answered as saved", "there"] += len(said)
        counts["power losses", "there"] += 1
    keep("power_decisions", counts)
    print(table(counts, "decisions", "together"))


def test_a_checkpoint_that_was_kept_is_there(disk: Disk, long: bool) -> None:
    for epoch in range(1, 101 if long else 6):
        Checkpoints({"a": 1}).keep_epoch(epoch, {"weights": torch.full((5000,), float(epoch))})
        disk.cut()
        state = Checkpoints({"a": 1}).latest_epoch()
        assert state
        assert state["weights"].eq(epoch).all()


def test_a_download_is_never_taken_for_whole_when_it_is_not(
    disk: Disk, chance: random.Random, serve: Callable[..., Server], long: bool
) -> None:
    """Of a url without a hash in params.yaml, whose content changes: some are cut off as they arrive, some after."""
    server = serve()
    for version in range(60 if long else 6):
        content, etag = bytes([version]) + CONTENT * 3, f'"{version}"'
        sent = chance.choice([None, None, chance.randrange(len(content))])
        server.asked.clear()
        server.answers = (host(content, sent, 60, ETag=etag),)
        until_cut(disk, chance.uniform(0.1, 0.4), FETCH, server.url)
        server.answers = (host(content, ETag=etag),)
        assert fetch(server.url, None, timeout=5, max_bytes=1e9).read_bytes() == content


def test_a_fetched_bundle_is_whole_or_fetched_again(ran: tuple[Project, list[str]], disk: Disk, long: bool) -> None:
    root = ran[0].folder
    for _ in range(30 if long else 3):
        fetched_bundle(root, "HEAD")
        disk.cut()
        bundle = fetched_bundle(root, "HEAD")
        read_bundle(bundle)
        shutil.rmtree(bundle)


# dvc repro


def recorded(project: Project) -> dict[str, str]:
    """The hash of each output that dvc.lock has; nothing where it is missing or makes no sense."""
    try:
        stages = YAML(typ="safe").load(project.folder / "dvc.lock")["stages"].values()
        return {out["path"]: out["md5"] for stage in stages for out in stage["outs"]}
    except (FileNotFoundError, YAMLError, LookupError, TypeError, AttributeError):
        return {}


def damaged(project: Project) -> list[Path]:
    """The objects of DVC's cache that are not what their names say."""
    objects = (path for path in (project.folder / ".dvc/cache/files/md5").glob("??/*") if path.suffix != ".tmp")
    return [path for path in objects if _md5(path) != f"{path.parent.name}{path.stem}"]


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def doctor(project: Project) -> Counter[str]:
    """How often `breedline doctor --repair` has mended what; all that is left then are warnings."""
    command = ["breedline", "doctor", "--repair"]
    done = subprocess.run(command, cwd=project.folder, env=project.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    mended = re.findall(r"^repair   (.*)$", done.stdout, re.MULTILINE)
    assert not [line for line in mended if line.startswith("failed")], mended
    return Counter(next(kind for word, kind in KINDS.items() if word in line) for line in mended)


def disturbed(project: Project, disk: Disk, stages: list[str], chance: random.Random) -> Iterator[tuple[str, str]]:
    """Run `dvc repro` and cut its power, until one has run through: what was at work each time, or what one that failed said."""
    cuts = 1 if stages else chance.randint(1, MOST)
    while True:
        run = Run(project, *stages)
        run.begins()
        try:
            if run.dvc.wait(chance.uniform(0, SECONDS) if cuts else SECONDS_TO_FINISH) == 0:
                return
            yield "", run.said.read_text()
        except subprocess.TimeoutExpired:
            at_work = run.at_work()
            run.kill(signal.SIGKILL, "all")
            run.ends()
            disk.cut()
            cuts -= 1
            yield at_work, ""


def test_dvc_repro_ends_with_the_same_bytes(
    fresh: Project,
    preloaded: str,
    tmp_path: Path,
    disk: Disk,
    chance: random.Random,
    long: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted, stages = (int(os.environ.get("BREEDLINE_POWER_LOSSES", 300)), []) if long else (1, [FIRST])
    undisturbed = fresh.copy(tmp_path / "undisturbed", PATH=preloaded)
    undisturbed.repro(*stages)
    truth, right = left(undisturbed), recorded(undisturbed)
    counts: Counter[tuple[str, str]] = Counter()
    outcomes: Counter[str] = Counter()
    while counts.total() < wanted:
        shutil.copytree(fresh.folder, disk.behind / "project")
        project = Project(disk.mounted / "project", PATH=preloaded)
        careful = not long or chance.random() < CAREFUL

        for at_work, said in disturbed(project, disk, stages, chance):
            if at_work:
                counts[at_work, "then the doctor" if careful else "then dvc repro"] += 1
                keep("power", counts, outcomes=outcomes)
            if careful:
                assert not said, said
                outcomes.update(doctor(project))
                assert damaged(project) == []
            elif said:
                assert "Traceback" not in said
                named = NAMED.search(said)
                outcomes[f"without the doctor: {named[1] if named else 'another line'}"] += 1
                if named:
                    (project.folder / named[1]).unlink()
                else:
                    doctor(project)
        wrong = [path for path, md5 in recorded(project).items() if right[path] != md5]
        if careful:
            assert wrong == []
        else:
            bad = bool(damaged(project))
            outcomes[
                f"without the doctor, at the end: {'wrong' if wrong else 'damaged cache' if bad else 'whole'}"
            ] += 1
            assert bool(doctor(project)) == bad
            project.repro(*stages)
        doctor(project)
        for temporary in cut_off(project.folder, float("inf")):
            temporary.unlink()
        assert wrong or left(project) == truth
        shutil.rmtree(project.folder)
        shutil.rmtree(project.folder.with_name("project-home"))
        keep("power", counts, outcomes=outcomes)
    with capsys.disabled():
        print(f"\n{dict(outcomes)}\n{table(counts, 'at work', 'power losses')}")
