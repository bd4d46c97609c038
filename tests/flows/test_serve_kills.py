"""What SIGKILLs of stages, of runs and of the worker leave behind: a branch and a remote that are whole, and nothing else."""

import itertools
import random
import time

import pytest

from flows.remote import missing, stored
from tests.flows.served import Served, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ENGINE = "prefect.engine|flow-run execute"


@pytest.mark.long
def test_nothing_is_lost_or_left_behind_by_kills(served: Served, long: bool) -> None:
    wanted = 100 if long else 4
    chance, victims = random.Random(), itertools.cycle([ENGINE, "worker start"])  # noqa: S311 - not a secret
    limit = next(limit["id"] for limit in served.ask("v2/concurrency_limits/filter"))
    served.ask(f"v2/concurrency_limits/{limit}", "PATCH", limit=wanted)
    kills = runs = 0
    while kills < wanted:
        runs += 1
        run = served.start(publish=True, overrides={"train.epochs": 100 + runs, "label.seed": 10 + runs})
        until(lambda: served.processes("repro"))
        time.sleep(chance.uniform(0.5, 3))
        kills += bool(served.kill(r"^sh -c|^sleep|train\.py"))
        time.sleep(chance.uniform(0, 4))
        kills += bool(served.kill(next(victims)))
        until(lambda: not served.processes(rf"repro|train\.py|{ENGINE}"), 30)
        assert served.ended(run) in ("Crashed", "Published")
        _assert_whole(served)
    assert served.ended(served.start(publish=True, overrides={"train.epochs": 500})) == "Published"
    until(lambda: served.slots() == 0, 150)
    assert not (served.folder / "cache/workspaces/1").exists()


def test_a_stage_that_is_killed_is_taken_up_again(served: Served) -> None:
    run = served.start(publish=True, overrides={"train.epochs": 600, "train.base_lr": 2})
    until(lambda: served.kill(r"train\.py"))
    assert served.ended(run) == "Published"


def _assert_whole(served: Served) -> None:
    """What the branch says is on the remote."""
    clone = served.folder / "clone"
    served.shell(f"rm -rf {clone} && git clone -q origin.git {clone}", served.folder)
    assert missing(clone, stored(clone)) == []
