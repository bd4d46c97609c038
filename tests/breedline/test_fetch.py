"""Downloads from a real server that misbehaves as real ones do, and from what fsspec reaches."""

import errno
import gzip
import hashlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from breedline.errors import BreedlineError, NetworkError
from breedline.fetch import FAILURES_IN_A_ROW, fetch, name_of

CONTENT = bytes(range(256)) * 1200
OTHER = CONTENT[::-1]
SHA256 = hashlib.sha256(CONTENT).hexdigest()
DATE = "Sat, 01 Aug 2026 10:00:00 GMT"
ROOT = Path(__file__).parents[2]
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Gives the server's answers one after the other; the last one from then on."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.asked.append(self.headers)
        self.server.answers[min(len(self.server.asked), len(self.server.answers)) - 1](self)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """What `asked` holds are the headers of every request."""

    def __init__(self, answers: tuple[Answer, ...]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.stopping = answers, list[Message](), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/pets.tgz"
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what some tests are about."""

    def ranges(self) -> list[str | None]:
        return [headers["Range"] for headers in self.asked]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """A function that starts a server with these answers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("breedline.fetch.BACKOFF", 0.001)
    servers = []

    def start(*answers: Answer) -> Server:
        servers.append(Server(answers))
        return servers[-1]

    yield start
    for server in servers:
        server.stopping.set()
        server.shutdown()
        server.server_close()


def say(
    status: int = 200, body: bytes = CONTENT, sent: int | None = None, pause: float = 0, **headers: object
) -> Answer:
    """An answer as scripted: it promises `body`, sends the first `sent` bytes of it, waits, and hangs up."""

    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            if value is not None:
                handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(body[:sent])
        handler.server.stopping.wait(pause)

    return answer


def host(content: bytes = CONTENT, sent: int | None = None, pause: float = 0, **headers: str) -> Answer:
    """An answer as a good server gives it, which knows ranges and versions; but the line may be cut as in `say`."""
    headers = headers or {"ETag": '"1"'}
    versions = list(headers.values())

    def answer(handler: Handler) -> None:
        asked = handler.headers
        start = re.fullmatch(r"bytes=(\d+)-", asked["Range"] or "")
        if (asked["If-None-Match"] or asked["If-Modified-Since"]) in versions:
            say(304, b"", Content_Length=None, **headers)(handler)
        elif start and asked["If-Range"] in versions and (had := int(start[1])) >= len(content):
            say(416, b"no", Content_Range=f"bytes */{len(content)}", **headers)(handler)
        elif start and asked["If-Range"] in versions:
            span = f"bytes {had}-{len(content) - 1}/{len(content)}"
            say(206, content[had:], sent, pause, Content_Range=span, **headers)(handler)
        else:
            say(200, content, sent, pause, **headers)(handler)

    return answer


def get(url: str, sha256: str | None = None, timeout: float = 5, max_bytes: float = 1e9) -> Path:
    return fetch(url, sha256, timeout=timeout, max_bytes=max_bytes)


def cached() -> list[Path]:
    return [f for f in Path(os.environ["BREEDLINE_CACHE"], "downloads").iterdir() if f.suffix not in (".lock", ".json")]


def test_a_file_arrives_whole(serve: Callable[..., Server]) -> None:
    assert get(serve(host()).url).read_bytes() == CONTENT
    assert len(cached()) == 1


@pytest.mark.parametrize("status", [206, 304, 401, 403, 404, 410])
def test_an_answer_that_asking_again_cannot_mend_is_refused_at_once(serve: Callable[..., Server], status: int) -> None:
    server = serve(say(status))
    with pytest.raises(BreedlineError, match=rf"{server.url}.* {status} .*params.yaml") as error:
        get(server.url)
    assert error.value.exit_code == 1
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(serve: Callable[..., Server], status: int) -> None:
    server = serve(say(status), say(status), host())
    assert get(server.url).read_bytes() == CONTENT
    assert len(server.asked) == 3


def test_a_server_that_stays_busy_is_a_network_error(serve: Callable[..., Server]) -> None:
    server = serve(say(503))
    with pytest.raises(NetworkError, match=r"503.*again later") as error:
        get(server.url)
    assert error.value.exit_code == 75
    assert len(server.asked) == FAILURES_IN_A_ROW


def test_nobody_there_is_a_network_error(serve: Callable[..., Server]) -> None:
    server = serve(host())
    server.shutdown()
    server.server_close()
    with pytest.raises(NetworkError, match="again later"):
        get(server.url)


@pytest.mark.parametrize("version", [{"ETag": '"1"'}, {"Last_Modified": DATE}])
def test_a_cut_download_goes_on_where_it_ended(serve: Callable[..., Server], version: dict[str, str]) -> None:
    server = serve(host(sent=100_000, **version))
    assert get(server.url).read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert {headers["If-Range"] for headers in server.asked[1:]} == set(version.values())


def test_any_progress_is_progress_however_often_the_line_is_cut(serve: Callable[..., Server]) -> None:
    server = serve(host(sent=20_000))
    assert get(server.url).read_bytes() == CONTENT
    assert len(server.asked) == 16


@pytest.mark.parametrize(
    "then",
    [
        say(200, OTHER),  # knows no ranges
        host(OTHER, ETag='"2"'),  # knows that it has changed
        say(206, OTHER[9:], Content_Range=f"bytes 9-{len(OTHER) - 1}/{len(OTHER)}", ETag='"2"'),  # does not care
        say(206, OTHER[8:], Content_Range=f"bytes 8-{len(OTHER) - 1}/{len(OTHER)}", ETag='"1"'),
        say(206, OTHER, Content_Range="bytes 9-", ETag='"1"'),
        say(206, OTHER, Content_Type="multipart/byteranges; boundary=x"),
        say(416, b"", Content_Range="bytes */5"),
    ],
    ids=["no range", "changed", "changed unsaid", "other range", "no end", "multipart", "less than we have"],
)
def test_versions_are_never_mixed(serve: Callable[..., Server], then: Answer) -> None:
    server = serve(host(sent=9), then, host(OTHER, ETag='"2"'))
    assert get(server.url).read_bytes() == OTHER
    assert server.ranges()[:2] == [None, "bytes=9-"]


@pytest.mark.parametrize("etag", ['W/"1"', "unquoted", None])
def test_what_does_not_name_one_version_is_never_resumed(serve: Callable[..., Server], etag: str | None) -> None:
    server = serve(say(ETag=etag, sent=9), say(ETag=etag))
    assert get(server.url).read_bytes() == CONTENT
    assert server.ranges() == [None, None]


def test_a_server_may_send_less_than_the_range_asked_for(serve: Callable[..., Server]) -> None:
    total = len(CONTENT)
    server = serve(
        host(sent=10), say(206, CONTENT[10:90], Content_Range=f"bytes 10-89/{total}", ETag='"1"'), host(CONTENT)
    )
    assert get(server.url).read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=10-", "bytes=90-"]


@pytest.mark.parametrize(
    "answers",
    [
        [say(sent=1000)],
        [say(sent=1000), say(sent=500)] * 20,  # more than the time before, every other time
        [host(sent=1000), say(416, b"", Content_Range="bytes */1000")] * 20,  # it believes in a larger file
        [host(sent=1000), say(206, Content_Range="bytes 0-1/2")] * 20,
        [say(Content_Length=None, Transfer_Encoding="chunked", body=b"3\r\nabc\r\n")],
        [host(sent=0)],
    ],
    ids=["always short", "up and down", "unsatisfied", "wrong range", "chunks without end", "headers only"],
)
def test_a_promise_that_is_never_kept_ends(serve: Callable[..., Server], answers: list[Answer]) -> None:
    server = serve(*answers)
    with pytest.raises(NetworkError, match="5 times in a row"):
        get(server.url)
    assert len(server.asked) <= FAILURES_IN_A_ROW + 1


def test_a_stalled_download_is_asked_for_again_then_given_up(serve: Callable[..., Server]) -> None:
    server = serve(host(sent=70_000, pause=30), host())
    assert get(server.url, timeout=0.1).read_bytes() == CONTENT
    server = serve(say(sent=70_000, pause=30))
    with pytest.raises(NetworkError, match="timed out"):
        get(server.url, timeout=0.1)
    assert len(server.asked) == FAILURES_IN_A_ROW + 1


def test_a_redirect_is_followed(serve: Callable[..., Server]) -> None:
    target = serve(host(sent=200_000))
    server = serve(say(302, b"", Location=target.url))
    assert get(server.url).read_bytes() == CONTENT
    assert target.ranges() == [None, "bytes=200000-"]


@pytest.mark.parametrize("location", ["/again", "ftp://127.0.0.1/x"])
def test_a_redirect_to_nowhere_is_refused_at_once(serve: Callable[..., Server], location: str) -> None:
    server = serve(say(302, b"", Location=location))
    with pytest.raises(BreedlineError, match=r"params\.yaml") as error:
        get(server.url)
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    "url", ["http://", "http:///pets.tgz", "https://host:port/pets.tgz", "foo://x", "file:///nowhere", "nowhere"]
)
def test_a_url_that_leads_nowhere_is_named(url: str) -> None:
    with pytest.raises(BreedlineError, match=rf"{re.escape(url.removeprefix('file://'))}.*params\.yaml") as error:
        get(url)
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("header", "version"),
    [
        ("If-None-Match", {"ETag": '"1"'}),
        ("If-None-Match", {"ETag": 'W/"1"'}),
        ("If-Modified-Since", {"Last_Modified": DATE}),
    ],
)
def test_what_has_not_changed_is_not_sent_again(
    serve: Callable[..., Server], header: str, version: dict[str, str]
) -> None:
    server = serve(host(**version), host(**version), host(OTHER, ETag='"2"'))
    first, again = get(server.url), get(server.url)
    assert first == again
    assert again.read_bytes() == CONTENT
    assert [headers[header] for headers in server.asked] == [None, *version.values()]
    assert get(server.url).read_bytes() == OTHER


