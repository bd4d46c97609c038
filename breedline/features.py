"""Features: what a pretrained body, the model without its head, makes of presized images.

They are computed chunk by chunk, and each chunk is kept as a checkpoint, so that a killed run computes only the rest. On a
cluster (cluster.py) one task is one chunk: the worker builds the same body, reads the same images and leaves the checkpoint
in the cache, which all machines share; here it is read. What makes views random is drawn here, before the cluster's own
threads can draw from the same generators, so that views are the same wherever they are looked at. A feature may differ in
its last digits there, as on any machine that computes with another number of threads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from breedline.checkpoints import Checkpoints
from breedline.cluster import VARIABLE, each, is_set
from breedline.device import pick_device, pick_precision, set_seed
from breedline.errors import BreedlineError
from breedline.inference import in_batches, infer
from breedline.items import Item
from breedline.params import Augment
from breedline.pixels import Store
from breedline.progress import progress
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from breedline.views import Geometry, normalised
from breedline.zoo import features, load_pretrained

if TYPE_CHECKING:
    from breedline.augment import Drawn, Transforms

CHUNK = 4096
"""Images whose features are kept in one checkpoint."""


@dataclass(frozen=True)
class Body:
    """A pretrained body and the images that it sees, in words that any machine with the same files understands."""

    arch: str
    classes: int
    """Those of the head, which has no part in this."""
    weights: Path
    """The folder of the weights stage."""
    presized: Path
    """The presized shard set."""
    geometry: Geometry
    precision: str
    """bf16, fp16 or fp32; a machine that cannot takes what comes nearest."""
    channels_last: bool = False

    def open(self) -> "Extractor":
        """Build it on this machine's device.

        Raises:
            BreedlineError: weights that do not fit the architecture, or none; or the shard set is not whole.
        """
        device = pick_device()
        model = load_pretrained(self.arch, self.classes, self.weights)
        if model is None:
            raise BreedlineError(f"{self.weights} holds no pretrained weights: name some as weights.source")
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        store = Store(ShardSet(self.presized, PRESIZED_COLUMNS), device, self.geometry.max_side)
        able = replace(self, precision=pick_precision(self.precision, device))
        return Extractor(able, model.eval().to(device).to(memory_format=layout), store)


class _Chunk(NamedTuple):
    """The images of one checkpoint, in batches; with `augment`, random views of them are seen, as `drawn` for each batch."""

    name: str
    batches: list[Sequence[Item]]
    augment: Augment | None = None
    drawn: "Iterable[Sequence[Drawn]]" = ()

    def sent(self) -> "_Chunk":
        """The same with all random numbers drawn."""
        return self._replace(drawn=[[one.cpu() for one in views] for views in self.drawn])


@dataclass(frozen=True)
class Extractor:
    """A body at work on this machine; the model in evaluation mode."""

    body: Body
    model: nn.Module
    store: Store

    def central(self, items: Sequence[Item], batch_size: int, checkpoints: Checkpoints, stage: str) -> torch.Tensor:
        """The features of the items' central views, (1, images, features) in float32 on the CPU.

        They are computed here, or by the cluster if there is one.

        Args:
            checkpoints: where chunks of them are kept.
            stage: its name, for people.

        Raises:
            BreedlineError: the cluster does not answer, or its workers have other files.
        """
        chunks = [
            _Chunk(f"central-{number}", list(in_batches(chunk, batch_size)))
            for number, chunk in enumerate(in_batches(items, CHUNK))
        ]
        return self._all(chunks, checkpoints, f"{stage} (features of central views)")

    def random(
        self,
        items: Sequence[Item],
        batch_size: int,
        checkpoints: Checkpoints,
        stage: str,
        *,
        augment: Augment,
        views: int,
        seed: int,
    ) -> torch.Tensor:
        """The same of so many random views of each item, (views, images, features)."""
        # fastai, which draws them, takes as long to import as all else
        from breedline.augment import Transforms

        transforms = Transforms(self.body.geometry, augment)
        chunks = []
        for number, chunk in enumerate(in_batches(items, CHUNK)):
            batches = list(in_batches(chunk, batch_size))
            drawn = _draw(transforms, [len(batch) for batch in batches], views, seed + number, self.store.device)
            chunks.append(_Chunk(f"random-{number}", batches, augment, drawn))
        return self._all(chunks, checkpoints, f"{stage} (features of random views)")

    def _all(self, chunks: list[_Chunk], checkpoints: Checkpoints, what: str) -> torch.Tensor:
        images = {chunk.name: sum(map(len, chunk.batches)) for chunk in chunks}
        with progress(what, sum(images.values())) as advance:
            found = {chunk.name: checkpoints.kept(chunk.name) for chunk in chunks}
            missing = [chunk for chunk in chunks if found[chunk.name] is None]
            if missing and is_set():
                work = [_Work(self.body, chunk.sent(), checkpoints) for chunk in missing]
                for name in each(_leave, work, what):
                    found[name] = checkpoints.kept(name)
                    if found[name] is None:
                        raise BreedlineError(
                            f"a worker of {VARIABLE} left nothing in {checkpoints.folder}: give all machines the same "
                            "BREEDLINE_CACHE"
                        )
                    advance(images[name])
            else:
                for chunk in missing:
                    found[chunk.name] = self._features(chunk, advance)
                    checkpoints.keep(chunk.name, found[chunk.name])
        return torch.cat(list(found.values()), dim=1)

    def _features(self, chunk: _Chunk, advance: Callable[[int], None] = lambda images: None) -> torch.Tensor:
        device, precision = self.store.device, self.body.precision
        seen, of_body = self._views(chunk), partial(features, self.model)
        return infer(of_body, seen, lambda views: views, device=device, precision=precision, advance=advance).cpu()

    def _views(self, chunk: _Chunk) -> Iterator[list[torch.Tensor]]:
        """For each batch as many inputs of the model as there are views."""
        geometry, store = self.body.geometry, self.store
        if chunk.augment is None:
            for squares in store.squares(chunk.batches, geometry.size):
                yield [normalised(squares, geometry)]
            return
        from breedline.augment import Transforms

        transforms = Transforms(geometry, chunk.augment)
        for pixels, drawn in zip(store.batches(chunk.batches), chunk.drawn, strict=True):
            yield [transforms.finished(pixels, store.device, one) for one in drawn]


def _draw(
    transforms: "Transforms", batches: list[int], views: int, seed: int, device: torch.device
) -> "Iterator[list[Drawn]]":
    """Draw the views of a chunk, batch by batch; seeded for each chunk, so that a resumed run draws the same."""
    set_seed(seed)
    for count in batches:
        yield [transforms.draw(count, device) for _ in range(views)]


class _Work(NamedTuple):
    """What a worker of a cluster is told of a chunk."""

    body: Body
    chunk: _Chunk
    checkpoints: Checkpoints


def _leave(work: _Work) -> str:
    """Leave the features of a chunk as a checkpoint, in a worker of a cluster; the checkpoint's name."""
    name = work.chunk.name
    if work.checkpoints.kept(name) is None:
        extractor = _opened(work.body, work.checkpoints.folder)
        work.checkpoints.keep(name, extractor._features(work.chunk))
    return name


@lru_cache(maxsize=1)
def _opened(body: Body, inputs: Path) -> Extractor:
    """One for all chunks of a worker; the folder `inputs` is named by the hash of all that its checkpoints depend on."""
    return body.open()
