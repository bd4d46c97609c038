import csv
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from breedline.errors import BreedlineError
from breedline.files import cache_dir, fingerprint, link_or_copy, new_file, new_folder, sha256_of
from breedline.tables import read_csv, write_csv, write_json

ROOT = Path(__file__).parents[2]
NASTY = [
    "NA",
    "null",
    "nan",
    "None",
    "007",
    "1e5",
    "True",
    "",
    " a ",
    "a,b",
    'say "hi"',
    "two\nlines",
    "Icon\r",
    "a\rb",
    "a\r\nb",
    "Käse 🐱",
    "'",
]


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_new_file_takes_the_old_ones_place_only_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with new_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), new_file(path) as temporary:  # noqa: PT012 - what comes before must last
        temporary.write_text("half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert below(tmp_path / "deep") == {"file"}


KILLED = """
import os, signal, sys
from pathlib import Path
from breedline.files import new_file, new_folder
with new_file(Path("file")) as file, new_folder(Path("folder")) as folder:
    file.write_text("half")
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_run_removes_what_a_killed_one_left_behind() -> None:
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", KILLED], env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert killed.returncode == -signal.SIGKILL
        assert len(below(Path())) == 3
    with new_file(Path("file")) as file, new_folder(Path("folder")):
        assert not file.exists()
        file.write_text("whole")
    assert below(Path()) == {"file", "folder"}


def test_a_new_file_writes_through_no_link_that_a_killed_run_left(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    os.link(other, tmp_path / ".file.partial")
    with new_file(tmp_path / "file") as temporary:
        link_or_copy(Path(__file__), temporary)
    assert other.read_text() == "precious"
    assert (tmp_path / "file").read_bytes() == Path(__file__).read_bytes()


@pytest.mark.parametrize(("code", "raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_only_a_file_system_that_cannot_sync_need_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, raised: bool
) -> None:
    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(code)) if raised else nullcontext(), new_file(tmp_path / "a") as new:
        new.write_text("new")
    assert (tmp_path / "a").exists() != raised


def test_a_new_folder_takes_the_old_ones_place_only_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "work" / "folder"
    with new_folder(path) as temporary:
        (temporary / "old").touch()
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), new_folder(path) as temporary:  # noqa: PT012 - what comes before must last
        (temporary / "half").touch()
        raise KeyboardInterrupt
    assert below(tmp_path / "work") == {"folder", "folder/old"}
    with new_folder(path) as temporary:
        (temporary / "new").touch()
    assert below(tmp_path / "work") == {"folder", "folder/new"}


def test_what_a_killed_run_left_behind_is_removed(tmp_path: Path) -> None:
    for leftover in (".folder.partial", ".folder.old"):
        (tmp_path / "work" / leftover / "deep").mkdir(parents=True)
    with new_folder(tmp_path / "work" / "folder") as temporary:
        assert below(temporary) == set()
    assert below(tmp_path / "work") == {"folder"}


def test_a_kill_while_removing_the_old_folder_leaves_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    meanwhile = []
    monkeypatch.setattr(shutil, "rmtree", lambda folder, **_: meanwhile.append(below(path)))
    with new_folder(path) as temporary:
        (temporary / "new").touch()
    assert [sorted(names) for names in meanwhile] == [["old"], ["old"], ["new"], ["new"]]


def test_a_table_comes_back_as_the_text_it_was(tmp_path: Path) -> None:
    table = pd.DataFrame({"name": NASTY, "size": range(len(NASTY)), "label": NASTY[::-1]})
    write_csv(table, tmp_path / "table.csv")
    back = read_csv(tmp_path / "table.csv", ["name", "size", "label"], integers=["size"])
    assert back.to_dict("list") == table.to_dict("list")


BEGINNING = st.sampled_from(["", "'", "''"]), st.sampled_from(["", *"=+-@\t\r\n"])
TEXT = st.tuples(*BEGINNING, st.text(st.characters(codec="utf-8", exclude_characters="\0"))).map("".join)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1))
def test_any_text_comes_back_and_none_begins_like_a_formula(rows: list[tuple[str, str]]) -> None:
    table = pd.DataFrame(rows, columns=["name", "label"]).assign(size=-1)
    write_csv(table, Path("table.csv"))
    assert read_csv(Path("table.csv"), table, integers=["size"]).to_dict("list") == table.to_dict("list")
    with Path("table.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.DictReader(file) for cell in (row["name"], row["label"])]
    assert [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))] == []
    assert len(cells) == 2 * len(rows)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("=1+1", "'=1+1"),
        ("-1", "'-1"),
        ("@a", "'@a"),
        ("'=1", "''=1"),
        ("''+", "'''+"),
        ("'t Hof", "'t Hof"),
        ("a=1", "a=1"),
        ("", ""),
    ],
)
def test_text_that_begins_like_a_formula_has_an_apostrophe_before_it(text: str, written: str) -> None:
    write_csv(pd.DataFrame({"name": [text, "x"], "number": [-1.5, 2]}), Path("table.csv"))
    assert Path("table.csv").read_text() == f"name,number\n{written},-1.5\nx,2.0\n"
    assert read_csv(Path("table.csv"), ["name"])["name"].tolist() == [text, "x"]


def test_words_that_are_repeated_stay_text() -> None:
    table = read_csv(io.BytesIO(b"shard,size\n8,1\n8,2\n"), ["shard", "size"], ["size"], "it", repeated=["shard"])
    assert table.to_dict("list") == {"shard": ["8", "8"], "size": [1, 2]}


def test_columns_that_nobody_asks_for_are_left_as_they_are_written() -> None:
    table = read_csv(io.BytesIO(b"name,other\n'-x,'-x\n"), ["name"], where="it")
    assert table.to_dict("records") == [{"name": "-x", "other": "'-x"}]


def test_an_ordinary_table_is_written_without_quotes_and_with_line_feeds(tmp_path: Path) -> None:
    write_csv(pd.DataFrame({"name": ["a b.jpg"], "size": [3]}), tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_bytes() == b"name,size\na b.jpg,3\n"


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffname,label\nx,NA\n",
        '\ufeff"name","label"\nx,NA\n',
        "name,label\r\nx,NA\r\n",
        "label,name\n\nNA,x\n",
        'name,label\n"x","NA"',
    ],
)
def test_tables_are_read_as_spreadsheets_save_them(text: str) -> None:
    table = read_csv(io.BytesIO(text.encode()), ["name", "label"], where="it")
    assert table[["name", "label"]].to_dict("records") == [{"name": "x", "label": "NA"}]


def test_digits_are_text_unless_they_are_asked_for_as_numbers() -> None:
    table = read_csv(io.BytesIO(b"label,size\n007,7\n1e5,8\n"), ["label"], integers=["size"])
    assert table.to_dict("list") == {"label": ["007", "1e5"], "size": [7, 8]}


def test_a_short_line_ends_in_empty_values() -> None:
    table = read_csv(io.BytesIO(b"name,action,label,reason\nx,drop\n"), ["name"])
    assert table.to_dict("records") == [{"name": "x", "action": "drop", "label": "", "reason": ""}]


def test_every_missing_column_is_named() -> None:
    with pytest.raises(BreedlineError, match=r"^it lacks the column label, split; it has name, size$"):
        read_csv(io.BytesIO(b"name,size\nx,1\n"), ["name", "label", "split"], where="it")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"\xff\xfen\0a\0m\0e\0",  # UTF-16
        b'name,size\n"x,1\n',  # the quote is never closed
        b"name,size\nx,1\ny,2,3\n",
        b"name,size\nx,y.jpg,1\n",  # all lines are longer than the first: pandas would shift the columns
        b"name,size\nx,many\n",
        b"name,size\nx,\n",
        b"name,size\nx,1.5\n",
        b"name,size\nx,1e400\n",
        b"name,size\nx," + b"9" * 20 + b"\n",
        b"name,size\nx," + b"9" * 5000 + b"\n",
        b"name,size" + b",a" * 100_000 + b"\nx,1\n",  # pandas would take minutes for each of these
        b'\n \nname,size,"a\n"' + b",a" * 2_000 + b"\nx,1\n",
        b"name,size\nx,1" + b",1" * 30_000 + b"\n",
        b'name,size,"' + b"a" * 200_000 + b'"' + b",a" * 30_000 + b"\n",
    ],
)
def test_what_is_no_table_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(BreedlineError) as caught:
        read_csv(path, ["name", "size"], integers=["size"])
    assert str(caught.value).startswith(f"{path} is not a CSV table (")
    assert "\n" not in str(caught.value)


ODD = st.sampled_from([b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"1e400", b"9" * 30, b"-", b"nan", b"'", b" "])


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9), st.one_of(ODD, st.binary())), min_size=1))
def test_a_damaged_table_is_read_or_refused_in_one_line(damage: list[tuple[int, int, bytes]]) -> None:
    content = b'name,size,label\na.jpg,100,cat\n"b, c.jpg",7,dog\n'
    for start, length, odd in damage:
        content = content[:start] + odd + content[start + length :]
    table, said = pd.DataFrame({"name": ["x"], "size": [1]}), "it is fine"
    try:
        table = read_csv(io.BytesIO(content), ["name", "size"], integers=["size"], where="it")
    except BreedlineError as error:
        said = str(error)
    assert said.startswith("it ")
    assert "\n" not in said
    assert table["size"].dtype == "int64"
    assert all(isinstance(name, str) for name in table["name"])


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(BreedlineError, match=r" is not a CSV table \(.*Is a directory"):
        read_csv(tmp_path, ["name"])


def test_a_table_of_odd_columns_is_told_in_one_short_line() -> None:
    text = '"odd\nname' + "x" * 9999 + '",size\na,1\n'
    with pytest.raises(BreedlineError, match=r"^it lacks the column name; it has odd name") as caught:
        read_csv(io.BytesIO(text.encode()), ["name"], where="it")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_json_is_readable_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    write_json({"Käse": 0.1}, path)
    assert path.read_text("utf-8") == '{\n  "Käse": 0.1\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(float("nan"), path)
    assert "Käse" in path.read_text("utf-8")


def test_a_copy_replaces_a_link_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, linked, copied = (tmp_path / name for name in ("source", "linked", "copied"))
    source.write_bytes(b"content")
    link_or_copy(source, linked)
    assert linked.samefile(source)

    def other_file_system(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_file_system)
    link_or_copy(source, copied)
    assert not copied.samefile(source)
    assert sha256_of(copied) == sha256_of(source)


def test_a_fingerprint_changes_with_a_touched_and_with_an_added_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("a")
    before = fingerprint([tmp_path / "folder"])
    assert fingerprint([tmp_path / "folder"]) == before
    os.utime(tmp_path / "folder" / "file", ns=(0, 0))
    touched = fingerprint([tmp_path / "folder"])
    (tmp_path / "folder" / "newcomer").touch()
    assert len({str(state) for state in (before, touched, fingerprint([tmp_path / "folder"]))}) == 3


@pytest.mark.parametrize("path", ["file", "file/deeper", "~no such user/cache"])
def test_a_cache_that_cannot_be_a_folder_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    Path("file").touch()
    monkeypatch.setenv("BREEDLINE_CACHE", path)
    with pytest.raises(BreedlineError, match=rf"^BREEDLINE_CACHE is {path}, .*: set it to a folder"):
        cache_dir("thing")


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir("thing") == tmp_path / "cache" / "thing"
    assert (tmp_path / "cache" / "thing").is_dir()
    monkeypatch.delenv("BREEDLINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_dir("thing") == tmp_path / "user" / "breedline" / "thing"
