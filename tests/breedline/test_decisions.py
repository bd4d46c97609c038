"""Decisions about suspects as lines of two tables: nothing else of them changes, and nobody's line is lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from breedline.corrections import read_corrections
from breedline.decisions import Decision, Decisions, Meanwhile
from breedline.errors import BreedlineError
from breedline.tables import read_csv

ROOT = Path(__file__).parents[2]
CORRECTIONS, KEPT = Path("corrections.csv"), Path("kept.csv")
HEADER = "name,sha256,action,label,reason\n"
LABELS = {letter * 64: "pug" for letter in "abcdef"}


def decisions() -> Decisions:
    return Decisions(CORRECTIONS, KEPT, LABELS)


def about(letter: str, action: str = "relabel", label: str = "beagle", name: str = "") -> Decision:
    label = {"keep": "pug", "drop": ""}.get(action, label)
    return Decision(name or f"{letter}.jpg", letter * 64, action, label, "review")


def line(letter: str, action: str = "relabel", label: str = "beagle") -> str:
    return f"{letter}.jpg,{letter * 64},{action},{label},review\n"


def test_a_decision_is_a_line_of_its_table_and_undo_takes_it_away() -> None:
    CORRECTIONS.write_text(HEADER)
    made = decisions()
    for decision in (about("a"), about("b", "drop"), about("c", "keep")):
        made.decide(decision, None)
    assert CORRECTIONS.read_text() == HEADER + line("a") + line("b", "drop", "")
    assert KEPT.read_text() == f"name,sha256,label,reason\nc.jpg,{'c' * 64},pug,review\n"
    assert decisions().read() == {
        letter * 64: about(letter, action) for letter, action in zip("abc", ("relabel", "drop", "keep"), strict=True)
    }
    assert len(read_corrections(CORRECTIONS)) == 2
    assert [made.undo() for _ in range(4)] == ["c" * 64, "b" * 64, "a" * 64, None]
    assert CORRECTIONS.read_text() == HEADER
    assert KEPT.read_text() == "name,sha256,label,reason\n"
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize(
    ("before", "added"),
    [
        (HEADER + f'\n"d.jpg",{"D" * 64},"drop",,"two ""pugs"",\nand a cat"\n', line("a")),
        (HEADER.replace("\n", "\r\n") + f"d.jpg,{'d' * 64},drop,,\r\n", line("a").replace("\n", "\r\n")),
        (HEADER + f"d.jpg, {'d' * 64} ,drop,,no line end", "\n" + line("a")),
        ("\ufeff" + HEADER, line("a")),
        ("\n\n" + HEADER, line("a")),
        ("who,sha256,name,label,reason,action\n", f",{'a' * 64},a.jpg,beagle,review,relabel\n"),
    ],
    ids=["quotes", "CRLF", "no line end", "mark", "blank lines", "columns"],
)
def test_other_lines_stay_byte_for_byte(before: str, added: str) -> None:
    CORRECTIONS.write_bytes(before.encode())
    made = decisions()
    made.decide(about("a"), None)
    assert CORRECTIONS.read_bytes() == (before + added).encode()
    assert made.read()["a" * 64] == about("a")
    made.undo()
    assert CORRECTIONS.read_bytes().rstrip(b"\r\n") == before.encode().rstrip(b"\r\n")


def test_a_decision_takes_the_place_of_the_one_that_was_seen_and_undo_puts_that_back() -> None:
    by_a_person = f'"a.jpg","{"A" * 64}",drop,,"a cat, too"\n'
    CORRECTIONS.write_text(HEADER + by_a_person + line("b"))
    made = decisions()
    made.decide(about("a", "keep"), "")
    assert CORRECTIONS.read_text() == HEADER + line("b")
    assert made.read()["a" * 64] == about("a", "keep")
    made.decide(about("a", label="boxer"), "pug")
    assert CORRECTIONS.read_text() == HEADER + line("b") + line("a", label="boxer")
    assert KEPT.read_text() == "name,sha256,label,reason\n"
    made.undo()
    made.undo()
    assert CORRECTIONS.read_text() == HEADER + line("b") + by_a_person
    assert KEPT.read_text() == "name,sha256,label,reason\n"


def test_what_somebody_else_has_decided_meanwhile_is_not_lost() -> None:
    mine, other = decisions(), decisions()
    other.decide(about("a", "drop"), None)
    with pytest.raises(Meanwhile) as found:
        mine.decide(about("a"), None)
    assert found.value.decision == about("a", "drop")
    mine.decide(about("b"), None)
    other.decide(about("b", "drop"), "beagle")
    with pytest.raises(Meanwhile):
        mine.undo()
    assert CORRECTIONS.read_text() == HEADER + line("a", "drop", "") + line("b", "drop", "")
    assert mine.undo() is None


def test_the_same_decision_again_is_no_second_line() -> None:
    mine, other = decisions(), decisions()
    other.decide(about("a"), None)
    mine.decide(about("a"), None)
    assert CORRECTIONS.read_text() == HEADER + line("a")
    assert mine.undo() is None


def test_a_label_that_was_kept_counts_until_the_image_gets_another() -> None:
    KEPT.write_text(f"name,sha256,label,reason\na.jpg,{'a' * 64},boxer,\n")
    assert decisions().read() == {}
    decisions().decide(about("a", "keep"), None)
    assert KEPT.read_text() == f"name,sha256,label,reason\na.jpg,{'a' * 64},pug,review\n"


def test_to_keep_a_label_that_a_correction_gave_leaves_the_correction() -> None:
    CORRECTIONS.write_text(HEADER + line("a", label="pug"))
    made = decisions()
    made.decide(about("a", "keep"), "pug")
    assert CORRECTIONS.read_text() == HEADER + line("a", label="pug")
    assert not KEPT.exists()


@pytest.mark.parametrize("name", ["=1+1.jpg", "'=1.jpg", "a\nb.jpg", "a\rb.jpg", 'a"b,c.jpg', "\u202ea.jpg"])
def test_any_name_is_read_as_it_was_written(name: str) -> None:
    made = decisions()
    made.decide(about("a", name=name), None)
    made.decide(about("b", "keep", name=name), None)
    assert [one.name for one in made.read().values()] == [name, name]
    assert read_csv(CORRECTIONS, ["name"])["name"].tolist() == [name]
    made.undo()
    made.undo()
    assert CORRECTIONS.read_text() == HEADER


def test_tables_that_contradict_themselves_are_told_and_left_alone() -> None:
    text = HEADER + line("a") + line("b") + line("a", "drop", "")
    CORRECTIONS.write_text(text)
    with pytest.raises(BreedlineError, match=r"more than one decision on 'a\.jpg': leave one of the lines 2 and 4"):
        decisions().decide(about("c"), None)
    assert CORRECTIONS.read_text() == text


def test_a_table_that_cannot_be_written_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    CORRECTIONS.write_text(HEADER)
    monkeypatch.setattr(os, "fsync", full)
    made = decisions()
    with pytest.raises(BreedlineError, match=r"corrections\.csv cannot be written \(No space left on device\)"):
        made.decide(about("a"), None)
    assert CORRECTIONS.read_text() == HEADER
    assert made.undo() is None


def test_who_may_write_a_table_stays_the_same_and_a_link_stays_a_link() -> None:
    Path("shared").mkdir()
    table = Path("shared/corrections.csv")
    table.write_text(HEADER)
    table.chmod(0o664)
    CORRECTIONS.symlink_to(table)
    decisions().decide(about("a"), None)
    assert table.read_text() == HEADER + line("a")
    assert table.stat().st_mode & 0o777 == 0o664
    assert CORRECTIONS.is_symlink()


WRITES = """
import sys
from pathlib import Path
from breedline.decisions import Decision, Decisions
made = Decisions(Path("corrections.csv"), Path("kept.csv"), {})
for number in range(40):
    made.decide(Decision("x.jpg", f"{sys.argv[1]}{number:063d}", "drop", "", ""), None)
