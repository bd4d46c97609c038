"""The unattended run, from the clone to the commit: published, held, unchanged, failed or killed."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)

from flows import retrain as module
from flows import tasks
from flows.remote import stored
from flows.retrain import retrain

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]
ROOT = Path(__file__).parents[2]
BETTER, WORSE = {"train.epochs": 24}, {"train.epochs": 3}
KILLED = """
import os, signal, sys
from flows import publish, retrain, workspace

step = sys.argv[1]

def die_after(work):
    def and_die(*arguments):
        work(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    return and_die

def git(folder, *arguments):
    if step == "commit" and arguments[0] == "push":
        os.kill(os.getpid(), signal.SIGKILL)
    return workspace.git(folder, *arguments)

def dvc(processes, root, *arguments):
    said = done(processes, root, *arguments)
    if step == arguments[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return said

done, retrain._dvc, publish.git = retrain._dvc, dvc, git
if step == "verify":
    publish.verified = die_after(publish.verified)
retrain.retrain(overrides={"train.epochs": 24})
"""


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "RETRY_DELAY", 0)


@pytest.fixture
def project(project: Any) -> Any:
    """The project; nothing has run in it yet."""
    project.ran()
    return project


def run(**arguments: Any) -> tuple[str, str]:
    """The state in which a run ends, and what it says."""
    state = retrain(**arguments, return_state=True)
    return state.name, state.message


def oids(project: Any, output: str, at: Path | None = None) -> set[str]:
    return {item.oid for item in stored(at or project.work) if item.name.startswith(output)}


def cached(root: Path) -> set[str]:
    return {path.parent.name + path.name for path in (root / ".dvc/cache/files/md5").glob("??/*")}


def test_what_is_published_can_be_pulled_by_everybody_and_is_published_once(project: Any) -> None:
    before = project.tip()
    project.s3.rm_file(project.remote(next(item.oid for item in stored(project.work) if item.name == "raw/b.txt")))

    name, message = run(overrides=BETTER)
    assert (name, project.ran()) == ("Published", ["train"])
    assert message == f"{project.tip()[:7]} on main: test.accuracy 0.923077 -> 0.96 (+0.0369231)"
    assert project.tip("main~1") == before
    assert project.git("show", "--name-only", "--format=%B", "main", at=project.origin).split("\n") == [
        "Retrain: test.accuracy 0.923077 -> 0.96 (+0.0369231) [skip ci]",
        "",
        "metrics/evaluate.json:test.accuracy: 0.9230769230769231 -> 0.96",
        "",
        "",
        *["dvc.lock", "metrics/evaluate.json", "params.yaml"],
    ]

    fresh = project.clone("fresh")
    project.run("dvc", "pull", at=fresh)
    assert (fresh / "models/weights").read_text() == "a picture\n" * 24
    assert (fresh / "models/bundle").read_text() == "24 epochs"
    assert (fresh / "raw/b.txt").read_text() == "42\n"
    assert json.loads((fresh / "metrics/evaluate.json").read_text()) == {"test": {"accuracy": 0.96}}
    assert project.run("dvc", "status", at=fresh) == "Data and pipelines are up to date."
    assert project.git("status", "--porcelain", at=fresh) == ""

    after = project.tip()
    assert run() == ("Unchanged", "everything is as it was published")
    assert (project.ran(), project.tip()) == ([], after)
    assert project.git("status", "--porcelain") == ""


def test_the_first_champion_needs_no_other_to_beat(project: Any) -> None:
    project.git("rm", "--quiet", "--cached", "dvc.lock", "metrics/evaluate.json", ".gitignore")
    project.git("commit", "--quiet", "--message", "before anything ran")
    project.git("push", "--quiet")
    name, message = run()
    assert name == "Published"
    assert message.endswith("test.accuracy 0.923077, and there is no champion yet")
    assert project.ran() == []
    published = project.git("show", "--name-only", "--format=", "main", at=project.origin).split()
    assert published == [".gitignore", "dvc.lock", "metrics/evaluate.json"]


@pytest.mark.parametrize(
    ("arguments", "state", "message"),
    [
        ({"overrides": WORSE}, "Held", "test.accuracy 0.923077 -> 0.75 (-0.173077), beyond the tolerance of 0.005"),
        (
            {"overrides": BETTER, "publish": False},
            "Completed",
            "1 UpToDate, 1 Completed; not published, as publish is off",
        ),
    ],
)
def test_what_is_not_published_goes_nowhere(project: Any, arguments: dict[str, Any], state: str, message: str) -> None:
    before = project.tip(), project.objects()
    assert run(**arguments) == (state, message)
    assert project.ran() == ["train"]
    assert (project.tip(), project.objects()) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.epoch": 3}, "overrides: train.epoch: unknown setting; did you mean epochs?"),
        ({"train.batch_size": 0}, "overrides: train.batch_size = 0: should be 'auto', or should be greater than 0"),
        ({"train.epochs.x": 1}, "overrides: train.epochs.x: epochs is a setting itself, not a section"),
    ],
)
def test_an_override_that_is_wrong_is_named_in_one_line(project: Any, overrides: dict[str, Any], message: str) -> None:
    assert run(overrides=overrides) == ("Failed", message)
    assert project.ran() == []


@pytest.mark.parametrize(
    "overrides",
    [
        {"download.sources": [{"url": "../canary"}]},
        {"download": {"sources": [{"url": "../canary"}]}},
        {"weights.source": {"url": "../canary"}},
        {"gate.tolerance": 1, "train.epochs": 2},
        {"score.predictions": "../canary"},
    ],
)
def test_who_asks_for_a_run_neither_names_a_source_nor_widens_the_gate(project: Any, overrides: dict[str, Any]) -> None:
    (project.work.parent / "canary").write_text("a secret")
    name, message = run(overrides=overrides)
    assert name == "Failed"
    assert re.fullmatch(r"overrides: (download|weights|gate|score)[\w.]* cannot be changed for a run: .*", message)
    assert project.ran() == []


def test_a_setting_of_the_branch_that_is_wrong_is_no_override(project: Any) -> None:
    params = (project.work / "params.yaml").read_text()
    (project.work / "params.yaml").write_text(params.replace("tolerance: 0.005", "tolerance: -1"))
    project.git("commit", "--quiet", "--all", "--message", "a mistake")
    project.git("push", "--quiet")
    name, message = run(overrides=BETTER)
    assert name == "Failed"
    assert message.startswith("params.yaml needs mending:\n  gate.tolerance = -1")


def test_the_run_has_the_artifacts_and_tasks_and_a_name_that_tells_what_it_was_for(project: Any) -> None:
    state = retrain(overrides={"train.epochs": 24, "train.seed": 7}, force=["train"], return_state=True)
    run = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run).name == "by hand main: train.epochs=24, train.seed=7, force train"
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run])))
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
    assert {artifact.key for artifact in shown} == {"plan", "summary", "metrics"}
    assert {task.name for task in tasks} == {"pull", "download", "train", "gate", "push", "verify", "commit"}


def test_what_cannot_be_published_does_not_even_start(project: Any) -> None:
    project.git("push", "--quiet", "origin", "HEAD:refs/tags/v1")
    assert run(ref="v1") == ("Failed", "v1 is no branch, and only to a branch can be published: name one")
    assert run(ref="v2") == ("Failed", "there is no branch, tag or commit called 'v2'")
    (project.work / ".dvc/config").write_text("")
    project.git("commit", "--quiet", "--all", "--message", "no remote")
    project.git("push", "--quiet")
    name, message = run()
    assert name == "Failed"
    assert "no remote" in message
    assert project.ran() == []


def test_a_tag_can_be_run_without_publishing(project: Any) -> None:
    project.git("push", "--quiet", "origin", "HEAD:refs/tags/v1")
    assert run(ref="v1", publish=False) == ("Completed", "2 UpToDate; not published, as publish is off")
    assert project.ran() == []


def test_a_stage_that_fails_is_the_message_and_nothing_is_published(project: Any) -> None:
    (project.work / "train.py").write_text("import sys; sys.exit('out of luck')")
    project.git("commit", "--quiet", "--all", "--message", "a bug")
    project.git("push", "--quiet")
    before = project.tip(), project.objects()
    assert run() == ("Failed", "train: exit code 1\nout of luck")
    assert (project.tip(), project.objects()) == before


def test_what_neither_the_remote_nor_the_cache_has_stops_the_commit(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, verified = project.tip(), module.transaction.verified

    def lose_and_verify(root: Path) -> object:
        lost = next(item.oid for item in stored(root) if item.name == "models/weights")
        project.s3.rm_file(project.remote(lost))
        (project.work / ".dvc/cache/files/md5" / lost[:2] / lost[2:]).unlink()
        return verified(root)

    monkeypatch.setattr(module.transaction, "verified", lose_and_verify)
    name, message = run(overrides=BETTER)
    assert name == "Failed"
    assert message.startswith("1 of 6 objects are neither on the remote nor in the cache (models/weights, …): nothing")
    assert project.tip() == before


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """A function that lets a command of dvc fail some times."""
    dvc = module.Processes.dvc

    def make(command: str, times: int) -> None:
        failures = [9] * times

        def fails(self: module.Processes, root: Path, arguments: list[str], say: Any, timeout: Any = None) -> int:
            if arguments[0] == command and failures:
                say("ERROR: the server is away")
                return failures.pop()
            return dvc(self, root, arguments, say, timeout)

        monkeypatch.setattr(module.Processes, "dvc", fails)

    return make


def test_a_push_that_fails_is_tried_again(project: Any, fail: Callable[[str, int], None]) -> None:
    fail("push", tasks.RETRIES)
    assert run(overrides=BETTER)[0] == "Published"


@pytest.mark.parametrize(("command", "ran"), [("pull", []), ("push", ["train"])])
def test_a_server_that_stays_away_ends_the_run(
    project: Any, fail: Callable[[str, int], None], command: str, ran: list[str]
) -> None:
    before = project.tip()
    fail(command, tasks.RETRIES + 1)
    assert run(overrides=BETTER) == ("Failed", f"dvc {command} ended with exit code 9: ERROR: the server is away")
    assert (project.ran(), project.tip()) == (ran, before)


def test_a_killed_run_leaves_the_branch_alone_and_the_next_one_publishes_without_running_anything(
    project: Any, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = project.tip()
    for step, ran in (("push", ["train"]), ("verify", []), ("commit", [])):
        done = subprocess.run([sys.executable, "-c", KILLED, step], text=True, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        assert project.ran() == ran, step
        assert project.tip() == before, step
    name, _ = run(overrides=BETTER)
    assert name == "Published"
    assert project.ran() == []
    assert project.tip("main~1") == before
    assert not (Path(os.environ["BREEDLINE_CACHE"]) / "workspaces/1").exists()


def test_another_machine_pulls_instead_of_running(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = project.clone("machine")
    monkeypatch.chdir(other)
    assert run() == ("Unchanged", "everything is as it was published")
    assert project.ran() == []
    assert cached(other) == oids(project, "")


def test_another_machine_pulls_no_model_that_it_will_train_anew(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = project.clone("machine")
    monkeypatch.chdir(other)
    name, _ = run(overrides=BETTER)
    assert (name, project.ran()) == ("Published", ["train"])
    assert oids(project, "raw") <= cached(other)
    assert not oids(project, "models") & cached(other)


@pytest.mark.parametrize("lost", ["raw/b.txt", "raw"])
def test_what_the_remote_has_lost_is_made_again(project: Any, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    project.s3.rm_file(project.remote(next(item.oid for item in stored(project.work) if item.name == lost)))
    other = project.clone("machine")
    monkeypatch.chdir(other)
    name, _ = run(overrides=BETTER)
    assert (name, project.ran()) == ("Published", ["download", "train"])
    assert oids(project, "raw") <= project.objects()
