"""What DVC knows, asked in this process: the graph of any dvc.yaml, what would happen to each stage and why, metrics.

The only module that touches `dvc.repo.Repo`. That is not a public interface: should it move, this is what to mend.
"""

import contextlib
import operator
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import dvc
from dvc.dependency import Dependency, ParamsDependency
from dvc.dvcfile import LOCK_FILE, PROJECT_FILE
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro
from dvc.stage import Stage
from dvc.stage.cache import _can_hash
from dvc.stage.serialize import to_single_stage_lockfile
from dvc.utils.serialize import load_yaml, modify_yaml
from dvc_data.hashfile.db import HashFileDB
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.tree import Tree
from dvc_objects.errors import ObjectFormatError

from breedline.errors import BreedlineError
from breedline.fetch import reaching
from flows.policy import Policy, policy_of

MADE_WITH = "3.67"
USED = (
    "lock",
    "metrics.show",
    "cloud.get_remote",
    "cache.local",
    "stage_cache._load",
    "stage_cache._create_stage",
)
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


@contextlib.contextmanager
def opened(root: Path) -> Iterator[Repo]:
    """The repository at `root`, which is the working folder meanwhile: DVC names stages and files as seen from there.

    Raises:
        BreedlineError: no DVC repository, a dvc.yaml that DVC cannot read, or a DVC that has moved its insides.
    """
    with contextlib.chdir(root):
        try:
            with Repo(_wait_for_lock=True) as repo:
                for name in USED:
                    operator.attrgetter(name)(repo)
                yield repo
        except DvcException as error:
            raise BreedlineError(f"{root}: {' '.join(str(error).split())}") from error
        except (AttributeError, ImportError) as error:
            if not dvc.__version__.startswith(MADE_WITH):
                raise BreedlineError(
                    f"DVC {dvc.__version__} has moved what Breedline asks it ({error}): install {MADE_WITH}"
                ) from error
            raise


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
            steps[name] = Step(name, needs, action, tuple(why), policy_of(name, stage.meta or {}))
    return list(steps.values())


def metrics(root: Path) -> dict[str, tuple[float | None, float | None]]:
    """Every number among the metrics of the repository at `root`, as `path:key`: the committed value, the present one."""
    with opened(root) as repo:
        committed = not repo.config["core"]["no_scm"] and not repo.scm.no_commits
        shown = repo.metrics.show(revs=["HEAD"] if committed else None, hide_workspace=False)
    old, new = (_numbers(shown.get(revision, {})) for revision in ("HEAD", "workspace" if committed else ""))
    return {name: (old.get(name), new.get(name)) for name in {**new, **old}}


def _numbers(shown: dict[str, Any]) -> dict[str, float]:
    return {
        f"{path}:{key}": value
        for path, file in shown.get("data", {}).items()
        for key, value in _flat(file.get("data")).items()
        if isinstance(value, int | float)
    }


@contextlib.contextmanager
def keep_order(root: Path, stages: list[str]) -> Iterator[None]:
    """Around runs of `stages`, which end in any order: afterwards dvc.lock has them in the order of `dvc repro`."""
    before = _locked(root)
    yield
    order = [*before, *(stage for stage in stages if stage not in before)]
    if (after := _locked(root)) != sorted(after, key=order.index):
        with opened(root) as repo, repo.lock, modify_yaml(LOCK_FILE) as lock:
            lock["stages"] = {stage: lock["stages"][stage] for stage in sorted(after, key=order.index)}


def _locked(root: Path) -> list[str]:
    """The stages in dvc.lock."""
    path = root / LOCK_FILE
    return list(load_yaml(path).get("stages", {})) if path.exists() else []


def share_cache(checkout: Path, clone: Path) -> None:
    """Let the repository at `clone` use the cache of the one at `checkout`, and its settings for this machine alone."""
    with opened(checkout) as repo:
        settings = repo.config.load_one("local")
        settings.setdefault("cache", {})["dir"] = repo.cache.legacy.path
    with opened(clone) as repo, repo.config.edit("local") as local:
        local.update(settings)


def recorded(root: Path) -> list[str]:
    """The files in which git keeps what DVC knows: dvc.lock, outputs that are not cached (metrics), what git ignores."""
    with opened(root) as repo:
        uncached = [str(out) for out in repo.index.outs if not out.use_cache]
        ignores = {str(Path(str(out)).parent / ".gitignore") for out in repo.index.outs if out.use_cache}
        return [LOCK_FILE, *uncached, *sorted(ignores)]


