import numpy as np
import pytest
from scipy.special import expit, softmax

from breedline.calibration import fit_temperature, probabilities_of, threshold


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
@pytest.mark.parametrize("wanted", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(loss: str, wanted: float) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(scale=2, size=(8000, 3)) * wanted
    drawn = logits / wanted
    if loss == "bce":  # of images that show just one class, each class is asked for by itself
        shares = expit(drawn)
        shows = random.random(shares.shape) < shares
        one = shows.sum(1) == 1
        logits, target = logits[one], shows[one].argmax(1)
        assert fit_temperature(logits, target, loss) < fit_temperature(2 * logits, target, loss)
    else:
        target = (random.random((len(drawn), 1)) > softmax(drawn, axis=1).cumsum(1)).sum(1)
        assert fit_temperature(logits, target, loss) == pytest.approx(wanted, rel=0.1)


def test_a_few_images_that_are_all_right_do_not_make_it_certain() -> None:
    logits, target = 5 * np.eye(3), np.arange(3)
    assert 0.3 < fit_temperature(logits, target, "cross_entropy") < 1


def test_probabilities_are_those_of_the_loss() -> None:
    logits = np.array([[[2.0, -1.0, 0.5]]])
    assert np.allclose(probabilities_of(logits, "cross_entropy"), softmax(logits, axis=-1))
    assert np.allclose(probabilities_of(logits, "bce"), expit(logits))


def test_of_the_known_images_at_most_a_share_is_below_the_threshold() -> None:
    best = np.linspace(0.2, 1, 41)
    probabilities = np.stack([best, 1 - best], axis=1)
    for error in (0.0, 0.05, 0.5):
        assert (probabilities.max(1) < threshold(probabilities, error)).mean() <= error
    assert threshold(probabilities, 0.5) > threshold(probabilities, 0.0)
