"""Labels that the rest of the data contradicts: how probable each label is by the other images, and which are likely wrong."""

import warnings

import numpy as np
import pandas as pd
from scipy.special import softmax

from breedline.calibration import fit_temperature
from breedline.ridge import LANDMARKS, left_out, scaled
from breedline.split import draw

SEED = 0
"""Of the choice of landmarks, by each image's content."""
COLUMNS = ["row", "label", "suggested", "label_probability", "suggested_probability", "score", "likely"]


def out_of_sample(views: list[np.ndarray], target: np.ndarray, classes: int, sha256: list[str]) -> np.ndarray:
    """Probabilities (images, classes) of each image's class by the labels of all others.

    Args:
        views: one or two, each (images, numbers): ways to see the images, as the regression may weigh them.
        target: (images,) class indices.
        sha256: of each image's content, no two of them equal: an image that is left out must not have a copy that is not.
    """
    drawn = sorted(range(len(sha256)), key=lambda row: draw(sha256[row], SEED))
    scores = left_out([scaled(view) for view in views], target, classes, np.array(drawn[:LANDMARKS]))
    return softmax(scores / fit_temperature(scores, target, "cross_entropy"), axis=1)


def judge(probabilities: np.ndarray, target: np.ndarray) -> pd.DataFrame:
    """The images whose label can be judged, the least credible first, as COLUMNS: `row`, two class indices, what speaks for each.

    `score` is cleanlab's label quality, and `likely` whether its confident learning takes the label for wrong (Northcutt
    et al., 2021). `suggested` is the most probable of the other classes. Of the only image of its class no other could
    speak for the label, so it is not judged.

    Args:
        probabilities: (images, classes), as `out_of_sample` gives them.
    """
    judged = np.flatnonzero(np.bincount(target)[target] > 1)
    if not len(judged) or probabilities.shape[1] < 2:
        return pd.DataFrame(columns=COLUMNS)
    # imported here: it takes as long as scikit-learn
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    every = np.arange(len(target))
    others = probabilities.copy()
    others[every, target] = -1
    suggested = others.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="May not flag all label issues in class"
        )  # of one image, which is known
        # in one process: others would have to import all this, too
        likely = find_label_issues(target, probabilities, n_jobs=1)
    numbers = {
        "row": every,
        "label": target,
        "suggested": suggested,
        "label_probability": probabilities[every, target],
        "suggested_probability": probabilities[every, suggested],
        "score": get_label_quality_scores(target, probabilities),
        "likely": likely,
    }
    return pd.DataFrame(numbers, columns=COLUMNS).iloc[judged].sort_values("score", kind="stable")
