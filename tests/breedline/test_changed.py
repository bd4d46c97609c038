"""The page of what a challenger changes."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import expect

from breedline.changed import comparison_page
from tests.pages import opened, presized_set

DECISION: dict[str, Any] = {
    "verdict": "hold",
    "published": False,
    "reasons": ["accuracy falls by 0.02 <b>more</b> than the margin", "1 image is fixed, 2 are broken"],
    "time": "2026-01-02T03:04:05Z",
    "champion": "classifier@v1.2.0",
    "challenger": "9c" * 32,
    "metric": "test.accuracy",
    "champion_value": 0.98,
    "challenger_value": 0.96,
    "difference": -0.02,
    "interval": [-0.04, 0.01],
    "level": 0.95,
    "fixed": 1,
    "broken": 2,
    "mcnemar_p": 0.5,
    "images": 1478,
    "images_to_decide": None,
    "look": 3,
    "test_set": "",
}
ROWS = [  # name, actual, champion, challenger
    ("a", "cat", "cat", "<i>dog"),
    ("b", "cat", "cat", "elm"),
    ("c", "elm", "cat", "elm"),
    ("d", "elm", "cat", "dog"),
    ("e", "dog", "dog", "dog"),
    ("f", "dog", "elm", "elm"),
]


def written(folder: Path, rows: list[tuple[str, str, str, str]] = ROWS, **others: Any) -> Path:
    names = [row[0] for row in rows]
    images = presized_set(names, folder / "presized")
    table = pd.DataFrame(rows, columns=["name", "actual", "champion", "challenger"])
    table = table.assign(champion_probability=0.75, challenger_probability=0.9)
    table.insert(1, "sha256", [f"hash of {name}" for name in names])
    path = folder / "gate.html"
    comparison_page(DECISION | others, table, images, path)
    return path


def test_it_shows_which_images_changed(tmp_path: Path) -> None:
    with opened(written(tmp_path)) as page:
        expect(page.get_by_role("heading", level=1)).to_have_text("Hold")
        expect(page.get_by_text("accuracy falls by 0.02 <b>more</b> than the margin")).to_be_visible()
        for name, title, files in (("broken", "Broken: 2", ["a", "b"]), ("fixed", "Fixed: 1", ["c"])):
            section = page.locator(f"#{name}")
            expect(section.get_by_role("heading")).to_have_text(title)
            assert section.locator(".file").all_inner_texts() == files
            assert section.get_by_role("img").count() == len(files)
        assert page.locator("#other .file").all_inner_texts() == ["d"]
        first = page.locator("#broken").get_by_role("listitem").first
        expect(first).to_contain_text("challenger <i>dog 90.0%")
        expect(first).to_contain_text("champion cat 75.0%")
        expect(page.locator("#numbers")).to_contain_text("95.0% interval -0.0400 to 0.0100")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(
    ("verdict", "title"), [("promote", "Promote"), ("undecided", "No decision"), ("<b>", "&lt;b&gt;")]
)
def test_a_first_model_has_no_champion_and_an_undecided_verdict_says_what_would_decide(
    tmp_path: Path, verdict: str, title: str
) -> None:
    missing = dict.fromkeys(["champion", "champion_value", "difference", "interval", "mcnemar_p"])
    page = written(tmp_path, verdict=verdict, images_to_decide=2900, **missing).read_text()
    assert f"<h1>{title}</h1>" in page
    assert "about 2,900 would decide" in page


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    one, other = (written(tmp_path / name).read_bytes() for name in ("one", "other"))
    assert one == other


def test_all_kinds_of_changes_are_shown_where_there_are_many(tmp_path: Path) -> None:
    rows = [(f"broken {n}", "cat", "cat", "dog") for n in range(300)]
    rows += [(f"fixed {n}", "cat", "dog", "cat") for n in range(10)]
    page = written(tmp_path, rows).read_text()
    assert "Broken: 300" in page
    assert "Shown are 190." in page
    assert page.count("fixed 9") == 2  # its description and its name
