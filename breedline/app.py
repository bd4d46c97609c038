"""A page on this machine alone that shows what a published model sees in a photo, and which part of it decides.

Where evaluate has kept training photos (neighbours.py), the page also shows those that are most similar to the model.
page.py guards it, so only photos that the page itself (app.html) sends are looked at.
"""

import asyncio
import base64
import io
import sys
import warnings
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from breedline import page
from breedline.bundle import WEIGHTS
from breedline.classifier import Classifier, Photo, Prediction, Unreadable
from breedline.errors import BreedlineError
from breedline.neighbours import Neighbour, Neighbours, read

MAX_UPLOAD = 50_000_000
"""Bytes of a photo."""
TOP = 5
"""Classes that are told."""
NEAREST = 5
"""Training photos that are shown."""
CELLS, PATCH = 8, 3
"""Places to which a patch is slid, in each direction, and how many of them it is wide: models that are sure of a photo
hardly notice smaller ones."""


def main(bundle: Path, neighbours: Path, port: int | None, *, needed: bool) -> None:
    """Show the page for the model of the folder `bundle` until Ctrl-C.

    Args:
        neighbours: the file of training photos to show the nearest of. Unless it is `needed`, there may be none, and if
            it does not fit, a line says so.

    Raises:
        BreedlineError: there is no whole bundle, no fitting file of training photos where one is needed, or the port is
            taken.
    """
    warnings.filterwarnings("ignore", module="PIL")  # of metadata
    observer = Observer.load(bundle)
    try:
        if needed or neighbours.exists():
            observer.neighbours = read(neighbours, observer.spec.files[WEIGHTS], observer.n_features)
    except BreedlineError as error:
        if needed:
            raise
        print(f"shown without training photos: {error}", file=sys.stderr)
    page.serve(lambda number: application(observer, number), port, "Drop a photo on {} (Ctrl-C ends this)")


# What the model sees, and where


class Look(NamedTuple):
    """What a model sees in a photo, and which part of it decides."""

    prediction: Prediction
    view: np.ndarray
    """The square that the model sees, (size, size, 3) bytes."""
    fall: np.ndarray
    """(cells, cells): how much less probable the best class is with a patch over that place; below 0 where it is more."""
    nearest: list[Neighbour]
    """The training photos most similar to it, the most similar first; none where there are none to compare with."""


class Observer(Classifier):
    """A classifier that tells where it looks, too, and of what it has seen a photo reminds it."""

    neighbours: Neighbours | None = None
    """Training photos to compare with, as this model sees them."""

    def look(self, photo: Photo) -> Look | Unreadable:
        """What the model sees in a photo. Raises BreedlineError if the model fails, or its numbers are not finite."""
        view = self._view(photo.name, photo.data)
        if isinstance(view, Unreadable):
            return view
        (probabilities,) = self._probabilities(view[None])
        prediction = self._named(photo.name, probabilities, TOP, self.spec.none_below)
        nearest = self.neighbours.nearest(self._features(view[None])[0], NEAREST) if self.neighbours else []
        return Look(prediction, view, self._fall(view, probabilities), nearest)

    def _fall(self, view: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """Occlusion: P(best | view) - P(best | view with a patch at row, column), (cells, cells) (Zeiler & Fergus, 2014)."""
        best, cells = int(probabilities.argmax()), min(CELLS, len(view))
        grey = np.rint(255 * np.array(self.spec.preprocessing.mean)).astype(np.uint8)  # 0 when it is normalised
        covered = _covered(view, grey, cells)
        falls = []
        while batch := list(islice(covered, self.batch_size)):
            falls.append(probabilities[best] - self._probabilities(np.stack(batch))[:, best])
        return np.concatenate(falls).reshape(cells, cells)


def _covered(view: np.ndarray, grey: np.ndarray, cells: int) -> Iterator[np.ndarray]:
    """The view with a grey patch over each of cells x cells places, row by row."""
    cell = len(view) / cells
    middles = (np.arange(cells) + 0.5) * cell
    spans = [slice(max(0, round(middle - PATCH / 2 * cell)), round(middle + PATCH / 2 * cell)) for middle in middles]
    for rows, columns in product(spans, repeat=2):
        covered = view.copy()
        covered[rows, columns] = grey
        yield covered


# The server


def application(observer: Observer, port: int) -> Starlette:
    """The page, what it says of the model, and what it asks of a photo; for a server at that port."""
    one_at_a_time = asyncio.Lock()

    async def model(request: Request) -> Response:
        spec = observer.spec
        told = {"arch": spec.arch, "classes": len(spec.classes), "none_below": spec.none_below}
        photos = len(observer.neighbours.names) if observer.neighbours else 0
        return JSONResponse(told | {"neighbours": photos, "max_upload": MAX_UPLOAD})

    async def look(request: Request) -> Response:
        async with one_at_a_time:
            seen = await asyncio.to_thread(observer.look, Photo("photo", await page.body(request, MAX_UPLOAD)))
        return page.refusal(422, seen.reason) if isinstance(seen, Unreadable) else JSONResponse(_told(seen))

    routes = [Route("/model", model), Route("/look", look, methods=["POST"])]
    return page.application(Path(__file__).with_name("app.html"), routes, port)


def _told(look: Look) -> dict[str, object]:
    return {
        "label": look.prediction.label,
        "top": [guess._asdict() for guess in look.prediction.top],
        "view": _as_url(look.view),
        "fall": look.fall.round(6).tolist(),
        "nearest": [
            one._asdict() | {"similarity": round(one.similarity, 6), "thumbnail": _as_url(one.thumbnail)}
            for one in look.nearest
        ],
    }


def _as_url(pixels: np.ndarray) -> str:
    """A picture, (height, width, 3) bytes, as a URL that holds all of it: encoded here, so that a browser decodes no file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
