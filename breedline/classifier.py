"""A published model at work: photos in, the names of what they show out. It imports neither torch, timm, fastai nor pandas.

    classifier = Classifier.load("models")
    classifier.predict(["robin.jpg"])[0].label

A bundle may come from anybody. Its graph is checked against its spec and gets no file to read, but it is a program all the
same: one that computes for long, or takes much memory, is not refused.
"""

import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import onnxruntime
from PIL import Image

from breedline.bundle import ONNX, BundleSpec, read_bundle
from breedline.errors import BreedlineError
from breedline.images import DAMAGE, Undecodable
from breedline.preprocessing import normalised, view_of_photo

MAX_BYTES = 1_000_000_000
"""A larger file is not read."""
MOST_AT_ONCE, VALUES_PER_CORE = 16, 620_000
"""Photos that go through the model at once, and about how many numbers: at 224 pixels, 16 on one core take a quarter longer
each than 4, while small ones are hardly worth a call each."""
BYTES_AHEAD = 2**28
"""Of files that wait in memory to be decoded; one larger file still does."""
MAX_FEATURES = 65_536
"""Of a photo, as the graph gives them."""
PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"}


class Guess(NamedTuple):
    """A class, and how probable it is that the photo shows it."""

    label: str
    probability: float


class Prediction(NamedTuple):
    """What the model sees in a photo."""

    source: str
    """The photo's path or name; of an image in memory, its file's name, if it has one."""
    label: str | None
    """The most probable class; None if that is too improbable: the photo shows none of the classes."""
    top: list[Guess]
    """The most probable classes, best first."""


class Unreadable(NamedTuple):
    """A photo that nothing can be said of, and the reason."""

    source: str
    reason: str


class Photo(NamedTuple):
    """An image file that is in memory already."""

    name: str
    data: bytes


Source = str | Path | Photo | Image.Image
"""A photo: the path of its file, the content of its file, or an image. An image is taken as a PNG of its pixels would be."""


