"""What is written for people is true: commands, settings, files and links exist, and the picture is of this pipeline."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.cli.parser import get_main_parser
from pydantic import BaseModel
from ruamel.yaml import YAML

from breedline.params import Params
from breedline.pattern import compile_pattern
from docs.draw_pipeline import PICTURE, draw
from flows.cli import _parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PIPELINE: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")
WORDS_IN_README = 1300

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def _blocks(page: Path, *kinds: str) -> Iterator[str]:
    for kind, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text("utf-8"), re.M | re.S):
        if kind in kinds:
            yield block


def _quoted(page: Path) -> list[str]:
    """What stands between single backticks, outside of blocks."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.M | re.S)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def _commands(page: Path, program: str) -> Iterator[list[str]]:
    """The words of each command of a page that calls `program`: in its blocks and in `quoted text`."""
    lines = [line for block in _blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *_quoted(page)]:
        for part in re.split(r'&&|;|"?\$\(|\)"?', line.partition(" # ")[0]):
            words = shlex.split(part) if re.search(rf"\b{program}\b", part) else []
            while words and re.fullmatch(r"[A-Z_]+=.*|export|nice", words[0]):
                del words[0]
            if words and words[0] == program:
                yield words[1:]


@each_page
def test_what_is_called_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.M))
    variables = set(re.findall(r"\$\(([A-Z]+)\)", MAKEFILE))
    for words in _commands(page, "make"):
        for word in words:
            assert word in targets or word.partition("=")[0] in variables, word
    for words in _commands(page, "python"):
        assert words[0] == "-m" or (ROOT / words[0]).is_file(), words
        if words[0] == "-m":
            assert (ROOT / f"{words[1].replace('.', '/')}.py").is_file(), words
    for words in _commands(page, "breedline"):
        if words and words != ["--help"]:
            _parser().parse_args(words)


@each_page
def test_what_is_asked_of_dvc_and_prefect_is_understood(page: Path) -> None:
    for words in _commands(page, "dvc"):
        get_main_parser().parse_args(words)
    deployments = YAML(typ="safe").load(ROOT / "prefect.yaml")["deployments"]
    names = {f"{d['entrypoint'].rpartition(':')[2]}/{d['name']}" for d in deployments}
    for words in _commands(page, "prefect"):
        if words[:2] == ["deployment", "run"]:
            assert words[2] in names


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.is_file(), target
            if anchor:
                titles = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.M)
                assert anchor in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@each_page
def test_code_and_settings_that_are_named_exist(page: Path) -> None:
    for text in _quoted(page):
        if re.fullmatch(r"[\w./-]+\.(py|md|toml)|(presets|docs|tests|flows|stages|breedline)/[\w./-]*", text):
            assert (ROOT / text).exists(), text
        section, _, key = text.partition(":")[0].partition(".")
        if section in Params.model_fields and re.fullmatch(r"[a-z_.]+", key):
            model: Any = Params.model_fields[section].annotation
            for part in key.split("."):
                assert issubclass(model, BaseModel), text
                assert part in model.model_fields, text
                model = model.model_fields[part].annotation


def test_the_checks_above_find_what_they_look_at() -> None:
    """Else a change of the pages' style would leave them with nothing to check."""
    found = {program: [words for page in PAGES for words in _commands(page, program)] for program in ("make", "dvc")}
    assert ["repro"] in found["make"]
    assert ["repro"] in found["dvc"]
    assert any(words[:1] == ["run"] for page in PAGES for words in _commands(page, "breedline"))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= WORDS_IN_README


def test_the_example_for_ones_own_images_is_right() -> None:
    """The sections of the README's example, put into the preset that it starts from."""
    (example,) = _blocks(ROOT / "README.md", "yaml")
    settings = YAML(typ="safe").load(ROOT / "presets/photos.yaml")
    changed = YAML(typ="safe").load(example.replace("3a7b…", "a" * 64))
    Params.model_validate({section: {**settings[section], **changed.get(section, {})} for section in settings})


@pytest.mark.parametrize("name", ["robin/1.jpg", "birds/robin/1.jpg", "a/birds/robin/a b.jpg"])
def test_the_pattern_for_folders_takes_a_plain_folder_of_folders_too(name: str) -> None:
    (pattern,) = [text.removeprefix("pattern: ") for text in _quoted(ROOT / "README.md") if "[^/]" in text]
    assert compile_pattern(pattern)(name) == "robin"


def test_the_picture_is_of_this_pipeline() -> None:
    assert PICTURE.read_text("utf-8") == draw(PIPELINE), "run `make picture`"


def test_another_graph_is_another_picture() -> None:
    stages = {name: dict(stage) for name, stage in PIPELINE["stages"].items()}
    stages["train"]["deps"] = [*stages["train"]["deps"], "data/rejected.csv"]
    assert draw({"stages": stages}) != draw(PIPELINE)


def test_the_changelog_begins_with_the_next_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert first
    assert first[1] == version
