"""The page of `breedline app`: what it says of a photo, where it looks, and whom it answers."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from starlette.testclient import TestClient

from breedline import app
from breedline.bundle import WEIGHTS
from breedline.classifier import Photo, Unreadable
from breedline.errors import BreedlineError
from breedline.neighbours import FILE, Neighbours, of_unit_length, thumbnail, write
from breedline.preprocessing import view_of_photo
from flows.cli import _parser
from tests.bundles import CLASSES, FEATURES, HOW, SIZE, bundle, graph, picture

ROOT = Path(__file__).parents[2]
PORT = 8123
HERE = f"http://127.0.0.1:{PORT}"
SAME = {"Origin": HERE}
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
DROPPED = """
base64 => {
    const carried = new DataTransfer();
    carried.items.add(new File([Uint8Array.from(atob(base64), letter => letter.charCodeAt(0))], "dropped.png"));
    return carried;
}
"""
HOSTILE = ["<img src=x onerror=alert(1)>", "</script><b>green", "\u202eblue"]


def client(folder: Path | None = None) -> TestClient:
    return page_of(app.Observer.load(folder or bundle()))


def page_of(observer: app.Observer) -> TestClient:
    return TestClient(app.application(observer, PORT), base_url=HERE)


def seen_before(observer: app.Observer, **photos: bytes) -> Neighbours:
    """Training photos of the names COLOUR_…, each of the class that has its colour's place."""
    views = np.stack([view_of_photo(photo, HOW) for photo in photos.values()])
    return Neighbours(
        model=observer.spec.files[WEIGHTS],
        names=list(photos),
        labels=[observer.spec.classes[CLASSES.index(name.partition("_")[0])] for name in photos],
        features=of_unit_length(observer._features(views)),
        thumbnails=[thumbnail(view) for view in views],
    )


def with_neighbours(**others: Any) -> app.Observer:
    """A model that has seen five reds, a green and a blue."""
    observer = app.Observer.load(bundle(graph(beside=FEATURES), **others))
    reds = {f"red_{size}": picture("red", size=(size, size)) for size in (60, 61, 62, 63, 64)}
    observer.neighbours = seen_before(observer, green_1=picture("green"), **reds, blue_1=picture("blue"))
    return observer


def shades(url: str) -> np.ndarray:
    """The pixels of a picture that a URL holds as a PNG."""
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) as picture:
        return np.asarray(picture)


