"""The plan names exactly the stages that `dvc repro` then does not skip, whatever was edited in between."""

import copy
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.exceptions import DvcException
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from breedline.errors import BreedlineError
from flows.plan import Action, plan

pytestmark = [pytest.mark.slow, pytest.mark.long]
EDITS_AT_LEAST = 4
EXAMPLES = settings.default.max_examples // EDITS_AT_LEAST

# each run makes something new, so that whatever depends on it has to run, too, unless the run-cache has an old result
PIPELINE = """
stages:
  a: {cmd: cat /proc/sys/kernel/random/uuid > a, deps: [in], params: [a], outs: [a]}
  b:
    cmd: mkdir b && cat /proc/sys/kernel/random/uuid > b/x && cat a > b/y
    deps: [a, data]
    params: [b.x, c]
    outs: [b]
  c:
    cmd: cat /proc/sys/kernel/random/uuid > c
    deps: [a]
    params: [other.yaml: ]
    metrics: [c: {cache: false}]
  d: {cmd: cat /proc/sys/kernel/random/uuid > d, deps: [b/x, c], outs: [d]}
  e: {cmd: "echo '${e.name}' > e; cat /proc/sys/kernel/random/uuid >> e", deps: [in], outs: [e]}
"""
FILES = {
    "params.yaml": "{a: {x: 1, y: {z: red}}, b: {x: {}}, c: [], e: {name: it}}",
    "other.yaml": "{c: {}}",
    "data/x": "1\n",
    "data/y": "1\n",
}
VALUES = st.sampled_from(
    [
        None,
        "none",
        "absent",
        "None",
        "",
        "1",
        1,
        1.0,
        True,
        0,
        False,
        1.5,
        "it",
        [],
        [1],
        [{}],
        [[]],
        {},
        {"z": None},
        {"z": {}},
        {"z": {"x": []}},
        {"size": 1},
        {"size": 2},
        {1: 1},
        {"1": 1},
        {"x.y": 1},
        {"x": {"y": 1}},
    ]
)
KEYS = st.sampled_from(
    ["a", "a.x", "a.y", "a.y.z", "a.new", "b.x", "b.x.q", "b.other", "c", "e.name", "e.other", "new"]
)
PLACES = st.sampled_from(["in", "data/x", "data/y", "data/z", "a", "b/x", "b/y", "b/z", "c", "d", "e"])
LOST = st.sampled_from(["data", "b", "dvc.lock", ".dvc/cache/runs", ".dvc/cache", "other.yaml"])


def _set(root: Path, key: str, value: object, file: str = "params.yaml") -> None:
    *sections, last = key.split(".")
    params = section = _yaml(root / file)
    for name in sections:
        if not isinstance(section.get(name), dict):
            section[name] = {}
        section = section[name]
    section[last] = value
    YAML(typ="safe").dump(params, root / file)


def _remove_setting(root: Path, key: str) -> None:
    *sections, last = key.split(".")
    params = section = _yaml(root / "params.yaml")
    for name in sections:
        section = section.get(name) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(last, None)
    YAML(typ="safe").dump(params, root / "params.yaml")


def _yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path) if path.exists() else {}


def _write(root: Path, place: str, content: str) -> None:
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).unlink(missing_ok=True)
    (root / place).write_text(content)


def _rename(root: Path, place: str, other: str) -> None:
    if (root / place).exists():
        (root / other).parent.mkdir(exist_ok=True)
        (root / place).replace(root / other)


def _lose(root: Path, path: str) -> None:
    if (root / path).is_dir():
        shutil.rmtree(root / path)
    else:
        (root / path).unlink(missing_ok=True)


def _forget(root: Path, stage: str) -> None:
    lock = _yaml(root / "dvc.lock")
    lock.get("stages", {}).pop(stage, None)
    if (root / "dvc.lock").exists():
        YAML(typ="safe").dump(lock, root / "dvc.lock")


Edit = tuple[Callable[..., None], tuple[Any, ...]]
EDITS: st.SearchStrategy[Edit] = st.one_of(
    st.tuples(st.just(_set), st.tuples(KEYS, VALUES)),
    st.tuples(st.just(_set), st.tuples(st.sampled_from(["c", "new", "c.x"]), VALUES, st.just("other.yaml"))),
    st.tuples(st.just(_remove_setting), st.tuples(KEYS)),
    st.tuples(st.just(_write), st.tuples(PLACES, st.sampled_from(["1\n", "22\n"]))),
    st.tuples(st.just(_rename), st.tuples(PLACES, PLACES)),
    st.tuples(st.just(_lose), st.tuples(PLACES | LOST)),
    st.tuples(st.just(_forget), st.tuples(st.sampled_from("abcde"))),
)


@pytest.fixture
def reproduced(make_repository: Callable[..., Any]) -> Any:
    """A repository in which everything is up to date."""
    repository = make_repository(PIPELINE, FILES)
    repository.repro()
    return repository


numbers = itertools.count()


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(EDITS, min_size=EDITS_AT_LEAST, max_size=8))
@example([(_set, ("a.new", "none")), (_set, ("a.new", {})), (_set, ("a.new", None)), (_remove_setting, ("a.new",))])
@example([(_set, ("b.x", [])), (_set, ("b.x", "None")), (_set, ("b.x", {1: 1})), (_set, ("b.x", {"1": 1}))])
@example([(_set, ("c", "absent")), (_set, ("c", {"x.y": 1})), (_set, ("c", {"x": {"y": 1}})), (_set, ("a.x", True))])
def test_what_is_planned_is_what_dvc_does(reproduced: Any, edits: list[Edit]) -> None:
    repository = copy.copy(reproduced)
    repository.root = reproduced.root.with_name(f"edited{next(numbers)}")
    shutil.copytree(reproduced.root, repository.root)
    for edit, arguments in edits:
        note(f"{edit.__name__}{arguments}")
        edit(repository.root, *arguments)
        _compare(repository)
    shutil.rmtree(repository.root)


def _compare(repository: Any) -> None:
    planned: dict[str, Action] | None = None
    try:
        planned = {step.stage: step.action for step in plan(repository.root)}
    except BreedlineError as error:
        note(f"plan: {error}")
    failed = None
    try:
        done = repository.repro()
    except DvcException as error:  # such as a dependency that is gone
        note(f"repro: {error}")
        failed = re.search("failed to reproduce '(.*)'", str(error))
        done = repository.done()
        assert failed or planned is None
    else:
        assert planned is not None
    if planned is not None:
        if failed:
            assert planned[failed[1]] is Action.RUN
        assert done == [(stage, planned[stage]) for stage, _ in done]
        if not failed:
            assert set(planned) == {stage for stage, _ in done}