@pytest.mark.parametrize("sent", [0, 1000])
def test_an_update_that_was_cut_is_not_taken_for_done(serve: Callable[..., Server], sent: int) -> None:
    broken = say(200, OTHER, sent, ETag='"2"')
    server = serve(host(), *[broken] * (FAILURES_IN_A_ROW + (sent > 0)), host(OTHER, ETag='"2"'))
    first = get(server.url)
    with pytest.raises(NetworkError):
        get(server.url)
    assert first.read_bytes() == CONTENT
    assert get(server.url).read_bytes() == OTHER


def test_an_update_killed_between_its_file_and_its_note_mixes_no_versions(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def die(self: Path, target: Path) -> Path:
        if self.name.endswith(".part.json"):
            raise KeyboardInterrupt
        return replace(self, target)

    server = serve(host(), host(OTHER, ETag='"2"'), host())
    get(server.url)
    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        get(server.url)
    monkeypatch.setattr(Path, "replace", replace)
    assert get(server.url).read_bytes() == CONTENT


@pytest.mark.parametrize("pin", [SHA256, SHA256[:8]])
def test_a_pinned_file_is_asked_for_once(serve: Callable[..., Server], pin: str) -> None:
    server = serve(host())
    assert get(server.url, pin) == get(server.url, pin)
    assert len(server.asked) == 1


def test_a_pinned_file_that_went_bad_in_the_cache_is_fetched_anew(serve: Callable[..., Server]) -> None:
    server = serve(host())
    get(server.url, SHA256).write_bytes(b"rotten")
    assert get(server.url, SHA256).read_bytes() == CONTENT


def test_another_hash_names_both_and_leaves_nothing(serve: Callable[..., Server]) -> None:
    server = serve(host(OTHER))
    with pytest.raises(BreedlineError, match=rf"{hashlib.sha256(OTHER).hexdigest()}.*{SHA256}.*params\.yaml"):
        get(server.url, SHA256)
    assert cached() == []


def test_another_hash_than_pinned_spares_a_local_file(tmp_path: Path) -> None:
    (tmp_path / "pets.tgz").write_bytes(OTHER)
    with pytest.raises(BreedlineError, match=SHA256):
        get(str(tmp_path / "pets.tgz"), SHA256)
    assert (tmp_path / "pets.tgz").exists()


@pytest.mark.parametrize(("length", "taken"), [(len(CONTENT), 0), (None, 200_000)])
def test_more_than_allowed_is_refused(serve: Callable[..., Server], length: int | None, taken: int) -> None:
    server = serve(say(Content_Length=length))
    with pytest.raises(BreedlineError, match=r"0\.0001 GB.*max_total_gb"):
        get(server.url, max_bytes=1e5)
    assert len(server.asked) == 1
    assert sum(f.stat().st_size for f in cached()) <= taken


def test_an_archive_is_not_unpacked_on_its_way(serve: Callable[..., Server]) -> None:
    packed = gzip.compress(CONTENT)
    server = serve(say(body=packed, Content_Encoding="gzip"))
    assert get(server.url).read_bytes() == packed
    assert server.asked[0]["Accept-Encoding"] == "identity"


def fetch_elsewhere(url: str, first: str = "") -> subprocess.Popen[str]:
    code = f"import breedline.fetch, hashlib, os, pathlib; {first}\n"
    code += f"path = breedline.fetch.fetch({url!r}, None, timeout=20, max_bytes=1e9)\n"
    code += "print(hashlib.sha256(path.read_bytes()).hexdigest())"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_get_the_same_whole_file(serve: Callable[..., Server]) -> None:
    server = serve(host(sent=150_000))
    with fetch_elsewhere(server.url) as one, fetch_elsewhere(server.url) as two:
        assert [process.communicate(timeout=60)[0].strip() for process in (one, two)] == [SHA256, SHA256]
    assert server.ranges() == [None, "bytes=150000-", "bytes=300000-", None]
    assert server.asked[-1]["If-None-Match"] == '"1"'


@pytest.mark.slow
def test_a_download_killed_midway_goes_on_where_it_ended(serve: Callable[..., Server]) -> None:
    server = serve(host(sent=150_000, pause=30), host())
    with fetch_elsewhere(server.url) as process:
        while process.poll() is None and sum(f.stat().st_size for f in Path.cwd().parent.rglob("*.part")) < 140_000:
            time.sleep(0.01)
        process.kill()
    (part,) = cached()
    size = part.stat().st_size
    assert get(server.url).read_bytes() == CONTENT
    assert server.ranges() == [None, f"bytes={size}-"]


@pytest.mark.slow
@pytest.mark.parametrize(("etag", "content"), [('"1"', CONTENT), ('"2"', OTHER)])
def test_a_download_killed_after_its_last_byte_is_not_sent_again(
    serve: Callable[..., Server], etag: str, content: bytes
) -> None:
    server = serve(host(), host(content, ETag=etag))
    with fetch_elsewhere(server.url, "breedline.fetch._check = lambda *_: os.kill(os.getpid(), 9)"):
        pass
    (part,) = cached()
    assert part.read_bytes() == CONTENT
    assert get(server.url).read_bytes() == content
    assert server.ranges() == [None, f"bytes={len(CONTENT)}-"]


def test_a_local_path_is_used_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pets.tgz").write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    for url in ("pets.tgz", "~/pets.tgz", f"file://{tmp_path}/pets.tgz", str(tmp_path / "pets.tgz")):
        assert get(url, SHA256).samefile(tmp_path / "pets.tgz")


def test_a_file_that_fsspec_reaches_is_copied_and_pinned() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/fetch/pets.tgz", CONTENT)
    assert get("memory://fetch/pets.tgz", SHA256).read_bytes() == CONTENT
    memory.rm("/fetch/pets.tgz")
    assert get("memory://fetch/pets.tgz", SHA256).read_bytes() == CONTENT
    with pytest.raises(BreedlineError, match=r"there is no memory://fetch/pets\.tgz.*params\.yaml"):
        get("memory://fetch/pets.tgz")


def test_a_large_file_is_refused_before_it_is_copied() -> None:
    fsspec.filesystem("memory").pipe("/fetch/large", CONTENT)
    with pytest.raises(BreedlineError, match="max_total_gb"):
        get("memory://fetch/large", max_bytes=1e5)
    assert cached() == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(BreedlineError, match=r"gs://bucket/pets\.tgz.*gcsfs.*install it") as error:
        get("gs://bucket/pets.tgz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (PermissionError("403"), BreedlineError),
        (TimeoutError(), NetworkError),
        (OSError(errno.ENOSPC, "full"), OSError),
    ],
)
def test_a_storage_that_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: OSError, becomes: type[Exception]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", refuse)
    with pytest.raises(becomes):
        get("memory://fetch/pets.tgz")


