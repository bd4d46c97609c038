import hashlib

import numpy as np
import pandas as pd

from breedline.suspects import COLUMNS, judge, out_of_sample


def _judged(view: np.ndarray, target: np.ndarray, classes: int) -> pd.DataFrame:
    sha256 = [hashlib.sha256(str(row).encode()).hexdigest() for row in range(len(view))]
    return judge(out_of_sample([view.astype(np.float32)], target, classes, sha256), target)


def _clusters(classes: int, each: int = 40) -> tuple[np.ndarray, np.ndarray]:
    target = np.repeat(np.arange(classes), each)
    return np.random.default_rng(0).normal(size=(len(target), 8)) + 8 * np.eye(classes, 8)[target], target


def test_flipped_labels_come_first_and_the_true_ones_are_suggested() -> None:
    for classes in (2, 4):
        view, true = _clusters(classes)
        given = true.copy()
        flipped = [3, 17, 41, 70]
        given[flipped] = (true[flipped] + 1) % classes
        found = _judged(view, given, classes)
        assert sorted(found["row"][:4]) == flipped
        assert found["likely"].tolist() == [True] * 4 + [False] * (len(true) - 4)
        assert (found["suggested"][:4] == true[found["row"][:4]]).all()
        assert (found["label"] == given[found["row"]]).all()
        assert found["score"].is_monotonic_increasing
        assert (found["label_probability"] + found["suggested_probability"] <= 1 + 1e-9).all()


def test_right_labels_are_not_suspected() -> None:
    assert not _judged(*_clusters(3), 3)["likely"].any()


def test_the_only_image_of_a_class_is_not_judged() -> None:
    view, target = _clusters(3)
    target[5] = 3
    found = _judged(view, target, 4)
    assert set(found["row"]) == set(range(len(target))) - {5}


def test_without_other_classes_or_images_nothing_is_judged() -> None:
    assert _judged(np.ones((5, 4)), np.zeros(5, int), 1).columns.tolist() == COLUMNS
    assert _judged(np.ones((5, 4)), np.zeros(5, int), 1).empty
    assert _judged(np.ones((1, 4)), np.zeros(1, int), 1).empty
    assert _judged(np.eye(3), np.arange(3), 3).empty


def test_equal_images_are_judged_without_a_warning() -> None:
    assert len(_judged(np.ones((9, 4)), np.array([0] * 6 + [1] * 3), 2)) == 9
