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

from breedline.errors import NetworkError
from flows import retrain as module
from flows import tasks
from flows.registry import roll_back
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


def decisions(project: Any) -> dict[str, Any]:
    """The decisions on the branch that everybody sees, by path."""
    paths = project.git("ls-tree", "-r", "--name-only", "main", "decisions", at=project.origin).split()
    return {path: json.loads(project.git("show", f"main:{path}", at=project.origin)) for path in paths}


def tags(project: Any) -> dict[str, str]:
    """The commit of each tag that everybody sees."""
    lines = project.git("tag", "--format=%(refname:strip=2) %(*objectname)", at=project.origin).splitlines()
    return dict(line.split() for line in lines)


def cached(root: Path) -> set[str]:
    return {path.parent.name + path.name for path in (root / ".dvc/cache/files/md5").glob("??/*")}


def test_what_is_published_can_be_pulled_by_everybody_and_is_published_once(project: Any) -> None:
    before = project.tip()
    project.s3.rm_file(project.remote(next(item.oid for item in stored(project.work) if item.name == "raw/b.txt")))

    name, message = run(overrides=BETTER)
    assert (name, project.ran()) == ("Published", ["train"])
    ((path, decision),) = decisions(project).items()
    (why,) = decision["reasons"]
    assert why.startswith("accuracy 0.9250 -> 0.9600 (+0.0350, ")
    assert message == f"{project.tip()[:7]} on main: promote: {why}"
    assert project.tip("main~1") == before
    assert project.git("show", "--name-only", "--format=%B", "main", at=project.origin).split("\n") == [
        f"Retrain: {why} [skip ci]",
        "",
        "metrics/evaluate.json:test.accuracy: 0.9230769230769231 -> 0.96",
        "",
        "",
        *[path, "dvc.lock", "metrics/evaluate.json", "params.yaml"],
    ]
    assert (decision["champion"], decision["published"]) == (project.tip("main~2"), True)  # main~1 is but a remote
    assert (decision["fixed"], decision["broken"], decision["look"]) == (7, 0, 1)
    assert tags(project) == {"classifier#prod#1": project.tip(), "classifier@v1.0.0": project.tip()}
    assert project.git("tag", "--list", "--format=%(contents)", "*@*", at=project.origin).strip() == f"Retrain: {why}"

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
    assert message.endswith("promote: there is no champion yet")
    assert project.ran() == []
    ((path, decision),) = decisions(project).items()
    assert (decision["champion"], decision["interval"], decision["look"]) == (None, None, 0)
    published = project.git("show", "--name-only", "--format=", "main", at=project.origin).split()
    assert published == [".gitignore", path, "dvc.lock", "metrics/evaluate.json"]


def test_what_a_person_has_trained_and_pushed_is_gated_as_well(project: Any) -> None:
    tip = project.tip()
    name, message = run()
    assert (name, project.ran()) == ("Published", [])
    assert message.endswith("promote: there is no champion yet")
    assert (project.tip("main~1"), project.git("show", "--name-only", "--format=", "main", at=project.origin)) == (
        tip,
        next(iter(decisions(project))),
    )
    assert tags(project) == {"classifier#prod#1": project.tip(), "classifier@v1.0.0": project.tip()}
    assert run() == ("Unchanged", "everything is as it was published")

    project.git("pull", "--quiet")
    params = project.work / "params.yaml"
    params.write_text(params.read_text().replace("epochs: 12", "epochs: 3"))
    project.run("dvc", "repro", "--quiet")
    project.git("commit", "--quiet", "--all", "--message", "worse")
    project.git("push", "--quiet")
    tip = project.tip()
    for _ in range(2):
        name, message = run()
        assert name == "Held"
        assert message.startswith("hold: accuracy 0.9250 -> 0.7500")
    assert (project.tip("main~1"), len(decisions(project)), len(tags(project))) == (tip, 2, 2)


