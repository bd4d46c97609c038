"""The page of all that was found: what it says, what it is made of, and how it works in a browser."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
from playwright.sync_api import expect

from breedline.errors import BreedlineError
from breedline.tables import write_csv
from tests.pages import CONTRASTS, add_curves, found, opened, page_of

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "</style><style>*{display:none}</style>",
    """a"b'c onclick=alert(1) `""",
    "{{ 7 * 7 }}{% raw %}",
    "\U0001f408 \u202eright to left",
    "=cmd|' /C calc'!A0",
    "long " * 200,
]
PLAIN = ["cat", "dog", "elm"]


class _Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        add_curves(found(tmp_path / name, PLAIN, 24))
    one, other = (page_of(tmp_path / name).replace(f"{tmp_path}/{name}", "") for name in ("one", "other"))
    assert one == other


def test_it_tells_what_was_found(tmp_path: Path) -> None:
    page = page_of(found(tmp_path / "found", PLAIN, 24))
    assert "83.3% right of 24 test images" in page
    assert "95% interval 64.1% to 93.3%" in page  # Wilson's of 20 of 24
    assert "4 mistakes" in page
    assert "3 labels likely wrong" in page
    assert page.count('class="gallery"') == 6  # three classes, each once right and once taken for the next
    assert "Only a head was fitted" in page
    assert "Nothing was left out." in page
    assert "tf_efficientnet_lite0" in page


def test_a_training_has_curves(tmp_path: Path) -> None:
    folder = found(tmp_path / "found", PLAIN, 24)
    before = page_of(folder).count("<svg xmlns")
    add_curves(folder)
    page = page_of(folder)
    assert page.count("<svg xmlns") == before + 2
    assert "75% of the way" in page


@pytest.mark.parametrize("classes", [1, 2, 120])
def test_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    names = [f"class {number}" for number in range(classes)]
    page = page_of(found(tmp_path / "found", names, 2 * classes, wrong=min(classes - 1, 5), suspects=0, pairs=0))
    assert page.count('<tr><th scope="row"><bdi class="label">class 0<') == 2  # in the matrix and among the classes
    assert ("Shown are the 100 classes" in page) == (classes == 120)
    assert "No label is suspected" in page
    assert "There are none." in page
    assert ("was taken for another class" in page) == (classes == 1)


def test_labels_of_any_kind_are_text(tmp_path: Path) -> None:
    folder = found(tmp_path / "found", HOSTILE, 28, wrong=28)
    left_out = {"name": HOSTILE[0], "sha256": "", "reason": HOSTILE[2], "detail": HOSTILE[3]}
    write_csv(pd.DataFrame([left_out]), folder / "rejected.csv")
    page = page_of(folder)
    tags = _Tags(page).tags
    assert {tag for tag, _ in tags} & {"img", "iframe", "object", "link", "base", "form"} == {"link"}
    assert [tag for tag, _ in tags if tag in ("script", "style")] == ["style", "script"]
    assert not any(name.startswith("on") or name == "style" for _, attributes in tags for name in attributes)
    assert "49" not in re.findall(r"<bdi[^>]*>([^<]*)</bdi>", page)
    assert "long " * 13 not in page
    with opened(folder / "index.html") as browser:
        shown = browser.locator("#mistakes").inner_text()
        assert HOSTILE[0] in shown
        assert HOSTILE[2] in shown
        assert HOSTILE[3] in shown
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_its_policy_lets_nothing_else_run_or_load(tmp_path: Path) -> None:
    page = page_of(found(tmp_path / "found", PLAIN, 24))
    (policy,) = [tag["content"] for name, tag in _Tags(page).tags if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert set(re.findall(r"url\((.{16})", page)) == {"data:image/webp;"}


def test_200_thumbnails_of_37_classes_are_less_than_3_mb(tmp_path: Path) -> None:
    names = [f"american_pit_bull_terrier_{number}" for number in range(37)]
    folder = found(tmp_path / "found", names, 1480, side=200, wrong=120, suspects=100, pairs=20)
    page = page_of(folder)
    assert page.count("{background-image:url(") == 200
    assert (folder / "index.html").stat().st_size < 3_000_000
    # each is there once, however often it is shown
    pictures = re.findall(r"base64,([^)]+)", page)
    assert len(set(pictures)) == len(pictures)
    assert page_of(folder, thumbnails=0).count("base64,") == 0


def test_predictions_of_other_images_are_refused(tmp_path: Path) -> None:
    folder = found(tmp_path / "found", PLAIN, 24)
    table = pd.read_csv(folder / "labels.csv")
    write_csv(table.iloc[1:], folder / "labels.csv")
    with pytest.raises(BreedlineError, match="of other images than the labels: run `dvc repro`"):
        page_of(folder)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("evaluate.json", '"images": 24', '"images": 1e999'),
        ("evaluate.json", '"macro_f1"', '"f1"'),
        ("evaluate.json", '"accuracy": 0', '"accuracy": 7'),
        ("train.json", "{", "["),
        ("train.json", '"head"', '"heads"'),
        ("label.json", "{", ""),
        ("suspects.csv", "0.02", "nan"),
        ("near_duplicates.csv", "0.98", "alike"),
        ("evaluate/predictions.csv", "0.", "-1e999"),
        ("evaluate/predictions.csv", "dog", "cow"),
        ("evaluate/per_class.csv", "0.", "x"),
        ("train/live/plots/metrics/accuracy.tsv", "step", "epoch"),
    ],
)
def test_what_is_damaged_is_told_in_one_line(file: str, old: str, new: str, tmp_path: Path) -> None:
    folder = found(tmp_path / "found", PLAIN, 24)
    add_curves(folder)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    with pytest.raises(BreedlineError, match=r"damaged|not a CSV table|lacks the column|of other images"):
        page_of(folder)


