"""A bundle at work: what it makes of photos, and what it refuses."""

import io
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import breedline
from breedline import Classifier
from breedline.bundle import ONNX
from breedline.classifier import Guess, Photo, Prediction, Unreadable
from breedline.errors import BreedlineError
from breedline.images import presize_image
from breedline.preprocessing import view_of_photo, view_of_presized
from tests.bundles import COLOURS, FEATURES, HOW, SIZE, bundle, graph, picture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def classifier() -> Classifier:
    return Classifier.load(bundle())


def test_photos_are_named_whatever_they_are_given_as(classifier: Classifier) -> None:
    Path("a.png").write_bytes(picture("green"))
    (by_path,) = classifier.predict(Path("a.png"))
    assert by_path.source == "a.png"
    assert by_path.label == "green"
    assert [guess.label for guess in by_path.top] == ["green", "red", "blue"] or by_path.top[0].label == "green"
    assert sum(guess.probability for guess in by_path.top) == pytest.approx(1)
    with Image.open("a.png") as image:
        assert classifier.predict(["a.png", image, Photo("a.png", Path("a.png").read_bytes())]) == [by_path] * 3
        assert classifier.predict(image.copy())[0] == by_path._replace(source="image")


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),  # turned
        ("PNG", "RGBA", {}),
        ("PNG", "P", {"transparency": 0}),
        ("PNG", "1", {}),
        ("PNG", "I;16", {}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("WEBP", "RGB", {}),
        ("TIFF", "LAB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(60, 45), (33, 31)], ids=str)
def test_every_format_is_seen_as_its_presized_image(
    kind: str, mode: str, options: dict[str, Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(Classifier, "_probabilities", lambda self, views: seen.extend(views) or np.eye(3)[:1])
    mode_now, base = ("L", "I;16") if mode == "I;16" else (mode, mode)
    data = picture("red", kind, mode_now, size, **options)
    if base == "I;16":
        buffer = io.BytesIO()
        Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint16).reshape(size[1], size[0]) * 20).save(
            buffer, "PNG"
        )
        data = buffer.getvalue()
    Classifier.load(bundle()).predict(Photo("photo", data))
    assert np.array_equal(seen[0], view_of_presized(presize_image(data, 40, 92).data, SIZE))


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "LAB", "YCbCr", "HSV"])
def test_an_image_in_memory_is_seen_upright_and_in_its_colours(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Classifier, "_probabilities", lambda self, views: seen.extend(views) or np.eye(3)[:1])
    image = Image.new("RGB", (60, 45), "white")
    image.paste(COLOURS["red"], (30, 0, 60, 45))
    if mode == "LAB":
        from PIL import ImageCms

        change = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(image, change)
    else:
        image = image.convert(mode)
    image.getexif()[0x0112] = 6
    Classifier.load(bundle()).predict(image)
    plain = image.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    buffer = io.BytesIO()
    plain.save(buffer, "PNG")
    # which is turned before it is reduced, not after; in another direction half of the pixels would differ by 100 and more
    assert np.abs(seen[0].astype(int) - view_of_photo(buffer.getvalue(), HOW)).mean() < 8


def test_an_image_that_cannot_be_decoded_is_told(classifier: Classifier) -> None:
    image = Image.open(io.BytesIO(picture("red", size=(200, 200))[:5000]))
    with pytest.raises(BreedlineError, match="'image' is no usable photo"):
        classifier.predict(image)


