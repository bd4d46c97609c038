"""What a stage reads is edited while it runs: its settings, an input, its code.

Bazel checks its inputs again after an action, and so does a stage: it ends with one line, and nothing is recorded. An edit
that comes before the stage looks at its inputs counts for the whole run. One that comes after the stage has ended, but
before DVC has hashed the inputs for dvc.lock, is DVC's: it would record them with outputs of the old ones.
"""

import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from breedline.code import code_of
from tests.campaigns.counts import keep, table
from tests.project import STAGES, Project

ROUNDS = 2
"""Of each stage and kind of edit."""
LINE = re.compile(r"^error: \w+: .+ changed while it ran, so its outputs are void: run it again$", re.M)


def _setting(project: Project, stage: str, deps: list[str], chance: random.Random) -> bool:
    """One more than any number of the stage's section; whether there is one."""
    path = project.folder / "params.yaml"
    params = YAML(typ="safe").load(path)
    numbers = list(_numbers(params[stage]))
    if numbers:
        section, key = chance.choice(numbers)
        section[key] += 1
        temporary = path.with_suffix(".edited")
        YAML(typ="safe").dump(params, temporary)
        temporary.replace(path)
    return bool(numbers)


def _numbers(section: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    own = [(section, key) for key, value in section.items() if type(value) is int]
    nested = [_numbers(value) for value in section.values() if isinstance(value, dict)]
    return own + [each for some in nested for each in some]


def _input(project: Project, stage: str, deps: list[str], chance: random.Random) -> bool:
    """A line more in a file that an earlier stage has written; whether there is one."""
    paths = [project.folder / dep for dep in deps if dep.startswith(("data/", "metrics/", "reports/"))]
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    if files:
        path = chance.choice(files)
        content = path.read_bytes()
        path.unlink()  # it may be a link to DVC's cache
        path.write_bytes(content + b"\n")
    return bool(files)


def _code(project: Project, stage: str, deps: list[str], chance: random.Random) -> bool:
    """A comment more in a module that the stage imports."""
    modules = [path.relative_to(Path(__file__).parents[2]) for path in code_of(Path(f"stages/{stage}.py").absolute())]
    with (project.folder / chance.choice(modules)).open("a") as file:
        file.write("# edited\n")
    return True


EDITS: dict[str, Callable[[Project, str, list[str], random.Random], bool]] = {
    "setting": _setting,
    "input": _input,
    "code": _code,
}


def _run(
    project: Project, stage: str, edit: Callable[[], object] = lambda: None, after: float = 0
) -> tuple[int, str, float]:
    """The exit code of the stage's run by DVC, what it said, and its seconds; the edit comes `after` so many of them."""
    said = project.folder.with_name("said")
    command = ["dvc", "repro", "--force", "--single-item", stage]
    with said.open("wb") as file:
        dvc = subprocess.Popen(command, cwd=project.folder, env=project.environment, stdout=file, stderr=file)
        while dvc.poll() is None and b"Running stage" not in said.read_bytes():
            time.sleep(0.01)
        began = time.monotonic()
        time.sleep(after)
        edit()
        code = dvc.wait(240)
    return code, said.read_text(), time.monotonic() - began


def _undo(project: Project, finished: Project) -> None:
    for name in ("data", "metrics", "reports", "stages", "breedline"):
        shutil.rmtree(project.folder / name)
        shutil.copytree(finished.folder / name, project.folder / name)
    shutil.copy(finished.folder / "params.yaml", project.folder)


def _recorded(project: Project, stage: str) -> Any:
    return YAML(typ="safe").load(project.lock())["stages"][stage]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_an_edit_while_a_stage_runs_is_seen_whole_or_voids_the_run(
    ran: tuple[Project, list[str]],
    preloaded: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    long: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    seed = int(os.environ.get("BREEDLINE_SEED", random.randrange(1 << 32)))  # noqa: S311 - not a secret
    chance = random.Random(seed)  # noqa: S311
    counts: Counter[tuple[str, str]] = Counter()
    lasts: dict[str, float] = {}
    cases = [(stage, kind) for stage in STAGES for kind in EDITS] * ROUNDS if long else [("label", "setting")]
    for stage, kind in cases:
        project = ran[0].copy(tmp_path / "project", PATH=preloaded)
        before, edited = _recorded(project, stage), False
        deps = [dep["path"] for dep in before.get("deps", ())]
        if stage not in lasts:
            lasts[stage] = _run(project, stage)[2]

        def edit(kind: str = kind, stage: str = stage, project: Project = project, deps: list[str] = deps) -> None:
            nonlocal edited
            edited = EDITS[kind](project, stage, deps, chance)

        code, said, _ = _run(project, stage, edit, chance.uniform(0, lasts[stage]))
        assert "Traceback" not in said, said
        if not edited:
            outcome = "nothing to edit"
        elif code:
            outcome = "void, one line" if LINE.search(said) else "refused, one line"
            assert len(re.findall(r"^error: ", said, re.M)) == 1, said
            assert _recorded(project, stage) == before
            _undo(project, ran[0])
            code, said, _ = _run(project, stage)
            assert code == 0, said
            assert _recorded(project, stage) == before
            assert stage != "train" or outcome.startswith("refused") or "resuming after epoch 1 of 1" in said
        else:
            once = _recorded(project, stage)
            again = _run(project, stage)[0] == 0 and _recorded(project, stage)
            outcome = "after the run" if once == before else "seen whole" if again == once else "recorded by DVC unseen"
        counts[stage, f"{kind}: {outcome}"] += 1
        keep("edits", counts, seed=seed)
        shutil.rmtree(project.folder)
        shutil.rmtree(tmp_path / "project-home")
    with capsys.disabled():
        print(f"\nseed {seed}\n{table(counts, 'stage', 'edits')}")
    unseen = sum(count for (_, outcome), count in counts.items() if "unseen" in outcome)
    assert unseen <= counts.total() // 20, "more than come between the end of a stage and DVC's record"
