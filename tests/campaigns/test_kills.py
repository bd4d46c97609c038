"""`dvc repro` killed at random moments, until it has run through: the bytes are those of an undisturbed run, and nothing is left.

A kill is a signal to all processes, as a terminal, a shutdown or the OOM killer of a container send it; to dvc alone;
or to the stage alone. What was at work at that moment is counted (tests/campaigns/counts.py).

DVC writes dvc.lock and .dvc/tmp/rwlock in place. A kill within these milliseconds leaves one of them cut short; then each
command of dvc ends with a line that names the file. The remedy is counted, too: the file is removed, and DVC's run-cache
has what was done. It leaves temporary files behind, too, mostly empty ones, which `breedline doctor --repair` removes.
A dvc.lock that was cut short and can be read nevertheless may lack `hash: md5`; then DVC 3 hashes as DVC 2 did, once.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

from flows.repo import cut_off, empty_runs
from tests.campaigns.counts import keep, table
from tests.campaigns.run import TAKEN, Run, left
from tests.project import STAGES, Project

STAGES_TO_BEGIN = 3
"""At most, before a run is killed, so that no stage is killed again and again until it happens to get through."""
SECONDS = 6.0
"""Within which it then is: mostly within one, as many a stage takes less."""
AT_THE_START = 0.1
"""Share of kills that come as dvc starts."""
LEFT_ALONE = 0.03
"""Share of runs that nothing happens to."""
SIGNALS = {signal.SIGKILL: 8, signal.SIGTERM: 1, signal.SIGINT: 1}
VICTIMS = ["all", "the stage", "dvc"]
IN_PLACE = ["dvc.lock", ".dvc/tmp/rwlock"]


def disturb(project: Project, chance: random.Random, counts: Counter[tuple[str, str]]) -> list[str]:
    """Kill one run after the other, until one has run through; the files of DVC's own that were removed for it."""
    removed: list[str] = []
    while True:
        run = Run(project)
        if chance.random() >= LEFT_ALONE:
            if chance.random() >= AT_THE_START:
                run.begins(chance.randint(1, STAGES_TO_BEGIN))
            try:
                code = run.dvc.wait(SECONDS * chance.random() ** 3)
            except subprocess.TimeoutExpired:
                (number,) = chance.choices(list(SIGNALS), list(SIGNALS.values()))
                at_work = run.at_work()
                # Ctrl-C reaches more than dvc, which minds none while a stage is at work
                victim = run.kill(number, chance.choice(VICTIMS[:2] if number == signal.SIGINT else VICTIMS))
                counts[at_work, f"{number.name} to {victim}"] += 1
                if run.ends() == 0:
                    return removed
                continue
        else:
            code = run.ends()
        if code == 0:
            return removed
        said = run.said.read_text()
        if "join() argument must be" in said:  # what dvc makes of a folder of its run-cache that is still empty
            for folder in empty_runs(project.folder):
                folder.rmdir()
                removed.append("an empty folder of the run-cache")
            continue
        if TAKEN.search(said):
            removed.append("a file of the run-cache, by the other dvc")
            continue
        cut = next((name for name in IN_PLACE if re.search(rf"'(\./)?{re.escape(name)}'", said)), None)
        assert cut, said
        (project.folder / cut).unlink()
        removed.append(cut)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    ran: tuple[Project, list[str]],
    fresh: Project,
    preloaded: str,
    tmp_path: Path,
    long: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = int(os.environ.get("BREEDLINE_KILLS", 1000 if long else 5))
    seed = int(os.environ.get("BREEDLINE_SEED", random.randrange(1 << 32)))  # noqa: S311 - not a secret
    chance, truth, start = random.Random(seed), left(ran[0]), time.monotonic()  # noqa: S311
    counts: Counter[tuple[str, str]] = Counter()
    cut: Counter[str] = Counter()
    completed = 0
    while counts.total() < wanted:
        project = fresh.copy(tmp_path / "project", PATH=preloaded)
        try:
            cut.update(disturb(project, chance, counts))
            for temporary in cut_off(project.folder, float("inf")):
                temporary.unlink()
                cut["temporary files"] += 1
            for old in (project.folder / ".dvc/cache").glob("??/*"):
                old.unlink()
                cut["objects as DVC 2 kept them"] += 1
            assert left(project) == truth
            assert project.repro()[0] == []
        except BaseException:  # Ctrl-C, too: the counts so far and the seed are told, and it goes on its way
            keep("kills", counts, seed=seed, failed=True)
            print(f"seed {seed}, after {counts.total()} kills, {completed} runs")
            raise
        for lock in Path(project.environment["BREEDLINE_CACHE"]).rglob("*.lock"):
            FileLock(lock).acquire(blocking=False).lock.release()
        shutil.rmtree(project.folder)
        shutil.rmtree(tmp_path / "project-home")
        completed += 1
        minutes = round((time.monotonic() - start) / 60, 1)
        keep("kills", counts, seed=seed, completed=completed, cut=cut, minutes=minutes)
    with capsys.disabled():
        print(
            f"\n{completed} runs completed, files of DVC removed: {dict(cut)}, seed {seed}\n{table(counts, 'at work', 'kills')}"
        )
    assert {at_work for at_work, _ in counts} <= {*STAGES, "dvc: starts", "dvc: records"}
