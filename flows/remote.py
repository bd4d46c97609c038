"""What the DVC remote has: every object that dvc.lock names, asked for one by one, and sent again if missing or altered."""

import base64
import contextlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.output import Output
from dvc.repo import Repo
from dvc_data.hashfile.db import HashFileDB
from dvc_data.hashfile.hash import file_md5
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.tree import Tree

from breedline.errors import BreedlineError
from breedline.fetch import reaching
from breedline.progress import progress
from flows.repo import opened

READERS = 4
"""Objects that are read side by side; for each, s3fs keeps up to 100 MB in memory."""


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
    """What is in a folder: its list, from the cache or else the remote; nothing, where that is lost or altered."""
    for odb in (repo.cache.local, _store(repo, out.remote)):
        with contextlib.suppress(FileNotFoundError):
            if _is_whole(odb, out.hash_info.value):
                return Tree.load(odb, out.hash_info)
    return ()


def missing(root: Path, objects: list[Stored], *, deep: bool = False) -> list[Stored]:
    """Those of `objects` that their remote has not got, or not with the right bytes. Asks it about every one.

    Compared are the size, where the cache of this machine has the object, and the MD5, where the remote tells it.

    Args:
        deep: read every object and compute its MD5, whatever the remote tells.

    Raises:
        BreedlineError: there is no such remote, or it is one that keeps files by name (version_aware, worktree).
        NetworkError: the remote does not answer.
    """
    with opened(root) as repo, reaching("DVC remote", ".dvc/config"):
        stores = {name: _store(repo, name) for name in {stored.remote for stored in objects}}

        def lacks(stored: Stored) -> bool:
            store = stores[stored.remote]
            try:
                info = store.fs.info(store.oid_to_path(stored.oid))
                if stored.bytes is not None and info["size"] != stored.bytes:
                    return True
                if not deep and _md5_told(info) in (None, stored.oid.removesuffix(".dir")):
                    return False
                return not _is_whole(store, stored.oid)  # what was told may be another kind of hash, so read it
            except FileNotFoundError:
                return True

        with ThreadPoolExecutor(READERS if deep else 16) as threads, progress("verify", len(objects)) as advance:
            found = []
            for stored, gone in zip(objects, threads.map(lacks, objects), strict=True):
                advance(1)
                if gone:
                    found.append(stored)
            return found


def _md5_told(info: dict[str, Any]) -> str | None:
    """The MD5 of an object that its remote tells without sending it; None where it tells none.

    Google's is the md5Hash. Amazon's is the ETag, unless the object was sent in parts or is encrypted with a key of KMS;
    then it is another hash, which in the latter case looks like an MD5.
    """
    if "md5Hash" in info:
        return base64.b64decode(info["md5Hash"]).hex()
    etag = info.get("ETag", "").strip('"')
    return etag if re.fullmatch("[0-9a-f]{32}", etag) else None


def _is_whole(store: HashFileDB, oid: str) -> bool:
    """Whether an object has the MD5 that it is named by. Reads all of it. Raises FileNotFoundError if it is not there."""
    return file_md5(store.oid_to_path(oid), store.fs) == oid.removesuffix(".dir")


def upload(root: Path, objects: list[Stored]) -> list[Stored]:
    """Send `objects` from the cache to their remote, whatever is there; returns those that the cache has not got whole.

    An altered object of the cache is removed, as DVC would take it for whole because it is read-only.

    Raises:
        BreedlineError, NetworkError: as `missing`.
    """
    lost = []
    with opened(root) as repo, reaching("DVC remote", ".dvc/config"):
        cache = repo.cache.local
        for stored in objects:
            path = cache.oid_to_path(stored.oid)
            try:
                if not _is_whole(cache, stored.oid):
                    Path(path).unlink()
                    raise FileNotFoundError
            except FileNotFoundError:
                lost.append(stored)
                continue
            _store(repo, stored.remote).add(path, cache.fs, stored.oid, check_exists=False)
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
