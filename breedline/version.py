"""The version of a source, asked without fetching it: another one means that the source has changed."""

import hashlib
import json

import httpx

from breedline.errors import BreedlineError, NetworkError
from breedline.fetch import HTTP, filesystem, reaching
from breedline.params import Source

VERSION_FIELDS = ("size", "mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "md5Hash")
"""What fsspec's file systems tell of a file that changes with its content; each of them has some of these."""


def version_of(source: Source, timeout: float) -> str:
    """A SHA-256 of what identifies the content: ETag, Last-Modified and length over HTTP, else each file's size and times.

    Raises:
        BreedlineError: the source is missing.
        NetworkError: the server does not answer.
    """
    if source.url == "digits":
        state: object = "digits"
    elif source.url.startswith(HTTP):
        state = _of_url(source.url, timeout)
    else:
        state = _of_files(source.url)
    return hashlib.sha256(json.dumps([source.url, state], default=str).encode()).hexdigest()


def _of_url(url: str, timeout: float) -> list[str | None]:
    try:
        with httpx.Client(timeout=timeout, follow_redirects=True) as client:
            answer = client.head(url)
            if answer.status_code in (
                httpx.codes.METHOD_NOT_ALLOWED,
                httpx.codes.NOT_IMPLEMENTED,
                httpx.codes.FORBIDDEN,
            ):
                with client.stream("GET", url) as answer:  # some servers answer GET only; the body is not read
                    pass
    except httpx.InvalidURL as error:  # which may quote a part of the password
        raise BreedlineError(f"{url} is not a valid url: mend it in params.yaml") from error
    except httpx.HTTPError as error:
        raise NetworkError(f"{url}: {error or type(error).__name__}: try again later") from error
    if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
        raise NetworkError(f"{url}: the server answered {answer.status_code}: try again later")
    if not answer.is_success:
        raise BreedlineError(f"{url}: the server answered {answer.status_code}: mend the url in params.yaml")
    return [answer.headers.get(name) for name in ("ETag", "Last-Modified", "Content-Length")]


def _of_files(url: str) -> list[object]:
    fs, path = filesystem(url)
    with reaching(url):
        fs.invalidate_cache()
        files = fs.find(path, detail=True) if fs.isdir(path) else {path: fs.info(path)}
    return [[name, *(str(info.get(key)) for key in VERSION_FIELDS)] for name, info in sorted(files.items())]
