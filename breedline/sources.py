"""Sources: digits, folders and archives, here or elsewhere, as one stream of files. Nothing is extracted to disk."""

import bz2
import contextlib
import fnmatch
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import zstandard

from breedline.errors import BreedlineError
from breedline.fetch import fetch, filesystem
from breedline.params import Download, Source
from breedline.shards import sniff

BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError)
"""What the archive readers raise on bytes that are not what they should be."""
BROKEN_OS = (gzip.BadGzipFile, OSError)
"""The same from gzip and bz2, which raise OSError: told from a failing disk by having no errno."""
TABLES = {".csv", ".tsv", ".txt"}


class Member(NamedTuple):
    """A file of a source: its path there, its size in bytes, and its content, to be read before the next one's."""

    name: str
    size: int
    file: IO[bytes]


def members(source: Source, params: Download) -> Iterator[Member]:
    """The files of `source` that its globs let through, in the source's order (a folder's: sorted).

    Raises:
        BreedlineError: no such source, wrong hash, not an archive, truncated, over one of the caps, nothing included.
        NetworkError: as `breedline.fetch.fetch`.
    """
    caps = _Caps(source.url, params)
    seen: list[str] = []
    found = False
    for member in _open(source, params, caps):
        caps.count_file()
        name = _clean(member.name)
        seen = seen or [name]
        if _matches(name, source.include) and not _matches(name, source.exclude):
            found = True
            yield member._replace(name=name)
    if not found:
        hint = f"its first file is {seen[0]}" if seen else "it is empty"
        raise BreedlineError(f"{source.url} has no file that include and exclude let through; {hint}")


def _matches(name: str, globs: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _clean(name: str) -> str:
    """`name` as a relative path that stays inside, and as text that UTF-8 can hold."""
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..")]
    return "/".join(parts).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class _Caps:
    """The limits on one source; an archive can promise little and unpack to anything."""

    def __init__(self, url: str, params: Download) -> None:
        self.url, self.files, self.max_files = url, 0, params.max_files
        self.max_ratio, self.max_bytes = params.max_ratio, params.max_total_gb * 1e9
        self.packed: float | None = None

    def count_file(self) -> None:
        self.files += 1
        if self.files > self.max_files:
            raise BreedlineError(
                f"{self.url} has over {self.max_files} files: raise download.max_files if that is right"
            )

    def check(self, size: int) -> None:
        if size > self.max_bytes:
            raise BreedlineError(
                f"{self.url} has over {self.max_bytes / 1e9:g} GB: raise download.max_total_gb if right"
            )
        # a few MB of padding and headers say nothing
        if self.packed and size > max(self.packed * self.max_ratio, 2**24):
            raise BreedlineError(
                f"{self.url} unpacks to over {self.max_ratio:g} times its size: raise download.max_ratio if that is right"
            )


def _open(source: Source, params: Download, caps: _Caps) -> Iterator[Member]:
    if source.url == "digits":
        return _digits()
    fs, path = filesystem(source.url) if not source.url.startswith(("http://", "https://")) else (None, "")
    if fs is not None and fs.isdir(path):
        if source.sha256:
            raise BreedlineError(f"{source.url} is a folder, which has no sha256: remove it from params.yaml")
        return _folder(fs, path, caps)
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


def _folder(fs: Any, path: str, caps: _Caps) -> Iterator[Member]:
    total = 0
    for file, info in sorted(fs.find(path, detail=True).items()):
        total += info["size"]
        caps.check(total)
        with fs.open(file, "rb") as content:
            yield Member(file[len(path.rstrip("/")) + 1 :], info["size"], _Guard(content, caps.url))  # type: ignore[arg-type]


OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True),
}


def _archive(path: Path, url: str, caps: _Caps) -> Iterator[Member]:
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        opener = next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None)
        if opener or head[257:262] == b"ustar":
            yield from _tar(opener(file) if opener else file, url, caps)
        elif zipfile.is_zipfile(file):
            yield from _zip(file, url, caps)
        elif sniff(head[:32]) or Path(url).suffix in TABLES:  # a single picture, or a table that goes with others
            yield Member(Path(url).name, path.stat().st_size, file)
        else:
            raise BreedlineError(
                f"{url} is no tar (plain, gz, bz2, xz, zst), zip, image or table; it begins with {head[:24]!r}"
            )


def _tar(stream: IO[bytes], url: str, caps: _Caps) -> Iterator[Member]:
    # r| reads forward only: a header cannot send the reader back, and nothing but the current file is held
    counted = _Guard(stream, url, caps)
    with _one_line(url), tarfile.open(fileobj=counted, mode="r|") as tar:  # type: ignore[call-overload]
        for info in tar:
            content = tar.extractfile(info) if info.isreg() else None
            if content:
                yield Member(info.name, info.size, _Guard(content, url, size=info.size))  # type: ignore[arg-type]
        while counted.read(2**20):
            pass
        if counted.tail.strip(b"\0"):
            raise BreedlineError(f"{url} is cut short: it has no end-of-archive mark; fetch it again")


def _zip(file: IO[bytes], url: str, caps: _Caps) -> Iterator[Member]:
    with _one_line(url), zipfile.ZipFile(file) as archive:
        total = 0
        for info in archive.infolist():
            if info.is_dir():
                continue
            total += info.file_size
            caps.check(total)
            with archive.open(info) as content:
                yield Member(info.filename, info.file_size, _Guard(content, url, size=info.file_size))  # type: ignore[arg-type]


@contextlib.contextmanager
def _one_line(url: str) -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise BreedlineError(f"{url} is damaged or cut short ({error}): fetch it again, and pin its sha256") from error
    except (RuntimeError, NotImplementedError) as error:  # zipfile's word for a password, and for an odd compression
        raise BreedlineError(f"{url} cannot be read ({error}): pack it again as a plain zip or tar") from error
    except OSError as error:
        if error.errno:
            raise
        raise BreedlineError(f"{url} is damaged or cut short ({error}): fetch it again, and pin its sha256") from error


class _Guard:
    """A file whose broken bytes are the user's error, whose length is as promised, and which the caps watch."""

    def __init__(self, file: IO[bytes], url: str, caps: _Caps | None = None, size: int | None = None) -> None:
        self.file, self.url, self.caps, self.left = file, url, caps, size
        self.total, self.tail = 0, b""

    def read(self, size: int = -1) -> bytes:
        with _one_line(self.url):
            data = self.file.read(size)
        self.total += len(data)
        self.tail = (self.tail + data)[-512:] if len(data) < 512 else data[-512:]
        if self.caps:
            self.caps.check(self.total)
        if self.left is not None:
            self.left -= len(data)
            if not data and self.left > 0:
                raise BreedlineError(f"{self.url} is cut short: fetch it again, and pin its sha256")
        return data
