"""Decoded images: where their pixels are kept, and how they get to the device.

Images of any size lie end to end in one array, so that nothing is padded and a batch is a list of positions in it. They
are decoded once, by threads (decoding releases the GIL), and stay on the GPU if they fit there, else in memory; if they
fit in neither, batches are decoded ahead while the model trains on an earlier one.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import psutil
import torch
from joblib import cpu_count
from PIL import Image
from rich.filesize import decimal

from breedline.errors import BreedlineError
from breedline.items import Item, Photo
from breedline.preprocessing import decoded, view_of_presized
from breedline.progress import progress
from breedline.shards import ShardSet

log = logging.getLogger("breedline")
S = TypeVar("S")
T = TypeVar("T")

HEADROOM = 0.5
"""Share of the free memory that images may take with `keep_images: auto`: the model needs room, too."""
CHUNK = 256
"""Images that are decoded together before they are moved to where they are kept."""
AHEAD = 2
"""Batches that are fetched ahead of the one in use."""
PLACES = {"gpu": "on the GPU", "ram": "in memory"}
CGROUP = Path("/sys/fs/cgroup")


class Pixels(NamedTuple):
    """Images of any size, end to end."""

    values: torch.Tensor
    """(pixels,) int32, each the four bytes R, G, B and an unused one."""
    start: torch.Tensor
    """(images,) int64, index of the image's first pixel; on the CPU, like `height` and `width`."""
    height: torch.Tensor
    width: torch.Tensor

    def take(self, rows: Sequence[int]) -> "Pixels":
        """A selection of the images, which shares their `values`."""
        return Pixels(self.values, self.start[rows], self.height[rows], self.width[rows])

    def gather(self, rows: Sequence[int]) -> "Pixels":
        """A selection of the images with `values` of its own; pinned if these are."""
        few = self.take(rows)
        counts = few.height * few.width
        values = torch.empty(int(counts.sum()), dtype=torch.int32, pin_memory=self.values.is_pinned())
        for piece, start in zip(torch.split(values, counts.tolist()), few.start.tolist(), strict=True):
            piece.copy_(self.values[start : start + len(piece)])
        return few._replace(values=values, start=counts.cumsum(0) - counts)


