import hashlib

import pandas as pd
import pytest

from breedline.split import assign, draw


def images(count: int, classes: int = 4, start: int = 0) -> pd.DataFrame:
    numbers = range(start, start + count)
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers]
    return pd.DataFrame({"sha256": hashes, "label": [f"class {number % classes}" for number in numbers]})


def split(
    table: pd.DataFrame,
    *,
    valid: float = 0.2,
    test: float = 0.1,
    seed: int = 1,
    listed: tuple[str, ...] = (),
    **leaders: str,
):  # type: ignore[no-untyped-def]
    return assign(table, valid_pct=valid, test_pct=test, seed=seed, test=set(listed), leaders=leaders)


def test_shares_are_as_asked() -> None:
    shares = split(images(20_000)).value_counts(normalize=True)
    assert shares["valid"] == pytest.approx(0.2, abs=0.01)
    assert shares["test"] == pytest.approx(0.1, abs=0.01)


def test_an_image_keeps_its_split_when_others_come_or_go_or_change_order() -> None:
    few = images(1000)
    many = pd.concat([images(500, start=5000), few.iloc[::-1]])
    before = dict(zip(few["sha256"], split(few), strict=True))
    after = dict(zip(many["sha256"], split(many), strict=True))
    assert all(after[sha256] == before[sha256] for sha256 in before)


def test_duplicates_fall_on_one_side() -> None:
    table = pd.concat([images(300)] * 3)
    table["split"] = split(table)
    assert (table.groupby("sha256")["split"].nunique() == 1).all()


def test_another_seed_is_another_split() -> None:
    table = images(1000)
    assert (split(table) != split(table, seed=2)).mean() > 0.3


@pytest.mark.parametrize(
    ("count", "expected"), [(1, {"train"}), (2, {"train", "test"}), (3, {"train", "valid", "test"})]
)
def test_a_small_class_gives_its_lowest_hashes(count: int, expected: set[str]) -> None:
    for start in range(0, 60, 3):
        table = images(count, classes=1, start=start)
        # shares so small that nothing falls there by itself
        table["split"] = split(table, valid=1e-9, test=1e-9)
        assert set(table["split"]) == expected
        if count > 1:
            given = table.loc[table["split"] == "test", "sha256"].item()
            assert draw(given, 1) == min(draw(sha256, 1) for sha256 in table["sha256"])


def test_a_share_of_nothing_leaves_the_split_empty() -> None:
    assert set(split(images(200), test=0)) == {"train", "valid"}


def test_a_fixed_test_split_is_taken_as_it_is() -> None:
    table = images(1000)
    listed = tuple(table["sha256"].iloc[:7])
    found = split(table, listed=listed)
    assert set(table.loc[found == "test", "sha256"]) == set(listed)
    assert (found == "valid").mean() == pytest.approx(0.2, abs=0.05)


def test_the_draw_does_not_change_between_versions() -> None:
    # a split that moved would leak test images into training: this number is for ever
    assert draw("0" * 64, 42) == pytest.approx(0.5928472, abs=1e-7)
