"""What `dvc repro` would do with each stage, and why; changes nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from dvc.dependency import Dependency, ParamsDependency
from dvc.dvcfile import PROJECT_FILE
from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro
from dvc.stage import Stage
from dvc.stage.cache import _can_hash
from dvc.stage.serialize import to_single_stage_lockfile
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from rich.console import Console
from rich.table import Table

from breedline.urls import redacted
from flows.policy import Policy, policy_of
from flows.repo import flat, opened

NONE = "none"


class Action(StrEnum):
    """What `dvc repro` would do with a stage."""

    UP_TO_DATE = "up to date"
    RESTORE = "restored from run-cache"
    RUN = "will run"


@dataclass(frozen=True)
class Step:
    """A stage of the plan; of a matrix or foreach, one of its instances (`train@resnet34`)."""

    stage: str
    needs: tuple[str, ...]
    """The stages whose outputs it reads."""
    action: Action
    why: tuple[str, ...]
    policy: Policy


def plan(root: Path, *, pulled: bool = False) -> list[Step]:
    """What `dvc repro` would do with each stage of dvc.yaml at `root`, and why, in its order. Changes nothing.

    A stage after one that will run is said to run because of that one: its inputs may turn out the same, nobody knows.

    Args:
        pulled: as if the remote had every output that dvc.lock names, and they were in the cache.
    """
    steps: dict[str, Step] = {}
    restored: dict[str, _Restored] = {}
    with opened(root) as repo, repo.lock:
        graph = get_active_graph(repo.index.graph)
        for stage in plan_repro(graph, collect_stages(repo, [PROJECT_FILE])):
            name = stage.addressing
            needs = tuple(needed.addressing for needed in graph.successors(stage))
            if runs := [f"{needed} runs" for needed in needs if steps[needed].action is Action.RUN]:
                action, why = Action.RUN, runs
            else:
                action, why = _choose(stage, restored, pulled)
            steps[name] = Step(name, needs, action, tuple(map(redacted, why)), policy_of(name, stage.meta or {}))
    return list(steps.values())


class _Restored(NamedTuple):
    """An output that the plan takes from DVC's cache."""

    hash_info: HashInfo
    meta: Meta
    as_locked: bool
    """Whether that is what dvc.lock says."""


def _choose(stage: Stage, restored: dict[str, _Restored], pulled: bool) -> tuple[Action, list[str]]:
    """What DVC would do with a stage whose inputs are there or are in `restored`, to which its outputs may be added."""
    if not stage.is_callback and not any(entry.hash_info for entry in [*stage.deps, *stage.outs]):
        inputs = ["it never ran"]
    else:
        inputs = list(_changed_inputs(stage, restored))
    outputs = [f"output {path} {_said(change)}" for out in stage.outs for path, change in out.status().items()]
    if not inputs and not outputs:
        return Action.UP_TO_DATE, []
    if pulled and not inputs:
        found = {out.fs_path: _Restored(out.hash_info, out.meta, as_locked=True) for out in stage.outs}
    else:  # of a frozen stage DVC takes the outputs as they are
        found = {} if stage.frozen else _find(stage, restored, as_locked=not inputs)
    restored.update(found)
    return Action.RESTORE if found else Action.RUN, inputs or outputs


def _changed_inputs(stage: Stage, restored: dict[str, _Restored]) -> Iterator[str]:
    if (stage.always_changed or stage.is_callback) and not stage.frozen:
        yield "it always runs"
    if stage.changed_stage():
        yield "its command changed"
    for dep in [] if stage.frozen else stage.deps:
        if isinstance(dep, ParamsDependency):
            old, new = flat(dep.hash_info.value), flat(dep.read_params())
            changed = [key for key in sorted({*old, *new}) if old.get(key, NONE) != new.get(key, NONE)]
            yield from (f"{key}: {old.get(key, NONE)} -> {new.get(key, NONE)}" for key in changed)
        elif coming := _coming(dep, restored):
            if not coming.as_locked:
                yield f"{dep} will be another"
        else:
            yield from (f"{path} {_said(change)}" for path, change in dep.status().items())


def _coming(dep: Dependency, restored: dict[str, _Restored]) -> _Restored | None:
    """What will be restored as `dep`, or as the folder that it lies in."""
    path = Path(dep.fs_path)
    return next((restored[str(place)] for place in [path, *path.parents] if str(place) in restored), None)


def _said(change: str) -> str:
    words = {"deleted": "is missing", "modified": "changed", "new": "is new", "not in cache": "is not in the cache"}
    return words.get(change, change)


def _find(stage: Stage, restored: dict[str, _Restored], as_locked: bool) -> dict[str, _Restored]:
    """The outputs that DVC would restore instead of running the stage; none where it has to run.

    As `StageCache.restore(dry=True)`, which cannot be asked about inputs that are yet to be restored themselves.
    """
    for dep in stage.deps:
        if coming := _coming(dep, restored):
            if dep.fs_path in restored:
                dep.hash_info, dep.meta = coming.hash_info, coming.meta
            elif not coming.as_locked:
                return {}
            dep.get_hash = lambda known=dep.hash_info: known  # the file itself is not there to be asked
        elif not as_locked:
            if not dep.exists:
                return {}
            dep.save()
    if not _can_hash(stage):
        return {}
    cache = stage.repo.stage_cache
    outputs = to_single_stage_lockfile(stage) if as_locked else cache._load(stage)
    if not outputs:
        return {}
    cached = cache._create_stage(outputs, wdir=stage.wdir)
    if not cached.outs_cached():
        return {}
    locked = {out.fs_path: out.hash_info for out in stage.outs}
    return {
        out.fs_path: _Restored(out.hash_info, out.meta, as_locked=out.hash_info == locked[out.fs_path])
        for out in cached.outs
    }


STYLES = {Action.UP_TO_DATE: "green", Action.RESTORE: "cyan", Action.RUN: "yellow"}


def rows(steps: list[Step]) -> list[dict[str, str]]:
    """The plan as a table of texts."""
    return [{"stage": step.stage, "action": step.action.value, "why": "; ".join(step.why)} for step in steps]


def main() -> None:
    """Print the plan of the working folder."""
    steps = plan(Path())
    table = Table("stage", "action", "why", box=None, header_style="bold")
    for step, row in zip(steps, rows(steps), strict=True):
        table.add_row(row["stage"], f"[{STYLES[step.action]}]{row['action']}[/]", row["why"])
    Console().print(table)