"""


def test_two_reviews_at_the_same_time_lose_nothing() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", WRITES, letter], env=environment) for letter in "ab"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert set(decisions().read()) == {f"{letter}{number:063d}" for letter in "ab" for number in range(40)}


def git(*words: str) -> str:
    who: dict[str, Any] = {
        f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(["git", *words], check=True, text=True, capture_output=True, env=os.environ | who)
    return done.stdout


def test_git_merges_what_several_people_decide() -> None:
    """Both branches add lines at the same place; .gitattributes has git take all of them."""
    shutil.copytree(ROOT / "data", "data", ignore=lambda folder, names: {*names} - {"corrections.csv", "kept.csv"})
    shutil.copy(ROOT / ".gitattributes", ".gitattributes")
    corrections, kept = Path("data/corrections.csv"), Path("data/kept.csv")
    both = Decisions(corrections, kept, LABELS)
    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-qm", "before")
    git("checkout", "-qb", "one")
    for decision in (about("a"), about("b", "drop"), about("c", "keep"), about("f")):
        both.decide(decision, None)
    git("commit", "-qam", "one")
    git("checkout", "-q", "main")
    for decision in (about("e"), about("d", "keep"), about("f", "drop"), about("a")):
        both.decide(decision, None)
    git("commit", "-qam", "two")
    git("merge", "-q", "--no-edit", "one")
    assert git("status", "--porcelain") == ""
    assert corrections.read_text().count(line("a")) == 2
    with pytest.raises(BreedlineError, match=r"more than one decision on 'f\.jpg': leave one of the lines"):
        both.read()
    one_of_both = corrections.read_text().replace(line("f", "drop", ""), "")
    corrections.write_text(one_of_both)
    expected = [about("a"), about("b", "drop"), about("e"), about("f"), about("c", "keep"), about("d", "keep")]
    assert sorted(both.read().values()) == sorted(expected)
