import io
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from breedline.errors import BreedlineError
from breedline.files import cache_dir, fingerprint, link_or_copy, new_file, new_folder, sha256_of
from breedline.tables import read_csv, write_csv, write_json

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


def test_a_new_file_begins_empty_even_where_a_killed_run_of_the_same_process_number_left_one(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    os.link(other, tmp_path / f".file.{os.getpid()}.partial")
    with new_file(tmp_path / "file") as temporary:
        link_or_copy(Path(__file__), temporary)
    assert other.read_text() == "precious"
    assert (tmp_path / "file").read_bytes() == Path(__file__).read_bytes()


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


def test_whoever_is_killed_while_removing_leaves_a_whole_folder(
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
    ],
)
def test_what_is_no_table_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(BreedlineError) as caught:
        read_csv(path, ["name", "size"], integers=["size"])
    assert str(caught.value).startswith(f"{path} is not a CSV table (")
    assert "\n" not in str(caught.value)


def test_json_keeps_its_words_and_knows_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    write_json({"Käse": 0.1}, path)
    assert path.read_text("utf-8") == '{\n  "Käse": 0.1\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(float("nan"), path)
    assert "Käse" in path.read_text("utf-8")


def test_a_link_costs_nothing_and_a_copy_stands_in_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_fingerprint_tells_of_a_touch_and_of_a_newcomer(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("a")
    before = fingerprint([tmp_path / "folder"])
    assert fingerprint([tmp_path / "folder"]) == before
    os.utime(tmp_path / "folder" / "file", ns=(0, 0))
    touched = fingerprint([tmp_path / "folder"])
    (tmp_path / "folder" / "newcomer").touch()
    assert len({str(state) for state in (before, touched, fingerprint([tmp_path / "folder"]))}) == 3


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir("thing") == tmp_path / "cache" / "thing"
    assert (tmp_path / "cache" / "thing").is_dir()
    monkeypatch.delenv("BREEDLINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_dir("thing") == tmp_path / "user" / "breedline" / "thing"
