import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from rich.filesize import decimal

import breedline.pixels
from breedline.errors import BreedlineError
from breedline.items import Item
from breedline.pixels import Pixels, Store, choose
from breedline.shards import ShardSet

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
Presized = Callable[..., tuple[ShardSet, list[Item]]]


def images(pixels: Pixels) -> list[np.ndarray]:
    """Each image's (height, width, 3)."""
    values = pixels.values.numpy().view(np.uint8).reshape(-1, 4)[:, :3]
    places = zip(pixels.start.tolist(), pixels.height.tolist(), pixels.width.tolist(), strict=True)
    return [values[start : start + height * width].reshape(height, width, 3) for start, height, width in places]


def decoded(store: Store, item: Item) -> Image.Image:
    return Image.open(io.BytesIO(store.images.read(item.shard, item.offset, item.size)))


@pytest.mark.parametrize("kept", ["ram", "disk", "auto"])
@pytest.mark.parametrize("chunk", [2, 256])
def test_the_pixels_are_those_of_the_files(
    presized: Presized, monkeypatch: pytest.MonkeyPatch, kept: str, chunk: int
) -> None:
    monkeypatch.setattr(breedline.pixels, "CHUNK", chunk)
    shards, items = presized([(20, 30), (31, 17), (1, 5), (8, 8), (50, 9)])
    store = Store(shards, CPU, 64)
    store.keep(items, kept)
    order = [items[3], items[0], items[4], items[2], items[1]]
    batches = list(store.batches([order[:2], order[2:4], order[4:]]))
    found = [image for batch in batches for image in images(batch)]
    assert [image.shape[:2] for image in found] == [(item.height, item.width) for item in order]
    for image, item in zip(found, order, strict=True):
        assert np.array_equal(image, np.asarray(decoded(store, item))), item


def test_images_that_are_not_kept_are_decoded_on_the_fly(presized: Presized) -> None:
    shards, items = presized([(20, 30), (31, 17), (8, 8)])
    store = Store(shards, CPU, 64)
    store.keep(items[:1], "ram")
    (batch,) = store.batches([items])
    assert [image.shape[:2] for image in images(batch)] == [(30, 20), (17, 31), (8, 8)]


