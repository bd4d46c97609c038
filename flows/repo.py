"""What DVC knows, asked in this process: its metrics, its lock file, its cache.

`repo`, `plan` and `remote` are the only modules that import DVC. What they ask of it is not a public interface: should
it move, these are what to mend.
"""

import contextlib
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dvc
from dvc.dvcfile import LOCK_FILE
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
    "stage_cache._load",
    "stage_cache._create_stage",
)


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
        for key, value in flat(file.get("data")).items()
        if isinstance(value, int | float)
    }


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value}; an empty mapping is a value, too."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings} if prefix else {}
    parts = (flat(value, f"{prefix}.{key}".lstrip(".")) for key, value in settings.items())
    return {key: value for part in parts for key, value in part.items()}


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
