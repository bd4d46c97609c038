"""What the DVC remote has: every object that dvc.lock names, asked for one by one, and sent again where it lacks."""

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dvc.output import Output
from dvc.repo import Repo
from dvc_data.hashfile.db import HashFileDB
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.tree import Tree
from dvc_objects.errors import ObjectFormatError

from breedline.errors import BreedlineError
from breedline.fetch import reaching
from flows.repo import opened


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
