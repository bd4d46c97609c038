"""Two clones that share the caches of one machine, at work at once, one of which is killed again and again.

Both end with the bytes of an undisturbed run. `breedline doctor` finds nothing in the one that nobody has killed, and in
the other only what the kills have left, which `--repair` removes.
"""

import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from flows.repo import cut_off
from tests.campaigns.counts import keep, table
from tests.campaigns.run import TAKEN, Run, left
from tests.campaigns.test_kills import disturb
from tests.project import Project

EXPECTED = ("environment", "pipeline", "remote")
"""What the doctor may have warnings about: little room on the disk, a dvc.lock that is not committed, no remote."""


def _diagnosis(project: Project, *options: str) -> list[str]:
    """What the doctor finds, or repairs, but for what it is right about."""
    lines = project.run("breedline", "doctor", *options).splitlines()
    return [line for line in lines if re.match("repair|problem|warning", line) and line.split()[1][:-1] not in EXPECTED]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_clones_that_share_a_cache_leave_each_other_alone(
    ran: tuple[Project, list[str]],
    fresh: Project,
    preloaded: str,
    tmp_path: Path,
    long: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not long:
        pytest.skip("`make test-long` does it: a round takes a minute")
    rounds = int(os.environ.get("BREEDLINE_ROUNDS", 30))
    seed = int(os.environ.get("BREEDLINE_SEED", random.randrange(1 << 32)))  # noqa: S311 - not a secret
    chance, truth = random.Random(seed), left(ran[0])  # noqa: S311
    counts: Counter[tuple[str, str]] = Counter()
    facts: Counter[str] = Counter()
    for number in range(rounds):
        folder = tmp_path / str(number)
        shared = {"BREEDLINE_CACHE": str(folder / "home"), "DVC_SITE_CACHE_DIR": str(folder / "site")}
        calm, killed = (fresh.copy(folder / name / "project", PATH=preloaded, **shared) for name in ("calm", "killed"))
        for clone in (calm, killed):
            clone.run("dvc", "config", "--quiet", "--local", "cache.dir", str(folder / "cache"))
        run = Run(calm)
        facts.update(disturb(killed, chance, counts))
        while run.ends():
            assert TAKEN.search(run.said.read_text()), f"seed {seed}, round {number}: {run.said.read_text()}"
            facts["a file of the run-cache, by the other dvc"] += 1
            run = Run(calm)
        assert _diagnosis(calm) == [], f"seed {seed}, round {number}"
        assert all(line.startswith("repair   removed ") for line in _diagnosis(killed, "--repair"))
        assert _diagnosis(killed) == [], f"seed {seed}, round {number}"
        assert [clone.repro()[0] for clone in (calm, killed)] == [[], []]
        for temporary in cut_off(killed.folder, float("inf")):
            temporary.unlink()
            facts["temporary files"] += 1
        for unused in (
            folder / "home/checkpoints"
        ).iterdir():  # DVC's cache had the result, of the other clone's training
            shutil.rmtree(unused)
            facts["checkpoints that nobody needs"] += 1
        assert left(calm, folder / "cache") == left(killed, folder / "cache") == truth, f"seed {seed}, round {number}"
        keep("clones", counts, seed=seed, rounds=number + 1, facts=facts)
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{rounds} rounds, {dict(facts)}, seed {seed}\n{table(counts, 'at work', 'kills')}")
