import hashlib

import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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


def test_a_group_is_never_divided_and_its_leader_decides() -> None:
    table = images(3000)
    leaders = {table["sha256"][n + k]: table["sha256"][n] for n in range(0, 300, 3) for k in (1, 2)}
    found = dict(zip(table["sha256"], split(table, **leaders), strict=True))
    alone = dict(zip(table["sha256"], split(table), strict=True))
    assert all(found[member] == found[leader] == alone[leader] for member, leader in leaders.items())
    assert all(found[sha256] == alone[sha256] for sha256 in found if sha256 not in leaders)
    assert sum(found[member] != alone[member] for member in leaders) > 50


def test_a_group_keeps_its_split_without_its_leader() -> None:
    table = images(1000)
    leaders = {table["sha256"][n + 1]: table["sha256"][n] for n in range(0, 400, 2)}
    whole = split(table, **leaders)
    members = table[table["sha256"].isin(leaders)]
    assert split(members, **leaders).tolist() == whole[members.index].tolist()


@given(data=st.data(), count=st.integers(50, 80), more=st.integers(0, 40))
def test_images_that_come_later_move_no_group(data: st.DataObject, count: int, more: int) -> None:
    every = images(count + more, classes=2)
    leads = [data.draw(st.integers(0, number)) for number in range(len(every))]
    # as leaders() gives them: whoever has a leader is none
    leaders = {}
    for number, lead in enumerate(leads):
        if every["sha256"][lead] not in leaders and lead != number and number % 3:
            leaders[every["sha256"][number]] = every["sha256"][lead]
    before = split(every[:count], valid=0.3, test=0.3, **leaders)
    after = split(every, valid=0.3, test=0.3, **leaders)
    by_class = before.groupby(every["label"][:count]).nunique()
    assume((by_class == 3).all())  # where a class lacks a split, its lowest group fills it until a lower one comes
    assume(all(_drawn(before, every, leaders)))
    assert after[:count].tolist() == before.tolist()


def _drawn(found: "pd.Series[str]", table: pd.DataFrame, leaders: dict[str, str]) -> list[bool]:
    """Whether each row's split is what its leader draws, rather than what fills a gap."""
    numbers = [draw(leaders.get(sha256, sha256), 1) for sha256 in table["sha256"][: len(found)]]
    drawn = ["test" if number < 0.3 else "valid" if number < 0.6 else "train" for number in numbers]
    return [a == b for a, b in zip(found, drawn, strict=True)]


def test_a_class_gives_its_lowest_group_whole() -> None:
    for start in range(0, 90, 9):
        table = images(9, classes=1, start=start)
        leaders = {table["sha256"][n + k]: table["sha256"][n] for n in (0, 3, 6) for k in (1, 2)}
        table["split"] = split(table, valid=1e-9, test=1e-9, **leaders)
        assert table["split"].value_counts().to_dict() == {"train": 3, "valid": 3, "test": 3}
        assert table.groupby(table.index // 3)["split"].nunique().tolist() == [1, 1, 1]
        assert draw(table["sha256"][3 * (table["split"].tolist().index("test") // 3)], 1) == min(
            draw(table["sha256"][n], 1) for n in (0, 3, 6)
        )


def test_a_class_that_is_one_group_is_trained_on() -> None:
    for start in range(0, 100, 5):
        table = images(5, classes=1, start=start)
        leaders = dict.fromkeys(table["sha256"][1:], table["sha256"][0])
        assert set(split(table, valid=0.45, test=0.45, **leaders)) == {"train"}


def test_a_group_of_several_classes_fills_no_gap() -> None:
    for start in range(0, 60, 6):
        table = images(6, classes=2, start=start)  # 0, 2, 4 and 1, 3, 5
        leaders = {table["sha256"][1]: table["sha256"][0]}
        table["split"] = split(table, valid=0.0, test=1e-9, **leaders)
        assert table["split"][:2].tolist() == ["train", "train"]
        assert table.groupby("label")["split"].value_counts().unstack()["test"].tolist() == [1, 1]


def test_a_group_of_several_classes_stays_where_its_leader_draws_it() -> None:
    for start in range(0, 60, 6):
        table = images(6, classes=2, start=start)[:2].assign(label=["a", "b"])
        leaders = {table["sha256"][1]: table["sha256"][0]}
        assert set(split(table, valid=0.0, test=0.9999, **leaders)) == {"test"}


def test_listed_images_are_none_to_train_on() -> None:
    for start in range(0, 60, 2):
        table = images(2, classes=1, start=start)
        found = split(table, valid=1e-9, listed=(table["sha256"][0],))
        assert found.tolist() == ["test", "train"]


def test_a_fixed_test_split_takes_no_near_duplicates() -> None:
    table = images(1000)
    leaders = {table["sha256"][n + 1]: table["sha256"][n] for n in range(0, 400, 2)}
    listed = (table["sha256"][0], table["sha256"][3])  # a leader, and a member
    found = split(table, listed=listed, **leaders)
    assert table["sha256"][found == "test"].tolist() == list(listed)
    numbers = [draw(table["sha256"][0], 1), draw(table["sha256"][2], 1)]
    assert found[[1, 2]].tolist() == ["valid" if number < 0.2 else "train" for number in numbers]