def test_what_publish_is_off_for_goes_nowhere(project: Any) -> None:
    before = project.tip(), project.objects()
    assert run(overrides=BETTER, publish=False) == (
        "Completed",
        "1 UpToDate, 1 Completed; not published, as publish is off",
    )
    assert project.ran() == ["train"]
    assert (project.tip(), project.objects()) == before


def test_what_is_held_leaves_its_decision_once_and_nothing_else(project: Any) -> None:
    before, objects = project.tip(), project.objects()
    name, message = run(overrides=WORSE)
    assert (name, project.ran()) == ("Held", ["train"])
    assert message.startswith("hold: accuracy 0.9250 -> 0.7500 (-0.1750, ")
    ((path, decision),) = decisions(project).items()
    assert re.fullmatch(rf"decisions/\d{{8}}T\d{{6}}Z-{decision['challenger'][:8]}\.json", path)
    assert (decision["verdict"], decision["published"], decision["look"]) == ("hold", False, 1)
    subject, *files = project.git("show", "--name-only", "--format=%s", "main", at=project.origin).split("\n")
    assert (subject.startswith("Held: accuracy 0.9250"), subject.endswith(" [skip ci]")) == (True, True)
    assert [file for file in files if file] == [path]
    assert (project.tip("main~1"), project.objects(), tags(project)) == (before, objects, {})

    tip = project.tip()
    name, again = run(overrides=WORSE)  # as a nightly run does, whose stages are restored
    assert (name, project.ran(), project.tip()) == ("Held", [], tip)
    assert again == f"{message} (as decided on {decision['time'][:10]})"
    name, _ = run(overrides={"train.epochs": 4})
    assert name == "Held"
    assert sorted(one["look"] for one in decisions(project).values()) == [1, 2]


@pytest.mark.parametrize(("undecided", "state"), [("promote", "Published"), ("hold", "Held")])
def test_what_happens_undecided_is_a_setting(project: Any, undecided: str, state: str) -> None:
    params = (project.work / "params.yaml").read_text()
    (project.work / "params.yaml").write_text(params.replace("undecided: promote", f"undecided: {undecided}"))
    project.git("commit", "--quiet", "--allow-empty", "--all", "--message", "what happens")
    project.git("push", "--quiet")
    name, message = run(overrides={"train.epochs": 11})
    assert name == state
    assert "undecided: accuracy 0.9250 -> 0.9200" in message
    (decision,) = decisions(project).values()
    assert (decision["verdict"], decision["published"]) == ("undecided", state == "Published")
    assert decision["images_to_decide"] > 200
    assert bool(tags(project)) == (state == "Published")


def test_a_rollback_stands_until_there_is_another_model(project: Any) -> None:
    assert run(overrides={"train.epochs": 14})[0] == "Published"
    assert run(overrides=BETTER)[0] == "Published"
    assert sorted(tags(project)) == [f"classifier{what}" for what in ("#prod#1", "#prod#2", "@v1.0.0", "@v1.1.0")]
    roll_back(project.work, None)
    assert tags(project)["classifier#prod#3"] == tags(project)["classifier@v1.0.0"]
    tip = project.push_elsewhere(train_py=(project.work / "train.py").read_text() + "# a comment\n")
    name, message = run()
    assert (name, project.tip()) == ("Held", tip)
    assert re.fullmatch(
        r"this model was published on [\d-]+ and rolled back since: `breedline rollback --to` .*", message
    )
    name, message = run(overrides={"train.epochs": 40})
    assert name == "Published"
    assert "accuracy 0.9350 -> 0.9750" in message
    assert tags(project)["classifier@v1.2.0"] == project.tip()


def test_a_change_that_leaves_the_model_as_it_is_is_published_without_a_decision(project: Any) -> None:
    assert run()[0] == "Published"
    before = decisions(project), tags(project)
    tip = project.push_elsewhere(train_py=(project.work / "train.py").read_text() + "# a comment\n")
    name, message = run()
    assert (name, message) == (
        "Published",
        f"{project.tip()[:7]} on main: the model gives the same answers as the champion",
    )
    assert (project.tip("main~1"), decisions(project), tags(project)) == (tip, *before)


