"""What the other images say of an image's label: kernel ridge regression, each image predicted by a fit that left it out.

Leaving an image out has a closed form, so that one fit does for all of them, and a label that is wrong cannot speak for
itself. Which view of the images tells the classes apart (a pretrained body's features, plain pixels, or both), and how
strong the penalty is, is chosen by the error on the images that are left out.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.linalg import solve_triangular

LANDMARKS = 1000
"""Images that others are compared with, at most: the kernel of more is approximated by these (Nyström's method)."""
SHARES = (0.0, 0.25, 0.5, 1.0)
"""Weights of the first of two views to choose from; the second has the rest."""
PENALTIES = tuple(10.0 ** np.arange(-3, 1.6, 0.5))
BLOCK = 1024
"""Images whose kernel is in memory at a time."""
ROUNDING = 1e-4
"""Added to the similarity of each landmark to itself, which is 1: more than float32 rounds it, and no penalty is smaller."""


def left_out(views: Sequence[np.ndarray], target: np.ndarray, classes: int, landmarks: np.ndarray) -> np.ndarray:
    """Scores (images, classes) of each image by a regression on the labels of all others; about 1 for its class, 0 for others.

    Args:
        views: one or two, each (images, numbers), as `scaled` gives them.
        target: (images,) class indices.
        landmarks: rows of the images that all are compared with, LANDMARKS of them or fewer.
    """
    shares = [(1.0,)] if len(views) == 1 else [(share, 1 - share) for share in SHARES]
    _, best, penalty = min(
        (error, share, penalty)
        for share in shares
        for error, penalty in zip(_errors(_Kernel(views, share, landmarks), target, classes), PENALTIES, strict=True)
    )
    blocks = _without_each(_Kernel(views, best, landmarks), target, classes, [penalty])
    return np.concatenate([scores for _, _, scores in blocks])


def scaled(view: np.ndarray) -> np.ndarray:
    """The view, centred, and scaled so that the mean squared distance of two images is 1; all zeros where all are equal."""
    centred = view - view.mean(axis=0)
    mean_square = np.square(centred).sum(axis=1).mean()
    return centred / np.sqrt(2 * max(mean_square, np.finfo(view.dtype).tiny))


class _Kernel:
    """The features Φ of a Gaussian kernel: Φ Φᵀ = exp(-d²/2) for images and landmarks, where d² sums the views' distances."""

    def __init__(self, views: Sequence[np.ndarray], shares: Sequence[float], landmarks: np.ndarray) -> None:
        self.views, self.shares, self.landmarks = views, shares, landmarks
        identity = np.eye(len(landmarks))
        cholesky = np.linalg.cholesky(self._compared(landmarks) + ROUNDING * identity)
        self.root = solve_triangular(cholesky, identity, lower=True).T

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Φ (images, directions) of BLOCK images at a time; its last column is 1, for the mean."""
        images = len(self.views[0])
        for first in range(0, images, BLOCK):
            rows = slice(first, min(first + BLOCK, images))
            yield rows, np.pad(self._compared(rows) @ self.root, ((0, 0), (0, 1)), constant_values=1)

    def _compared(self, rows: slice | np.ndarray) -> np.ndarray:
        """exp(-d²/2) of these images and the landmarks, in float64; distances in float32 take half the time."""
        total: np.ndarray | float = 0.0
        for view, share in zip(self.views, self.shares, strict=True):
            if share:
                some, marks = view[rows], view[self.landmarks]
                lengths = np.square(some).sum(axis=1)[:, None] + np.square(marks).sum(axis=1)
                total = total + share * np.maximum(lengths - 2 * some @ marks.T, 0)
        return np.exp(-0.5 * np.asarray(total, np.float64))


def _errors(kernel: _Kernel, target: np.ndarray, classes: int) -> list[float]:
    """The sum of squared errors on the images that are left out, for each penalty."""
    total = np.zeros(len(PENALTIES))
    for number, wanted, scores in _without_each(kernel, target, classes, PENALTIES):
        total[number] += np.square(scores - wanted).sum()
    return total.tolist()


def _without_each(
    kernel: _Kernel, target: np.ndarray, classes: int, penalties: Sequence[float]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each block of images and each penalty: its number, the block's Y, and its scores, each by a fit without the image.

    With Φ (images, directions), Y (images, classes) of zeros and a one in each row, and penalty λ, ridge regression has
    the weights W = (ΦᵀΦ + λI)⁻¹ ΦᵀY. Without image i, the rows φ and y, it would predict (Sherman, Morrison, 1950)

        (φW - h y) / (1 - h),  where h = φ (ΦᵀΦ + λI)⁻¹ φᵀ, the image's own weight in its prediction.

    In the eigenvectors V of ΦᵀΦ = V diag(s) Vᵀ, all penalties are quick: with U = ΦV, h = Σ U²/(s + λ) over the directions.
    """
    directions = kernel.root.shape[1] + 1
    squares, products = np.zeros((directions, directions)), np.zeros((directions, classes))
    one_hot = np.eye(classes)
    for rows, phi in kernel.blocks():
        squares += phi.T @ phi
        products += phi.T @ one_hot[target[rows]]
    values, vectors = np.linalg.eigh(squares)
    products = vectors.T @ products
    for rows, phi in kernel.blocks():
        turned, wanted = phi @ vectors, one_hot[target[rows]]
        for number, penalty in enumerate(penalties):
            weight = 1 / (np.maximum(values, 0) + penalty)
            own = (np.square(turned) @ weight)[:, None]
            yield number, wanted, (turned @ (products * weight[:, None]) - own * wanted) / (1 - own)
