"""A source that changes is remembered when the retraining that it started has completed, and not before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, Scheduled
from ruamel.yaml import YAML

from flows import watch as module
from flows.retrain import retrain
from flows.watch import watch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def source(project: Any, tmp_path: Path) -> Path:
    """The only source of the project's branch, a file."""
    source = tmp_path / "photos.tar"
    source.write_bytes(b"1")
    path = project.work / "params.yaml"
    params = YAML(typ="safe").load(path)
    params["download"]["sources"] = [{"url": str(source)}]
    YAML(typ="safe").dump(params, path)
    project.git("commit", "--quiet", "--all", "--message", "a source")
    project.git("push", "--quiet")
    return source


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[FlowRun]:
    """The runs that `watch` has started, which nobody runs."""
    runs: list[FlowRun] = []

    def start(name: str, parameters: dict[str, Any], tags: list[str], **_: Any) -> FlowRun:
        assert name == "retrain/on-demand"
        with get_client(sync_client=True) as client:
            runs.append(client.create_flow_run(retrain, parameters=parameters, tags=tags, state=Scheduled()))
        return runs[-1]

    monkeypatch.setattr(module, "run_deployment", start)
    return runs


@pytest.fixture
def end(started: list[FlowRun]) -> Callable[[State[Any]], None]:
    """A function that brings the run started last into a state."""

    def end(state: State[Any]) -> None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(started[-1].id, state, force=True)

    return end


def look() -> str:
    return str(watch(return_state=True).name)


@pytest.mark.parametrize("failure", [Failed, Crashed, Cancelled])
def test_a_retraining_that_failed_is_started_again_and_one_that_completed_is_not(
    source: Path, started: list[FlowRun], end: Callable[[State[Any]], None], failure: Callable[[], State[Any]]
) -> None:
    assert [look(), look()] == ["Remembered", "Unchanged"]
    source.write_bytes(b"12")
    assert [look(), look()] == ["Changed", "Waiting"]
    assert started[0].parameters == {"repository": None, "ref": "main", "force": ["download"], "publish": True}
    end(Running())
    assert look() == "Waiting"
    end(failure())
    assert [look(), look()] == ["Changed", "Waiting"]
    end(Completed(name="Held"))
    assert [look(), look()] == ["Unchanged", "Unchanged"]
    assert len(started) == 2


def test_a_source_that_changes_while_it_is_retrained_is_retrained_again(
    source: Path, started: list[FlowRun], end: Callable[[State[Any]], None]
) -> None:
    look()
    source.write_bytes(b"12")
    assert look() == "Changed"
    source.write_bytes(b"123")
    assert look() == "Waiting"
    end(Completed())
    assert look() == "Changed"
    end(Completed())
    assert look() == "Unchanged"
    assert len(started) == 2


def test_whether_a_retraining_publishes_is_said_by_who_watches(source: Path, started: list[FlowRun]) -> None:
    look()
    source.write_bytes(b"12")
    watch(publish=False)
    assert started[0].parameters["publish"] is False
