"""What a user is told: one short line, whatever it quotes."""

import pytest

from breedline.errors import LONGEST, BreedlineError
from breedline.params import MOST_MISTAKES, ParamsError


@pytest.mark.parametrize("odd", ["\x1b]0;owned\x07", "a\0b", "\u202egpj", "\x85", "\udcff"])
def test_what_controls_a_terminal_is_not_told(odd: str) -> None:
    told = str(BreedlineError(f"a {odd} is damaged"))
    assert told.endswith(" is damaged")
    assert not set(odd) & set(told) - set("a ]0;ownedbgpjis")


def test_of_several_lines_one_is_made() -> None:
    assert str(BreedlineError("a \r\n b\n\nc\n")) == "a b c"


def test_of_what_is_long_the_remedy_is_kept() -> None:
    told = str(BreedlineError(f"{'x' * 10_000}: `dvc checkout` restores it"))
    assert len(told) == LONGEST
    assert told.endswith("x: `dvc checkout` restores it")


def test_each_mistake_of_the_settings_is_a_short_line_and_there_are_not_too_many() -> None:
    lines = str(ParamsError("\n  ".join(["mend:", *["a\x1b" * 1000] * 999]))).split("\n  ")
    assert len(lines) == MOST_MISTAKES + 2
    assert lines[-1] == f"and {999 - MOST_MISTAKES} more"
    assert all(len(line) <= LONGEST and "\x1b" not in line for line in lines)
