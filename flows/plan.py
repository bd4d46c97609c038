"""The plan: what `dvc repro` would do with each stage, and why. Making it changes nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from dvc.dependency import Dependency, ParamsDependency
from dvc.dvcfile import LOCK_FILE, PROJECT_FILE
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

from breedline.errors import BreedlineError
from breedline.params import check_nesting, load_params
from breedline.urls import redacted
from flows.policy import Policy, policy_of
from flows.repo import flat, opened
from flows.workspace import PARAMS

OUR_CODE = Path("breedline/params.py")


class _Absent:
    """Stands for a setting that does not exist. It equals no value of a YAML file, whereas a word such as "none" could."""

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

    A stage downstream of one that runs is planned to run, too: whether its inputs will change is not known before.

    Args:
        pulled: assume that the cache has every output that dvc.lock names, as it will after a `dvc pull`.

    Raises:
        BreedlineError: dvc.yaml or dvc.lock cannot be read; or params.yaml is not as it should be, with every mistake.
    """
    if (root / OUR_CODE).exists():  # else it is another DVC project, whose settings are its own
        load_params(root / PARAMS)
    for name in (PROJECT_FILE, LOCK_FILE):
        check_nesting(root / name)
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
                action, why = _decide(stage, restored, pulled)
            steps[name] = Step(name, needs, action, tuple(map(redacted, why)), policy_of(name, stage.meta or {}))
    return list(steps.values())


Restored = dict[str, Output]
"""Outputs that `dvc repro` would restore from the cache, with the hashes they will have then, by absolute path."""


class _Content(NamedTuple):
    """What DVC records of a file or folder; the hash is empty (false) if there is no such file."""

    hash_info: HashInfo
    meta: Meta


def _decide(stage: Stage, restored: Restored, pulled: bool) -> tuple[Action, list[str]]:
    """What DVC would do with a stage none of whose upstream stages runs, and why.

    Args:
        restored: the outputs of upstream stages that will be restored; those of this stage are added if it is restored.
    """
    if not stage.is_callback and not any(entry.hash_info for entry in [*stage.deps, *stage.outs]):
        inputs = ["it never ran"]
    else:
        inputs = list(_changed_inputs(stage, restored))
    outputs = [f"output {path} {_in_words(change)}" for out in stage.outs for path, change in out.status().items()]
    if not inputs and not outputs:
        return Action.UP_TO_DATE, []
    if pulled and not inputs:
        found = stage.outs
    else:  # of a frozen stage DVC takes the outputs as they are
        found = [] if stage.frozen else _restorable(stage, restored, as_locked=not inputs)
    restored.update({out.fs_path: out for out in found})
    return Action.RESTORE if found else Action.RUN, inputs or outputs


def _changed_inputs(stage: Stage, restored: Restored) -> Iterator[str]:
    """Why DVC would not skip the stage, as far as its command, dependencies and settings go."""
    if (stage.always_changed or stage.is_callback) and not stage.frozen:
        yield "it always runs"
    if stage.changed_stage():
        yield "its command changed"
    for dep in [] if stage.frozen else stage.deps:
        if isinstance(dep, ParamsDependency):
            if dep.status():
                yield from _changed_settings(dep)
        elif coming := _content_after_restore(dep, restored):
            if coming.hash_info != dep.hash_info:
                yield f"{dep} will differ"
        else:
            yield from (f"{path} {_in_words(change)}" for path, change in dep.status().items())


def _changed_settings(dep: ParamsDependency) -> Iterator[str]:
    """The settings that differ, one by one, of a section that DVC has found changed."""
    old, new = flat(dep.hash_info.value), flat(dep.read_params())
    changed = [key for key in sorted({*old, *new}) if old.get(key, ABSENT) != new.get(key, ABSENT)]
    if not changed:  # the difference is in the keys, and joining them hides it: 1 and "1", "a.b" and b in a
        yield f"{dep} changed"
    yield from (f"{key}: {old.get(key, ABSENT)!r} -> {new.get(key, ABSENT)!r}" for key in changed)


def _content_after_restore(dep: Dependency, restored: Restored) -> _Content | None:
    """The content that `dep` will have once the outputs in `restored` are; None if it is in none of them.

    A dependency may also be a file or subfolder in a restored folder. Its hash then comes from the folder's object in
    the cache, a list of (path, hash): the file is on the disk only after the restore.
    """
    path = Path(dep.fs_path)
    out = next((restored[str(place)] for place in [path, *path.parents] if str(place) in restored), None)
    if out is None:
        return None
    if out.fs_path == dep.fs_path:
        return _Content(out.hash_info, out.meta)
    folder = out.get_obj()
    if folder is None:  # the list is yet to be pulled; the folder will be as dvc.lock says, so the part is, too
        return _Content(dep.hash_info, dep.meta)
    part = out.get_obj(filter_info=dep.fs_path) if isinstance(folder, Tree) else None
    return _Content(part.hash_info if part else HashInfo(), Meta())


def _in_words(change: str) -> str:
    words = {"deleted": "is missing", "modified": "changed", "new": "is new", "not in cache": "is not in the cache"}
    return words.get(change, change)


def _restorable(stage: Stage, restored: Restored, as_locked: bool) -> list[Output]:
    """The outputs that DVC would restore instead of running the stage, with their hashes; empty if it has to run.

    This repeats `StageCache.restore(dry=True)` of DVC, which cannot plan a chain of stages: it hashes the dependencies
    that are on the disk now, but those of the second stage arrive only when the first has been restored. So their
    future hashes are put into the stage first. Then DVC is asked the same three things as in `restore`:

    1. `_can_hash`: may this stage be restored at all? It needs a command, dependencies with a hash, and outputs
       in the repository that do not persist.
    2. Which outputs are recorded for these dependencies? dvc.lock tells if they are what it says (`as_locked`);
       else the run-cache, which maps a hash of (command, hashes of dependencies, settings, output paths) to the hashes
       of the outputs.
    3. `outs_cached`: does the cache still have every one of these outputs, unaltered?
    """
    for dep in stage.deps:
        if coming := _content_after_restore(dep, restored):
            dep.hash_info, dep.meta = coming
            dep.get_hash = lambda known=dep.hash_info: (
                known
            )  # what _can_hash asks; DVC would hash a file that is not there yet
        elif not as_locked:
            if not dep.exists:
                return []
            dep.save()
    if not _can_hash(stage):
        return []
    cache = stage.repo.stage_cache
    try:
        recorded = to_single_stage_lockfile(stage) if as_locked else cache._load(stage)
    except TypeError as error:  # from json, which sorts the keys
        raise BreedlineError(
            f"stage {stage.addressing}: a setting has texts and numbers as keys, which DVC cannot sort: put them in quotes"
        ) from error
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
    for step, row in zip(steps, rows(steps), strict=True):  # Text, since rich reads [red] in a str as markup
        table.add_row(Text(row["stage"]), Text(row["action"], STYLES[step.action]), Text(row["why"]))
    Console().print(table)