class Classifier:
    """The model of a bundle, computing on all cores that this process may use; for any number of threads at a time."""

    def __init__(self, spec: BundleSpec, graph: bytes) -> None:
        """Make ready the ONNX `graph` of a bundle with this spec. Raises BreedlineError as `load` does."""
        self.spec = spec
        self._cores = len(os.sched_getaffinity(0))
        values = 3 * spec.preprocessing.input_size**2
        self.batch_size = max(1, min(MOST_AT_ONCE, self._cores * VALUES_PER_CORE // values))
        self._session = _session(graph, self._cores)
        self._input, self.n_features = _checked(self._session, spec)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """The model of the bundle in `folder`.

        Raises:
            BreedlineError: there is no whole bundle, or its graph is not what its spec says.
        """
        folder = Path(folder)
        spec = read_bundle(folder)
        graph = (folder / ONNX).read_bytes()
        if hashlib.sha256(graph).hexdigest() != spec.files[ONNX]:
            raise BreedlineError(f"{folder / ONNX} was replaced while it was read: try again")
        return cls(spec, graph)

    def predict(
        self, photos: Source | Iterable[Source], *, top: int = 5, min_confidence: float | None = None
    ) -> list[Prediction]:
        """What the model sees in each photo; the arguments are those of `stream`, or one photo.

        Raises:
            BreedlineError: a photo cannot be read, or the model's numbers are not finite.
        """
        several = [photos] if isinstance(photos, str | Path | Photo | Image.Image) else photos
        found = []
        for result in self.stream(several, top=top, min_confidence=min_confidence):
            if isinstance(result, Unreadable):
                raise _unusable(result.source, result)
            found.append(result)
        return found

    def stream(
        self, photos: Iterable[Source | Unreadable], *, top: int = 5, min_confidence: float | None = None
    ) -> Iterator[Prediction | Unreadable]:
        """What the model sees in each photo, in their order, while further ones are decoded; for any number of photos.

        Args:
            photos: an Unreadable among them is passed on in its place.
            top: how many classes to tell.
            min_confidence: the probability below which a photo shows none of the classes; None for the bundle's own.

        Raises:
            BreedlineError: the model fails, or its numbers are not finite.
        """
        if top < 1:
            raise BreedlineError(f"top is {top}: ask for at least 1 class")
        least = self.spec.none_below if min_confidence is None else min_confidence
        for source, answer in self._answers(photos):
            yield answer if isinstance(answer, Unreadable) else self._named(source, answer, top, least)

    def probabilities(self, photos: Iterable[Source]) -> np.ndarray:
        """(photos, classes): how probable each of `spec.classes` is.

        Raises:
            BreedlineError: as `predict`.
        """
        found = []
        for source, answer in self._answers(photos):
            if isinstance(answer, Unreadable):
                raise _unusable(source, answer)
            found.append(answer)
        return np.array(found).reshape(-1, len(self.spec.classes))

    def _answers(self, photos: Iterable[Source | Unreadable]) -> Iterator[tuple[str, np.ndarray | Unreadable]]:
        """Name and probabilities (classes,) of each photo, in their order."""
        views = self._views(photos, 2 * self.batch_size + self._cores)
        while batch := list(islice(views, self.batch_size)):
            seen = [view for _, view in batch if not isinstance(view, Unreadable)]
            probabilities = iter(self._probabilities(np.stack(seen)) if seen else ())
            for source, view in batch:
                yield source, view if isinstance(view, Unreadable) else next(probabilities)

    def _views(
        self, photos: Iterable[Source | Unreadable], ahead: int
    ) -> Iterator[tuple[str, np.ndarray | Unreadable]]:
        """Name and view of each photo, decoded by as many threads as there are cores, at most `ahead` photos ahead."""
        waiting: deque[tuple[str, int, Future[np.ndarray | Unreadable]]] = deque()
        total = 0
        pool = ThreadPoolExecutor(self._cores)
        try:
            for photo in photos:
                data = _in_memory(photo)
                name, size = _name(photo), len(data) if isinstance(data, bytes) else 0
                while waiting and (len(waiting) >= ahead or total + size > BYTES_AHEAD):
                    done, freed, view = waiting.popleft()
                    total -= freed
                    yield done, view.result()
                total += size
                waiting.append((name, size, pool.submit(self._view, name, data)))
            while waiting:
                done, _, view = waiting.popleft()
                yield done, view.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _view(self, name: str, photo: str | Path | bytes | Unreadable) -> np.ndarray | Unreadable:
        if isinstance(photo, Unreadable):
            return photo
        try:
            return view_of_photo(photo if isinstance(photo, bytes) else read_file(photo), self.spec.preprocessing)
        except OSError as error:
            return Unreadable(name, error.strerror or str(error))
        except (Undecodable, ValueError) as error:  # a ValueError is of a path with a zero byte
            return Unreadable(name, str(error))

    def _probabilities(self, views: np.ndarray) -> np.ndarray:
        """(images, classes) probabilities for views (images, size, size, 3)."""
        logits = self._output("logits", views, len(self.spec.classes)).astype(np.float64)
        if self.spec.loss == "bce":
            return 0.5 + 0.5 * np.tanh(logits / 2)  # the sigmoid, but for its overflow
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def _features(self, views: np.ndarray) -> np.ndarray:
        """(images, n_features): what the head sees of views (images, size, size, 3)."""
        return self._output("features", views, self.n_features)

    def _output(self, name: str, views: np.ndarray, width: int) -> np.ndarray:
        """(images, width) numbers of one of the graph's outputs, for which no other is computed."""
        try:
            (found,) = self._session.run([name], {self._input: normalised(views, self.spec.preprocessing)})
        except Exception as error:  # ONNX Runtime has no common base of what it raises
            raise BreedlineError(f"the model of the bundle fails ({_first_line(error)}): {RESTORE}") from error
        wanted = (len(views), width)
        if found.shape != wanted or not np.isfinite(found).all():
            raise BreedlineError(f"the model of the bundle gives no finite numbers of shape {wanted}: {RESTORE}")
        return found

    def _named(self, source: str, probabilities: np.ndarray, top: int, least: float) -> Prediction:
        best = np.argsort(-probabilities, kind="stable")[:top]
        guesses = [Guess(self.spec.classes[number], float(probabilities[number])) for number in best]
        return Prediction(source, guesses[0].label if guesses[0].probability >= least else None, guesses)


RESTORE = "`dvc checkout` restores it, or train it again"


def _session(graph: bytes, cores: int) -> Any:
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = cores, 1
    options.log_severity_level = 4  # what is wrong is told by an exception
    # threads that wait for work would else spin, on the cores that decode
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # a graph may name files that its weights are in, by default below the working folder: here nothing can be
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null/none")
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has no common base of what it raises
        raise BreedlineError(f"the bundle's {ONNX} is no usable graph ({_first_line(error)}): {RESTORE}") from error


def _checked(session: Any, spec: BundleSpec) -> tuple[str, int]:
    """The name of the graph's input, and how many features of an image it gives: 0 where it gives none.

    Raises:
        BreedlineError: the graph is not one from images to logits of the spec's classes, and at most features beside.
    """
    size, classes = spec.preprocessing.input_size, len(spec.classes)
    try:
        inputs, outputs = (
            [(value.name, value.type, value.shape) for value in values]
            for values in (session.get_inputs(), session.get_outputs())
        )
    except UnicodeDecodeError as error:  # its names are bytes of any kind
        raise BreedlineError(f"the bundle's {ONNX} has names that are no text: {RESTORE}") from error
    match inputs, outputs:
        case [(name, "tensor(float)", [batch, *shape])], [("logits", "tensor(float)", [_, number]), *others] if (
            not isinstance(batch, int) and (shape, number) == ([3, size, size], classes)
        ):
            match others:
                case []:
                    return name, 0
                case [("features", "tensor(float)", [_, int(width)])] if 0 < width <= MAX_FEATURES:
                    return name, width
    raise BreedlineError(
        f"the bundle's {ONNX} does not lead from images (batch, 3, {size}, {size}) to logits "
        f"(batch, {classes}), and at most features beside, as {spec.arch} should: {RESTORE}"
    )


def _unusable(source: str, why: Unreadable) -> BreedlineError:
    return BreedlineError(f"{source!r} is no usable photo ({why.reason}): leave it out")


def _in_memory(photo: Source | Unreadable) -> str | Path | bytes | Unreadable:
    """The photo as another thread may read it: an image is not safe to use in two."""
    if isinstance(photo, Photo):
        return photo.data
    if not isinstance(photo, Image.Image):
        return photo
    buffer = BytesIO()
    try:
        if photo.mode in PNG_MODES:
            photo.save(buffer, "PNG", compress_level=1, exif=photo.getexif())
        else:
            (photo if photo.mode in ("CMYK", "LAB", "F") else photo.convert("RGB")).save(
                buffer, "TIFF", exif=photo.getexif()
            )
    except DAMAGE as error:
        return Unreadable(_name(photo), str(error) or type(error).__name__)
    return buffer.getvalue()


def _name(photo: Source | Unreadable) -> str:
    if isinstance(photo, Photo):
        return photo.name
    if isinstance(photo, Unreadable):
        return photo.source
    return str(getattr(photo, "filename", "") or "image" if isinstance(photo, Image.Image) else photo)


def read_file(path: str | Path) -> bytes:
    """The content of a file. Raises Undecodable where that has no end, or none in sight."""
    # a pipe that nobody writes to would wait for ever
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Undecodable("not a file")
        if status.st_size > MAX_BYTES:
            raise Undecodable(f"over {MAX_BYTES / 1e9:g} GB")
        return file.read()


def _first_line(error: Exception) -> str:
    return repr(str(error).splitlines()[0][:200]) if str(error) else type(error).__name__
