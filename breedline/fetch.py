"""Downloads into the per-machine cache: resumed after a failure, verified, and never left incomplete."""

import errno
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fsspec
import httpx
from filelock import FileLock
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from breedline.errors import BreedlineError, NetworkError
from breedline.files import cache_dir, sha256_of, sync
from breedline.progress import progress
from breedline.tables import write_json
from breedline.urls import redacted

log = logging.getLogger("breedline")
logging.getLogger("httpx").setLevel(logging.WARNING)  # below, it logs every url whole, with its secrets
HTTP = ("http://", "https://")
SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "memory")
"""Further schemes, read through fsspec. Its other ones are refused: some run programs or read any local file."""
FAILURES_IN_A_ROW = 5
"""After so many attempts that receive no further byte a download is given up."""
BACKOFF = 0.5
"""Seconds to wait before the next attempt; doubled after each failure in a row."""
HOPELESS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.TooManyRedirects)
"""Errors that another attempt cannot avoid."""


def fetch(url: str, sha256: str | None, *, timeout: float, max_bytes: float) -> Path:
    """The file at `url` on the local disk: a local path as it is, anything else downloaded into the cache.

    Args:
        sha256: the expected hash, or its first digits; a cached file with this hash is used without a request.
        timeout: seconds without a byte after which a connection is dropped.
        max_bytes: a larger file is refused.

    Raises:
        NetworkError: the server failed to deliver the whole file in several attempts.
        BreedlineError: the file is missing, larger than `max_bytes`, or has another hash than `sha256`.
    """
    if "://" not in url or url.startswith("file://"):
        path = Path(url.removeprefix("file://")).expanduser()
        if not path.is_file():
            raise BreedlineError(f"there is no file or folder {path}: mend the url in params.yaml")
        _check(path, url, sha256)
        return path
    target = cache_dir("downloads") / hashlib.sha256(url.encode()).hexdigest()[:32]
    with FileLock(f"{target}.lock"):
        if sha256 and target.is_file() and sha256_of(target).startswith(sha256):
            return target
        if url.startswith(HTTP):
            arrived = _Download(url, target, timeout, max_bytes, cached=not sha256 and target.is_file()).run()
        else:
            arrived = _copy(url, target, max_bytes)
        try:
            _check(arrived, url, sha256)
        except BreedlineError:
            arrived.unlink()
            raise
        if arrived != target:
            _keep(arrived, target)
    return target


def _check(path: Path, url: str, sha256: str | None) -> None:
    found = sha256_of(path)
    if not sha256:
        log.info("%s: sha256 is %s; put it into params.yaml to pin the data", redacted(url), found)
    elif not found.startswith(sha256):
        raise BreedlineError(
            f"{url} has sha256 {found}, not {sha256} as expected: "
            "if the new content is right, put its sha256 into params.yaml"
        )


def _keep(part: Path, target: Path) -> None:
    # in this order a note never describes another file, even after a kill or a power loss between two of the steps
    sync(part)
    _note(target).unlink(missing_ok=True)
    part.replace(target)
    if _note(part).is_file():
        _note(part).replace(_note(target))


def _note(file: Path) -> Path:
    """The note beside `file` that records which version of the url's content it is."""
    return file.with_name(file.name + ".json")


def name_of(url: str) -> str:
    """The file name at the end of `url`, which may be a local path, without the query."""
    return Path(httpx.URL(url).path if url.startswith(HTTP) else url).name or "file"


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of `url`, which may be a local path, and the path on it.

    Raises:
        BreedlineError: the url's scheme is not in SCHEMES, or the package for it is missing.
    """
    scheme, is_url, rest = url.partition("://")
    if not is_url or scheme == "file":
        local = LocalFileSystem()
        return local, local._strip_protocol(url)
    if scheme not in SCHEMES or "::" in rest:
        raise BreedlineError(
            f"{url} is not a url that can be read: mend the url in params.yaml to a path, https://…, s3://…, gs://… or az://…"
        )
    try:
        fs, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise BreedlineError(f"{url} needs another package ({error}): install it into .venv") from error
    except ValueError as error:
        raise BreedlineError(f"{url}: {error}; mend the url in params.yaml") from error
    return fs, str(path)


@contextmanager
def reaching(url: str, settings: str = "params.yaml") -> Iterator[None]:
    """Turn what a file system raises within the block into a BreedlineError, except for a full local disk.

    Args:
        settings: the file that names the url.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise BreedlineError(f"there is no {url} ({error}): mend the url in {settings}") from error
    except PermissionError as error:
        raise BreedlineError(f"{url} may not be read ({error}): mend its permissions or your credentials") from error
    except _storage_errors() as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = " ".join(str(error).split())
        raise NetworkError(
            f"{url}: {reason}: look at the connection and your credentials, then run it again"
        ) from error


def _storage_errors() -> tuple[type[Exception], ...]:
    """OSError, and the base errors of the packages behind s3:// and gs://, as far as these are imported."""
    bases = {
        "botocore.exceptions": "BotoCoreError",
        "botocore.parsers": "ResponseParserError",  # an answer that makes no sense
        "aiohttp": "ClientError",  # one that is cut off
        "google.auth.exceptions": "GoogleAuthError",
    }
    return OSError, *(getattr(sys.modules[module], name) for module, name in bases.items() if module in sys.modules)


def _copy(url: str, target: Path, max_bytes: float) -> Path:
    fs, path = filesystem(url)
    part = target.with_suffix(".part")
    with reaching(url):
        size = fs.info(path)["size"] or 0
        _refuse_above(url, size, max_bytes)
        with progress(f"download {name_of(redacted(url))}", size, in_bytes=True) as advance:
            fs.get_file(path, str(part), callback=_Advance(advance))
    return part


