"""Sources as a stream of files: the embedded digits, folders and archives, local or remote. Nothing is extracted to disk."""

import bz2
import errno
import fnmatch
import gzip
import io
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import zstandard

from breedline.errors import BreedlineError
from breedline.fetch import HTTP, fetch, filesystem, name_of, reaching
from breedline.formats import sniff
from breedline.params import Download, Source

BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, ValueError)
"""What the archive readers raise on damaged bytes. gzip and bz2 raise an OSError without errno as well."""
TABLES = {".csv", ".tsv", ".txt"}
EXTENDED = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
"""Types of the headers that only extend the header of the file after them."""
MAX_XZ_MEMORY = 2**28
"""Bytes; what `xz -9` packs needs 65 MB, but a file may declare a dictionary of 4 GB."""
MAX_EXTENDED = 1_000_000
"""Most bytes that all extended headers of one file may have together."""
EVERYTHING = ["*"]
HIDDEN = ["__MACOSX/*", ".*", "*/.*"]
"""What a source leaves out unless it says otherwise."""


class Member(NamedTuple):
    """A file of a source: its path in the source, its size in bytes, and its content, valid until the next member is asked for."""

    name: str
    size: int
    file: IO[bytes]


def members(source: Source, params: Download) -> Iterator[Member]:
    """The files of `source` that include and exclude select, in the archive's order; those of a folder sorted by path.

    Raises:
        BreedlineError: the source is missing, has another hash, is damaged or not an archive, exceeds a limit of `params`,
            or has no file that is selected.
        NetworkError: as `breedline.fetch.fetch`.
    """
    caps = _Caps(source.url, params)
    first, found = "", False
    for member in _open(source, params, caps):
        caps.count(member.size)
        name = _clean(member.name)
        if not name:
            raise BreedlineError(f"{source.url} has a file named {member.name!r}: pack it again, with proper names")
        first = first or name
        if _matches(name, source.include, EVERYTHING) and not _matches(name, source.exclude, HIDDEN):
            found = True
            yield member._replace(name=name)
    if not found:
        hint = f"its first file is {first}" if first else "it holds no files at all"
        raise BreedlineError(
            f"{source.url} has no file that include and exclude select: mend these or the url in params.yaml; {hint}"
        )


def _matches(name: str, globs: list[str] | None, default: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in (default if globs is None else globs))


def _clean(name: str) -> str:
    """`name` as a relative path without `..`, in valid UTF-8 and without control characters."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part.strip("/") not in ("", "..")]
    text = "/".join(parts).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return re.sub(r"[\x00-\x1f\x7f]", "\ufffd", text)


class _Caps:
    """The limits on one source, checked while it is unpacked: what an archive declares cannot be trusted."""

    def __init__(self, url: str, params: Download) -> None:
        self.url, self.files, self.bytes = url, 0, 0
        self.max_files, self.max_ratio, self.max_bytes = params.max_files, params.max_ratio, params.max_total_gb * 1e9
        self.packed: float | None = None

    def count(self, size: int) -> None:
        self.files, self.bytes = self.files + 1, self.bytes + size
        if self.files > self.max_files:
            raise BreedlineError(
                f"{self.url} has over {self.max_files} files: raise download.max_files if that is right"
            )
        self.check(self.bytes)

    def check(self, size: int) -> None:
        if size > self.max_bytes:
            raise BreedlineError(
                f"{self.url} has over {self.max_bytes / 1e9:g} GB: raise download.max_total_gb if that is right"
            )
        # below 16 MB the padding and headers of a small archive dominate
        if self.packed and size > max(self.packed * self.max_ratio, 2**24):
            raise BreedlineError(
                f"{self.url} unpacks to over {self.max_ratio:g} times its size: raise download.max_ratio if that is right"
            )


def _open(source: Source, params: Download, caps: _Caps) -> Iterator[Member]:
    if source.url == "digits":
        return _digits()
    if not source.url.startswith(HTTP):
        fs, path = filesystem(source.url)
        with reaching(source.url):
            is_folder = fs.isdir(path)
        if is_folder and source.sha256:
            raise BreedlineError(f"{source.url} is a folder, which has no sha256: remove it from params.yaml")
        if is_folder:
            return _folder(fs, path, source.url)
    local = fetch(source.url, source.sha256, timeout=params.timeout, max_bytes=caps.max_bytes)
    caps.packed = local.stat().st_size
    return _archive(local, source.url, caps)


def _digits() -> Iterator[Member]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, 17 grey levels."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(buffer, "PNG")
        yield Member(f"{label}_{number:04d}.png", buffer.tell(), io.BytesIO(buffer.getvalue()))


def _folder(fs: Any, path: str, url: str) -> Iterator[Member]:
    with reaching(url):
        files = sorted((info["name"], info["size"]) for info in _listing(fs, path))
    for file, size in files:
        with reaching(url):
            content = fs.open(file, "rb")
        with content:
            yield Member(file[len(path.rstrip("/")) + 1 :], size, _Guard(content, url, size=size))  # type: ignore[arg-type]


def _listing(fs: Any, path: str) -> Iterator[dict[str, Any]]:
    """The files below `path`. Unlike fsspec's `find`, it raises PermissionError for a folder that cannot be entered."""
    for info in fs.ls(path, detail=True):
        name = info["name"]
        if info["type"] == "directory" and name.rstrip("/") != path.rstrip("/"):
            yield from _listing(fs, name)
        elif name.endswith("/"):
            continue  # the marker of a folder in a bucket
        elif info["type"] == "file" or fs.isfile(name):  # neither a pipe nor a dangling link
            yield info


