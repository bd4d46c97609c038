"""The plan is what DVC then does, says why, and is printed by `breedline plan`."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from breedline.errors import BreedlineError
from flows.plan import Action, plan

ROOT = Path(__file__).parents[2]
RUN, RESTORE, UP_TO_DATE = Action.RUN, Action.RESTORE, Action.UP_TO_DATE
DIAMOND = None  # the default of make_repository
RUNS = {"b": (RUN, "a runs"), "c": (RUN, "a runs"), "d": (RUN, "b runs; c runs")}
FOLLOWS = {
    "b": (RESTORE, "a will differ"),
    "c": (RESTORE, "a will differ"),
    "d": (RESTORE, "b will differ; c will differ"),
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
PARTS = """
stages:
  a: {cmd: mkdir -p a/z; cat in | tee a/x > a/z/x; cat other > a/y, deps: [in, other], outs: [a]}
  b: {cmd: cat a/x > b, deps: [a/x], outs: [b]}
  c: {cmd: cat a/z/x > c, deps: [a/z], outs: [c]}
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
            {"a": (RESTORE, "in changed"), "b": (RESTORE, "a will differ"), "c": (RUN, "b will differ")},
            id="folder changed back",
        ),
        pytest.param(
            PARTS,
            f"echo 2 > other; {REPRO}; echo 1 > other",
            {"a": (RESTORE, "other changed")},
            id="folder changed back, but not the part of it that is read",
        ),
        pytest.param(
            PARTS,
            f"echo 2 > in; {REPRO}; echo 1 > in",
            {"a": (RESTORE, "in changed"), "b": (RESTORE, "a/x will differ"), "c": (RESTORE, "a/z will differ")},
            id="folder changed back, and the parts of it that are read",
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
    repository = make_repository(dvc_yaml, {"other": "1\n"})
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


def test_a_stage_with_neither_deps_nor_outs_always_runs(make_repository: Callable[..., Any]) -> None:
    [step] = plan(make_repository("stages: {a: {cmd: echo}}").root)
    assert step.why == ("it always runs",)


def _print_plan(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("breedline"), "plan"]
    return subprocess.run(command, cwd=folder, env=os.environ | {"COLUMNS": "120"}, text=True, capture_output=True)


def test_the_command_prints_each_stage_with_what_happens_and_why(make_repository: Callable[..., Any]) -> None:
    repository = make_repository()
    repository.repro()
    repository.shell("rm a; echo 22 > in")
    (repository.root / "dvc.yaml").write_text(
        "stages: {b: {cmd: cat in > b, deps: [in], params: [a.depth], outs: [b]}}"
    )
    done = _print_plan(repository.root)
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["stage", "action", "why"],
        ["b", "will", "run", "its", "command", "changed;", "in", "changed;", "a.depth:", "absent", "->", "1"],
    ]
    assert done.returncode == 0


def test_a_secret_in_a_url_is_not_shown(make_repository: Callable[..., Any]) -> None:
    """As a setting, and within one that is a list of mappings."""
    url = "https://user:s3cret@host/pets.tgz?token=s3cret"
    repository = make_repository("stages: {b: {cmd: echo > b, params: [url, sources], outs: [b]}}")
    for number in (1, 2):
        settings = {"url": f"{url}{number}", "sources": [{"url": f"{url}{number}", "sha256": None}]}
        (repository.root / "params.yaml").write_text(json.dumps(settings))
        (step,) = plan(repository.root)
        assert step.action is Action.RUN
        assert "s3cret" not in str(step)
        repository.shell("dvc repro -q")
    assert any("'https://host/pets.tgz?…' -> 'https://host/pets.tgz?…'" in reason for reason in step.why)


def test_square_brackets_are_text(make_repository: Callable[..., Any]) -> None:
    """Of a file, of a setting and of its value; rich reads them as markup."""
    repository = make_repository(
        """stages: {b: {cmd: echo > b, deps: ["[/in]"], params: [map], outs: [b]}}""",
        {"[/in]": "", "params.yaml": '{map: {"[red]": "[/bold]", ":dog:": 1}}'},
    )
    repository.repro()
    repository.shell("""echo 2 > '[/in]'; echo '{map: {"[red]": "[/blink]", ":dog:": 2}}' > params.yaml""")
    done = _print_plan(repository.root)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert said.endswith("b will run [/in] changed; map.:dog:: 1 -> 2; map.[red]: '[/bold]' -> '[/blink]'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs: 6", "epochs: twelve"), "train.epochs = 'twelve'"),
        (("epochs: 6", "epoch: 12"), "train.epoch: unknown setting; did you mean epochs?"),
        (("epochs: 6", "epochs: ["), "params.yaml is not YAML"),
    ],
)
def test_a_broken_params_yaml_is_told_by_the_plan(
    make_repository: Callable[..., Any], change: tuple[str, str], message: str
) -> None:
    """Where it is ours; that of another DVC project, as in the other tests, may hold what it likes."""
    ours = {name: (ROOT / name).read_text() for name in ("params.yaml", "breedline/params.py")}
    repository = make_repository("stages: {b: {cmd: echo > b, params: [train], outs: [b]}}", ours)
    assert [step.stage for step in plan(repository.root)] == ["b"]
    repository.shell(f"sed -i 's/{change[0]}/{change[1]}/' params.yaml")
    with pytest.raises(BreedlineError, match=re.escape(message)):
        plan(repository.root)


def test_an_error_is_one_line(tmp_path: Path) -> None:
    done = _print_plan(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
