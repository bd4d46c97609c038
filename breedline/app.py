"""A page on this machine alone that shows what a published model sees in a photo, and which part of it decides.

Where evaluate has kept training photos (neighbours.py), the page also shows those that are most similar to the model.

The page (app.html) is whole in itself and may ask nobody but this server for anything. The server listens on the loopback
address, where any web page that a browser shows could reach it. So it answers only under its own name, which a name that
was made to lead here (DNS rebinding) is not, and looks only at photos that its own page sends.
"""

import asyncio
import base64
import contextlib
import hashlib
import io
import re
import socket
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from breedline.bundle import WEIGHTS
from breedline.classifier import Classifier, Photo, Prediction, Unreadable
from breedline.errors import BreedlineError
from breedline.neighbours import Neighbour, Neighbours, read

LOOPBACK, PORT = "127.0.0.1", 8000
"""The port is tried where none is asked for; if it is taken, another one will do."""
MAX_UPLOAD = 50_000_000
"""Bytes of a photo."""
SECONDS_TO_UPLOAD = 60
"""Within which a photo must have arrived, as the next one waits for it."""
CONNECTIONS = 32
"""At a time; each further one is refused."""
TOP = 5
"""Classes that are told."""
NEAREST = 5
"""Training photos that are shown."""
CELLS, PATCH = 8, 3
"""Places to which a patch is slid, in each direction, and how many of them it is wide: models that are sure of a photo
hardly notice smaller ones."""
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
Handler = Callable[[Request], Awaitable[Response]]


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
    with _listener(port) as listener:
        number = listener.getsockname()[1]
        config = uvicorn.Config(
            application(observer, number), log_config=None, log_level="error", access_log=False, lifespan="off",
            ws="none", proxy_headers=False, server_header=False, limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        print(f"Drop a photo on http://{LOOPBACK}:{number} (Ctrl-C ends this)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _listener(port: int | None) -> socket.socket:
    """A socket at `port`; with None at PORT or, where that is taken, at any free one. Raises BreedlineError if it is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, PORT if port is None else port))
        listener.listen()
    except OSError as error:
        listener.close()
        if port is None:
            return _listener(0)
        raise BreedlineError(
            f"port {port} cannot be had ({error.strerror}): leave --port out, or name another"
        ) from error
    return listener


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
    page = Path(__file__).with_name("app.html").read_text("utf-8")
    headers = HEADERS | {"Content-Security-Policy": _policy(page)}
    one_at_a_time = asyncio.Lock()

    async def show(request: Request) -> Response:
        return HTMLResponse(page)

    async def model(request: Request) -> Response:
        spec = observer.spec
        told = {"arch": spec.arch, "classes": len(spec.classes), "none_below": spec.none_below}
        photos = len(observer.neighbours.names) if observer.neighbours else 0
        return JSONResponse(told | {"neighbours": photos, "max_upload": MAX_UPLOAD})

    async def look(request: Request) -> Response:
        async with one_at_a_time:
            try:
                async with asyncio.timeout(SECONDS_TO_UPLOAD):
                    data = await _body(request)
            except TimeoutError:
                return _refusal(408, f"it did not arrive within {SECONDS_TO_UPLOAD} seconds")
            except ClientDisconnect:
                return _refusal(400, "it did not arrive whole")
            if data is None:
                return _refusal(413, f"it is larger than {MAX_UPLOAD / 1e6:g} MB")
            try:
                seen = await asyncio.to_thread(observer.look, Photo("photo", data))
            except BreedlineError as error:
                return _refusal(500, str(error))
        return _refusal(422, seen.reason) if isinstance(seen, Unreadable) else JSONResponse(_told(seen))

    async def guard(request: Request, handler: Handler) -> Response:
        host = request.headers.get("host", "")
        if host.partition(":")[0] not in (LOOPBACK, "localhost") or (host.partition(":")[2] or "80") != str(port):
            response = _refusal(421, f"this is http://{LOOPBACK}:{port}, and goes by no other name")
        elif request.method not in ("GET", "HEAD") and request.headers.get("origin") != f"http://{host}":
            response = _refusal(403, "only the page of this address may ask that")
        else:
            response = await handler(request)
        response.headers.update(headers)
        return response

    return Starlette(
        routes=[Route("/", show), Route("/model", model), Route("/look", look, methods=["POST"])],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
    )


def _policy(page: str) -> str:
    """A Content-Security-Policy under which the page's own script and style run, nothing else, and it asks only this server."""
    hashes = {}
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.S)
        hashes[kind] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _refusal(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status)


async def _body(request: Request) -> bytes | None:
    """The content of the request; None if it is larger than MAX_UPLOAD, of which no more is read than that."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_UPLOAD:
        return None
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_UPLOAD:
            return None
    return bytes(data)


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
