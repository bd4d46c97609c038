import numpy as np
import pytest

from breedline.intervals import JACKKNIFED, bootstrapped, wilson


def test_wilson_of_a_case_worked_by_hand() -> None:
    z, n, p = 1.959964, 24, 20 / 24
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson(20, 24) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert wilson(0, 0) is None
    assert wilson(9, 9) == pytest.approx((0.7009, 1), abs=1e-4)


@pytest.mark.parametrize("images", [400, JACKKNIFED + 1])
def test_the_bootstrap_of_a_mean_is_nearly_the_normal_interval_and_always_the_same(images: int) -> None:
    values = np.random.default_rng(1).normal(5, 1, images)
    found = bootstrapped(np.mean, values)
    half = 1.96 * values.std() / np.sqrt(images)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 8)
    assert found == bootstrapped(np.mean, values)


def test_what_does_not_vary_has_no_interval() -> None:
    assert bootstrapped(np.mean, np.zeros(20)) is None
    assert bootstrapped(np.mean, np.ones(1)) is None


def test_columns_are_resampled_together() -> None:
    values = np.random.default_rng(1).normal(5, 1, 50)
    assert bootstrapped(lambda one, other: float(abs(one - other).max()), values, values) is None
