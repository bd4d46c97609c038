import pytest

from breedline import pattern
from breedline.errors import BreedlineError
from breedline.pattern import compile_pattern

PETS = r"(?P<label>.+)_\d+\.jpg"


@pytest.mark.parametrize(
    ("expression", "name", "label"),
    [
        (PETS, "american_pit_bull_terrier_12.jpg", "american_pit_bull_terrier"),
        (PETS, "american_pit_bull_terrier_12.jpg.txt", None),  # the whole name has to match
        (PETS, "x/Abyssinian_1.jpg", "x/Abyssinian"),
        (r".*/(?P<label>[^/]+)/[^/]+", "data/cats/1.jpg", "cats"),
        (r"(?P<label>\p{L}+)\d*", "Kätzchen7", "Kätzchen"),
        (r"(?!\.)(?P<label>\w+?)(?=_)_\d+", "cat_1", "cat"),  # look-around: RE2 has none
        (r"(?P<label>\w)(?P=label)_\d", "aa_1", "a"),  # nor references back
        (r"(?P<label>a)?b", "b", None),
    ],
)
def test_the_label_is_the_named_group_of_a_whole_match(expression: str, name: str, label: str | None) -> None:
    assert compile_pattern(expression)(name) == label


def test_a_pattern_that_explodes_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern, "SECONDS_PER_NAME", 0.05)
    match = compile_pattern(r"(?=a)(?P<label>(a|aa)+)\1$")
    with pytest.raises(BreedlineError, match=r"took over 0\.05 s on 'aaaa"):
        match("a" * 60 + "b")


def test_re2_reads_what_would_explode_elsewhere() -> None:
    assert compile_pattern(r"(?P<label>(a|aa)+)c")("a" * 10_000 + "b") is None
