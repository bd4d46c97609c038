"""Files from elsewhere into the per-machine download cache: verified, resumable, whole or absent."""

import hashlib
import json
import logging
import time
from pathlib import Path

import fsspec
import httpx
from filelock import FileLock
from fsspec.callbacks import Callback

from breedline.errors import BreedlineError, NetworkError
from breedline.files import cache_dir, sha256_of, write_json
from breedline.progress import progress

log = logging.getLogger("breedline")
FAILURES_IN_A_ROW = 5
"""Attempts that bring not one byte before a download is given up."""
BACKOFF = 0.5
"""Seconds before the second attempt; doubled for each further one."""


def fetch(url: str, sha256: str | None, *, timeout: float, max_bytes: float) -> Path:
    """The local copy of the file at `url`: a path as it is, anything else through the download cache.

    Args:
        sha256: what the file must hash to, or the beginning of it; a cached copy that does is used without asking the network.
        timeout: seconds without a byte before a connection is given up.
        max_bytes: a larger file is refused.

    Raises:
        NetworkError: the server does not answer, or not whole, however often asked.
        BreedlineError: no such file, too large, or another hash than `sha256` (both are named).
    """
    scheme = url.partition("://")[0] if "://" in url else "file"
    if scheme == "file":
        path = Path(url.removeprefix("file://")).expanduser()
        if not path.is_file():
            raise BreedlineError(f"there is no file {path}: mend the url in params.yaml")
    else:
        key = hashlib.sha256(url.encode()).hexdigest()[:32]
        target = cache_dir("downloads") / key
        with FileLock(f"{target}.lock"):
            if sha256 and target.is_file() and sha256_of(target).startswith(sha256):
                return target
            if scheme in ("http", "https"):
                _Download(url, target, timeout, max_bytes).run()
            else:
                _copy(url, target, max_bytes)
        path = target
    found = sha256_of(path)
    if sha256 and not found.startswith(sha256):
        if path.parent == cache_dir("downloads"):
            path.unlink()
        raise BreedlineError(
            f"{url} has sha256 {found}, not {sha256} as expected: "
            "if the new content is right, put its sha256 into params.yaml"
        )
    if not sha256:
        log.info("%s: sha256 is %s; put it into params.yaml to pin the data", url, found)
    return path


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of `url`, and the path on it. Raises BreedlineError when its package is missing."""
    try:
        fs, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise BreedlineError(f"{url} needs another package ({error}): install it into .venv") from error
    except ValueError as error:
        raise BreedlineError(f"{url}: {error}; mend the url in params.yaml") from error
    return fs, str(path)


def _copy(url: str, target: Path, max_bytes: float) -> None:
    fs, path = filesystem(url)
    part = target.with_suffix(".part")
    try:
        size = fs.info(path)["size"] or 0
        _refuse_above(url, size, max_bytes)
        with progress(f"download {Path(path).name}", size, in_bytes=True) as advance:
            fs.get_file(path, str(part), callback=_Advance(advance))
    except FileNotFoundError:
        raise BreedlineError(f"there is no {url}: mend the url in params.yaml") from None
    part.replace(target)


class _Advance(Callback):
    def __init__(self, advance) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self._advance = advance

    def relative_update(self, inc: int = 1) -> None:
        self._advance(inc)


def _refuse_above(url: str, size: float, max_bytes: float) -> None:
    if size > max_bytes:
        raise BreedlineError(f"{url} has {size / 1e9:.1f} GB: raise download.max_total_gb if that is right")


class _Download:
    """One file over HTTP: resumed where the server can (Range, If-Range), asked for again only if it changed."""

    def __init__(self, url: str, target: Path, timeout: float, max_bytes: float) -> None:
        self.url, self.target, self.max_bytes = url, target, max_bytes
        self.part, self.note = target.with_suffix(".part"), target.with_suffix(".json")
        headers = {"Accept-Encoding": "identity"}  # the archive's own bytes, so that ranges and hashes mean them
        self.client = httpx.Client(timeout=timeout, headers=headers, follow_redirects=True)

    def run(self) -> None:
        failures = 0
        with self.client:
            while True:
                had = self._partial()
                try:
                    return self._attempt(had)
                except (httpx.TransportError, _TryAgain) as error:
                    failures = 0 if self._partial() > had else failures + 1
                    why = str(error) or type(error).__name__
                    if failures == FAILURES_IN_A_ROW:
                        raise NetworkError(
                            f"{self.url}: {why} ({failures} times in a row): what has arrived is kept; try again later"
                        ) from error
                    log.info("%s: %s; trying again", self.url, why)
                    time.sleep(BACKOFF * 2**failures)
                except (httpx.InvalidURL, httpx.TooManyRedirects) as error:
                    raise BreedlineError(f"{self.url}: {error}: mend the url in params.yaml") from error

    def _partial(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _attempt(self, had: int) -> None:
        known = json.loads(self.note.read_text()) if self.note.is_file() else {}
        asked = {}
        if had and known.get("validator"):
            asked = {"Range": f"bytes={had}-", "If-Range": known["validator"]}
        elif self.target.is_file() and known.get("validator"):
            kind = "If-None-Match" if known["validator"].startswith('"') else "If-Modified-Since"
            asked = {kind: known["validator"]}
        with self.client.stream("GET", self.url, headers=asked) as answer:
            if answer.status_code == httpx.codes.NOT_MODIFIED:
                return
            if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                self.part.unlink(missing_ok=True)
                raise _TryAgain("the server has less than what had arrived")
            if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
                raise _TryAgain(f"the server answered {answer.status_code} {answer.reason_phrase}")
            if answer.status_code not in (200, 206):
                raise BreedlineError(
                    f"{self.url}: the server answered {answer.status_code} {answer.reason_phrase}: mend the url in params.yaml"
                )
            resumed = answer.status_code == httpx.codes.PARTIAL_CONTENT
            if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {had}-"):
                self.part.unlink(missing_ok=True)
                raise _TryAgain("the server sent another range than the one asked for")
            self._receive(answer, had if resumed else 0)
        self.part.replace(self.target)

    def _receive(self, answer: httpx.Response, had: int) -> None:
        length = answer.headers.get("Content-Length")
        total = had + int(length) if length else None
        _refuse_above(self.url, total or 0, self.max_bytes)
        etag = answer.headers.get("ETag", "")
        validator = etag if etag.startswith('"') else answer.headers.get("Last-Modified")  # a weak one can't resume
        write_json({"url": self.url, "validator": validator}, self.note)
        size = had
        name = f"download {Path(self.url).name}"
        with self.part.open("ab" if had else "wb") as file, progress(name, total, in_bytes=True) as advance:
            advance(had)
            for chunk in answer.iter_raw(2**18):
                file.write(chunk)
                advance(len(chunk))
                size += len(chunk)
                _refuse_above(self.url, size, self.max_bytes)


class _TryAgain(Exception):
    """An answer that may be better the next time."""