def test_a_stream_keeps_the_order_and_passes_on_what_is_unreadable(classifier: Classifier) -> None:
    names = [*COLOURS] * 30
    Path("cut.jpg").write_bytes(picture("red", "JPEG")[:300])
    Path("text.jpg").write_text("no image")
    Path("folder.jpg").mkdir()
    os.mkfifo("pipe.jpg")
    bad = ["cut.jpg", "text.jpg", "folder.jpg", "pipe.jpg", "gone.jpg", "zero\0byte.jpg", Unreadable("told", "before")]
    photos: list[Any] = [Photo(f"{number} {name}", picture(name)) for number, name in enumerate(names)]
    for place, what in enumerate(bad):
        photos.insert(place * 13, what)
    results = list(classifier.stream(iter(photos)))
    assert [result.source for result in results] == [photo if isinstance(photo, str) else photo[0] for photo in photos]
    assert [result.label for result in results if isinstance(result, Prediction)] == names
    reasons = {result.source: result.reason for result in results if isinstance(result, Unreadable)}
    assert reasons["text.jpg"] == "not a whole JPEG, PNG, GIF, BMP, WEBP or TIFF"
    assert reasons["folder.jpg"] == "Is a directory"
    assert reasons["pipe.jpg"] == "not a file"
    assert reasons["gone.jpg"] == "No such file or directory"
    assert reasons["told"] == "before"
    assert "null" in reasons["zero\0byte.jpg"]
    assert reasons["cut.jpg"]
    for photo in bad[:-1]:
        with pytest.raises(BreedlineError, match="is no usable photo"):
            classifier.predict(photo)


def test_a_stream_takes_no_more_photos_than_it_needs_and_no_memory(classifier: Classifier) -> None:
    taken = 0

    def photos() -> Iterator[Photo]:
        nonlocal taken
        data = picture("red", "BMP", size=(200, 200))
        while True:
            taken += 1
            yield Photo("photo", bytes(bytearray(data)))

    stream = classifier.stream(photos())
    for _ in range(100):
        next(stream)
    assert taken < 200
    tracemalloc.start()
    for _ in range(500):
        next(stream)
    assert tracemalloc.get_traced_memory()[1] < 40_000_000  # of 60 MB of photos
    tracemalloc.stop()
    stream.close()


def test_large_files_do_not_wait_together(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    data, taken = picture("red", "BMP", size=(200, 200)), []
    monkeypatch.setattr("breedline.classifier.BYTES_AHEAD", 3 * len(data))
    views = classifier._views((taken.append(1) or Photo("photo", data) for _ in range(50)), 40)
    next(views)
    assert len(taken) == 4


def test_a_file_that_is_too_large_is_not_read(classifier: Classifier) -> None:
    with Path("large.jpg").open("wb") as file:
        file.truncate(1_000_000_001)
    (result,) = classifier.stream(["large.jpg"])
    assert result == Unreadable("large.jpg", "over 1 GB")


def test_what_is_too_improbable_is_none_of_the_classes(classifier: Classifier) -> None:
    grey = Photo("grey", picture_of_grey())
    (prediction,) = classifier.predict(grey, top=2)
    assert prediction.label is None
    assert [guess.probability for guess in prediction.top] == pytest.approx([1 / 3] * 2, abs=0.02)
    assert classifier.predict(grey, min_confidence=0.2)[0].label == prediction.top[0].label
    assert classifier.predict(Photo("red", picture("red")), min_confidence=1.0)[0].label is None


def picture_of_grey() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 50), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def test_sigmoids_are_each_for_itself_and_do_not_overflow() -> None:
    weights = np.array([[1e30, -1e30, 0]] * 3)
    classifier = Classifier.load(bundle(graph(weights), loss="bce"))
    (prediction,) = classifier.predict(Photo("red", picture("red", size=(9, 9))))
    assert prediction.top == [Guess("green", 1.0), Guess("blue", 0.5), Guess("red", 0.0)]
    assert classifier.predict([]) == []


