"""Images that look alike: the nearest ones of a class, and near-duplicates that contradict each other."""

import io
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from PIL import Image

SIMILAR = 0.85
"""Cosine of the features of near-duplicates, at least. A photo saved at half the size or a poor quality has 0.85 to 0.99."""
BITS = 4
"""Bits of 64 in which their perceptual hashes differ, at most; a photo of which 2 % were cut off differs in 4."""
CANDIDATES = 10
"""Images with which each one is compared by hash, at most: the most similar ones."""
BLOCK = 1024
"""Images whose similarities to all others are in memory at a time."""


class Gallery:
    """Images by the direction of their features, on a device."""

    def __init__(self, features: np.ndarray, device: torch.device) -> None:
        """Takes (images, numbers)."""
        self.directions = torch.nn.functional.normalize(torch.tensor(features, device=device))

    def nearest(self, rows: np.ndarray, kinds: np.ndarray, wanted: np.ndarray, count: int) -> list[list[int]]:
        """For each of these rows, up to `count` others of the kind `wanted` of it, the most similar first.

        Args:
            kinds: (images,) integers.
            wanted: (rows,) a kind each.
        """
        of_kind = torch.tensor(kinds).to(self.directions.device)
        found = []
        for some, similarity in self._similarities(rows):
            own, only = (torch.tensor(numbers[some]).to(similarity.device) for numbers in (rows, wanted))
            similarity[of_kind != only[:, None]] = -torch.inf
            similarity[torch.arange(len(own)), own] = -torch.inf
            best = similarity.topk(min(count, similarity.shape[1]))
            for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found.append([place for value, place in zip(values, places, strict=True) if value > -torch.inf])
        return found

    def similar(self, kinds: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """Pairs of rows of different kinds, the first the lower one, with their cosine, SIMILAR or more; in order.

        Each image is in pairs with its CANDIDATES most similar ones only, or a thousand equal ones would make a million.
        """
        of_kind = torch.tensor(kinds).to(self.directions.device)
        pairs: dict[tuple[int, int], float] = {}
        for some, similarity in self._similarities(np.arange(len(kinds))):
            similarity[of_kind == of_kind[some, None]] = -torch.inf
            best = similarity.topk(min(CANDIDATES, similarity.shape[1]))
            for row, place in torch.nonzero(best.values >= SIMILAR).tolist():
                one, other = some.start + row, int(best.indices[row, place])
                pairs[min(one, other), max(one, other)] = float(best.values[row, place])
        return ((*rows, similarity) for rows, similarity in sorted(pairs.items()))

    def _similarities(self, rows: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
        """The cosines of BLOCK rows at a time with all images."""
        for first in range(0, len(rows), BLOCK):
            some = slice(first, first + BLOCK)
            yield some, self.directions[torch.tensor(rows[some])] @ self.directions.T


def confirmed(pairs: Iterable[tuple[int, int, float]], read: Callable[[int], bytes]) -> list[tuple[int, int, float]]:
    """Those pairs whose perceptual hashes agree, the most similar first.

    Args:
        read: gives the JPEG of a row.
    """
    import imagehash  # with scipy's transforms it takes a second to import

    hashes: dict[int, imagehash.ImageHash] = {}

    def hash_of(row: int) -> imagehash.ImageHash:
        if row not in hashes:
            with Image.open(io.BytesIO(read(row))) as image:
                hashes[row] = imagehash.phash(image)
        return hashes[row]

    found = [pair for pair in pairs if hash_of(pair[0]) - hash_of(pair[1]) <= BITS]
    return sorted(found, key=lambda pair: -pair[2])
