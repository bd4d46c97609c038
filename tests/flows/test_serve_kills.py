"""What SIGKILLs of stages, runs, the worker and the server leave behind: a branch and a remote that are whole, and nothing else."""

import itertools
import os
import random
import time
from collections import Counter

import pytest

from flows.remote import missing, stored
from flows.service import STEADY
from tests.campaigns.counts import keep, table
from tests.flows.served import Served, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ENGINE = "prefect.engine|flow-run execute"
VICTIMS = {"the run": ENGINE, "the worker": "worker start", "the server": "prefect server start|uvicorn"}


@pytest.mark.long
def test_nothing_is_lost_or_left_behind_by_kills(
    served: Served, long: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = int(os.environ.get("BREEDLINE_KILLS", 100 if long else 4))
    chance, victims = random.Random(), itertools.cycle(VICTIMS)  # noqa: S311 - not a secret
    counts: Counter[tuple[str, str]] = Counter()
    limit = next(limit["id"] for limit in served.ask("v2/concurrency_limits/filter"))
    served.ask(f"v2/concurrency_limits/{limit}", "PATCH", limit=wanted)
    runs, last = 0, dict.fromkeys(VICTIMS, -STEADY)
    while counts.total() < wanted:
        runs += 1
        victim = next(victims)
        time.sleep(max(0, last[victim] + STEADY - time.monotonic()))  # serve gives up what ends five times in a row
        run = served.start(publish=True, overrides={"train.epochs": 100 + runs, "label.seed": 10 + runs})
        until(lambda: served.processes("repro"))
        time.sleep(chance.uniform(0.5, 3))
        killed = ["a stage"] * bool(served.kill(r"^sh -c|^sleep|train\.py"))
        time.sleep(chance.uniform(0, 4))
        killed += [victim] * bool(served.kill(VICTIMS[victim]))
        last[victim] = time.monotonic()
        until(lambda: not served.processes(rf"repro|train\.py|{ENGINE}"), 60)
        ended = served.ended(run)
        assert ended in ("Crashed", "Published"), served.log.read_text()
        _assert_whole(served)
        counts.update((each, f"the run ends as {ended}") for each in killed)
        keep("prefect", counts)
    assert served.ended(served.start(publish=True, overrides={"train.epochs": 500})) == "Published"
    until(lambda: served.slots() == 0, 150)
    assert not (served.folder / "cache/workspaces/1").exists()
    with capsys.disabled():
        print(f"\n{runs} runs\n{table(counts, 'killed', 'kills')}")


def test_a_stage_that_is_killed_is_taken_up_again(served: Served) -> None:
    run = served.start(publish=True, overrides={"train.epochs": 600, "train.base_lr": 2})
    until(lambda: served.kill(r"train\.py"))
    assert served.ended(run) == "Published"


def _assert_whole(served: Served) -> None:
    """What the branch says is on the remote."""
    clone = served.folder / "clone"
    served.shell(f"rm -rf {clone} && git clone -q origin.git {clone}", served.folder)
    assert missing(clone, stored(clone)) == []