@pytest.mark.parametrize("chunk", [2, 256])
def test_kept_squares_are_those_of_the_files_and_decoded_once(
    presized: Presized, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(breedline.pixels, "CHUNK", chunk)
    shards, items = presized([(20, 30), (31, 17), (8, 8), (50, 9)])
    store = Store(shards, CPU, 64)
    store.keep(items[:1], "ram", squares=items[1:], size=16)
    order = [items[3], items[1], items[2]]
    (anew,) = Store(shards, CPU, 64).squares([order], 16)
    (other_size,) = store.squares([order], 8)
    (not_kept,) = store.squares([items], 16)
    monkeypatch.setattr(Store, "_bytes", lambda *_: pytest.fail("decoded again"))
    (kept,) = store.squares([order], 16)
    assert torch.equal(kept, anew)
    assert torch.equal(not_kept[[3, 1, 2]], anew)
    assert other_size.shape == (3, 8, 8, 3)


def test_what_is_decoded_anew_is_read_once_if_it_fits(
    presized: Presized, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "breedline")
    shards, items = presized([(20, 30), (31, 17), (8, 8)])
    size = sum(item.size for item in items)
    monkeypatch.setattr(breedline.pixels, "_free_memory", lambda: 2 * size)
    store = Store(shards, CPU, 64)
    store.keep(items[:2], "auto", squares=items[2:], size=8)
    assert caplog.messages[0].endswith("of which images may take half)")
    assert caplog.messages[1] == f"train: their JPEGs, {decimal(size)}, are kept in memory"
    monkeypatch.setattr(ShardSet, "read", lambda *_: pytest.fail("read again"))
    assert [image.shape[:2] for batch in store.batches([items]) for image in images(batch)] == [
        (30, 20),
        (17, 31),
        (8, 8),
    ]


def test_larger_images_are_reduced(presized: Presized) -> None:
    shards, items = presized([(40, 80), (60, 45), (16, 90)])
    store = Store(shards, CPU, 20)
    (batch,) = store.batches([items])
    found = images(batch)
    assert [image.shape[:2] for image in found] == [(40, 20), (20, 27), (90, 16)]
    wanted = decoded(store, items[0]).resize((20, 40), Image.Resampling.BILINEAR)
    assert np.array_equal(found[0], np.asarray(wanted))


def test_gathered_images_are_copies_of_the_same_pixels(presized: Presized) -> None:
    shards, items = presized([(20, 30), (31, 17), (1, 5)])
    (pixels,) = Store(shards, CPU, 64).batches([items])
    few = pixels.gather([2, 0])
    assert len(few.values) == 5 + 600
    for one, other in zip(images(few), images(pixels.take([2, 0])), strict=True):
        assert np.array_equal(one, other)


def test_an_error_in_a_decoding_thread_is_raised_with_the_batch(presized: Presized) -> None:
    shards, items = presized([(20, 30), (31, 17)])
    volume = shards.folder / items[0].shard
    volume.write_bytes(volume.read_bytes().replace(b"IHDR", b"IHXR"))
    with pytest.raises(OSError, match="cannot identify image file"):
        list(Store(shards, CPU, 64).batches([items]))


class Free(NamedTuple):
    gpu: float
    ram: float


@pytest.mark.parametrize(
    ("wanted", "device", "free", "where", "why"),
    [
        ("auto", CUDA, Free(4, 100), "gpu", "kept on the GPU (4.0 GB on the GPU and 100.0 GB in memory are free)"),
        ("auto", CUDA, Free(3, 100), "ram", "kept in memory (3.0 GB on the GPU and 100.0 GB in memory are free)"),
        ("auto", CUDA, Free(3, 3), "disk", "decoded anew in every epoch (3.0 GB on the GPU and 3.0 GB in memory are"),
        ("auto", CPU, Free(0, 5), "ram", "kept in memory (5.0 GB in memory are free)"),
        ("gpu", CUDA, Free(3, 100), "gpu", "kept on the GPU, as train.keep_images says"),
        ("gpu", CPU, Free(3, 100), "ram", "kept in memory (100.0 GB in memory are free, and there is no CUDA GPU)"),
        ("ram", CUDA, Free(9, 3), "ram", "kept in memory, as train.keep_images says"),
        ("disk", CUDA, Free(9, 9), "disk", "decoded anew in every epoch, as train.keep_images says"),
    ],
)
def test_where_two_gigabytes_of_images_are_kept(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: Any, free: Free, where: str, why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free.gpu * 1e9, 80e9))
    monkeypatch.setattr(breedline.pixels, "_free_memory", lambda: free.ram * 1e9)
    place, reason = choose(wanted, 2.0, device)
    assert place == where
    assert reason.startswith(why)


@pytest.mark.parametrize(("wanted", "device"), [("gpu", CUDA), ("ram", CPU)])
def test_images_that_do_not_fit_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1e9, 80e9))
    monkeypatch.setattr(breedline.pixels, "_free_memory", lambda: 1e9)
    with pytest.raises(
        BreedlineError,
        match=rf"train.keep_images is {wanted}, but the images take 2.0 GB, and 1.0 GB .* are free: set it to auto",
    ):
        choose(wanted, 2.0, device)


@pytest.mark.parametrize(("limit", "free"), [("3000000000", 1.0), ("max", 7.0), (None, 7.0)])
def test_the_memory_limit_of_a_container_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None, free: float
) -> None:
    class Memory(NamedTuple):
        available: int = 7_000_000_000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    monkeypatch.setattr(breedline.pixels, "CGROUP", tmp_path)
    if limit:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text("2000000000\n")
    assert breedline.pixels._free_memory() == free * 1e9
