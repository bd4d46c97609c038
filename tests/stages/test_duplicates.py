import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import breedline.presized
from breedline.files import cache_dir
from breedline.params import Duplicates
from breedline.shards import COLUMNS, pack, write_index
from breedline.tables import read_csv
from stages.duplicates import duplicates

Found = Callable[..., dict[str, str]]
BOMB = b"BM" + bytes(8) + b"6\0\0\0(\0\0\0" + b"\xff\xff\xff\x7f" * 2 + b"\1\0\x18\0" + bytes(24)
"""A BMP that declares more pixels than anybody has memory for."""


def photo(number: int, quality: int = 95) -> bytes:
    """A JPEG of soft shapes that differ for each number, large enough to be reduced."""
    noise = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype="uint8")
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((200, 150), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def find() -> Found:
    """A function that packs sources of {name: content} and gives what the stage found, both by name."""

    def go(*sources: dict[str, bytes], similarity: float | None = 0.9) -> dict[str, str]:
        Path("raw").mkdir(exist_ok=True)
        entries = []
        for number, files in enumerate(sources):
            content = ((name, len(data), io.BytesIO(data)) for name, data in files.items())
            entries += pack(content, Path("raw"), f"{number:02d}")
        write_index(pd.DataFrame(entries, columns=COLUMNS), Path("raw"))
        duplicates(Duplicates(similarity=similarity), Path("raw"), duplicates=Path("duplicates.csv"))
        names = {entry.sha256: entry.name for entry in reversed(entries)}
        table = read_csv(Path("duplicates.csv"), ["sha256", "leader"])
        assert list(table) == ["sha256", "leader"]
        return {names[row.sha256]: names[row.leader] for row in table.itertuples()}  # type: ignore[index]

    return go


def test_each_near_duplicate_is_listed_with_the_first_of_its_group(find: Found) -> None:
    files = {
        "a": photo(1),
        "b": photo(2),
        "b again": photo(2, 70),
        "a again": photo(1, 80),
        "a once more": photo(1, 60),
    }
    assert find(files) == {"b again": "b", "a again": "a", "a once more": "a"}
    assert list(cache_dir("scratch").iterdir()) == []


def test_equal_files_are_one_content_and_no_near_duplicates(find: Found) -> None:
    assert find({"a": photo(1), "a as it was": photo(1), "b": photo(2)}) == {}
    again = photo(1, 80)
    assert find({"a": photo(1), "again": again, "a as it was": photo(1), "and again": again}) == {"again": "a"}
    assert len(Path("duplicates.csv").read_text().splitlines()) == 2


def test_what_cannot_be_decoded_is_passed_over(find: Found) -> None:
    odd = {"half.jpg": photo(3)[:60], "bomb.bmp": BOMB, "notes.txt": b"photo(1)", "none": b""}
    assert find({**odd, "a": photo(1), "cut": photo(1)[:-900], "a again": photo(1, 80)}) == {"a again": "a"}
    assert find(odd) == {}


def test_a_later_source_changes_no_earlier_line(find: Found) -> None:
    first = {"a": photo(1), "b": photo(2), "a again": photo(1, 80)}
    find(first)
    before = Path("duplicates.csv").read_text()
    assert find(first, {"b again": photo(2, 80), "c": photo(3)}) == {"a again": "a", "b again": "b"}
    assert Path("duplicates.csv").read_text().startswith(before)


def test_the_order_is_that_of_the_index_not_of_the_volumes_names(find: Found) -> None:
    many = [{f"{number}": photo(number)} for number in range(20, 121)]
    many[11], many[100] = {"eleventh": photo(1)}, {"hundredth": photo(1, 80)}
    assert find(*many) == {"hundredth": "eleventh"}


def test_each_content_is_decoded_once_on_a_machine(find: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a": photo(1), "a again": photo(1, 80)}
    find(files)
    before = Path("duplicates.csv").read_bytes()
    decoded: list[int] = []
    presize_image = breedline.presized.presize_image
    monkeypatch.setattr(
        breedline.presized, "presize_image", lambda data, *to: decoded.append(len(data)) or presize_image(data, *to)
    )
    find(files)
    assert decoded == []
    assert Path("duplicates.csv").read_bytes() == before
    find(files, {"b": photo(2), "b as it was": photo(2), "notes.txt": b"no image"})
    assert decoded == [len(photo(2))]


def test_null_looks_for_none_and_decodes_nothing(find: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breedline.presized, "presize_image", lambda *_: pytest.fail("decoded"))
    assert find({"a": photo(1), "a again": photo(1, 80)}, similarity=None) == {}
    assert Path("duplicates.csv").read_text() == "sha256,leader\n"


def test_images_that_all_look_alike_are_warned_of(find: Found, caplog: pytest.LogCaptureFixture) -> None:
    files = {f"{number}": photo(number) for number in range(30)}
    find(files | {"0 again": photo(0, 80), "1 again": photo(1, 80)})
    assert "32 images are near-duplicates" not in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    find(files | {f"again {number}": photo(7, 50 + number) for number in range(10)})
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith(
        "duplicates: 10 images are near-duplicates of '7', and the split cannot divide them: if they"
    )
