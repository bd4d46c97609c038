"""The code that decides what a stage writes, found in its text."""

from pathlib import Path

import pytest

from breedline import code
from breedline.code import code_of, sha256_of_code

FILES = {
    "stages/verb.py": "import breedline.noun\nfrom breedline.progress import progress\n",
    "breedline/noun.py": "def late():\n    from breedline import deep\n",
    "breedline/deep.py": "import json\nfrom breedline.noun import late\n",
    "breedline/progress.py": "from breedline.words import words\n",
    "breedline/words.py": "",
    "breedline/other.py": "",
}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of FILES, in which progress is exempt."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    return tmp_path


def test_code_is_what_is_imported_at_any_remove_and_anywhere_but_through_what_is_exempt(project: Path) -> None:
    found = code_of(project / "stages/verb.py")
    assert [path.relative_to(project).as_posix() for path in found] == [
        "breedline/deep.py",
        "breedline/noun.py",
        "stages/verb.py",
    ]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("stages/verb.py", True),
        ("breedline/deep.py", True),
        ("breedline/progress.py", False),
        ("breedline/other.py", False),
    ],
)
def test_the_hash_changes_with_the_code_that_counts_alone(project: Path, name: str, counts: bool) -> None:
    before = sha256_of_code(project / "stages/verb.py")
    with (project / name).open("a") as file:
        file.write("# a word\n")
    assert (sha256_of_code(project / "stages/verb.py") != before) == counts
