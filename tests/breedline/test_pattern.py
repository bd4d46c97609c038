import time

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
        (r"(?P<label>\C)\C", "Ä", "\ufffd"),  # a single byte, if one insists
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


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("(?P<label>" + "|".join(["a"] * 200_000) + ")", "is 400010 characters long, at most 5000"),
        (r"(?=a)(?P<label>a)(?:(?:a{99}){99}){99}", "repeats by counts such as .2. up to 970299 times"),
        (r"(?=a)(?P<label>a)" + "(?:" * 30 + "a" + "){2}" * 30, "repeats by counts such as .2. up to 1073741824 times"),
        (r"(?x)(?=a)(?P<label>a)(?:(?:a{ 9 9 }){0, 99}){ 99, }", "repeats by counts"),
        (r"(?=a)(?P<label>a)" + "(?:" * 900 + "a" + ")*" * 900, "is nested too deeply"),
        (r"(?P<label>a", "is not a regular expression: missing [)]"),
        (r"(?=a)a", "has no group called label"),
    ],
)
def test_a_pattern_that_would_take_long_or_much_memory_is_refused_at_once(expression: str, expected: str) -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match=expected):
        compile_pattern(expression)
    assert time.process_time() - begun < 2


def test_counts_are_for_every_pattern_that_people_write() -> None:
    dated = r"(?P<label>\w{1,64})(?=_)_\d{4}-\d{2}-\d{2}\.(jpg|png)"
    assert compile_pattern(dated)("cat_2024-01-31.jpg") == "cat"
    assert compile_pattern(r"(?P<label>\p{L}{1,200})_[0-9a-f]{64}\.jpg")("Kätzchen_" + "0a" * 32 + ".jpg") == "Kätzchen"


def test_equal_labels_are_one_object() -> None:
    match = compile_pattern(PETS)
    assert match("american_pit_bull_terrier_1.jpg") is match("american_pit_bull_terrier_2.jpg")
