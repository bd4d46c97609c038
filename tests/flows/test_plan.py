"""`breedline plan`."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
        ["b", "will", "run", "its", "command", "changed;", "in", "changed;", "a.depth:", "none", "->", "1"],
    ]
    assert done.returncode == 0


def test_an_error_is_one_line(tmp_path: Path) -> None:
    done = _print_plan(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
