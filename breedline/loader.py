"""The DataBlock, and its data loader, which shows random views of the decoded images of a Store, or their central squares."""

from collections.abc import Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import TfmdDL
from fastai.data.transforms import FuncSplitter
from fastai.vision.core import PILImage, TensorCategory, TensorImage
from fasttransform import Transform
from PIL import Image

from breedline.augment import TRAINING, Transforms
from breedline.items import Item, Photo, photo
from breedline.pixels import Store, to_device
from breedline.ranks import part
from breedline.shards import ShardSet


class OpenImage(Transform):
    """fastai's item transform from an `Item`, or from an image elsewhere, to the decoded image."""

    input_types = (Item, Path, str, Image.Image)
    """What fastai's `test_dl` takes for the beginning of the transforms; it would else be the type of the first item."""

    def __init__(self, images: ShardSet) -> None:
        super().__init__()
        self.images = images

    def encodes(self, item: Item | Path | str | Image.Image) -> PILImage:
        if isinstance(item, Item):
            return PILImage.create(self.images.read(item.shard, item.offset, item.size))
        return PILImage.create(item)


def data_block(images: ShardSet, classes: list[str], transforms: Transforms) -> DataBlock:
    """From items to normalised batches; split `valid` is the validation set, all other items are the training set."""
    return DataBlock(
        blocks=(TransformBlock(type_tfms=OpenImage(images)), CategoryBlock(vocab=classes, sort=False)),
        get_y=attrgetter("label"),
        splitter=FuncSplitter(_is_valid),
        item_tfms=transforms.item,
        batch_tfms=transforms.batch,
    )


def _is_valid(item: Item) -> bool:
    return item.split == "valid"


class PixelsDL(TfmdDL):
    """A fastai data loader whose images come from a Store; `transforms` gives the views of them, and finishes these.

    Used in place of TfmdDL: `block.dataloaders(items, dl_type=PixelsDL, store=store, transforms=transforms)`, where
    `transforms` are those of the DataBlock. Its items may also be images from elsewhere (see `Photo`).
    """

    def __init__(self, dataset: Any, store: Store, transforms: Transforms, **kwargs: Any) -> None:
        self.store, self.transforms = store, transforms
        left = [transform for transform in kwargs["after_batch"] if transform not in transforms.replaced]
        super().__init__(dataset, **{**kwargs, "after_batch": left, "num_workers": 0})
        self._n_inp, self._types = 1, {tuple: [TensorImage, TensorCategory]}
        self._targets: list[torch.Tensor] | None = None

    def new(self, dataset: Any = None, cls: Any = None, **kwargs: Any) -> "PixelsDL":
        """A loader of the same kind, as fastai creates for each further split and for images to predict."""
        return super().new(dataset, cls, **{"store": self.store, "transforms": self.transforms, **kwargs})

    def create_batches(self, samps: Iterable[int]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Views and class indices, on the device.

        Of several processes that train together (together.py), each has a part of every batch, or validates some of them.
        """
        chunks = list(self.chunkify(samps))
        if self.dataset.split_idx == TRAINING:
            rows = [chunk[part()] for chunk in chunks]
            views = self._random_views(self._items(rows), map(len, chunks))
        else:
            rows = chunks[part()]
            views = self._squares(self._items(rows))
        for own, seen in zip(rows, views, strict=True):
            yield TensorImage(seen), *(to_device(column[own], self.device) for column in self._columns())

    def _items(self, chunks: list[list[int]]) -> Iterator[list[Item | Photo]]:
        items = self.dataset.items
        return ([self._own(items[row]) for row in chunk] for chunk in chunks)

    def _random_views(self, chunks: Iterable[list[Item | Photo]], whole: Iterable[int]) -> Iterator[torch.Tensor]:
        """(images, 3, size, size) in 0 to 1; `whole` are the numbers of images in the batches of which the chunks are parts."""
        for pixels, count in zip(self.store.batches(chunks), whole, strict=True):
            drawn = self.transforms.draw(count, self.device)  # each process those of the whole batch
            yield self.transforms.views(pixels, drawn.take(part()), self.device)

    def _squares(self, chunks: Iterable[list[Item | Photo]]) -> Iterator[torch.Tensor]:
        """The central squares; (images, 3, size, size) in 0 to 1."""
        squares = self.store.squares(chunks, self.transforms.geometry.size)
        return (batch.permute(0, 3, 1, 2).float() / 255 for batch in squares)

    def _own(self, item: Any) -> Item | Photo:
        return item if isinstance(item, Item) else photo(item, self.transforms.geometry.item_size)

    def _columns(self) -> list[torch.Tensor]:
        """The dataset's columns beside the images: class indices, or nothing for images to predict."""
        if self._targets is None:
            rows = range(len(self.dataset))
            self._targets = [torch.stack([column[row] for row in rows]) for column in self.dataset.tls[1:]]
        return self._targets
