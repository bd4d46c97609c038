"""What DVC knows: its metrics, its lock file, its cache, asked in this process.

`repo`, `plan` and `remote` are the only modules that import DVC. They use parts of it that are not a public interface:
if a new version of DVC changes these parts, only the three modules have to follow.
"""

import contextlib
import operator
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dvc
from dvc.dvcfile import LOCK_FILE, Lockfile
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.serialize import load_yaml, modify_yaml

from breedline.errors import BreedlineError

MADE_WITH = "3.67"
USED = (
    "lock",
    "metrics.show",
    "cloud.get_remote",
    "cache.local",
    "state.hashes.clear",
    "stage_cache.cache_dir",
    "stage_cache._load",
    "stage_cache._create_stage",
)
SILENCE = 20
"""Seconds without a byte; by default 60. botocore tries again, and s3fs five times around it."""
TEMPORARY = re.compile(r"\.[\w-]{22}\.tmp")
"""What DVC calls a file that it is writing."""


class LockFileError(BreedlineError):
    """A dvc.lock that was cut off, or that is none at all."""


@contextlib.contextmanager
def opened(root: Path) -> Iterator[Repo]:
    """The DVC repository at `root`, open; `root` is the working folder meanwhile, so that DVC's names are relative to it.

    Raises:
        BreedlineError: there is no DVC repository, DVC fails, or this version of DVC lacks what is used of it.
        LockFileError: dvc.lock has a hash of an unknown kind.
    """
    with contextlib.chdir(root):
        try:
            with Repo(_wait_for_lock=True) as repo:
                for name in USED:
                    operator.attrgetter(name)(repo)
                yield repo
        except DvcException as error:
            raise BreedlineError(f"{root}: {' '.join(str(error).split())}") from error
        except NotImplementedError as error:
            remedy = f"`git checkout {LOCK_FILE}`"
            raise LockFileError(f"{root / LOCK_FILE} has a hash of a kind that DVC does not know: {remedy}") from error
        except (AttributeError, ImportError) as error:
            if not dvc.__version__.startswith(MADE_WITH):
                raise BreedlineError(
                    f"DVC {dvc.__version__} has moved what Breedline asks it ({error}): install {MADE_WITH}"
                ) from error
            raise


def metrics(root: Path) -> dict[str, tuple[float | None, float | None]]:
    """Every number in the metrics files of the repository at `root`: {"path:key": (value in HEAD, value now)}."""
    with opened(root) as repo:
        committed = not repo.config["core"]["no_scm"] and not repo.scm.no_commits
        shown = repo.metrics.show(revs=["HEAD"] if committed else None, hide_workspace=False)
    old, new = (_numbers(shown.get(revision, {})) for revision in ("HEAD", "workspace" if committed else ""))
    return {name: (old.get(name), new.get(name)) for name in {**new, **old}}


def _numbers(shown: dict[str, Any]) -> dict[str, float]:
    return {
        f"{path}:{key}": value
        for path, file in shown.get("data", {}).items()
        for key, value in flat(file.get("data")).items()
        if isinstance(value, int | float)
    }


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value}. An empty mapping is kept as a value."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings} if prefix else {}
    parts = (flat(value, f"{prefix}.{key}".lstrip(".")) for key, value in settings.items())
    return {key: value for part in parts for key, value in part.items()}


@contextlib.contextmanager
def keep_order(root: Path, stages: list[str]) -> Iterator[None]:
    """On leaving, sort dvc.lock as `dvc repro` would have written it, whatever order `stages` ended in meanwhile.

    Args:
        stages: in the order of `dvc repro`.
    """
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


def check_lock(root: Path) -> None:
    """Raises LockFileError if dvc.lock at `root` makes no sense."""
    with opened(root) as repo:
        try:
            Lockfile(repo, LOCK_FILE).load()
        except DvcException as error:
            raise LockFileError(f"{LOCK_FILE} makes no sense: {' '.join(str(error).split())}") from error


def outputs(root: Path) -> list[str]:
    """The paths of all outputs in dvc.yaml at `root`, metrics included."""
    with opened(root) as repo:
        return [str(out) for out in repo.index.outs]


def cut_off(root: Path, before: float) -> list[Path]:
    """Temporary files of a dvc that was killed: beside the outputs, and in its cache those last written `before`.

    The cache may be shared with a dvc that is at work elsewhere. No file in it has such a name for long.
    """
    with opened(root) as repo:
        beside = {root / Path(str(out)).parent for out in repo.index.outs}
        found = [path for folder in beside for path in folder.glob(".*.tmp")]
        kept = (path for path in Path(repo.cache.legacy.path).rglob(".*.tmp") if path.lstat().st_mtime < before)
        return [path for path in (*found, *kept) if TEMPORARY.fullmatch(path.name)]


def empty_runs(root: Path) -> list[Path]:
    """Folders of the run-cache without a file, as a kill or a power loss may leave them: dvc fails at their stages.

    They are so for a second: in a new one, the dvc of another clone with the same cache is about to write.
    """
    with opened(root) as repo:
        found = [folder for folder in Path(repo.stage_cache.cache_dir).glob("??/*") if not any(folder.iterdir())]
    if found:
        time.sleep(1)
    return [folder for folder in found if folder.is_dir() and not any(folder.iterdir())]


def altered(root: Path) -> dict[str, str]:
    """Which outputs of stages that have run are not as dvc.lock says, and whether each is "deleted" or "modified"."""
    with opened(root) as repo:
        ran = (out for out in repo.index.outs if out.hash_info)
        return {path: change for out in ran for path, change in out.workspace_status().items()}


def share_cache(checkout: Path, clone: Path) -> None:
    """Give the repository at `clone` the cache and the local settings (.dvc/config.local) of the one at `checkout`."""
    with opened(checkout) as repo:
        settings = repo.config.load_one("local")
        settings.setdefault("cache", {})["dir"] = repo.cache.legacy.path
    with opened(clone) as repo, repo.config.edit("local") as local:
        local.update(settings)


def distrust_remotes(root: Path) -> None:
    """In the repository at `root`, dvc hashes what it fetches, and waits SILENCE for S3, where no setting says how long."""
    with opened(root) as repo:
        remotes = repo.config["remote"]
        with repo.config.edit("local") as local:
            for name, remote in remotes.items():
                settings = local.setdefault("remote", {}).setdefault(name, {})
                settings["verify"] = True
                if remote["url"].startswith("s3://"):
                    settings["read_timeout"] = remote.get("read_timeout", SILENCE)


def recorded(root: Path) -> list[str]:
    """The files of a run that belong in git: dvc.lock, outputs that DVC does not cache (metrics), each .gitignore."""
    with opened(root) as repo:
        uncached = [str(out) for out in repo.index.outs if not out.use_cache]
        ignores = {str(Path(str(out)).parent / ".gitignore") for out in repo.index.outs if out.use_cache}
        return [LOCK_FILE, *uncached, *sorted(ignores)]
