"""The file of training photos to compare with: what is written is read, and nothing else is."""

import dataclasses
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load, save

from breedline import neighbours
from breedline.errors import BreedlineError
from breedline.neighbours import MAX_NAME, THUMBNAIL, Neighbours, of_unit_length, read, thumbnail, write

ROOT = Path(__file__).parents[2]
MODEL = "a" * 64
FILE = Path("photos.safetensors")


def squares(side: int = 200) -> np.ndarray:
    """Three squares of one shade each, black, grey and white."""
    return np.stack([np.full((side, side, 3), shade, np.uint8) for shade in (0, 127, 255)])


def photos() -> Neighbours:
    features = np.array([[1, 0, 0, 0], [3, 4, 0, 0], [0, 0, 0, 9]], np.float32)
    return Neighbours(
        MODEL,
        ["a.jpg", "ä/β.jpg", ""],
        ["black", "grey", "<b>"],
        of_unit_length(features),
        list(map(thumbnail, squares())),
    )


def written(found: Neighbours | None = None) -> bytes:
    write(found or photos(), FILE)
    return FILE.read_bytes()


def refused(content: bytes, said: str) -> None:
    FILE.write_bytes(content)
    with pytest.raises(BreedlineError, match=said) as told:
        read(FILE, MODEL, 4)
    assert "\n" not in str(told.value)


def test_what_is_written_is_read() -> None:
    written()
    found, expected = read(FILE, MODEL, 4), photos()
    assert (found.names, found.labels, found.thumbnails) == (expected.names, expected.labels, expected.thumbnails)
    assert found.features.dtype == np.float16
    assert np.array_equal(found.features, expected.features)


def test_equal_photos_give_equal_bytes_in_every_process() -> None:
    code = "from tests.breedline.test_neighbours import written; import sys; sys.stdout.buffer.write(written())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert ran.stdout == written()


def test_the_nearest_come_first() -> None:
    first, second, third = photos().nearest(np.array([6, 8, 0, 0.1], np.float32), 3)
    assert (first.name, first.label) == ("ä/β.jpg", "grey")
    assert first.similarity == pytest.approx(1, abs=1e-3)
    assert second.similarity == pytest.approx(0.6, abs=1e-3)
    assert third.similarity == pytest.approx(0.01, abs=1e-3)
    assert [one.name for one in photos().nearest(np.array([0, 0, 0, 1e30], np.float32), 1)] == [""]


@pytest.mark.parametrize("scale", [0, 1e-30, 1e30])
def test_features_of_any_length_are_similar_by_their_direction(scale: float) -> None:
    features = np.array([scale, 0, 0, 0], np.float32)
    similarities = [one.similarity for one in photos().nearest(features, 3)]
    assert similarities == pytest.approx([float(scale > 0), 0.6 * (scale > 0), 0], abs=1e-3)
    assert np.isfinite(of_unit_length(features[None])).all()


def test_thumbnails_are_small_and_show_the_square() -> None:
    nearest = photos().nearest(np.ones(4, np.float32), 3)
    assert {one.thumbnail.shape for one in nearest} == {(THUMBNAIL, THUMBNAIL, 3)}
    shown = {one.label: one.thumbnail.mean() for one in nearest}
    assert shown == pytest.approx({"black": 0, "grey": 127, "<b>": 255}, abs=2)
    with Image.open(io.BytesIO(thumbnail(squares(20)[0]))) as small:
        assert (small.format, small.size) == ("JPEG", (20, 20))


def test_of_a_long_name_the_end_is_kept() -> None:
    names = ["x" * MAX_NAME + "/robin.jpg", "b", "c"]
    written(dataclasses.replace(photos(), names=names))
    found = read(FILE, MODEL, 4).names[0]
    assert (len(found), found[-10:]) == (MAX_NAME, "/robin.jpg")


@given(st.data())
def test_every_flipped_byte_is_refused(data: st.DataObject) -> None:
    content = bytearray(written())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    refused(bytes(content), "cannot be used|another model")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"{}", b"\0" * 8])
def test_what_is_no_such_file_is_refused(content: bytes) -> None:
    refused(content, "cannot be used")