class Store:
    """Gives the pixels of items, from wherever they are kept."""

    def __init__(self, images: ShardSet, device: torch.device, max_side: int) -> None:
        """Reads a presized set; images whose shorter side is longer than `max_side` pixels are reduced to it."""
        self.images, self.device, self.max_side = images, device, max_side
        self._threads = ThreadPoolExecutor(cpu_count(), "decode")
        self._kept: Pixels | None = None
        self._rows: dict[tuple[str, int], int] = {}
        self._squares = torch.empty(0, 0, 0, 3, dtype=torch.uint8)
        self._square_rows: dict[tuple[str, int], int] = {}
        self._files: dict[tuple[str, int], bytes] = {}

    def keep(self, items: Sequence[Item], where: str, squares: Sequence[Item] = (), size: int = 0) -> None:
        """Decode images now and keep them in place `where`, as `train.keep_images` has it.

        Args:
            items: images to keep whole, for random views.
            squares: images of which the central square of `size` pixels is kept.

        Raises:
            BreedlineError: they do not fit there.
        """
        places = self._places(items)
        total = int((places[1] * places[2]).sum())
        taken = total * 4 + len(squares) * size * size * 3
        place, why = choose(where, taken / 1e9, self.device)
        log.info("train: %d images, %s when decoded: %s", len(items) + len(squares), decimal(taken), why)
        if place == "disk":
            if where == "auto":
                self._keep_files([*items, *squares])
            return
        device = self.device if place == "gpu" else torch.device("cpu")
        # pinned, so that copies to the GPU need not be waited for
        how: dict[str, Any] = {"device": device, "pin_memory": device != self.device and self.device.type == "cuda"}
        values = torch.empty(total, dtype=torch.int32, **how)
        kept_squares = torch.empty(len(squares), size, size, 3, dtype=torch.uint8, **how)
        with progress("train (decoding images)", len(items) + len(squares)) as advance:
            for first in range(0, len(items), CHUNK):
                some = self._decode(items[first : first + CHUNK], advance).values
                values[places[0][first] :][: len(some)] = some.to(device)
            for first in range(0, len(squares), CHUNK):
                few = self._decode_squares(squares[first : first + CHUNK], size)
                kept_squares[first:][: len(few)] = few.to(device)
                advance(len(few))
        self._kept, self._rows = Pixels(values, *places), _rows(items)
        self._squares, self._square_rows = kept_squares, _rows(squares)

    def _keep_files(self, items: Sequence[Item]) -> None:
        """Keep the JPEGs, a tenth of their pixels, if they fit: no epoch then waits for a disk, or for one on the network."""
        size = sum(item.size for item in items)
        if size <= HEADROOM * _free_memory():
            log.info("train: their JPEGs, %s, are kept in memory", decimal(size))
            self._files = {(item.shard, item.offset): self._bytes(item) for item in items}

    def batches(self, chunks: Iterable[Sequence[Item | Photo]]) -> Iterator[Pixels]:
        """The pixels of each chunk of images, on the device; AHEAD chunks are fetched at once, or while one is in use."""
        return _ahead(self._load, chunks)

    def squares(self, chunks: Iterable[Sequence[Item | Photo]], size: int) -> Iterator[torch.Tensor]:
        """The same of their central squares, (images, size, size, 3) uint8, which preprocessing.py makes."""

        def load(items: Sequence[Item | Photo]) -> torch.Tensor:
            rows = _found(items, self._square_rows) if size == self._squares.shape[1] else None
            if rows is None:
                found = self._decode_squares(items, size)
            else:
                found = self._squares[to_device(torch.tensor(rows), self._squares.device)]
            return found if found.device == self.device else to_device(found, self.device)

        return _ahead(load, chunks)

    def _load(self, items: Sequence[Item | Photo]) -> Pixels:
        rows = _found(items, self._rows)
        if self._kept is None or rows is None:
            few = self._decode(items)
        elif self._kept.values.device == self.device:
            return self._kept.take(rows)
        else:
            few = self._kept.gather(rows)
        return few._replace(values=to_device(few.values, self.device))

    def _decode_squares(self, items: Sequence[Item | Photo], size: int) -> torch.Tensor:
        found = self._threads.map(lambda item: view_of_presized(self._bytes(item), size), items)
        return torch.from_numpy(np.stack(list(found)))

    def _decode(self, items: Sequence[Item | Photo], advance: Callable[[int], None] = lambda pieces: None) -> Pixels:
        start, height, width = self._places(items)
        values = torch.empty(int((height * width).sum()), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        raw = values.numpy()

        def one(item: Item | Photo, first: int) -> None:
            height, width = self._shape(item)
            picture = decoded(self._bytes(item))
            if picture.height != height:
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            raw[first : first + height * width] = np.frombuffer(picture.tobytes("raw", "RGBX"), np.int32)

        for _ in self._threads.map(one, items, start.tolist()):
            advance(1)
        return Pixels(values, start, height, width)

    def _bytes(self, item: Item | Photo) -> bytes:
        if isinstance(item, Photo):
            return item.data
        kept = self._files.get((item.shard, item.offset))
        return self.images.read(item.shard, item.offset, item.size) if kept is None else kept

    def _places(self, items: Sequence[Item | Photo]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`start`, `height` and `width` of the items when they lie end to end."""
        height, width = torch.tensor([self._shape(item) for item in items], dtype=torch.int64).unbind(1)
        counts = height * width
        return counts.cumsum(0) - counts, height, width

    def _shape(self, item: Item | Photo) -> tuple[int, int]:
        """Height and width when decoded and, if need be, reduced."""
        scale = min(1, self.max_side / min(item.height, item.width))
        return round(item.height * scale), round(item.width * scale)


def _rows(items: Sequence[Item]) -> dict[tuple[str, int], int]:
    return {(item.shard, item.offset): row for row, item in enumerate(items)}


def _found(items: Sequence[Item | Photo], rows: dict[tuple[str, int], int]) -> list[int] | None:
    """The row of each item; None if one has none."""
    found = [rows.get((item.shard, item.offset)) for item in items if isinstance(item, Item)]
    return None if None in found or len(found) < len(items) else cast(list[int], found)


def _ahead(fetch: Callable[[S], T], chunks: Iterable[S]) -> Iterator[T]:
    """`fetch` of each chunk, in order; the first AHEAD are fetched at once, the others while one is in use."""
    fetcher = ThreadPoolExecutor(1, "fetch")
    to_come = iter(chunks)
    coming = deque(fetcher.submit(fetch, chunk) for chunk in islice(to_come, AHEAD))

    def in_order() -> Iterator[T]:
        with fetcher:
            for chunk in to_come:
                coming.append(fetcher.submit(fetch, chunk))
                yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    return in_order()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; a copy to a GPU is asynchronous, so that nothing waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def choose(where: str, gigabytes: float, device: torch.device) -> tuple[str, str]:
    """The place (gpu, ram or disk) for images of `gigabytes` when decoded, and the reason in words.

    Raises:
        BreedlineError: they do not fit where `where` wants them.
    """
    if where == "disk":
        return "disk", "decoded anew in every epoch, as train.keep_images says"
    free = {"ram": _free_memory() / 1e9}
    if device.type == "cuda":
        free = {"gpu": torch.cuda.mem_get_info(device)[0] / 1e9, **free}
    said = " and ".join(f"{room:.1f} GB {PLACES[place]}" for place, room in free.items()) + " are free"
    if where in free:
        if gigabytes > free[where]:
            raise BreedlineError(
                f"train.keep_images is {where}, but the images take {gigabytes:.1f} GB, and {said}: set it to auto"
            )
        return where, f"kept {PLACES[where]}, as train.keep_images says ({said})"
    if where == "gpu":
        said += ", and there is no CUDA GPU"
    for place, room in free.items():
        if gigabytes <= HEADROOM * room:
            return place, f"kept {PLACES[place]} ({said})"
    return "disk", f"decoded anew in every epoch ({said}, of which images may take half)"


def _free_memory() -> int:
    """Bytes that can be allocated without swapping; in a container, within its own limit."""
    available: int = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except FileNotFoundError:  # no cgroup v2
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))
