from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import flows.artifacts
from flows.artifacts import changes, show_results
from flows.policy import Policy


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
    steps: Any = [SimpleNamespace(stage="a", policy=Policy(show=["t.csv"]))]
    show_results(tmp_path, steps, [{"stage": "a", "state": state}])
    assert seen[0] == "What happened to each stage"
    assert seen[1:] == shown
