from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from breedline.errors import BreedlineError
from breedline.training import Training
from breedline.zoo import linear_head

Make = Callable[..., Training]


def of_size(training: Training, images: int) -> Training:
    """The training with so many images to train on, which are all the same."""
    (first, *_), _ = training.split("train")
    return replace(training, items=[first] * images)


@pytest.mark.parametrize(
    ("wanted", "images", "batch_size"), [("auto", 1000, 32), ("auto", 18, 18), (64, 1000, 64), (64, 18, 18)]
)
def test_a_batch_has_at_most_all_images(training: Make, wanted: str | int, images: int, batch_size: int) -> None:
    assert of_size(training(batch_size=wanted), images).batch_size == batch_size


@pytest.mark.parametrize(
    ("wanted", "images", "batch_size", "pretrained", "epochs"),
    [
        ("auto", 18, "auto", True, 16),  # one step an epoch: as many epochs as there may be
        ("auto", 128, 32, True, 8),
        ("auto", 200, 32, True, 5),
        ("auto", 511, 16, True, 4),  # 128 steps
        ("auto", 512, 32, True, 6),
        ("auto", 100_000, "auto", True, 6),
        ("auto", 200, 32, False, 15),
        ("auto", 1000, 32, False, 18),
        (3, 1000, 32, True, 3),
        (3, 1000, 32, False, 3),
        (0, 1000, 32, True, 0),
    ],
)
def test_epochs_make_enough_steps(
    training: Make, wanted: str | int, images: int, batch_size: str | int, pretrained: bool, epochs: int
) -> None:
    assert of_size(training(epochs=wanted, batch_size=batch_size), images).epochs(pretrained) == epochs


@pytest.mark.parametrize("pretrained", [True, False])
def test_the_model_before_training_is_always_the_same(training: Make, pretrained: bool) -> None:
    one = training(pretrained)
    (first, said), (second, _) = one.model(), one.model()
    assert said is pretrained
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    other, _ = replace(one, params=one.params.model_copy(update={"seed": 7})).model()
    assert not torch.equal(linear_head(first).weight, linear_head(other).weight)
    body = [torch.equal(model.conv1[0].weight, first.conv1[0].weight) for model in (second, other)]  # type: ignore[union-attr,operator,index]
    assert body == [True, pretrained]


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_layout_of_the_weights_is_the_one_that_is_set(training: Make, channels_last: bool) -> None:
    weight = training(channels_last=channels_last).model()[0].conv1[0].weight  # type: ignore[union-attr,operator,index]
    assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_targets_are_positions_in_the_list_of_classes(training: Make) -> None:
    one = training()
    items, target = replace(one, classes=["b", "a"]).split("valid")
    assert {item.split for item in items} == {"valid"}
    assert target.tolist() == ["ba".index(item.label) for item in items]


def test_what_does_not_fit_is_tried_with_half_of_it(training: Make, caplog: pytest.LogCaptureFixture) -> None:
    one, tried = training(), []

    def phase(given: Training, part: int, word: str, *, number: int) -> str:
        assert given is one
        tried.append(part)
        if part > 4:
            raise torch.OutOfMemoryError
        return f"{word} {number}"

    assert one.until_it_fits(phase, "word", number=3) == "word 3"
    assert one.until_it_fits(phase, "word", number=4) == "word 4"
    assert tried == [10, 5, 3, 3], "the second phase begins where the first one ended"
    assert caplog.messages == [f"train: out of memory: batches of 10 from now on in parts of {n}" for n in (5, 3)]


def test_too_little_memory_for_two_images_is_one_line(training: Make) -> None:
    tried = []

    def phase(_: Training, part: int) -> None:
        tried.append(part)
        raise torch.OutOfMemoryError

    with pytest.raises(BreedlineError, match=r"memory of the CPU.* is too small for two images.*train.image_size"):
        training().until_it_fits(phase)
    assert tried == [10, 5, 3, 2]


def test_a_process_that_trains_with_others_does_not_halve_its_batches(
    training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    def phase(training: Training, part: int) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        BreedlineError, match=r"too small for its part of 10 images: choose a smaller train\.batch_size"
    ):
        training().until_it_fits(phase)
