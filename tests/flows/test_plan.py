"""`breedline plan`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.plan import Action, plan


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


def test_an_error_is_one_line(tmp_path: Path) -> None:
    done = _print_plan(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
