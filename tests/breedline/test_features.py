"""Features that a cluster computes; with workers that are real processes in test_cluster.py."""

import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import breedline.features
from breedline.checkpoints import Checkpoints
from breedline.errors import BreedlineError
from breedline.features import Extractor
from breedline.probe import compute_features
from breedline.training import Training

Make = Callable[..., Training]


def features(training: Training) -> torch.Tensor:
    return compute_features(training, training.model()[0].eval(), training.split("train")[0], 10)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has a cluster of one worker, which is this process, but gets copies and has generators in another state; the chunks it computes."""
    names: list[str] = []

    def each(function: Callable[[Any], str], work: list[Any], what: str) -> Iterator[str]:
        for piece in pickle.loads(pickle.dumps(work)):  # noqa: S301 - our own
            random.seed()
            torch.seed()
            names.append(piece.chunk.name)
            yield function(piece)

    monkeypatch.setattr(breedline.features, "CHUNK", 8)
    monkeypatch.setenv("BREEDLINE_BACKEND", "dask://somewhere")
    monkeypatch.setattr(breedline.features, "each", each)
    return names


def test_a_worker_sees_the_views_that_are_seen_here(
    training: Make, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = training()
    with monkeypatch.context() as alone:
        alone.delenv("BREEDLINE_BACKEND")
        here = features(replace(one, checkpoints=Checkpoints({"computed": "here"})))
    assert not sent
    assert torch.equal(features(one), here)
    assert sent == [f"{kind}-{number}" for kind in ("central", "random") for number in range(3)]


def test_only_what_is_missing_is_computed_by_the_cluster(training: Make, sent: list[str]) -> None:
    one = training()
    whole = features(one)
    (one.checkpoints.folder / "random-1.pt").unlink()
    sent.clear()
    assert torch.equal(features(one), whole)
    assert sent == ["random-1"]


def test_a_worker_that_does_not_share_the_cache_is_told(
    training: Make, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "keep", lambda *_: None)
    with pytest.raises(BreedlineError, match=r"left nothing in .*: give all machines the same BREEDLINE_CACHE"):
        features(training())


def test_a_body_opens_itself_from_files_alone(training: Make) -> None:
    one = training()
    items, _ = one.split("valid")
    found = [
        extractor.central(items, 3, Checkpoints({"number": number}), "suspects")
        for number, extractor in enumerate((Extractor(one.body, one.model()[0].eval(), one.store), one.body.open()))
    ]
    assert found[0].shape == (1, 6, one.model()[0].num_features)
    assert torch.equal(*found)


def test_a_body_that_is_not_pretrained_is_told(training: Make, tmp_path: Path) -> None:
    with pytest.raises(BreedlineError, match="holds no pretrained weights"):
        training(pretrained=False).body.open()
