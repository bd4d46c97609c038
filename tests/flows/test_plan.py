"""`breedline plan`."""

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
        (("epochs: 12", "epochs: twelve"), "train.epochs = 'twelve'"),
        (("epochs: 12", "epoch: 12"), "train.epoch: unknown setting; did you mean epochs?"),
        (("epochs: 12", "epochs: ["), "params.yaml is not YAML"),
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
