"""Whether a source has changed, asked without fetching it."""

import http.server
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from breedline.errors import BreedlineError, NetworkError
from breedline.params import Source
from breedline.version import version_of


def _version(url: object) -> str:
    return version_of(Source(url=str(url)), timeout=5)


def test_a_file_has_another_version_when_its_size_or_time_changes(make_tar: Callable[..., Path]) -> None:
    path = make_tar({"a.jpg": b"1"})
    first = _version(path)
    assert _version(path) == first
    os.utime(path, (1, 1))
    touched = _version(path)
    path.write_bytes(b"longer" * 4000)
    os.utime(path, (1, 1))
    assert len({first, touched, _version(path)}) == 3


def test_a_folder_has_another_version_when_a_file_comes_goes_or_changes(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "cats").mkdir(parents=True)
    versions = {_version(folder)}
    for change in (
        lambda: (folder / "cats/1.jpg").write_bytes(b"1"),
        lambda: (folder / "cats/2.jpg").write_bytes(b"1"),
        lambda: (folder / "cats/2.jpg").write_bytes(b"12"),
        lambda: (folder / "cats/2.jpg").rename(folder / "2.jpg"),
    ):
        change()
        versions.add(_version(folder))
    assert len(versions) == 5
    assert _version(folder) in versions


def test_a_listing_that_was_asked_for_before_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(LocalFileSystem, "invalidate_cache", lambda *_: asked.append(True))  # others have a cache
    _version(tmp_path)
    assert asked


def test_what_is_embedded_never_changes_and_what_is_not_there_is_a_mistake() -> None:
    assert _version("digits") == _version("digits")
    with pytest.raises(BreedlineError, match="mend the url"):
        _version("/no/such/folder")


class _Server(http.server.ThreadingHTTPServer):
    status = 200
    head = 200
    headers: dict[str, str]
    bodies = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_HEAD(self) -> None:
        self._answer(self.server.head if self.server.status == 200 else self.server.status)

    def do_GET(self) -> None:
        self.server.bodies += 1
        self._answer(self.server.status)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.headers = {"ETag": '"1"', "Content-Length": "1000000000"}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _url(server: _Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/photos.tar"


@pytest.mark.parametrize("header", [{"ETag": '"2"'}, {"Content-Length": "1000000001"}, {"Last-Modified": "yesterday"}])
def test_a_server_says_by_its_headers_that_it_has_something_else(server: _Server, header: dict[str, str]) -> None:
    first = _version(_url(server))
    assert _version(_url(server)) == first
    server.headers |= header
    assert _version(_url(server)) != first
    assert server.bodies == 0


def test_a_server_that_knows_no_head_is_asked_for_it_all_and_left_at_the_headers(server: _Server) -> None:
    first = _version(_url(server))
    server.head = 405
    assert _version(_url(server)) == first
    assert server.bodies == 1


@pytest.mark.parametrize(("status", "error"), [(503, NetworkError), (404, BreedlineError)])
def test_an_answer_that_is_none(server: _Server, status: int, error: type[BreedlineError]) -> None:
    server.status = status
    with pytest.raises(error, match=str(status)) as raised:
        _version(_url(server))
    assert type(raised.value) is error


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_secret_of_a_url_is_not_said(server: _Server, status: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server.status, said = status, ""
    try:
        _version(_url(server).replace("://", "://user:s3cret@") + "?token=s3cret")
    except BreedlineError as error:
        said = str(error)
    assert (_url(server) in said) == (status != 200)
    assert "s3cret" not in said + caplog.text


def test_a_url_that_cannot_be_read_is_a_mistake_and_shows_none_of_its_parts() -> None:
    with pytest.raises(BreedlineError, match=r"http://host/pets\.tgz is not a valid url") as error:
        _version("http://user:s3cret/x@host/pets.tgz")
    assert "s3cret" not in str(error.value)


def test_nobody_there_is_the_network() -> None:
    with pytest.raises(NetworkError, match="try again later"):
        _version("http://127.0.0.1:1/photos.tar")
