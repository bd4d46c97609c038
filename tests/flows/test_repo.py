"""The plan is what DVC then does, and says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dvc
import pytest
from dvc.repo import Repo

from breedline.errors import BreedlineError
from flows.plan import Action, plan
from flows.repo import keep_order, metrics

RUN, RESTORE, UP_TO_DATE = Action.RUN, Action.RESTORE, Action.UP_TO_DATE
DIAMOND = None  # the default of make_repository
RUNS = {"b": (RUN, "a runs"), "c": (RUN, "a runs"), "d": (RUN, "b runs; c runs")}
FOLLOWS = {
    "b": (RESTORE, "a will be another"),
    "c": (RESTORE, "a will be another"),
    "d": (RESTORE, "b will be another; c will be another"),
}


def _actions(root: Path) -> list[tuple[str, Action]]:
    return [(step.stage, step.action) for step in plan(root)]


@pytest.mark.parametrize(
    ("stages", "needs"),
    [
        pytest.param(
            """
            d: {cmd: cat b c > d, deps: [b, c], outs: [d]}
            c: {cmd: cat a > c, deps: [a], outs: [c]}
            b: {cmd: cat a > b, deps: [a], outs: [b]}
            a: {cmd: cat in > a, deps: [in], outs: [a]}
            """,
            {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"b", "c"}},
            id="diamond, upside down",
        ),
        pytest.param(
            """
            m: {matrix: {net: [x, y], size: [1, 2]}, cmd: "cat in > ${item.net}${item.size}", deps: [in], outs: ["${item.net}${item.size}"]}
            all: {cmd: cat x1 y2 > all, deps: [x1, y2], outs: [all]}
            """,
            {"m@x-1": set(), "m@x-2": set(), "m@y-1": set(), "m@y-2": set(), "all": {"m@x-1", "m@y-2"}},
            id="matrix",
        ),
        pytest.param(
            """
            each: {foreach: [x, y], do: {cmd: "echo ${item} > ${item}", deps: [in], outs: ["${item}"]}}
            """,
            {"each@x": set(), "each@y": set()},
            id="foreach",
        ),
        pytest.param(
            """
            a: {wdir: inside, cmd: cat ../in > a, deps: [../in], outs: [a]}
            b: {cmd: cat inside/a > b, deps: [inside/a], outs: [b]}
            """,
            {"a": set(), "b": {"a"}},
            id="wdir",
        ),
        pytest.param(
            """
            a: {cmd: "echo ${a.size} ${a.colour.hue} > a", outs: [a]}
            """,
            {"a": set()},
            id="templated, no deps",
        ),
        pytest.param(
            """
            a2: {cmd: cat a > a2, deps: [a], outs: [a2]}
            b2: {cmd: cat b > b2, deps: [b], outs: [b2]}
            a: {cmd: cat in > a, deps: [in], outs: [a]}
            b: {cmd: cat in > b, deps: [in], outs: [b]}
            """,
            {"a": set(), "b": set(), "a2": {"a"}, "b2": {"b"}},
            id="two branches",
        ),
        pytest.param(
            """
            a: {cmd: cat data > a, deps: [data], outs: [a]}
            """,
            {"data.dvc": set(), "a": {"data.dvc"}},
            id="a .dvc file",
        ),
        pytest.param(
            """
            a: {cmd: cat in > a, deps: [in], outs: [a], frozen: true}
            b: {cmd: cat a > b, deps: [a], outs: [b], always_changed: true}
            """,
            {"a": set(), "b": {"a"}},
            id="frozen, always changed",
        ),
        pytest.param(
            """
            a: {cmd: cat in > a, deps: [in], outs: [a]}
            b: {cmd: cat a > b, deps: [a], outs: [b], frozen: true}
            """,
            {"b": set(), "a": set()},
            id="frozen, so in need of nothing",
        ),
        pytest.param(
            """
            a: {cmd: echo}
            """,
            {"a": set()},
            id="neither deps nor outs",
        ),
    ],
)
def test_plan_has_the_names_needs_order_and_actions_of_dvc(
    make_repository: Callable[..., Any], stages: str, needs: dict[str, set[str]]
) -> None:
    repository = make_repository("stages:\n" + stages, {"inside/x": "", "data": "1"})
    if "data.dvc" in needs:
        repository.shell("python -m dvc add data")
    if "frozen" in stages:  # and without a record, which DVC asks to be there
        repository.shell("cat in > a; cat in > b")
    steps = plan(repository.root)
    assert {step.stage: set(step.needs) for step in steps} == needs
    assert [(step.stage, step.action) for step in steps] == repository.repro()
    assert _actions(repository.root) == repository.repro()
    repository.shell("echo 2 > in; echo 2 > data")
    assert _actions(repository.root) == repository.repro()


REPRO = "python -m dvc repro -q"
FOLDER = """
stages:
  a: {cmd: mkdir a; cat in > a/x, deps: [in], outs: [a]}
  b: {cmd: cat a/x > b, deps: [a], metrics: [b: {cache: false}]}
  c: {cmd: cat b > c, deps: [b], outs: [c: {cache: false}]}