def test_a_decision_that_is_broken_is_one_line(project: Any) -> None:
    (project.work / "decisions").mkdir()
    (project.work / "decisions/x.json").write_text('{"verdict": "maybe"}')
    project.git("add", "decisions")
    project.git("commit", "--quiet", "--message", "a mistake")
    project.git("push", "--quiet")
    name, message = run(overrides=BETTER)
    assert name == "Failed"
    assert re.fullmatch(
        r"decisions/x.json is no decision of the gate \(verdict: Input should be .*\): restore it .*", message
    )


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
        {"gate.margin": 1, "train.epochs": 2},
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
    (project.work / "params.yaml").write_text(params.replace("margin: 0.01", "margin: -1"))
    project.git("commit", "--quiet", "--all", "--message", "a mistake")
    project.git("push", "--quiet")
    name, message = run(overrides=BETTER)
    assert name == "Failed"
    assert message.startswith("params.yaml needs mending:\n  gate.margin = -1")


def test_the_run_has_the_artifacts_and_tasks_and_a_name_that_tells_what_it_was_for(project: Any) -> None:
    state = retrain(overrides={"train.epochs": 24, "train.seed": 7}, force=["train"], return_state=True)
    run = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run).name == "by hand main: train.epochs=24, train.seed=7, force train"
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run])))
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
    assert {artifact.key for artifact in shown} == {"plan", "summary", "metrics", "decision", "changed-answers"}
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
    assert message.startswith("1 of 10 objects are neither on the remote nor in the cache (models/weights, …): nothing")
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


@pytest.fixture
def away(fail: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that lets both dvc and ourselves fail some times to send anything."""
    verified = module.transaction.verified

    def make(times: int) -> None:
        failures = [NetworkError("the server is away")] * times
        fail("push", times)
        monkeypatch.setattr(
            module.transaction, "verified", lambda root: _raise(failures.pop()) if failures else verified(root)
        )

    return make


def _raise(error: Exception) -> None:
    raise error


def test_what_dvc_cannot_push_is_sent_object_by_object(project: Any, fail: Callable[[str, int], None]) -> None:
    fail("push", tasks.RETRIES + 1)  # as while the list of a folder is altered on the remote
    assert run(overrides=BETTER)[0] == "Published"


def test_a_push_is_tried_again(project: Any, away: Callable[[int], None]) -> None:
    away(tasks.RETRIES)
    assert run(overrides=BETTER)[0] == "Published"


@pytest.mark.parametrize(("command", "ran"), [("pull", []), ("push", ["train"])])
def test_a_server_that_stays_away_ends_the_run(
    project: Any, fail: Callable[[str, int], None], away: Callable[[int], None], command: str, ran: list[str]
) -> None:
    before = project.tip()
    if command == "push":
        away(tasks.RETRIES + 1)
    else:
        fail("pull", tasks.RETRIES + 1)
    name, message = run(overrides=BETTER)
    assert (name, message.endswith("the server is away")) == ("Failed", True)
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
    assert run()[0] == "Published"  # as the first version
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
@pytest.mark.parametrize("altered", [False, True])
def test_what_the_remote_has_lost_or_altered_is_made_again(
    project: Any, monkeypatch: pytest.MonkeyPatch, lost: str, altered: bool
) -> None:
    path = project.remote(next(item.oid for item in stored(project.work) if item.name == lost))
    content = project.s3.cat_file(path)
    project.s3.rm_file(path)
    if altered:
        project.s3.pipe_file(path, content[:-1] + b"?")
    other = project.clone("machine")
    monkeypatch.chdir(other)
    name, _ = run(overrides=BETTER)
    assert (name, project.ran()) == ("Published", ["download", "train"])
    assert oids(project, "raw") <= project.objects()
    assert project.s3.cat_file(path) == content