@dataclass(frozen=True)
class Stored:
    """A file that dvc.lock names, as an object of DVC's cache and remote."""

    name: str
    """Its path in the repository."""
    remote: str | None
    """The remote that it belongs to, by name; None is the default one."""
    oid: str
    bytes: int | None
    """Its size, where the cache of this machine has it."""


def stored(root: Path) -> list[Stored]:
    """Every object that the recorded outputs of the repository at `root` are made of, but for those kept in git.

    Raises:
        BreedlineError, NetworkError: as `missing`.
    """
    found: dict[str, Stored] = {}
    with opened(root) as repo, reaching("DVC remote", ".dvc/config"):
        cache = repo.cache.local
        for out in repo.index.outs:
            if out.use_cache and out.can_push and out.hash_info:
                files = {str(out): out.hash_info.value}
                if out.hash_info.isdir:
                    files |= {f"{out}/{'/'.join(key)}": info.value for key, _, info in _folder(repo, out)}
                for name, oid in files.items():
                    path = Path(cache.oid_to_path(oid))
                    size = path.stat().st_size if path.is_file() else None
                    found.setdefault(oid, Stored(name, out.remote, oid, size))
    return list(found.values())


def _folder(repo: Repo, out: Output) -> Iterable[tuple[tuple[str, ...], Meta | None, HashInfo]]:
    """What is in a folder; nothing, where its list is lost."""
    for odb in (repo.cache.local, _store(repo, out.remote)):
        with contextlib.suppress(FileNotFoundError, ObjectFormatError):
            return Tree.load(odb, out.hash_info)
    return ()


def missing(root: Path, objects: list[Stored]) -> list[Stored]:
    """Those of `objects` that are not on their remote, or there in another size. Asks the remote about every one.

    Raises:
        BreedlineError: there is no such remote, or it is one that keeps files by name (version_aware, worktree).
        NetworkError: the remote does not answer.
    """
    with opened(root) as repo, reaching("DVC remote", ".dvc/config"):
        stores = {name: _store(repo, name) for name in {stored.remote for stored in objects}}

        def lacks(stored: Stored) -> bool:
            store = stores[stored.remote]
            try:
                size = store.fs.info(store.oid_to_path(stored.oid))["size"]
            except FileNotFoundError:
                return True
            return stored.bytes is not None and size != stored.bytes

        with ThreadPoolExecutor(16) as threads:
            return [stored for stored, gone in zip(objects, threads.map(lacks, objects), strict=True) if gone]


def upload(root: Path, objects: list[Stored]) -> list[Stored]:
    """Send `objects` from the cache to their remote, whatever is there; those that the cache has not got whole are left.

    Raises:
        BreedlineError, NetworkError: as `missing`.
    """
    lost = []
    with opened(root) as repo, reaching("DVC remote", ".dvc/config"):
        cache = repo.cache.local
        for stored in objects:
            try:
                cache.check(stored.oid)
            except (FileNotFoundError, ObjectFormatError):
                lost.append(stored)
                continue
            _store(repo, stored.remote).add(cache.oid_to_path(stored.oid), cache.fs, stored.oid, check_exists=False)
    return lost


def has_remote(root: Path) -> bool:
    """Whether the repository at `root` has a default remote."""
    with opened(root) as repo:
        return bool(repo.config["core"].get("remote"))


def check_remote(root: Path) -> None:
    """Raises BreedlineError where there is no default remote, or one that cannot be verified."""
    with opened(root) as repo:
        _store(repo, None)


def _store(repo: Repo, name: str | None) -> HashFileDB:
    remote = repo.cloud.get_remote(name)
    if remote.worktree or remote.fs.version_aware:
        raise BreedlineError(
            f"the DVC remote {remote.name} keeps files by name, which cannot be verified: use a plain one"
        )
    remote.fs.fs.invalidate_cache()  # what is there now, not what it was when somebody last looked
    return remote.odb


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
            old, new = _flat(dep.hash_info.value), _flat(dep.read_params())
            changed = [key for key in sorted({*old, *new}) if old.get(key, NONE) != new.get(key, NONE)]
            yield from (f"{key}: {old.get(key, NONE)} -> {new.get(key, NONE)}" for key in changed)
        elif coming := _coming(dep, restored):
            if not coming.as_locked:
                yield f"{dep} will be another"
        else:
            yield from (f"{path} {_said(change)}" for path, change in dep.status().items())


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value}."""
    if not isinstance(settings, dict):
        return {prefix: settings} if prefix else {}
    parts = (_flat(value, f"{prefix}.{key}".lstrip(".")) for key, value in settings.items())
    return {key: value for part in parts for key, value in part.items()}


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