class _Xz:
    """The content of an xz file of one or several streams, as LZMAFile gives it, but within MAX_XZ_MEMORY."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.decompressor = file, lzma.LZMADecompressor(memlimit=MAX_XZ_MEMORY)

    def read(self, size: int) -> bytes:
        data = b""
        while not data:
            if self.decompressor.eof:  # the next stream may come after padding
                packed = self.decompressor.unused_data.lstrip(b"\0") or self.file.read(2**16).lstrip(b"\0")
                if not packed:
                    break
                self.decompressor = lzma.LZMADecompressor(memlimit=MAX_XZ_MEMORY)
            else:
                packed = self.file.read(2**16) if self.decompressor.needs_input else b""
                if not packed and self.decompressor.needs_input:
                    raise EOFError("it ends too soon")
            data = self.decompressor.decompress(packed, size)
        return data


OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": _Xz,
    b"\x28\xb5\x2f\xfd": lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True),
}


def _archive(path: Path, url: str, caps: _Caps) -> Iterator[Member]:
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        opener = next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None)
        if opener or head[257:262] == b"ustar":
            yield from _tar(opener(file) if opener else file, url, caps)
        elif head.startswith((b"PK\3\4", b"PK\5\6")):
            yield from _zip(file, url)
        elif sniff(head[:32]) or Path(name_of(url)).suffix in TABLES:  # a single image, or a table of labels
            yield Member(name_of(url), path.stat().st_size, file)
        else:
            raise BreedlineError(
                f"{url} is no tar (plain, gz, bz2, xz, zst), zip, image or table: mend the url in params.yaml; "
                f"it begins with {head[:24]!r}"
            )


def _tar(stream: IO[bytes], url: str, caps: _Caps) -> Iterator[Member]:
    # r| reads forward only: no header can make it seek back, and only the current file is buffered
    unpacked = _Guard(stream, url, caps)
    with _one_line(url), _Tar.open(fileobj=unpacked, mode="r|", encoding="utf-8") as tar:  # type: ignore[call-overload]
        while info := tar.next():
            tar.members.clear()  # tarfile would keep every member, and the contents of all global headers
            tar.pax_headers.clear()
            if info.size < 0 or tar.offset <= info.offset:
                raise tarfile.ReadError("a negative size")
            if info.isreg():
                yield Member(info.name, info.size, _Guard(tar.extractfile(info), url, size=info.size))  # type: ignore[arg-type]
        while rest := tar.fileobj.read(2**20):  # to the end of the stream, where gzip and others have their checksum
            if rest.strip(b"\0"):
                raise tarfile.ReadError("more data after the end-of-archive mark")


class _Header(tarfile.TarInfo):
    """A tar header. Where tarfile would read without bound, or take damage for the end of the archive, it raises ReadError."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the end-of-archive mark
            raise tarfile.ReadError(str(error)) from error

    def _proc_member(self, tar: "_Tar") -> tarfile.TarInfo:
        """tarfile's hook for every header, called before the header's payload is read."""
        tar.extended_bytes = tar.extended_bytes + self.size if self.type in EXTENDED else 0
        if tar.extended_bytes > MAX_EXTENDED:
            raise tarfile.ReadError(f"extended headers of over {MAX_EXTENDED / 1e6:g} MB")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _refuse_sparse(self, *_: object) -> None:
        """Replace the readers of a sparse file's map, whose length is not bounded."""
        raise tarfile.ReadError("a sparse file; leave out --sparse")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _Tar(tarfile.TarFile):
    """A tar archive that bounds the extended headers (long names, PAX) of a file, since tarfile reads them whole."""

    tarinfo = _Header
    extended_bytes = 0
    """Of the extended headers since the last file."""


def _zip(file: IO[bytes], url: str) -> Iterator[Member]:
    with _one_line(url), zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.filename:  # refused by `members`; zipfile cannot even print it
                yield Member("", 0, io.BytesIO())
            if info.filename.endswith("/") or stat.S_ISLNK(info.external_attr >> 16):
                continue
            with archive.open(info) as content:
                yield Member(info.filename, info.file_size, _Guard(content, url, size=info.file_size))  # type: ignore[arg-type]


@contextmanager
def _one_line(url: str) -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise _damaged(url, error) from error
    except RuntimeError as error:  # zipfile: encrypted, or an unsupported compression
        raise BreedlineError(f"{url} cannot be read ({error}): pack it again as a plain zip or tar") from error
    except OSError as error:
        if type(error) not in (OSError, gzip.BadGzipFile) or error.errno not in (None, errno.EINVAL):
            raise  # not a damaged archive; EINVAL is a seek to before the start
        raise _damaged(url, error) from error


def _damaged(url: str, error: Exception) -> BreedlineError:
    return BreedlineError(f"{url} is damaged or incomplete ({error}): fetch it again, and pin its sha256")


class _Guard:
    """A file whose damage, missing bytes and excess over `caps` raise BreedlineError.

    Args:
        size: the bytes that the source declares; reading fewer is damage. 0 where nothing is declared.
    """

    def __init__(self, file: IO[bytes], url: str, caps: _Caps | None = None, size: int = 0) -> None:
        self.file, self.url, self.caps, self.size = file, url, caps, size
        self.total, self.empty_reads = 0, 0

    def read(self, size: int = -1) -> bytes:
        with reaching(self.url), _one_line(self.url):
            data = self.file.read(size)
        self.total += len(data)
        self.empty_reads += not data
        if self.caps:
            self.caps.check(self.total)
        short = (size < 0 or len(data) < size) and self.total < self.size
        # at the end of the stream tarfile would keep asking for what a header declares
        if short or self.empty_reads > 2:
            raise _damaged(self.url, EOFError("it ends too soon"))
        return data
