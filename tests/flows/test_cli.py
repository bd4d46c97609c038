"""The command `breedline`: asking for help does nothing, and a mistake is one line and an exit code."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from breedline.errors import NetworkError
from flows import cli

ROOT = Path(__file__).parents[2]
BREEDLINE = Path(sys.executable).with_name("breedline")
SUBCOMMANDS = [
    "plan",
    "run",
    "retrain",
    "watch",
    "score",
    "gate",
    "rollback",
    "serve",
    "verify-remote",
    "doctor",
    "predict",
    "app",
    "review",
    "completion",
]
HEAVY = {"prefect", "dvc", "torch", "fastai", "pandas", "PIL", "pydantic"}
WATCHED = f"""
import sys

def refuse(event, arguments):
    written = event == "open" and arguments[1] not in (None, "r", "rb")
    if written or event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "os.system", "os.fork")):
        raise AssertionError((event, arguments))

sys.addaudithook(refuse)
from flows.cli import main
try:
    main()
finally:
    assert not (found := {HEAVY} & set(sys.modules)), found
"""


def breedline(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120"}
    return subprocess.run([BREEDLINE, *arguments], cwd=folder, env=environment, text=True, capture_output=True)


def test_every_subcommand_is_in_the_help() -> None:
    done = breedline("--help")
    assert done.returncode == 0
    assert re.findall(r"^    ([a-z-]+)", done.stdout, re.M) == SUBCOMMANDS


@pytest.mark.parametrize("arguments", [[], *([name] for name in SUBCOMMANDS)], ids=" ".join)
def test_help_writes_nothing_starts_nothing_and_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCHED, *arguments, "--help"], text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {' '.join(['breedline', *arguments])} ")
    assert done.stderr == ""


def test_the_makefile_calls_the_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    called = re.findall(r"^\t@?breedline (.+)", makefile, re.M)
    assert called == ["plan", "serve", "verify-remote $(if $(DEEP),--deep)"]
    assert "python -m flows" not in makefile


@pytest.mark.parametrize("module", sorted(path.stem for path in ROOT.glob("flows/*.py")))
def test_the_command_is_the_only_door(module: str) -> None:
    text = (ROOT / "flows" / f"{module}.py").read_text()
    assert ("__main__" in text) == (module == "leash")  # which is a program of its own


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["repro"], "invalid choice: 'repro' (choose from 'plan', "),
        (["plan", "--force", "train"], "unrecognized arguments: --force train"),
        (["retrain", "--set", "train.epochs"], "'train.epochs' is not KEY=VALUE, such as train.epochs=20"),
        (["retrain", "--set", "train.epochs=[1"], "'train.epochs=[1' is not KEY=VALUE, such as train.epochs=20"),
    ],
)
def test_a_mistake_in_the_command_is_a_line_below_the_usage(arguments: list[str], said: str) -> None:
    done = breedline(*arguments)
    assert done.returncode == 2
    *usage, error = done.stderr.splitlines()
    assert usage[0].startswith("usage: breedline")
    assert said in error


def test_what_is_expected_to_fail_is_one_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise NetworkError("nobody answers: try again later")

    monkeypatch.setattr("flows.plan.main", fail)
    monkeypatch.setattr(sys, "argv", ["breedline", "plan"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 75
    assert capsys.readouterr().err == "error: nobody answers: try again later\n"


def test_a_folder_without_a_pipeline_is_one_line_before_any_server_starts(tmp_path: Path) -> None:
    for subcommand in ("plan", "run", "verify-remote"):
        done = breedline(subcommand, folder=tmp_path)
        assert done.returncode == 1
        assert done.stdout == ""
        assert re.fullmatch(r"error: .*\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("words", "flow", "given"),
    [
        ("run --force train", "flows.pipeline.pipeline", {"force": ("train",)}),
        (
            "retrain --set train.epochs=3 --set label.seed=7 --force train --force label",
            "flows.retrain.retrain",
            {
                "ref": "main",
                "overrides": {"train.epochs": 3, "label.seed": 7},
                "force": ["train", "label"],
                "publish": False,
            },
        ),
        (
            "watch --ref next --publish",
            "flows.watch.watch",
            {"ref": "next", "deployment": "retrain/on-demand", "publish": True},
        ),
    ],
)
@pytest.mark.parametrize(("state", "code"), [(Completed(), 0), (Failed(), 1), (Cancelled(), 1)], ids=lambda v: str(v))
def test_a_flow_gets_what_the_command_says_and_decides_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, words: str, flow: str, given: dict[str, Any], state: State[Any], code: int
) -> None:
    called: list[dict[str, Any]] = []

    def stand_in(**arguments: Any) -> State[Any]:
        called.append(arguments)
        return state

    monkeypatch.setattr(flow, stand_in)
    monkeypatch.setattr("flows.plan.plan", lambda root: [])
    monkeypatch.setattr(sys, "argv", ["breedline", *words.split()])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert called == [{**given, "return_state": True}]
    assert left.value.code == code


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("train.epochs=20", ("train.epochs", 20)),
        ("train.base_lr=1e-3", ("train.base_lr", 1e-3)),
        ("label.pattern=(?P<label>.+)=x", ("label.pattern", "(?P<label>.+)=x")),
        ("label.table=null", ("label.table", None)),
        ("label.map={a: b}", ("label.map", {"a": "b"})),
    ],
)
def test_a_setting_is_yaml(text: str, setting: tuple[str, object]) -> None:
    assert cli._setting(text) == setting


def test_a_setting_needs_a_key() -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        cli._setting("=1")


def test_a_shell_completes_the_subcommands() -> None:
    ask = f'source /dev/stdin; COMP_WORDS=({BREEDLINE} ver); COMP_CWORD=1; _shtab_breedline; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", ask], input=breedline("completion", "bash").stdout, text=True, capture_output=True
    )
    assert done.stdout.strip() == "verify-remote", done.stderr


def test_code_of_the_folder_that_one_works_in_is_before_what_is_installed(tmp_path: Path) -> None:
    """A run works in a clone, whose stages may be other ones."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/download.py").write_text("print('of the clone')")
    done = subprocess.run([sys.executable, "-m", "stages.download"], cwd=tmp_path, text=True, capture_output=True)
    assert done.stdout == "of the clone\n"
