"""The flow: what DVC would do, task by task, on a Prefect server of its own."""

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import State, StateType
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

from flows.pipeline import pipeline
from flows.process import Processes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]
DIAMOND = """
stages:
  a: {cmd: cat in params.yaml > a, deps: [in], params: [a], outs: [a]}
  b: {cmd: sleep 1; cat a > b, deps: [a], outs: [b]}
  c: {cmd: wc -c < a > c, deps: [a], outs: [c]}
  d: {cmd: cat b c > d, deps: [b, c], outs: [d]}
"""
ALL_SORTS = """
stages:
  z: {cmd: sleep 2; cat in > z, deps: [in], outs: [z]}
  m: {matrix: {net: [x, y]}, cmd: "cat in > ${item.net}", deps: [in], outs: ["${item.net}"]}
  y2: {cmd: sleep 1; cat y > y2, deps: [y], outs: [y2]}
  x2: {cmd: cat x > x2, deps: [x], metrics: [x2: {cache: false}]}
"""


class Done(NamedTuple):
    """A run of the flow."""

    state: State[Any]
    stages: dict[str, State[Any]]
    attempts: dict[str, int]
    artifacts: dict[str, Any]

    def names(self) -> dict[str, str]:
        """The state of each stage."""
        return {stage: state.name for stage, state in self.stages.items()}


def _run(root: Path, *force: str) -> Done:
    state = pipeline(root, force, return_state=True)
    run = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        tasks = [task for task in client.read_task_runs() if task.flow_run_id == run]
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run])))
    return Done(
        state,
        {task.name: task.state for task in tasks},
        {task.name: task.run_count for task in tasks},
        {artifact.key: artifact.data for artifact in shown},
    )


def test_a_stage_to_force_that_does_not_exist_is_a_mistake(make_repository: Callable[..., Any]) -> None:
    done = _run(make_repository(DIAMOND).root, "a", "aa")
    assert done.state.message == "there is no stage called aa to force: there are a, b, c, d"
    assert done.stages == {}


def test_stages_are_completed_then_up_to_date_without_a_process_then_restored(
    make_repository: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_repository(DIAMOND).root
    first = _run(root)
    assert first.names() == dict.fromkeys("abcd", "Completed")
    assert {state.type for state in first.stages.values()} == {StateType.COMPLETED}
    assert first.state.is_completed()
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "_start", lambda *_: pytest.fail("a process was started"))
        assert _run(root).names() == dict.fromkeys("abcd", "UpToDate")
    (root / "c").unlink()
    restored = _run(root)
    assert restored.names() == {"a": "UpToDate", "b": "UpToDate", "c": "Restored", "d": "UpToDate"}
    assert restored.state.message == "3 UpToDate, 1 Restored"
    assert _run(root, "c").names() == {"a": "UpToDate", "b": "UpToDate", "c": "Completed", "d": "UpToDate"}


def test_after_a_failure_what_needs_it_is_skipped_and_the_rest_goes_on(make_repository: Callable[..., Any]) -> None:
    root = make_repository("""
stages:
  bad: {cmd: echo because >&2; exit 3, deps: [in], outs: [bad]}
  after: {cmd: cat bad > after, deps: [bad], outs: [after]}
  last: {cmd: cat after > last, deps: [after], outs: [last]}
  good: {cmd: cat in > good, deps: [in], outs: [good]}
""").root
    done = _run(root)
    assert done.names() == {"bad": "Failed", "after": "Skipped", "last": "Skipped", "good": "Completed"}
    assert done.stages["bad"].message == "exit code 3\nbecause"
    assert done.stages["after"].type == StateType.FAILED
    assert done.state.is_failed()
    assert done.state.message == "bad: exit code 3\nbecause"


def test_what_cannot_be_planned_is_a_failed_run_with_the_reason(make_repository: Callable[..., Any]) -> None:
    done = _run(make_repository("stages: {a: {cmd: x, meta: {prefect: {retry: 1}}}}").root)
    assert done.state.is_failed()
    assert str(done.state.message).startswith("dvc.yaml, a, meta.prefect: retry: ")
    assert not done.stages