def half_red() -> bytes:
    """A grey picture whose left half is red."""
    pixels = np.full((SIZE, SIZE, 3), 127, np.uint8)
    pixels[:, : SIZE // 2] = (250, 60, 60)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_photo_is_told_as_predict_tells_it_with_the_square_that_the_model_sees() -> None:
    folder, photo = bundle(), picture("green", "JPEG")
    told = client(folder).post("/look", content=photo, headers=SAME).json()
    (expected,) = app.Observer.load(folder).predict(Photo("photo", photo))
    assert told["label"] == expected.label == "green"
    assert [(guess["label"], guess["probability"]) for guess in told["top"]] == expected.top
    assert np.array_equal(shades(told["view"]), view_of_photo(photo, HOW))
    assert told["nearest"] == []


def test_the_nearest_training_photos_are_told_with_pictures() -> None:
    observer = with_neighbours()
    page, photo = page_of(observer), picture("green")
    nearest = page.post("/look", content=photo, headers=SAME).json()["nearest"]
    assert len(nearest) == app.NEAREST
    assert (nearest[0]["name"], nearest[0]["label"]) == ("green_1", "green")
    assert nearest[0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert all(one["similarity"] <= other["similarity"] for other, one in itertools.pairwise(nearest))
    shown = shades(nearest[0]["thumbnail"]).astype(int)
    assert np.abs(shown - view_of_photo(photo, HOW)).mean() < 8
    assert page.get("/model").json()["neighbours"] == 7


def test_a_thumbnail_that_is_none_is_told_in_words() -> None:
    observer = with_neighbours()
    assert observer.neighbours
    observer.neighbours.thumbnails[:] = [b"<svg onload=alert(1)>"] * 7
    answer = page_of(observer).post("/look", content=picture("red"), headers=SAME)
    assert answer.status_code == 500
    assert "thumbnail is no small JPEG" in answer.json()["error"]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[app.Observer]:
    """The observers that `main` would serve: it returns at once."""
    observers: list[app.Observer] = []
    monkeypatch.setattr(app, "application", lambda observer, port: observers.append(observer))
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: None)
    return observers


def shown_with(served: list[app.Observer], *arguments: str) -> Neighbours | None:
    """The training photos that `breedline app` with these arguments shows."""
    parsed = vars(_parser().parse_args(["app", *arguments]))
    parsed.pop("command")(**parsed)
    return served[-1].neighbours


def test_training_photos_of_the_report_are_shown_if_they_fit(
    served: list[app.Observer], capsys: pytest.CaptureFixture[str]
) -> None:
    observer = with_neighbours()
    assert observer.neighbours
    assert shown_with(served) is None
    assert capsys.readouterr().err == ""
    beside = Path("reports/evaluate") / FILE
    beside.parent.mkdir(parents=True)
    write(observer.neighbours, beside)
    assert (found := shown_with(served))
    assert found.names == observer.neighbours.names
    assert (found := shown_with(served, "--model", str(Path("models").absolute())))
    assert capsys.readouterr().err == ""
    write(dataclasses.replace(observer.neighbours, model="1" * 64), beside)
    assert shown_with(served) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("shown without training photos: ")
    assert line.endswith("is of another model than the bundle: `dvc repro` makes both anew")


def test_a_file_of_training_photos_that_is_asked_for_must_fit(served: list[app.Observer]) -> None:
    observer = with_neighbours()
    assert observer.neighbours
    with pytest.raises(BreedlineError, match="there is no such file"):
        shown_with(served, "--neighbours", "some.safetensors")
    write(observer.neighbours, Path("some.safetensors"))
    assert shown_with(served, "--neighbours", "some.safetensors")
    write(dataclasses.replace(observer.neighbours, features=np.ones((7, 1), np.float16)), Path("some.safetensors"))
    with pytest.raises(BreedlineError, match="is of another model"):
        shown_with(served, "--neighbours", "some.safetensors")


def test_what_is_too_improbable_is_none_of_the_classes() -> None:
    told = client(bundle(none_below=1.0)).post("/look", content=picture("red"), headers=SAME).json()
    assert told["label"] is None
    assert told["top"][0]["label"] == "red"


def test_it_looks_at_what_decides() -> None:
    """The probability falls where a patch hides the red half, most where it hides nothing else, and nowhere on the right."""
    fall = np.array(client().post("/look", content=half_red(), headers=SAME).json()["fall"])
    assert fall.shape == (8, 8)
    assert (fall[:, :5] > 0).all()
    assert fall[4, 2] == pytest.approx(fall.max())
    assert np.abs(fall[:, 6:]).max() < fall.max() / 10


def test_the_fall_is_that_of_the_photo_with_a_patch() -> None:
    how = HOW.model_copy(update={"mean": (0.2, 0.5, 0.8)})
    observer = app.Observer.load(bundle(preprocessing=how))
    seen = observer.look(Photo("photo", half_red()))
    assert not isinstance(seen, Unreadable)
    view = seen.view.astype(float)
    view[0:12, 8:20] = (51, 128, 204)  # cells of 4 pixels: its middle is that of row 1, column 3
    logits = 4 * ((view / 255 - how.mean) / how.std).mean((0, 1))
    powers = np.exp(logits)
    expected = seen.prediction.top[0].probability - (powers / powers.sum())[0]
    assert seen.fall[1, 3] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [1, 5, 31])
def test_squares_of_any_size_are_covered_in_every_place(size: int) -> None:
    view = np.zeros((size, size, 3), np.uint8)
    cells = min(app.CELLS, size)
    covered = list(app._covered(view, np.array([9, 9, 9], np.uint8), cells))
    assert len(covered) == cells**2
    assert all(one.any() for one in covered)
    assert np.max(covered, axis=0).all()


def test_a_file_that_is_no_photo_gets_its_reason() -> None:
    answer = client().post("/look", content=b"<b>no photo</b>", headers=SAME)
    assert answer.status_code == 422
    assert answer.json() == {"error": "not a whole JPEG, PNG, GIF, BMP, WEBP or TIFF"}


def test_a_model_that_fails_is_told_in_words() -> None:
    broken = bundle(graph(np.full((3, 3), np.nan)))
    answer = client(broken).post("/look", content=picture("red"), headers=SAME)
    assert answer.status_code == 500
    assert "no finite numbers" in answer.json()["error"]