def secret_url(server: Server) -> str:
    return server.url.replace("http://", "http://user:s3cret@") + "?token=s3cret&X-Amz-Signature=s3cret#s3cret"


@pytest.mark.parametrize(
    ("answers", "sha256"),
    [
        ([host()], None),
        ([host()], "0" * 64),
        ([say(404)], None),
        ([say(503)], None),
        ([say(sent=9)], None),
        ([say(sent=9, pause=9)], None),
        ([say(Content_Length=10**12)], None),
        ([lambda handler: say(302, b"", Location=handler.path)(handler)], None),
        ([lambda handler: say(302, b"", Location="ftp://a:s3cret@host/?s3cret")(handler)], None),
        ([lambda handler: handler.send_response(404, f"no {handler.path}")], None),
    ],
    ids=["unpinned", "wrong", "absent", "busy", "cut", "stalled", "large", "loop", "ftp", "echo"],
)
def test_a_secret_of_a_url_is_written_nowhere(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture, answers: list[Answer], sha256: str | None
) -> None:
    caplog.set_level(logging.INFO)
    server, said = serve(*answers), ""
    try:
        get(secret_url(server), sha256, timeout=0.2)
    except BreedlineError as error:
        said = str(error)
    assert server.asked[0]["Authorization"]
    assert server.url in said + caplog.text
    assert "s3cret" not in said + caplog.text
    written = [file for file in Path(os.environ["BREEDLINE_CACHE"]).rglob("*") if file.is_file()]
    assert not any("s3cret" in str(file) or b"s3cret" in file.read_bytes() for file in written)


@pytest.mark.parametrize("port", ["port", "s3cret/x"])
def test_a_url_that_cannot_be_read_shows_none_of_its_parts(port: str) -> None:
    with pytest.raises(BreedlineError, match=r"http://host.*params\.yaml") as error:
        get(f"http://user:s3cret@host:{port}/?s3cret" if port == "port" else f"http://user:{port}@host/pets.tgz")
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/a/pets.tgz", "pets.tgz"),
        ("https://host/a/my%20pets.tgz?download=true#top", "my pets.tgz"),
        ("https://host", "file"),
        ("s3://bucket/a/pets.tgz", "pets.tgz"),
        ("/a/what?.csv", "what?.csv"),
    ],
)
def test_a_file_is_called_as_its_url_ends(url: str, name: str) -> None:
    assert name_of(url) == name
