"""`breedline predict`: photos from anywhere, told in any form, and nothing of a name gets to the terminal or a spreadsheet."""

import contextlib
import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from breedline.bundle import read_bundle
from breedline.errors import BreedlineError
from breedline.tables import read_csv
from flows import cli, predict
from tests.bundles import bundle, picture

BREEDLINE = Path(sys.executable).with_name("breedline")
ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-c", "from flows.cli import main; main()", "predict"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
HOSTILE = "=\x1b[31m[bold]\u202ered\n.png"


@pytest.fixture(autouse=True)
def photos() -> None:
    """A bundle in models, and photos/ with two folders, a hidden file and files that are no photos."""
    bundle()
    for name, content in {
        "photos/b.png": picture("blue"),
        "photos/a.JPG": picture("red", "JPEG"),
        "photos/more/c": picture("green", "GIF"),
        "photos/.hidden.png": picture("red"),
        "photos/notes.txt": b"no photo",
        "photos/.git/d.png": picture("red"),
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def command(*arguments: str) -> object:
    """The exit code of `breedline predict` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["breedline", "predict", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
    return left.value.code


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[tuple[str, str | None]]:
    """The source and label of each line of JSON."""
    assert command("--json", *arguments) == code
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [(line["source"], line["label"]) for line in lines]


IN_FOLDER = [("photos/a.JPG", "red"), ("photos/b.png", "blue"), ("photos/more/c", "green")]


def test_a_folder_is_all_its_photos_in_order_but_for_hidden_ones(capsys: pytest.CaptureFixture[str]) -> None:
    (Path("photos") / "loop").symlink_to(Path("photos").absolute())
    os.mkfifo("photos/pipe.jpg")
    assert told(capsys, "photos") == IN_FOLDER
    assert told(capsys, "photos/b.png", "photos") == [IN_FOLDER[1], *IN_FOLDER]
    assert told(capsys, "photos/.hidden.png") == [("photos/.hidden.png", "red")]


@pytest.mark.parametrize(
    ("pattern", "found"), [("photos/*.JPG", IN_FOLDER[:1]), ("photos/m*", IN_FOLDER[2:]), ("**/*.png", IN_FOLDER[1:2])]
)
def test_a_glob_is_what_matches(capsys: pytest.CaptureFixture[str], pattern: str, found: list[tuple[str, str]]) -> None:
    assert told(capsys, pattern) == found


def test_a_name_that_exists_is_no_glob(capsys: pytest.CaptureFixture[str]) -> None:
    Path("[ab].png").write_bytes(picture("green"))
    assert told(capsys, "[ab].png") == [("[ab].png", "green")]


def _zip(files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile("data.bin", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return Path("data.bin")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_an_archive_is_its_photos_in_its_order(
    capsys: pytest.CaptureFixture[str], make_tar: Callable[..., Path], mode: str
) -> None:
    files = {"x/b.png": picture("blue"), "x/a": picture("red"), "x/.h.png": picture("red"), "labels.csv": b"name,label"}
    path = _zip(files) if mode == "zip" else make_tar(files, "data.bin", mode)
    assert told(capsys, str(path)) == [(f"{path}:x/b.png", "blue"), (f"{path}:x/a", "red")]


def test_an_archive_that_unpacks_to_too_much_or_is_cut_ends_there(
    capsys: pytest.CaptureFixture[str], make_tar: Callable[..., Path]
) -> None:
    bomb = make_tar({"a.png": picture("red"), "b.png": b"\0" * 30_000_000}, "bomb.tgz", "w:gz")
    cut = make_tar({"a.png": picture("red"), "b.png": picture("blue", size=(300, 300))}, "cut.tar")
    cut.write_bytes(cut.read_bytes()[:30_000])
    for path in (bomb, cut):
        assert told(capsys, str(path), "photos/b.png", code=3) == [(f"{path}:a.png", "red"), IN_FOLDER[1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "MAX_FILES", 1)
        assert predict.main([str(cut)], model="models", top=1, min_confidence=None, form="json") == 3
    said = capsys.readouterr().err
    assert f"skipped {cut}: {cut} has over 1 files\n" in said


def test_members_lead_nowhere_and_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open("data.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "photos/a.JPG"
        tar.addfile(link)
        out = tarfile.TarInfo("../../out.png")
        out.size = len(picture("red"))
        tar.addfile(out, io.BytesIO(picture("red")))
    before = sorted(Path().rglob("*"))
    assert told(capsys, "data.tar") == [("data.tar:out.png", "red")]
    assert sorted(Path().rglob("*")) == before


def test_a_list_comes_on_standard_input(capfd: pytest.CaptureFixture[str]) -> None:
    names = "photos/b.png\r\n\nphotos/more\ngone.png\n" + "x" * 70_000 + "\nphotos/a.JPG"
    done = subprocess.run([*PROGRAM, "--json", "-"], input=names, env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 3
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["blue", "green", "red"]
    assert "skipped gone.png: No such file or directory" in done.stderr


def test_what_cannot_be_read_is_told_and_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/bad.jpg").write_bytes(picture("red", "JPEG")[:200])
    assert (
        predict.main(["photos", "gone.png", "no*", "a\0b"], model="models", top=3, min_confidence=None, form="json")
        == 3
    )
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3
    assert [line.partition(": ")[0] for line in said.err.splitlines()] == [
        "skipped photos/bad.jpg", "skipped gone.png", "skipped no*", "skipped a\ufffdb",
    ]  # fmt: skip


def test_no_photo_at_all_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    with pytest.raises(BreedlineError, match="there is no photo in empty: name one"):
        predict.main(["empty"], model="models", top=3, min_confidence=None, form="table")
    assert told(capsys, "empty", code=1) == []


def hostile(form: str) -> int:
    Path("photos/a.JPG").rename(f"photos/{HOSTILE}")
    return predict.main([f"photos/{HOSTILE}", HOSTILE], model="models", top=1, min_confidence=None, form=form)


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_no_name_controls_the_terminal(capsys: pytest.CaptureFixture[str], form: str) -> None:
    assert hostile(form) == 3
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert text.splitlines() == text.split("\n")[:-1]
        assert not {"\x1b", "\u202e", "\r"} & set(text)
    if form == "json":
        assert json.loads(said.out)["source"] == f"photos/{HOSTILE}"
    else:
        assert "=\ufffd[31m[bold]\ufffdred\ufffd.png" in said.out


def test_a_class_controls_neither_terminal_nor_spreadsheet(capsys: pytest.CaptureFixture[str]) -> None:
    Path("models").rename("other")
    bundle(classes=["=1+1", "'-2", "@\x1b[2J"])
    assert predict.main(["photos"], model="models", top=2, min_confidence=None, form="csv") == 0
    text = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["label"] for row in rows] == ["'=1+1", "'@\ufffd[2J", "''-2"]
    assert list(read_csv(io.BytesIO(text.encode()), ["class_1"])["class_1"]) == ["=1+1", "@\ufffd[2J", "'-2"]


def test_csv_has_a_pair_of_columns_for_each_class(capsys: pytest.CaptureFixture[str]) -> None:
    predict.main(["photos/b.png"], model="models", top=9, min_confidence=1.0, form="csv")
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["source"] == "photos/b.png"
    assert row["label"] == ""
    assert [row["class_1"], len(row)] == ["blue", 8]
    assert float(row["probability_1"]) > 0.9


def test_a_table_is_aligned_page_after_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "PAGE", 2)
    assert predict.main(["photos"] * 2, model="models", top=2, min_confidence=None, form="table") == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["photo", "shows", "1.", "2."]
    assert [row.split()[:2] for row in rows] == [list(pair) for pair in IN_FOLDER * 2]
    assert len({tuple(cell.start() for cell in re.finditer(r"\S+( \d\S+)?", row)) for row in rows[2:4]}) == 1


def test_on_a_terminal_it_is_a_table_without_markup() -> None:
    Path("[bold red]x.png").write_bytes(picture("red"))
    ours, theirs = pty.openpty()
    environment = ENVIRONMENT | {"COLUMNS": "100", "TERM": "dumb"}
    subprocess.run([*PROGRAM, "[bold red]x.png"], stdout=theirs, env=environment, check=True)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(ours, 10_000):
            text += part
    os.close(ours)
    assert "│ [bold red]x.png │ red" in text.decode()


def test_a_reader_who_has_read_enough_is_no_error() -> None:
    many = " ".join(["photos"] * 400)
    program = "from flows.cli import main; main()"
    shell = f"{sys.executable} -c '{program}' predict --json {many} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], env=ENVIRONMENT, text=True, capture_output=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--top", "0", "photos"], "'0' is no count: give 1 or more"),
        (["--min-confidence", "1.5", "photos"], "'1.5' is no probability: give 0 to 1"),
        (["--min-confidence", "nan", "photos"], "'nan' is no probability"),
        (["--csv", "--json", "photos"], "not allowed with argument"),
        ([], "the following arguments are required: PATH"),
    ],
)
def test_a_mistake_in_the_options_is_told(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert command(*arguments) == 2
    assert said in capsys.readouterr().err


def test_one_photo_needs_neither_what_trained_the_model_nor_what_runs_the_pipeline() -> None:
    heavy = {"torch", "timm", "fastai", "pandas", "prefect", "dvc", "rich", "httpx", "zstandard"}
    code = f"""
import sys
from flows.cli import main
try:
    main()
finally:
    assert not (found := {heavy} & set(sys.modules)), found
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", "photos/b.png"], env=ENVIRONMENT, text=True, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# A model of another time


def shell(command: str, folder: Path = Path()) -> None:
    done = subprocess.run(command, shell=True, cwd=folder, text=True, capture_output=True)  # noqa: S602
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def versioned() -> Path:
    """A repository whose tag breedline@v1.0.0 has another model than HEAD and the working folder."""
    root = Path("repository").absolute()
    root.mkdir()
    Path("models").rename(root / "models")
    dvc = f"PATH={Path(sys.executable).parent}:$PATH dvc"
    (root / "dvc.yaml").write_text("artifacts:\n  breedline: {path: models, type: model}\n")
    git = "git -c user.name=a -c user.email=a@b.c"
    shell(f"git init -q && {dvc} init -q && {dvc} add -q models && git add -A && {git} commit -qm 1", root)
    shell("git tag breedline@v1.0.0", root)
    with contextlib.chdir(root.parent):
        bundle(classes=["rouge", "vert", "bleu"])
    shell(f"rm -r models && mv ../models . && {dvc} add -q models && git add -A && {git} commit -qm 2", root)
    return root


@pytest.mark.slow
def test_a_model_is_named_by_a_revision(
    versioned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = str(Path("photos/b.png").absolute())
    monkeypatch.chdir(versioned)

    def label(model: str) -> Any:
        return told(capsys, photo, "--model", model)[0][1]

    assert label("models") == "bleu"
    assert label("breedline@v1.0.0") == "blue"
    assert label("HEAD~1") == "blue"
    assert label("HEAD") == "bleu"
    (cached,) = {predict.bundle_of(name) for name in ("HEAD~1", "breedline@v1.0.0")}
    assert read_bundle(cached).classes == ["red", "green", "blue"]
    shell("rm -rf .dvc/cache models", versioned)
    assert label("HEAD~1") == "blue"  # which is fetched once


@pytest.mark.slow
def test_a_model_that_cannot_be_had_is_one_line(versioned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(versioned)
    shell("rm -rf .dvc/cache models", versioned)
    with pytest.raises(BreedlineError, match=r"of [0-9a-f]{12}: `dvc fetch --all-commits`, or push it"):
        predict.bundle_of("HEAD~1")
    (versioned / "dvc.yaml").write_text("stages: {}\n")
    shell("git -c user.name=a -c user.email=a@b.c commit -qam 3", versioned)
    with pytest.raises(BreedlineError, match="names no model, or several"):
        predict.bundle_of("HEAD")


@pytest.mark.parametrize("model", ["nothing", "--help", "../elsewhere"])
def test_a_model_that_is_neither_folder_nor_revision_is_told(model: str) -> None:
    with pytest.raises(BreedlineError, match="is no usable bundle"):
        predict.main(["photos"], model=model, top=1, min_confidence=None, form="json")
