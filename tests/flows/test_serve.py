"""The real thing: a Prefect server, a worker and schedules, as `breedline serve` runs them, and as Ctrl-C ends them."""

import os
import signal
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from tests.flows.served import Served, serving, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The project, served, with a run every 20 s."""
    with serving(tmp_path_factory.mktemp("served"), interval=20) as served:
        yield served


def test_a_schedule_trains_then_finds_nothing_to_do_then_what_has_changed(served: Served) -> None:
    (first,) = until(lambda: served.runs("retrain/nightly", "Published", "Failed", "Crashed"))
    assert served.tasks(first["id"]) == {"download": "Completed", "train": "Completed"}
    (second, *_) = until(lambda: served.runs("retrain/nightly", "Unchanged"))
    assert served.tasks(second["id"]) == {"download": "UpToDate", "train": "UpToDate"}
    assert len(served.commits()) == 2
    served.push(train={"epochs": 20})
    (_, third) = until(lambda: len(found := served.runs("retrain/nightly", "Published")) == 2 and found)
    assert served.tasks(third["id"]) == {"download": "UpToDate", "train": "Completed"}
    served.pause("retrain/nightly")


def test_cancelling_ends_the_training_within_ten_seconds_and_frees_the_gpu(served: Served) -> None:
    run = served.start(overrides={"train.epochs": 30, "train.base_lr": 9})
    until(lambda: served.processes("train.py"))
    served.ask(f"flow_runs/{run}/set_state", state={"type": "CANCELLING"})
    busy = max(1, os.getloadavg()[0] / len(os.sched_getaffinity(0)))  # with whom else the cores are shared
    until(lambda: not served.processes("train.py|repro|prefect.engine|flow-run execute"), 10 * busy)
    assert served.ended(run) == "Cancelled"
    until(lambda: served.tasks(run)["train"] != "Running")
    assert served.tasks(run, "pull") == {"pull": "Completed", "download": "UpToDate", "train": "Cancelled"}
    assert served.slots() == 0


def test_who_works_here_is_known_and_watched(served: Served) -> None:
    automations = served.ask("automations/filter")
    assert [automation["actions"][0]["state"] for automation in automations] == ["CRASHED"]
    limits = {limit["name"]: limit["limit"] for limit in served.ask("v2/concurrency_limits/filter")}
    incoming = served.deployment("score/incoming")
    assert limits == {"gpu": 1, f"deployment:{incoming['id']}": 1}
    assert [schedule["active"] for schedule in incoming["schedules"]] == [False]


def test_a_source_that_changes_is_noticed(served: Served) -> None:
    source = served.folder / "photos.tar"
    source.write_bytes(b"1")
    served.push(download={"sources": [{"url": str(source)}]})

    def look() -> str:
        deployment = served.deployment("watch/source")["id"]
        run = served.ask(f"deployments/{deployment}/create_flow_run", parameters={})["id"]
        return served.ended(run)

    assert [look(), look()] == ["Remembered", "Unchanged"]
    source.write_bytes(b"12")
    assert look() == "Changed"
    (started,) = until(lambda: served.runs("retrain/on-demand", "Unchanged", "Published"))
    assert started["parameters"]["force"] == ["download"]
    assert served.tasks(started["id"])["download"] == "Completed"
    assert look() == "Unchanged"


def test_ctrl_c_leaves_nothing_running_and_nothing_due(served: Served) -> None:
    served.start(overrides={"train.epochs": 31, "train.base_lr": 9})
    until(lambda: served.processes("train.py"))
    served.process.send_signal(signal.SIGINT)
    served.process.wait(60)
    assert served.processes("") == []
    assert "Traceback" not in served.log.read_text()
    again = subprocess.Popen(
        ["prefect", "server", "start", "--port", served.api.split(":")[2].split("/")[0]],
        env=served.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: _answers(served.api))
        assert served.deployment("retrain/nightly")["paused"]
        assert served.runs("retrain/nightly", "Scheduled", "Late", "Running", "Pending") == []
        assert served.runs("retrain/on-demand", "Scheduled", "Late", "Running", "Pending") == []
    finally:
        again.terminate()
        again.wait(30)


def _answers(api: str) -> bool:
    try:
        return httpx.get(f"{api}/health").is_success
    except httpx.TransportError:
        return False