"""
FROZEN = """
stages:
  a: {cmd: cat in > a, deps: [in], outs: [a], frozen: true, always_changed: true}
  b: {cmd: cat a > b, deps: [a], outs: [b]}
"""


def _params(text: str) -> str:
    return f"echo 'a: {{{text}}}' > params.yaml"


@pytest.mark.parametrize(
    ("dvc_yaml", "change", "expected"),
    [
        pytest.param(DIAMOND, change, expected, id=name)
        for name, (change, expected) in {
            "nothing": ("true", {}),
            "dep changed": ("echo 22 > in", {"a": (RUN, "in changed"), **RUNS}),
            "dep touched": ("touch in", {}),
            "param changed": (
                _params("depth: 20, size: 1, colour: {hue: red}"),
                {"a": (RUN, "a.depth: 1 -> 20"), **RUNS},
            ),
            "nested param changed": (
                _params("depth: 1, size: 1, colour: {hue: green}"),
                {"a": (RUN, "a.colour.hue: 'red' -> 'green'"), **RUNS},
            ),
            "params added": (
                _params("depth: 1, size: 1, colour: {hue: red, light: 3}, b: [1]"),
                {"a": (RUN, "a.b: absent -> [1]; a.colour.light: absent -> 3"), **RUNS},
            ),
            "param removed": (
                _params("size: 1, colour: {hue: red}"),
                {"a": (RUN, "a.depth: 1 -> absent"), **RUNS},
            ),
            "param of a name that DVC's run-cache leaves out": (
                _params("depth: 1, size: 20, colour: {hue: red}"),
                {"a": (RESTORE, "a.size: 1 -> 20")},
            ),
            "param of nobody": ("echo 'other: 1' >> params.yaml", {}),
            "command changed": (
                "sed -i 's/cat in/cat in in/' dvc.yaml",
                {"a": (RUN, "its command changed"), **RUNS},
            ),
            "dep added": (
                "sed -i 's/deps: .in./deps: [in, Other]/; s/cat in/cat in in/' dvc.yaml; echo > Other",
                {"a": (RUN, "its command changed; Other changed"), **RUNS},
            ),
            "output missing": ("rm b", {"b": (RESTORE, "output b is missing")}),
            "outputs missing": ("rm a b c d", {name: (RESTORE, f"output {name} is missing") for name in "abcd"}),
            "output edited and its copy in the cache missing": (
                "rm .dvc/cache/files/md5/*/$(md5sum b | cut -c3-32); echo >> b",
                {"b": (RUN, "output b is not in the cache"), "d": (RUN, "b runs")},
            ),
            "output edited": ("echo >> b", {"b": (RESTORE, "output b changed")}),
            "record missing": ("rm dvc.lock", dict.fromkeys("abcd", (RESTORE, "it never ran"))),
            "record and cache missing": ("rm -r dvc.lock .dvc/cache", {"a": (RUN, "it never ran"), **RUNS}),
            "dep changed back": (f"echo 22 > in; {REPRO}; echo 1 > in", {"a": (RESTORE, "in changed"), **FOLLOWS}),
            "dep changed back, outputs missing": (
                f"echo 22 > in; {REPRO}; echo 1 > in; rm a b",
                {"a": (RESTORE, "in changed"), **FOLLOWS},
            ),
            "param changed back": (
                f"cp params.yaml old; echo 'a: 3' > params.yaml; {REPRO}; mv old params.yaml",
                {
                    "a": (
                        RESTORE,
                        "a: 3 -> absent; a.colour.hue: absent -> 'red'; a.depth: absent -> 1; a.size: absent -> 1",
                    ),
                    **FOLLOWS,
                },
            ),
        }.items()
    ]
    + [
        pytest.param(
            FOLDER,
            f"echo 2 > in; {REPRO}; echo 1 > in",
            {"a": (RESTORE, "in changed"), "b": (RESTORE, "a will be another"), "c": (RUN, "b will be another")},
            id="folder changed back",
        ),
        pytest.param(FROZEN, "echo 2 > in", {}, id="dep of a frozen stage changed"),
        pytest.param(
            FROZEN,
            "echo 2 > a",
            {"a": (RUN, "output a changed"), "b": (RUN, "a runs")},
            id="output of a frozen stage edited",
        ),
    ],
)
def test_plan_is_what_dvc_then_does(
    make_repository: Callable[..., Any], dvc_yaml: str, change: str, expected: dict[str, tuple[Action, str]]
) -> None:
    repository = make_repository(dvc_yaml)
    if dvc_yaml == FROZEN:
        repository.shell("cat in > a")
    repository.repro()
    repository.shell(change)
    before = repository.content()
    steps = plan(repository.root)
    assert repository.content() == before
    assert {step.stage: (step.action, "; ".join(step.why)) for step in steps if step.why} == expected
    assert [(step.stage, step.action) for step in steps] == repository.repro()
    assert not any(step.why for step in plan(repository.root))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rm -r .dvc", "you are not inside of a DVC repository"),
        ("rm dvc.yaml", "dvc.yaml.* does not exist"),
        ("echo 'stages: [' > dvc.yaml", "unable to read: 'dvc.yaml'"),
        ("echo 'stages: {a: {command: x}}' > dvc.yaml", "dvc.yaml' validation failed"),
        ("echo '{}' > params.yaml", "Parameters 'a' are missing from 'params.yaml'"),
        (
            "sed -i 's/outs: .a./outs: [a], meta: {prefect: {retry: 1}}/' dvc.yaml",
            r"dvc.yaml, a, meta.prefect: retry: Extra",
        ),
    ],
)
def test_plan_says_in_one_line_what_is_wrong(make_repository: Callable[..., Any], change: str, message: str) -> None:
    repository = make_repository()
    repository.repro()
    repository.shell(change)
    with pytest.raises(BreedlineError, match=message) as raised:
        plan(repository.root)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("version", "error"),
    [("4.0.0", "DVC 4.0.0 has moved what Breedline asks it"), ("3.67.9", "no attribute 'stage_cache'")],
)
def test_a_dvc_that_has_moved_its_insides_is_named(
    make_repository: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, version: str, error: str
) -> None:
    repository = make_repository()
    monkeypatch.setattr(dvc, "__version__", version)
    monkeypatch.delattr(Repo, "stage_cache", raising=False)
    monkeypatch.setattr(Repo, "__init__", lambda self, **_: None)
    monkeypatch.setattr(Repo, "close", lambda self: None)
    monkeypatch.setattr("flows.repo.USED", ("stage_cache",))
    with pytest.raises(BreedlineError if version == "4.0.0" else AttributeError, match=error):
        plan(repository.root)


def test_metrics_are_the_committed_and_the_present_numbers(make_repository: Callable[..., Any]) -> None:
    repository = make_repository(
        "stages: {a: {cmd: cp in m.json, deps: [in], metrics: [m.json: {cache: false}]}}",
        {"in": '{"gone": 1, "same": {"x": 2}, "name": "n"}'},
    )
    repository.repro()
    assert metrics(repository.root) == {"m.json:gone": (None, 1), "m.json:same.x": (None, 2)}
    repository.shell("rm -r .dvc; git init -q; python -m dvc init -q")
    assert metrics(repository.root) == {"m.json:gone": (None, 1), "m.json:same.x": (None, 2)}
    repository.shell("git add -A; git -c user.name=n -c user.email=e commit -qm m")
    (repository.root / "in").write_text('{"same": {"x": 2.5}, "new": 3}')
    repository.repro()
    found = metrics(repository.root)
    assert found == {"m.json:same.x": (2, 2.5), "m.json:new": (None, 3), "m.json:gone": (1, None)}


def test_the_order_of_the_record_is_that_of_dvc_whatever_ends_first(make_repository: Callable[..., Any]) -> None:
    repository = make_repository()
    repository.repro()
    lock = repository.root / "dvc.lock"
    after = lock.read_bytes()
    lock.unlink()
    with keep_order(repository.root, ["a", "b", "c", "d"]):
        for stage in "acbd":
            repository.shell(f"python -m dvc repro -q -s {stage}")
        assert lock.read_bytes() != after
    assert lock.read_bytes() == after


def test_a_stage_with_neither_deps_nor_outs_always_runs(make_repository: Callable[..., Any]) -> None:
    [step] = plan(make_repository("stages: {a: {cmd: echo}}").root)
    assert step.why == ("it always runs",)
