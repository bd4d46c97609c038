import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from breedline import alike
from breedline.alike import Gallery, confirmed

CPU = torch.device("cpu")


def test_the_nearest_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "BLOCK", 2)
    gallery = Gallery(np.array([[1, 0], [9, 1], [1, 1], [0, 1], [-1, 0]], np.float32), CPU)
    kinds = np.array([0, 0, 1, 0, 2])
    rows = np.array([0, 0, 2, 4])
    assert gallery.nearest(rows, kinds, np.array([0, 1, 1, 0]), 2) == [[1, 3], [2], [], [3, 1]]


def test_pairs_are_of_different_kinds_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "BLOCK", 3)
    same = Gallery(np.ones((100, 3), np.float32), CPU)
    assert list(same.similar(np.zeros(100, int))) == []
    pairs = list(same.similar(np.arange(100) % 2))
    assert 50 <= len(pairs) <= 100 * alike.CANDIDATES
    assert all(one < other and (one - other) % 2 for one, other, _ in pairs)
    assert list(Gallery(np.eye(3, dtype=np.float32), CPU).similar(np.arange(3))) == []
    assert list(Gallery(np.zeros((3, 2), np.float32), CPU).similar(np.arange(3))) == []


def _jpeg(image: Image.Image, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_a_pair_is_confirmed_by_what_is_seen_not_by_the_file() -> None:
    def photo(seed: int) -> Image.Image:
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype("uint8")
        return Image.fromarray(noise).resize((200, 200)).filter(ImageFilter.GaussianBlur(3))

    files = [_jpeg(photo(0)), _jpeg(photo(0).resize((120, 120)), 40), _jpeg(photo(1))]
    read: list[int] = []
    pairs = [(0, 1, 0.9), (0, 2, 0.95), (1, 2, 0.86)]
    assert confirmed(pairs, lambda row: read.append(row) or files[row]) == [(0, 1, 0.9)]  # type: ignore[func-returns-value]
    assert sorted(read) == [0, 1, 2]
