"""What the DVC remote has: asks for every object that dvc.lock names, and sends again what is missing or altered.

And the other way round: what the cache has, and what it takes back; and the model of any commit, from the cache or the remote.
"""

import base64
import contextlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.api import DVCFileSystem
from dvc.config import NoRemoteError
from dvc.output import Output
from dvc.repo import Repo
from dvc_data.hashfile.build import build
from dvc_data.hashfile.db import HashFileDB
from dvc_data.hashfile.hash import file_md5
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.transfer import transfer
from dvc_data.hashfile.tree import Tree
from dvc_data.index import DataIndexDirError

from breedline.errors import BreedlineError, NetworkError
from breedline.fetch import reaching
from breedline.progress import progress
from flows.registry import model_in
from flows.repo import opened

READERS = 4
"""How many objects are read at the same time; s3fs buffers up to 100 MB of each."""
OBJECT = re.compile(r"[0-9a-f]{30}(\.dir)?")


@dataclass(frozen=True)
class Stored:
    """An object of DVC's cache and remote: a file that dvc.lock names, or the list of a folder's files."""

    name: str
    """Its path in the repository."""
    remote: str | None
    """Name of the remote that it belongs to; None for the default one."""
    oid: str
    bytes: int | None
    """Its size; None if the cache of this machine does not have it."""
    stage: str
    """What makes it."""


def stored(root: Path, *, cache_only: bool = False) -> list[Stored]:
    """Every object that the outputs in dvc.lock at `root` consist of; outputs that git keeps have none.

    Args:
        cache_only: ask no remote for the list of a folder that the cache has lost; its files are left out then.

    Raises:
        BreedlineError, NetworkError: as `missing`, unless `cache_only`.
    """
    found: dict[str, Stored] = {}
    with opened(root) as repo, reaching("DVC remote", ".dvc/config"):
        cache = repo.cache.local
        for out in repo.index.outs:
            if out.use_cache and out.can_push and out.hash_info:
                files = {str(out): out.hash_info.value}
                if out.hash_info.isdir:
                    files |= {f"{out}/{'/'.join(key)}": info.value for key, _, info in _folder(repo, out, cache_only)}
                for name, oid in files.items():
                    path = Path(cache.oid_to_path(oid))
                    size = path.stat().st_size if path.is_file() else None
                    found.setdefault(oid, Stored(name, out.remote, oid, size, out.stage.addressing))
    return list(found.values())


def _folder(repo: Repo, out: Output, cache_only: bool) -> Iterable[tuple[tuple[str, ...], Meta | None, HashInfo]]:
    """The files in a folder, from its list in the cache or else on the remote; empty if the list is lost or altered."""
    for odb in (repo.cache.local, *([] if cache_only else [_store(repo, out.remote)])):
        with contextlib.suppress(FileNotFoundError):
            if _is_whole(odb, out.hash_info.value):
                return Tree.load(odb, out.hash_info)
    return ()


def missing(root: Path, objects: list[Stored], *, deep: bool = False) -> list[Stored]:
    """Those of `objects` that are missing on their remote, or altered there. Asks the remote about every one.

    Compares the size, if the cache of this machine has the object, and the MD5, if the remote reports one.

    Args:
        deep: read every object and compute its MD5, whatever the remote reports.

    Raises:
        BreedlineError: there is no such remote, or it stores files by name (version_aware, worktree).
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
                if not deep and _md5_reported(info) in (None, stored.oid.removesuffix(".dir")):
                    return False
                return not _is_whole(store, stored.oid)  # a reported hash may be no MD5, so only the bytes can tell
            except FileNotFoundError:
                return True

        with ThreadPoolExecutor(READERS if deep else 16) as threads, progress("verify", len(objects)) as advance:
            found = []
            for stored, gone in zip(objects, threads.map(lacks, objects), strict=True):
                advance(1)
                if gone:
                    found.append(stored)
            return found


def _md5_reported(info: dict[str, Any]) -> str | None:
    """The MD5 that a remote reports with an object's size, without sending the object; None if it reports none.

    Google Cloud Storage has md5Hash. S3 has the ETag: the MD5, unless the object was uploaded in parts (then there is
    a hyphen in it) or is encrypted with a KMS key (then it looks like an MD5 but is none).
    """
    if "md5Hash" in info:
        return base64.b64decode(info["md5Hash"]).hex()
    etag = info.get("ETag", "").strip('"')
    return etag if re.fullmatch("[0-9a-f]{32}", etag) else None


def _is_whole(store: HashFileDB, oid: str) -> bool:
    """Whether an object has the MD5 that is its name; reads all of it. Raises FileNotFoundError if there is none."""
    return file_md5(store.oid_to_path(oid), store.fs) == oid.removesuffix(".dir")


def upload(root: Path, objects: list[Stored]) -> list[Stored]:
    """Send `objects` from the cache to their remote, whatever is there; returns those that the cache cannot supply.

    An object that is altered in the cache is removed from it: DVC trusts read-only files without hashing them.

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