@pytest.mark.parametrize("declared", [True, False])
def test_what_is_too_large_is_not_read_whole(monkeypatch: pytest.MonkeyPatch, declared: bool) -> None:
    monkeypatch.setattr(app, "MAX_UPLOAD", 1_000_000)
    photo = picture("red").ljust(1_000_000, b"\0")
    chunks = [photo, b"\0"]
    with client() as page:
        answer = page.post("/look", content=b"".join(chunks) if declared else iter(chunks), headers=SAME)
        assert answer.status_code == 413
        assert answer.json() == {"error": "it is larger than 1 MB"}
        assert page.post("/look", content=photo, headers=SAME).status_code == 200


def test_one_photo_at_a_time_is_looked_at() -> None:
    at_work: list[None] = []
    most = 0

    class Slow(app.Observer):
        def look(self, photo: Photo) -> app.Look | Unreadable:
            nonlocal most
            at_work.append(None)
            most = max(most, len(at_work))
            time.sleep(0.05)
            at_work.pop()
            return super().look(photo)

    slow = app.application(Slow.load(bundle()), PORT)
    with TestClient(slow, base_url=HERE) as page, ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda _: page.post("/look", content=picture("red"), headers=SAME), range(4))
        assert [answer.status_code for answer in answers] == [200] * 4
    assert most == 1


@pytest.mark.parametrize(("message", "status"), [(None, 408), ({"type": "http.disconnect"}, 400)])
def test_a_photo_that_never_comes_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, message: dict[str, str] | None, status: int
) -> None:
    monkeypatch.setattr("breedline.page.SECONDS_TO_UPLOAD", 0.1)
    page = client()
    sent: list[Any] = []

    async def receive() -> Any:
        return message or await asyncio.sleep(60)

    async def send(answer: Any) -> None:
        sent.append(answer)

    headers = [(b"host", HERE.removeprefix("http://").encode()), (b"origin", HERE.encode())]
    scope = {"type": "http", "method": "POST", "path": "/look", "query_string": b"", "headers": headers}
    asyncio.run(page.app(scope, receive, send))
    assert sent[0]["status"] == status
    assert page.post("/look", content=picture("red"), headers=SAME).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:80", f"127.0.0.2:{PORT}"]
)
def test_it_goes_by_no_other_name(host: str) -> None:
    page = client()
    for path in ("/", "/model", "/look", "/nothing"):
        assert page.get(path, headers={"Host": host}).status_code == 421
    answer = page.post("/look", content=picture("red"), headers={"Host": host, "Origin": f"http://{host}"})
    assert answer.status_code == 421


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:1", f"https://127.0.0.1:{PORT}"]
)
def test_no_other_page_may_ask(origin: str | None) -> None:
    answer = client().post("/look", content=picture("red"), headers={"Origin": origin} if origin else {})
    assert answer.status_code == 403


