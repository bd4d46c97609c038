"""What a run leaves to look at: which rows come first, what is shown at all, and that text is shown as text."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import flows.artifacts
from flows.artifacts import changes, show_results, text
from flows.policy import Policy
from flows.states import Outcome

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
WORDS = [
    "shiba_inu",
    "a b",
    "3",
    "1.",
    "2)",
    "\n",
    "\n\n",
    "<b>",
    "</b>",
    "&amp;",
    "[x](y)",
    "![x](y)",
    "http://x",
    "www.x.org",
]


def test_the_metrics_that_have_changed_come_first() -> None:
    table = {"same": (1.0, 1.0), "fell": (0.5, 0.25), "new": (None, 2.0), "gone": (3.0, None)}
    rows = changes(table)
    assert [(row["metric"], row["difference"]) for row in rows] == [
        ("fell", -0.25),
        ("new", None),
        ("gone", None),
        ("same", 0),
    ]


@pytest.mark.parametrize(
    ("state", "shown"), [("Completed", ["t.csv"]), ("Restored", ["t.csv"]), ("UpToDate", []), ("Failed", [])]
)
def test_what_a_stage_has_to_show_is_shown_when_it_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, shown: list[str]
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        flows.artifacts, "create_table_artifact", lambda *_, description, **__: seen.append(description)
    )
    monkeypatch.setattr(flows.artifacts, "metrics", lambda _: {})
    (tmp_path / "t.csv").write_text("a\n1\n")
    steps: Any = [SimpleNamespace(stage="a", policy=Policy(show=["t.csv", "not-written.png"]))]
    show_results(tmp_path, steps, [{"stage": "a", "state": state}])
    assert seen[0] == "What happened to each stage"
    assert seen[1:] == shown


@given(st.lists(st.sampled_from([*WORDS, *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ "]), max_size=12).map("".join))
@example(
    "<img src=x onerror=alert(1)> **b** __u__ [l](http://x) `c` ~~s~~ | a |\n|--|\n# h\n- i\n> q\nx\n===\n1. one \\"
)
def test_markup_in_texts_is_text(content: str) -> None:
    shown = []
    for token in MARKDOWN.parse(text(content)):
        assert token.type in ("paragraph_open", "paragraph_close", "inline", "code_block"), token
        for child in token.children or []:
            assert child.type in ("text", "text_special", "softbreak", "hardbreak"), child
            shown.append(child.content or "\n")
    if not any(line.startswith("    ") for line in content.splitlines()):  # which is shown as it is, too, as code
        assert "".join("".join(shown).split()) == "".join(content.split())


def test_names_of_classes_and_of_metrics_stay_as_they_are() -> None:
    for name in ("american_bulldog", "metrics/evaluate.json:test.accuracy", "train@resnet34", "train.epochs: 3 -> 20"):
        assert text(name) == name


def test_labels_in_a_table_and_its_path_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        flows.artifacts, "create_table_artifact", lambda rows, description, **_: seen.append((rows, description))
    )
    monkeypatch.setattr(flows.artifacts, "metrics", lambda _: {})
    (tmp_path / "t_*_.csv").write_text("class,n\n<img src=http://x>,1\n")
    steps: Any = [SimpleNamespace(stage="a", policy=Policy(show=["t_*_.csv"]))]
    show_results(tmp_path, steps, [{"stage": "a", "state": Outcome.COMPLETED, "why": "<b>"}])
    assert seen[0][0] == [{"stage": "a", "state": "Completed", "why": "\\<b>"}]
    assert seen[1] == ([{"class": "\\<img src=http\\://x>", "n": 1}], "t\\_\\*\\_.csv")


def test_a_page_is_shown_as_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(flows.artifacts, "create_table_artifact", lambda *_, **__: None)
    monkeypatch.setattr(flows.artifacts, "create_markdown_artifact", lambda said, **_: seen.append(said))
    monkeypatch.setattr(flows.artifacts, "metrics", lambda _: {})
    (tmp_path / "index.html").write_text("<script>")
    steps: Any = [SimpleNamespace(stage="a", policy=Policy(show=["index.html"]))]
    show_results(tmp_path, steps, [{"stage": "a", "state": Outcome.COMPLETED}])
    (said,) = seen
    assert "dvc pull index.html" in said
    assert "<script>" not in said