def damaged(root: Path, objects: list[Stored]) -> list[Stored]:
    """Those of `objects` that the cache of this machine lacks, or has with other bytes. Reads all that it has of them."""
    with (
        opened(root) as repo,
        progress("read DVC's cache", sum(o.bytes or 0 for o in objects), in_bytes=True) as advance,
    ):

        def whole(stored: Stored) -> bool:
            return stored.bytes is not None and _is_whole(repo.cache.local, stored.oid)

        found = []
        with ThreadPoolExecutor(READERS) as threads:
            for stored, good in zip(objects, threads.map(whole, objects), strict=True):
                advance(stored.bytes or 0)
                if not good:
                    found.append(stored)
        return found


def damaged_beside(root: Path, objects: list[Stored]) -> list[Path]:
    """What the cache has beside `objects` with other bytes than its name says, of what was last written to it.

    That is within a day, since a power loss damages what was written in the minutes before. The run-cache may name it, so
    dvc would restore it.
    """
    with opened(root) as repo:
        cache = repo.cache.local
        named = {cache.oid_to_path(stored.oid) for stored in objects}
        written = {path: path.stat().st_mtime for path in Path(cache.path).glob("??/*") if OBJECT.fullmatch(path.name)}
        since = max(written.values(), default=0) - 86_400
        return [
            path
            for path, when in written.items()
            if when >= since and str(path) not in named and not _is_whole(cache, path.parent.name + path.name)
        ]


def refill(root: Path, objects: list[Stored]) -> list[Stored]:
    """Put `objects` into the cache again, from outputs that are as dvc.lock says or else from their remote.

    What is there of them is removed first. Returns those that neither can supply.

    Raises:
        NetworkError: a remote does not answer.
    """
    lost = []
    with opened(root) as repo, reaching("DVC remote", ".dvc/config"):
        cache = repo.cache.local
        repo.state.hashes.clear()  # what was restored from a damaged object has the right hash there
        for stored in objects:
            Path(cache.oid_to_path(stored.oid)).unlink(missing_ok=True)
        for out in repo.index.outs:
            mine = any(Path(stored.name).is_relative_to(str(out)) for stored in objects)
            if mine and out.hash_info and not out.workspace_status():
                staging, _, found = build(cache, out.fs_path, out.fs, cache.hash_name, ignore=out.dvcignore)
                transfer(staging, cache, {found.hash_info}, shallow=False)
        for stored in objects:
            with contextlib.suppress(FileNotFoundError, NoRemoteError):
                if not cache.exists(stored.oid):
                    store = _store(repo, stored.remote)
                    cache.add(store.oid_to_path(stored.oid), store.fs, stored.oid)
                if _is_whole(cache, stored.oid):
                    continue
                Path(cache.oid_to_path(stored.oid)).unlink()
            lost.append(stored)
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
            f"the DVC remote {remote.name} keeps files by name, which cannot be verified: use one without version_aware and worktree"
        )
    remote.fs.fs.invalidate_cache()  # fsspec caches listings
    return remote.odb


class Missing(BreedlineError):
    """Nobody has pushed a model."""


def get_model(root: Path, commit: str, folder: Path) -> None:
    """Copy the one artifact of type `model` that dvc.yaml of a commit names into `folder`, from DVC's cache or remote.

    Raises:
        BreedlineError: the commit names no such artifact, or not one.
        Missing: neither cache nor remote has its files.
        NetworkError: the remote does not answer, or with other bytes.
    """
    with (
        opened(root),
        reaching("DVC remote", ".dvc/config"),
        contextlib.closing(DVCFileSystem(str(root), rev=commit)) as files,
    ):
        files.repo.drop_data_index()  # where DVC keeps lists of files that it has read, right or wrong
        text = files.read_bytes("dvc.yaml") if files.exists("dvc.yaml") else b""
        path = model_in(text, commit[:12]).path
        try:
            for file in files.ls(path):
                copy = folder / Path(file["name"]).name
                files.get_file(file["name"], str(copy))
                if "md5" in file and file_md5(str(copy)) != file["md5"]:
                    raise NetworkError(
                        f"{file['name']} of {commit[:12]} is altered, on its way or on the DVC remote: run it again; if that "
                        "does not help, `breedline verify-remote --deep` where DVC's cache has it"
                    )
        except (FileNotFoundError, DataIndexDirError) as error:
            cause = error.__cause__ or error
            if not isinstance(cause, FileNotFoundError):
                raise NetworkError(f"DVC remote: {path} of {commit[:12]}: {cause}: run it again") from error
            raise Missing(
                f"neither DVC's cache nor its remote has {path} of {commit[:12]}: `dvc fetch --all-commits`, or push it"
            ) from error