@pytest.mark.parametrize("top", [0, -1])
def test_at_least_one_class_is_told(classifier: Classifier, top: int) -> None:
    with pytest.raises(BreedlineError, match="ask for at least 1 class"):
        classifier.predict([], top=top)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(number: float) -> None:
    classifier = Classifier.load(bundle(graph(np.full((3, 3), number))))
    with pytest.raises(BreedlineError, match="gives no finite numbers"):
        classifier.predict(Photo("red", picture("red")))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: graph(size=31), "does not lead from images"),
        (lambda: graph(np.eye(3)[:, :2]), "does not lead from images"),
        (lambda: graph(batch=1), "does not lead from images"),
        (lambda: graph(beside={"features": ["batch"]}), "does not lead from images"),
        (lambda: graph(beside={"images": ["batch", 3, SIZE, SIZE]}), "does not lead from images"),
        (lambda: graph(beside=FEATURES | {"weights": [3, 3]}), "does not lead from images"),
        (lambda: graph()[:-40], "is no usable graph"),
        (lambda: b"\0" * 100, "is no usable graph"),
        (lambda: b"", "is no usable graph"),
    ],
    ids=["size", "classes", "batch", "rank", "images", "more", "cut", "zeros", "empty"],
)
def test_a_graph_that_does_not_fit_is_refused(content: Callable[[], bytes], said: str) -> None:
    with pytest.raises(BreedlineError, match=said) as told:
        Classifier.load(bundle(content()))
    assert "\n" not in str(told.value)


def test_features_are_given_only_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, view = Classifier.load(bundle(graph(beside=FEATURES))), view_of_photo(picture("red"), HOW)
    asked: list[str] = []
    run = classifier._session.run
    monkeypatch.setattr(
        classifier, "_session", SimpleNamespace(run=lambda names, *a: asked.extend(names) or run(names, *a))
    )
    classifier.predict(Photo("red", picture("red")))
    assert asked == ["logits"]
    expected = (view.mean((0, 1)) / 255 - HOW.mean) / HOW.std
    assert classifier._features(view[None])[0] == pytest.approx(expected, abs=1e-5)


def test_a_graph_with_more_features_than_is_sensible_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("breedline.classifier.MAX_FEATURES", 2)
    with pytest.raises(BreedlineError, match="does not lead from images"):
        Classifier.load(bundle(graph(beside=FEATURES)))


@pytest.mark.parametrize("where", ["canary", "./canary", "../work/canary", "models/../canary", "absolute", "beside"])
def test_a_graph_reads_no_file(where: str) -> None:
    """Given only bytes, ONNX Runtime reads what a graph names below the working folder."""
    canary = Path("models/canary" if where == "beside" else "canary").absolute()
    canary.parent.mkdir(exist_ok=True)
    canary.write_bytes((4 * np.eye(3)).astype(np.float32).tobytes())
    named = {"absolute": str(canary), "beside": "canary"}.get(where, where)
    content = graph(external=named)
    onnx.load_model_from_string(content)
    if where == "beside":
        canary.unlink()
        canary.parent.rmdir()
    with pytest.raises(BreedlineError, match="is no usable graph"):
        Classifier.load(bundle(content))


def test_the_file_is_read_once_and_its_hash_is_that_of_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle()
    monkeypatch.setattr(Path, "read_bytes", lambda path, read=Path.read_bytes: read(path) + b"\0" * (path.name == ONNX))
    with pytest.raises(BreedlineError, match="was replaced while it was read"):
        Classifier.load(folder)


def test_it_needs_none_of_what_trained_the_model() -> None:
    Path("red.jpg").write_bytes(picture("red", "JPEG"))
    bundle()
    code = """
import sys
from breedline import Classifier
assert Classifier.load("models").predict("red.jpg")[0].label == "red"
heavy = {"torch", "timm", "fastai", "pandas", "onnx", "prefect", "dvc", "scipy", "sklearn", "rich", "joblib"}
assert not (found := heavy & set(sys.modules)), found
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_itself_imports_nothing() -> None:
    code = "import sys; import breedline; assert not {'numpy', 'onnxruntime', 'typing'} & set(sys.modules) - {'typing'}"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    with pytest.raises(AttributeError, match="no attribute 'Learner'"):
        breedline.Learner  # noqa: B018


def test_a_graph_whose_names_are_no_text_is_refused() -> None:
    with pytest.raises(BreedlineError, match="has names that are no text"):
        Classifier.load(bundle(graph().replace(b"batch", b"\xe2atch")))
