"""What `dvc repro` would do with each stage, and why; changes nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from dvc.dependency import Dependency, ParamsDependency
from dvc.dvcfile import PROJECT_FILE
from dvc.output import Output
from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro
from dvc.stage import Stage
from dvc.stage.cache import _can_hash
from dvc.stage.serialize import to_single_stage_lockfile
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.tree import Tree
from rich.console import Console
from rich.table import Table
from rich.text import Text

from breedline.params import load_params
from breedline.urls import redacted
from flows.policy import Policy, policy_of
from flows.repo import flat, opened
from flows.workspace import PARAMS

OUR_CODE = Path("breedline/params.py")


class _Absent:
    """Stands for a setting that is not there; unlike any word, no file can hold it."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


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

    Raises:
        BreedlineError: dvc.yaml or dvc.lock cannot be read; or params.yaml is not as it should be, with every mistake.
    """
    if (root / OUR_CODE).exists():  # else it is another DVC project, whose settings are its own
        load_params(root / PARAMS)
    steps: dict[str, Step] = {}
    restored: Restored = {}
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


Restored = dict[str, Output]
"""The outputs that the plan takes from DVC's cache, with the hashes that they will then have, by their absolute path."""


class _Content(NamedTuple):
    """What DVC records of a file or folder. An empty hash is that of something that is not there."""

    hash_info: HashInfo
    meta: Meta


def _choose(stage: Stage, restored: Restored, pulled: bool) -> tuple[Action, list[str]]:
    """What DVC would do with a stage, and why.

    Args:
        restored: what the stages before it are given from the cache; this one's outputs are added if it is restored.
    """
    if not stage.is_callback and not any(entry.hash_info for entry in [*stage.deps, *stage.outs]):
        inputs = ["it never ran"]
    else:
        inputs = list(_changed_inputs(stage, restored))
    outputs = [f"output {path} {_said(change)}" for out in stage.outs for path, change in out.status().items()]
    if not inputs and not outputs:
        return Action.UP_TO_DATE, []
    if pulled and not inputs:
        found = stage.outs
    else:  # of a frozen stage DVC takes the outputs as they are
        found = [] if stage.frozen else _find(stage, restored, as_locked=not inputs)
    restored.update({out.fs_path: out for out in found})
    return Action.RESTORE if found else Action.RUN, inputs or outputs


def _changed_inputs(stage: Stage, restored: Restored) -> Iterator[str]:
    if (stage.always_changed or stage.is_callback) and not stage.frozen:
        yield "it always runs"
    if stage.changed_stage():
        yield "its command changed"
    for dep in [] if stage.frozen else stage.deps:
        if isinstance(dep, ParamsDependency):
            if dep.status():
                yield from _changed_settings(dep)
        elif coming := _coming(dep, restored):
            if coming.hash_info != dep.hash_info:
                yield f"{dep} will be another"
        else:
            yield from (f"{path} {_said(change)}" for path, change in dep.status().items())


def _changed_settings(dep: ParamsDependency) -> Iterator[str]:
    """Which of the settings that DVC found changed as a whole are so, one by one."""
    old, new = flat(dep.hash_info.value), flat(dep.read_params())
    changed = [key for key in sorted({*old, *new}) if old.get(key, ABSENT) != new.get(key, ABSENT)]
    if not changed:  # only the keys differ, and read alike once they are joined: 1 and "1", "a.b" and b within a
        yield f"{dep} changed"
    yield from (f"{key}: {old.get(key, ABSENT)!r} -> {new.get(key, ABSENT)!r}" for key in changed)


def _coming(dep: Dependency, restored: Restored) -> _Content | None:
    """What `dep` will be once `restored` is in its place; None where it is not among that, so that the disk tells.

    An input may be a part of a restored folder: DVC keeps of a folder the list of what is in it, which names that part.
    """
    path = Path(dep.fs_path)
    out = next((restored[str(place)] for place in [path, *path.parents] if str(place) in restored), None)
    if out is None:
        return None
    if out.fs_path == dep.fs_path:
        return _Content(out.hash_info, out.meta)
    folder = out.get_obj()
    if folder is None:  # yet to be pulled, as dvc.lock says, which says the same of the part
        return _Content(dep.hash_info, dep.meta)
    part = out.get_obj(filter_info=dep.fs_path) if isinstance(folder, Tree) else None
    return _Content(part.hash_info if part else HashInfo(), Meta())


def _said(change: str) -> str:
    words = {"deleted": "is missing", "modified": "changed", "new": "is new", "not in cache": "is not in the cache"}
    return words.get(change, change)


def _find(stage: Stage, restored: Restored, as_locked: bool) -> list[Output]:
    """The outputs that DVC would restore instead of running the stage, with their hashes; none where it has to run.

    DVC has two places to look: dvc.lock, if the inputs are what it says, and else its run-cache, which knows what a
    stage made of the hashes of all its inputs. `StageCache.restore(dry=True)` looks there, too, but hashes the inputs
    as they are on the disk now, while in a chain of stages those of the second are only there once the first is
    restored. So the hashes of such inputs are put into the stage by hand, before the same questions are asked: whether
    it can be cached at all, what is recorded for its inputs, and whether the cache still has that.
    """
    for dep in stage.deps:
        if coming := _coming(dep, restored):
            dep.hash_info, dep.meta = coming
            dep.get_hash = lambda known=dep.hash_info: known  # DVC would hash the file, which is not there yet
        elif not as_locked:
            if not dep.exists:
                return []
            dep.save()
    if not _can_hash(stage):
        return []
    cache = stage.repo.stage_cache
    recorded = to_single_stage_lockfile(stage) if as_locked else cache._load(stage)
    if not recorded:
        return []
    cached = cache._create_stage(recorded, wdir=stage.wdir)
    return cached.outs if cached.outs_cached() else []


STYLES = {Action.UP_TO_DATE: "green", Action.RESTORE: "cyan", Action.RUN: "yellow"}


def rows(steps: list[Step]) -> list[dict[str, str]]:
    """The plan as a table of texts."""
    return [{"stage": step.stage, "action": step.action.value, "why": "; ".join(step.why)} for step in steps]


def main() -> None:
    """Print the plan of the working folder."""
    steps = plan(Path())
    table = Table("stage", "action", "why", box=None, header_style="bold")
    for step, row in zip(steps, rows(steps), strict=True):  # as Text: in a plain str, [red] would be a style
        table.add_row(Text(row["stage"]), Text(row["action"], STYLES[step.action]), Text(row["why"]))
    Console().print(table)
