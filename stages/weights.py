"""Fetch and pin the pretrained weights, apart from the images, so that another architecture never fetches these again."""

from pathlib import Path

from breedline.edge import run
from breedline.params import Weights
from breedline.weights import fetch_weights


def weights(params: Weights, arch: str, *, weights: Path) -> None:
    """Put the pretrained weights of `arch` that `params` names into the folder `weights`, with a note of what they are.

    Raises:
        BreedlineError: no weights are known for `arch`, or they are not as pinned.
        NetworkError: a server did not answer; what has arrived is kept for the next run.
    """
    fetch_weights(params, arch, weights)


if __name__ == "__main__":
    run(weights)