def test_localhost_is_this_machine() -> None:
    name = f"localhost:{PORT}"
    headers = {"Host": name, "Origin": f"http://{name}"}
    assert client().post("/look", content=picture("red"), headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/model", "/nothing", "/look"])
def test_every_answer_has_the_headers(path: str) -> None:
    headers = client().get(path).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


def test_the_page_is_whole_in_itself() -> None:
    page = client().get("/").text
    assert re.findall(r"""(?:src|href|action)="([^"]*)""", page) == ["data:,"]
    assert not re.search(r"https?://|@import|url\(|innerHTML|\sstyle=|\son\w+=", page)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_what_is_no_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["app", f"--port={port}"])
    assert "give 1 to 65535" in capsys.readouterr().err


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The address of `breedline app` for the bundle in models; it must end quietly by Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = [sys.executable, "-c", "from flows.cli import main; main()", "app", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            assert (told := process.stdout.readline()), process.stderr and process.stderr.read()
            assert told == f"Drop a photo on http://127.0.0.1:{port} (Ctrl-C ends this)\n"
            yield f"http://127.0.0.1:{port}"
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == ("", "")
            assert process.returncode == 0
        finally:
            process.kill()


@pytest.mark.slow
def test_a_browser_shows_it() -> None:
    """By keyboard and by mouse; names are text, however they are meant; and nobody else is asked for anything."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.fail(
            "there is no Chromium, which `apt-get install chromium` brings, so nobody knows what the page shows"
        )
    expect.set_options(timeout=60_000)  # other tests compute at the same time
    observer = with_neighbours(classes=HOSTILE)
    assert observer.neighbours
    Path("reports/evaluate").mkdir(parents=True)
    names = ["<b>green", *observer.neighbours.names[1:]]
    write(dataclasses.replace(observer.neighbours, names=names), Path("reports/evaluate") / FILE)
    Path("<b>half.png").write_bytes(half_red())
    Path("bad.png").write_bytes(b"no photo")
    with (
        running() as address,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=FLAGS.split()) as browser,
    ):
        page = browser.new_page(viewport={"width": 360, "height": 740})
        asked: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(address)
        expect(page.locator("#model")).to_have_text("tiny, 3 classes")

        page.keyboard.press("Tab")
        photo = page.get_by_label("Choose a photo, or drop one here")
        expect(photo).to_be_focused()
        assert page.locator("#drop").evaluate("zone => getComputedStyle(zone).outlineStyle") == "solid"
        photo.set_input_files("<b>half.png")

        verdict = page.get_by_role("status")
        expect(verdict).to_contain_text("<b>half.png\u2069 shows \u2068<img src=x onerror=alert(1)>")
        bars = page.get_by_role("region", name="How probable each class is")
        expect(bars.get_by_role("listitem")).to_have_count(3)
        assert {name.inner_text() for name in bars.locator(".name").all()} == set(HOSTILE)
        nearest = page.get_by_role("region", name="Nearest training photos")
        expect(nearest.get_by_role("listitem")).to_have_count(5)
        expect(nearest.get_by_role("img", name="red_60")).to_be_visible()
        assert {name.inner_text() for name in nearest.locator(".name").all()} == {HOSTILE[0]}
        expect(nearest.get_by_text("another class")).to_have_count(0)
        expect(nearest).to_contain_text("Of 7 photos")
        widths = [
            bar.evaluate("bar => bar.offsetWidth / bar.parentElement.offsetWidth") for bar in page.locator(".bar").all()
        ]
        shares = [float(share.inner_text().rstrip("%")) / 100 for share in page.locator(".share").all()]
        assert widths == pytest.approx(shares, abs=0.02)
        expect(page.locator("figcaption")).to_contain_text(
            re.compile("With a grey patch over the (top |bottom )?left,")
        )
        opacities = (
            "map => [...map.getContext('2d').getImageData(0, 0, 8, 8).data].filter((_, place) => place % 4 === 3)"
        )
        drawn = np.array(page.locator("#map").evaluate(opacities)).reshape(8, 8)
        assert drawn[:, :4].min() > drawn[:, 6:].max()
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        expect(page.get_by_label("Show what mattered")).not_to_be_checked()
        expect(page.locator("#map")).to_be_hidden()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

        photo.set_input_files("bad.png")
        expect(verdict).to_contain_text("cannot be used: not a whole JPEG")
        expect(page.locator("#result")).to_be_hidden()
        dropped = page.evaluate_handle(DROPPED, base64.b64encode(picture("blue")).decode())
        page.dispatch_event("h1", "drop", {"dataTransfer": dropped})
        expect(verdict).to_contain_text("dropped.png\u2069 shows \u2068\u202eblue")
        first, *others = nearest.get_by_role("listitem").all()
        expect(first).to_have_text(re.compile(r"^\u202eblue(over 99.9|100.0)%$"))
        expect(first.get_by_role("img")).to_have_js_property("naturalWidth", SIZE)
        expect(others[0]).to_contain_text("another class")
        assert [
            one.locator("img").evaluate("image => getComputedStyle(image).borderTopStyle") for one in (first, *others)
        ] == ["solid", *["dashed"] * 4]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        Path("green.png").write_bytes(picture("green"))
        photo.set_input_files("green.png")
        expect(nearest.get_by_role("img", name="<b>green")).to_be_visible()
        page.route("**/look", lambda route: route.fulfill(json=route.fetch().json() | {"nearest": []}))
        photo.set_input_files("green.png")
        expect(verdict).to_contain_text("green.png\u2069 shows")
        expect(bars).to_be_visible()
        expect(nearest).to_be_hidden()
        with Path("large.png").open("wb") as large:
            large.truncate(app.MAX_UPLOAD + 1)
        photo.set_input_files("large.png")
        expect(verdict).to_contain_text("cannot be used: it is larger than 50 MB")
        assert wrong == []
        assert {url for url in asked if not url.startswith((f"{address}/", "data:"))} == set()