class _Advance(Callback):
    def __init__(self, advance) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self._advance = advance

    def relative_update(self, inc: int = 1) -> None:
        self._advance(inc)


def _refuse_above(url: str, size: float, max_bytes: float) -> None:
    if size > max_bytes:
        raise BreedlineError(f"{url} has over {max_bytes / 1e9:g} GB: raise download.max_total_gb if that is right")


class _Download:
    """One file over HTTP: resumed where the server supports it (Range, If-Range), sent again only if it has changed."""

    def __init__(self, url: str, target: Path, timeout: float, max_bytes: float, cached: bool) -> None:
        self.url, self.target, self.max_bytes, self.cached = url, target, max_bytes, cached
        self.part = target.with_suffix(".part")
        headers = {"Accept-Encoding": "identity"}  # so that ranges and hashes refer to the bytes of the file itself
        self.client = httpx.Client(timeout=timeout, headers=headers, follow_redirects=True)

    def run(self) -> Path:
        """Download the file; the path of the complete part, or the target's if the server has no other version."""
        most_received, failures = self._received(), 0
        with self.client:
            while True:
                try:
                    return self._attempt(self._received())
                except httpx.InvalidURL as error:  # which may quote a part of the password
                    raise BreedlineError(f"{self.url} is not a valid url: mend it in params.yaml") from error
                except HOPELESS as error:
                    raise BreedlineError(f"{self.url}: {error}: mend the url in params.yaml") from error
                except (httpx.TransportError, _TryAgain) as error:
                    # only a new maximum is progress: a server that restarts the file each time would keep us trying for ever
                    failures = 0 if self._received() > most_received else failures + 1
                    most_received = max(most_received, self._received())
                    why = str(error) or type(error).__name__
                    if failures == FAILURES_IN_A_ROW:
                        raise NetworkError(
                            f"{self.url}: {why} ({failures} times in a row): the part that arrived is kept; try again later"
                        ) from error
                    log.info("%s: %s; trying again", redacted(self.url), redacted(why))
                    time.sleep(BACKOFF * 2**failures)

    def _received(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _attempt(self, received: int) -> Path:
        partial, known = _version_of(self.part), _version_of(self.target).validator if self.cached else ""
        resume = received > 0 and partial.size is not None and partial.names_these_bytes
        conditions = {}
        if resume:
            conditions = {"Range": f"bytes={received}-", "If-Range": partial.validator}
        elif known:
            conditions = {"If-None-Match" if '"' in known else "If-Modified-Since": known}
        with self.client.stream("GET", self.url, headers=conditions) as answer:
            status = answer.status_code
            if status == httpx.codes.NOT_MODIFIED and known and not resume:
                return self.target
            if status in (httpx.codes.PARTIAL_CONTENT, httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE) and resume:
                self._receive_rest(answer, received, partial)
                return self.part
            if status in (408, 425, 429) or status >= 500:
                raise _TryAgain(_answered(answer))
            if status != httpx.codes.OK:
                raise BreedlineError(f"{self.url}: {_answered(answer)}: mend the url in params.yaml")
            length = answer.headers.get("Content-Length")
            self._receive(answer, 0, int(length) if length else None)
        return self.part

    def _receive_rest(self, answer: httpx.Response, received: int, partial: "_Version") -> None:
        complete = received == partial.size  # a kill came between the last byte and the check of the hash
        span = rf"bytes \*/{received}" if complete else rf"bytes {received}-\d+/{partial.size}"
        if (
            complete != (answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE)
            or not re.fullmatch(span, answer.headers.get("Content-Range", ""))
            or _validator(answer) not in ("", partial.validator)
        ):
            self.part.unlink()
            raise _TryAgain("the server no longer has the file that was partly received")
        if not complete:
            self._receive(answer, received, partial.size)

    def _receive(self, answer: httpx.Response, received: int, total: int | None) -> None:
        _refuse_above(self.url, total or 0, self.max_bytes)
        size = received
        name = f"download {name_of(redacted(self.url))}"
        with self.part.open("ab" if received else "wb") as file, progress(name, total, in_bytes=True) as advance:
            if not received:  # opening has emptied the file, so the note never describes older bytes
                write_json(
                    {"url": redacted(self.url), "validator": _validator(answer), "size": total}, _note(self.part)
                )
            advance(received)
            for chunk in answer.iter_raw():
                file.write(chunk)
                advance(len(chunk))
                size += len(chunk)
                _refuse_above(self.url, size, self.max_bytes)
        if total is not None and size != total:
            raise _TryAgain(f"only {size} of {total} bytes arrived")


def _answered(answer: httpx.Response) -> str:
    """The status with its standard phrase: the one that the server sent is not trusted, and may repeat the url's secrets."""
    return f"the server answered {answer.status_code} {httpx.codes.get_reason_phrase(answer.status_code)}".rstrip()


class _Version(NamedTuple):
    """The version of a url's content: the server's validator (ETag or Last-Modified, or ""), and the size in bytes."""

    validator: str
    size: int | None

    @property
    def names_these_bytes(self) -> bool:
        """Whether equal versions have equal bytes, which a weak ETag (W/…) does not promise."""
        return self.validator != "" and not self.validator.startswith("W/")


def _version_of(file: Path) -> _Version:
    if not _note(file).is_file():
        return _Version("", None)
    note = json.loads(_note(file).read_text("utf-8"))
    return _Version(note["validator"], note["size"])


def _validator(answer: httpx.Response) -> str:
    etag = answer.headers.get("ETag", "")
    return etag if etag.endswith('"') else answer.headers.get("Last-Modified", "")


class _TryAgain(Exception):
    """A failure that another attempt may avoid."""
