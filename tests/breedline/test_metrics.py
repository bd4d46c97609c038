import numpy as np
import pandas as pd
import pytest

from breedline.metrics import calibration_error, confused_pairs, confusion, per_class, summary

PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.2, 0.5, 0.3]])
TARGET = np.array([0, 1, 2, 0])


def test_summary_of_a_case_worked_by_hand() -> None:
    numbers = summary(PROBABILITIES, TARGET, top_k=2)
    assert numbers["accuracy"] == 0.5
    assert numbers["error_rate"] == 0.5
    assert numbers["top_2_accuracy"] == 0.75
    assert numbers["macro_f1"] == pytest.approx((0.5 + 2 / 3 + 0) / 3, abs=1e-6)
    assert numbers["log_loss"] == pytest.approx(-np.log([0.7, 0.6, 0.4, 0.2]).mean(), abs=1e-6)
    assert numbers["images"] == 4


@pytest.mark.parametrize(("classes", "top_k"), [(2, 1), (2, 5), (3, 3), (3, 1)])
def test_top_k_of_few_classes(classes: int, top_k: int) -> None:
    probabilities = np.eye(classes) * 0.5 + 0.1
    numbers = summary(probabilities, np.roll(np.arange(classes), 1), top_k)
    assert numbers[f"top_{min(top_k, classes)}_accuracy"] == (1.0 if top_k >= classes else 0.0)


def test_probabilities_of_each_class_for_itself_are_accepted() -> None:
    numbers = summary(np.array([[0.9, 0.8], [0.01, 0.02]]), np.array([0, 1]), 1)
    assert numbers["accuracy"] == 1
    assert numbers["error_rate"] == 0


def test_calibration_error() -> None:
    sure = np.array([[1.0, 0.0]] * 4)
    assert calibration_error(sure, np.array([0, 0, 0, 0])) == 0
    assert calibration_error(sure, np.array([0, 0, 1, 1])) == 0.5
    honest = np.array([[0.75, 0.25]] * 4)
    assert calibration_error(honest, np.array([0, 0, 0, 1])) == pytest.approx(0)


def test_tables_begin_with_what_is_worst() -> None:
    table = per_class(["a", "b", "c"], PROBABILITIES.argmax(1), TARGET)
    assert table["class"].tolist() == ["c", "a", "b"]
    assert table["images"].tolist() == [1, 2, 1]
    pairs = confused_pairs(pd.DataFrame({"actual": ["a", "a", "b", "c"], "predicted": ["b", "b", "a", "c"]}))
    assert pairs.to_numpy().tolist() == [["a", "b", 2], ["b", "a", 1]]


def test_classes_that_are_confused_stand_side_by_side() -> None:
    names = ["cat", "oak", "dog", "elm"]
    pairs = [(name, name) for name in names for _ in range(9)]
    pairs += [("cat", "dog"), ("dog", "cat"), ("oak", "elm"), ("elm", "oak"), ("oak", "elm")]
    table = pd.DataFrame(pairs, columns=["actual", "predicted"])
    counts = confusion(table, names)
    assert list(counts.index) == list(counts.columns)
    order = list(counts.index)
    assert sorted(order) == sorted(names)
    assert abs(order.index("cat") - order.index("dog")) == 1
    assert abs(order.index("oak") - order.index("elm")) == 1
    assert counts.loc["oak", "elm"] == 2
    assert counts.loc["elm", "oak"] == 1
    assert counts.to_numpy().sum() == len(table)


def test_confusion_of_a_few_of_the_classes() -> None:
    table = pd.DataFrame({"actual": ["a", "a", "b"], "predicted": ["a", "c", "c"]})
    assert confusion(table, ["a"]).to_numpy().tolist() == [[1]]
    assert confusion(table, ["a", "b"]).sum().sum() == 1
