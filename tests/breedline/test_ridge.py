import numpy as np
import pytest

from breedline import ridge
from breedline.ridge import PENALTIES, left_out, scaled


def _clusters(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    target = np.repeat(np.arange(3), 20)
    return random.normal(size=(60, 5)) + 3 * np.eye(3, 5)[target], target


def test_the_closed_form_is_what_leaving_each_image_out_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "BLOCK", 7)
    view, target = _clusters()
    kernel = ridge._Kernel([scaled(view)], [1.0], np.arange(0, 60, 2))
    phi = np.concatenate([block for _, block in kernel.blocks()])
    one_hot = np.eye(3)[target]
    for penalty in (PENALTIES[0], PENALTIES[-1]):
        found = np.concatenate([scores for *_, scores in ridge._without_each(kernel, target, 3, [penalty])])
        for image in range(60):
            rest = np.arange(60) != image
            squares = phi[rest].T @ phi[rest] + penalty * np.eye(phi.shape[1])
            weights = np.linalg.solve(squares, phi[rest].T @ one_hot[rest])
            assert found[image] == pytest.approx(phi[image] @ weights, abs=1e-6)


def test_with_all_images_as_landmarks_the_kernel_is_exact() -> None:
    view = scaled(_clusters()[0])
    kernel = ridge._Kernel([view], [1.0], np.arange(60))
    phi = np.concatenate([block for _, block in kernel.blocks()])[:, :-1]
    distances = np.square(view[:, None] - view[None]).sum(-1)
    assert np.allclose(phi @ phi.T, np.exp(-distances / 2), atol=2e-4)
    assert distances.mean() == pytest.approx(1)


def test_the_view_that_tells_the_classes_apart_is_chosen() -> None:
    view, target = _clusters()
    noise = np.random.default_rng(1).normal(size=(60, 50))
    for views in ([view, noise], [noise, view]):
        scores = left_out([scaled(one) for one in views], target, 3, np.arange(60))
        assert (scores.argmax(1) == target).mean() > 0.9


def test_equal_images_tell_no_more_than_the_counts() -> None:
    target = np.array([0] * 6 + [1] * 3)
    scores = left_out([scaled(np.ones((9, 4), np.float32))], target, 2, np.arange(9))
    assert np.isfinite(scores).all()
    assert (scores.argmax(1) == 0).all()