def test_a_file_cut_short_or_longer_is_refused() -> None:
    content = written()
    for other in (content[:-1], content + b"\0", content[: len(content) // 2], save(load(content), {"more": "words"})):
        refused(other, "cannot be used")


def test_a_file_of_another_model_is_refused() -> None:
    written()
    for model, n_features in (("b" * 64, 4), (MODEL, 3), (MODEL, 0)):
        with pytest.raises(BreedlineError, match="is of another model than the bundle: `dvc repro` makes both anew"):
            read(FILE, model, n_features)


def test_what_is_no_file_or_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo("pipe")
    for path in (Path("gone"), Path("pipe"), Path()):
        with pytest.raises(BreedlineError, match="there is no such file"):
            read(path, MODEL, 4)
    monkeypatch.setattr(neighbours, "MAX_BYTES", len(written()) - 1)
    with pytest.raises(BreedlineError, match="over 0"):
        read(FILE, MODEL, 4)


def with_length(length: float) -> Neighbours:
    features = photos().features.copy()
    features[-1] *= np.float16(length)
    return dataclasses.replace(photos(), features=features)


@pytest.mark.parametrize(
    ("forged", "said"),
    [
        (lambda: with_length(np.nan), "not of unit length"),
        (lambda: with_length(np.inf), "not of unit length"),
        (lambda: with_length(1.1), "not of unit length"),
        (lambda: dataclasses.replace(photos(), features=photos().features.astype(np.float32)), "of other kinds"),
        (lambda: dataclasses.replace(photos(), features=photos().features[0]), "of other kinds"),
        (lambda: dataclasses.replace(photos(), features=photos().features[:2]), "different numbers of photos"),
        (lambda: dataclasses.replace(photos(), labels=["a", "b"]), "different numbers of photos"),
        (lambda: dataclasses.replace(photos(), thumbnails=[b"a", b"b"]), "different numbers of photos"),
        (lambda: dataclasses.replace(photos(), thumbnails=[b"a", b"", b"b"]), "do not lead from thumbnail"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_sealed_file_that_does_not_fit_together_is_refused(forged: Callable[[], Neighbours], said: str) -> None:
    refused(written(forged()), said)


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [1, 2, 3, 4], [0, 1, 2, 2**62], [-5, 1, 2, 3], [0, 1, 2, 4]])
def test_offsets_that_lead_elsewhere_are_refused(offsets: list[int]) -> None:
    tensors = load(written())
    note = neighbours.Note.model_validate_json(tensors.pop("note").tobytes()).model_copy(update={"sha256": ""})
    tensors |= {"thumbnails": np.zeros(3, np.uint8), "offsets": np.array(offsets)}
    sealed = note.model_copy(update={"sha256": neighbours._sha256(tensors, note)})
    refused(neighbours._content(tensors, sealed), "do not lead from thumbnail")


@pytest.mark.parametrize(
    ("key", "value"),
    [("names", '["\\ud800", "b", "c"]'), ("names", '["' + "x" * 1001 + '", "b", "c"]'), ("format", '"breedline-0"')],
)
def test_a_note_that_says_something_else_is_refused(key: str, value: str) -> None:
    tensors = load(written())
    text = tensors["note"].tobytes().decode()
    old = {"names": '["a.jpg","ä/β.jpg",""]', "format": '"breedline-neighbours-1"'}[key]
    assert old in text
    refused(save({**tensors, "note": np.frombuffer(text.replace(old, value).encode(), np.uint8)}), "cannot be used")


def large() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (THUMBNAIL + 1, 10)).save(buffer, "JPEG")
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("other", [large, png, lambda: b"no picture", lambda: thumbnail(squares()[0])[:300]])
def test_a_thumbnail_that_is_no_small_jpeg_is_never_shown(other: Callable[[], bytes]) -> None:
    found = dataclasses.replace(photos(), thumbnails=[other()] * 3)
    with pytest.raises(BreedlineError, match="is no small JPEG"):
        found.nearest(np.ones(4, np.float32), 1)


def test_reading_needs_no_torch() -> None:
    written()
    code = """
import sys
from pathlib import Path
from breedline.neighbours import read
assert read(Path("photos.safetensors"), "a" * 64, 4).names
heavy = {"torch", "timm", "fastai", "pandas", "onnx", "onnxruntime"}
assert not (found := heavy & set(sys.modules)), found
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