def test_what_is_secret_in_a_setting_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Path("params.yaml")
    text = (Path(__file__).parents[2] / "params.yaml").read_text()
    settings.write_text(text.replace("url: digits", "url: https://me:pa55@example.org/a.tar?token=pa55"))
    folder = found(tmp_path / "found", PLAIN, 24)
    monkeypatch.setattr("tests.pages.ROOT", settings.parent)
    page = page_of(folder)
    assert "example.org/a.tar" in page
    assert "pa55" not in page


def test_without_its_script_it_can_be_read(tmp_path: Path) -> None:
    folder = found(tmp_path / "found", PLAIN, 24)
    add_curves(folder)
    page_of(folder)
    with opened(folder / "index.html", java_script_enabled=False) as page:
        expect(page.get_by_role("heading", level=1)).to_have_text("83.3% right of 24 test images")
        assert page.locator(".chart svg").count() == 4
        expect(page.locator("#classes tbody tr")).to_have_count(3)
        gallery = page.locator(".gallery:target")
        expect(gallery).to_have_count(0)
        page.locator(".matrix a").nth(1).click()
        expect(gallery).to_be_visible()
        expect(gallery.get_by_role("listitem").first).to_be_visible()
        gallery.get_by_text("Back to the matrix").click()
        expect(gallery).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_level_aa(tmp_path: Path, scheme: Literal["light", "dark"]) -> None:
    folder = found(tmp_path / "found", PLAIN, 60, wrong=9)
    answers = pd.read_csv(folder / "evaluate/predictions.csv")
    answers["predicted"] = [PLAIN[number * number % 7 % 3] for number in range(60)]  # cells of many shades
    write_csv(answers, folder / "evaluate/predictions.csv")
    add_curves(folder)
    page_of(folder)
    with opened(folder / "index.html", color_scheme=scheme) as page:
        page.evaluate(
            "for (const one of document.querySelectorAll('main > section')) one.style.contentVisibility = 'visible'"
        )
        contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 200
    assert [text for contrast, text in contrasts if contrast < 4.5] == []


@pytest.mark.slow
def test_it_works_in_a_browser_by_keyboard_on_a_phone_in_the_dark_and_in_print(tmp_path: Path) -> None:
    folder = found(tmp_path / "found", PLAIN, 24)
    add_curves(folder)
    page_of(folder)
    with opened(folder / "index.html", viewport={"width": 360, "height": 740}, color_scheme="dark") as page:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        took = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        print(f"{took / 1000:.2f} s to open")
        cell = page.locator(".matrix td[class^=miss] a").first
        cell.focus()
        page.keyboard.press("Enter")
        shown = page.get_by_role("dialog")
        expect(shown).to_be_visible()
        expect(shown.get_by_role("heading")).to_have_text(re.compile("^(cat|dog|elm) taken for (cat|dog|elm): [12]$"))
        picture = shown.get_by_role("img").first
        assert picture.evaluate("one => getComputedStyle(one).backgroundImage").startswith('url("data:image/webp')
        page.keyboard.press("Escape")
        expect(shown).to_be_hidden()
        expect(cell).to_be_focused()

        head = page.locator("#classes thead th").filter(has_text="Class")
        names = page.locator("#classes tbody th")
        for order, expected in (("ascending", PLAIN), ("descending", PLAIN[::-1])):
            head.get_by_role("button").press("Enter")
            expect(head).to_have_attribute("aria-sort", order)
            assert names.all_inner_texts() == expected
        page.locator("#classes thead th").filter(has_text="Recall").get_by_role("button").click()
        recalls = page.locator("#classes tbody tr td:nth-child(5)").evaluate_all(
            "all => all.map(one => +one.dataset.value)"
        )
        assert recalls == sorted(recalls)

        page.locator("#sure .chart [aria-roledescription=circle]").first.hover()
        expect(page.locator("#told")).to_contain_text("confidence")
        page.emulate_media(media="print")  # on paper it is light
        assert page.locator("nav").is_hidden()
        assert page.locator("h1").evaluate("one => getComputedStyle(one).color") == "rgb(29, 31, 33)"
        assert page.pdf().startswith(b"%PDF")