@pytest.mark.parametrize(("code", "state", "attempts"), [(75, "Completed", 3), (1, "Failed", 1)])
def test_only_the_named_exit_codes_are_tried_again(
    make_repository: Callable[..., Any], tmp_path: Path, code: int, state: str, attempts: int
) -> None:
    count = tmp_path / "count"
    script = f"echo >> {count}; [ $(wc -l < {count}) -ge 3 ] || exit {code}; echo > a"
    meta = "{prefect: {retries: 5, retry_delay: 0.1, retry_on: [75]}}"
    root = make_repository(
        f"stages: {{a: {{cmd: sh script, deps: [in], outs: [a], meta: {meta}}}}}", {"script": script}
    ).root
    done = _run(root)
    assert (done.names(), done.attempts) == ({"a": state}, {"a": attempts})
    assert count.read_text() == "\n" * attempts


@pytest.mark.parametrize("resources", ["[]", "[tests-only]"])
def test_independent_stages_overlap_unless_they_hold_the_same_resource(
    make_repository: Callable[..., Any], resources: str
) -> None:
    stage = "{cmd: date +%s.%N > $; sleep 3; date +%s.%N >> $, deps: [in], outs: [$], meta: {prefect: {resources: R}}}"
    lines = [f"{name}: {stage}".replace("$", name).replace("R", resources) for name in "ab"]
    root = make_repository(f"stages: {{{', '.join(lines)}}}").root
    assert _run(root).state.is_completed()
    (a_starts, a_ends), (b_starts, b_ends) = (map(float, (root / name).read_text().split()) for name in "ab")
    assert (max(a_starts, b_starts) < min(a_ends, b_ends)) == (resources == "[]")
    if resources != "[]":
        with get_client(sync_client=True) as client:
            assert client.read_global_concurrency_limit_by_name("tests-only").limit == 1


@pytest.mark.parametrize(
    ("cause", "state"), [(httpx.ConnectError("refused"), "Completed"), (ValueError("no such limit"), "Failed")]
)
def test_a_server_that_starts_again_costs_no_run(
    make_repository: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, cause: Exception, state: str
) -> None:
    asked = itertools.count()

    def concurrency(*_: object, **__: object) -> contextlib.AbstractContextManager[None]:
        if next(asked) < 2:
            raise ConcurrencySlotAcquisitionError("no slot") from cause
        return contextlib.nullcontext()

    monkeypatch.setattr("flows.pipeline.concurrency", concurrency)
    stage = "{cmd: echo > a, outs: [a], meta: {prefect: {resources: [tests-only]}}}"
    done = _run(make_repository(f"stages: {{a: {stage}}}").root)
    assert done.names() == {"a": state}


def test_a_run_leaves_its_plan_a_summary_metrics_and_what_the_stages_show(make_repository: Callable[..., Any]) -> None:
    repository = make_repository(
        """
stages:
  a:
    cmd: cp in m.json; cp picture b.png; cp picture.csv t.csv
    deps: [in]
    outs: [b.png, t.csv]
    metrics: [m.json: {cache: false}]
    meta: {prefect: {show: [b.png, t.csv]}}
""",
        {"in": '{"x": 1}', "picture": "bytes", "picture.csv": "n,m\n1,one\n"},
    )
    repository.shell("rm -r .dvc; git init -q; python -m dvc init -q")
    repository.repro()
    repository.shell("git add -A; git -c user.name=n -c user.email=e commit -qm m")
    (repository.root / "in").write_text('{"x": 1.5}')
    shown = _run(repository.root).artifacts
    assert set(shown) == {"plan", "summary", "metrics", "a-b", "a-t"}
    assert '"will run"' in shown["plan"]
    assert '"in changed"' in shown["plan"]
    assert '"state": "Completed"' in shown["summary"]
    assert '{"metric": "m.json:x", "committed": 1, "now": 1.5, "difference": 0.5}' in shown["metrics"]
    assert shown["a-b"] == "![b.png](data:image/png;base64,Ynl0ZXM=)"
    assert shown["a-t"] == '[{"n": 1, "m": "one"}]'


@pytest.mark.parametrize(("dvc_yaml", "runs"), [(DIAMOND, 1), (ALL_SORTS, 2)], ids=["diamond", "matrix and branches"])
def test_what_is_left_is_byte_for_byte_what_dvc_leaves(
    make_repository: Callable[..., Any], dvc_yaml: str, runs: int
) -> None:
    ours, theirs = make_repository(dvc_yaml, name="ours"), make_repository(dvc_yaml, name="theirs")
    for run in range(runs):
        for repository in (ours, theirs):
            (repository.root / "in").write_text(str(run))
        assert _run(ours.root).state.is_completed()
        theirs.repro()
        assert ours.content() == theirs.content()
