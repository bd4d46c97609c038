"""Batch scoring: each photo that is new in a folder or bucket becomes a row of a table, told by the branch's model.

The table is a folder of parts, as pandas and warehouses read it. A photo is new while no part has it in this version: a
run that is killed loses the part that it was at, and the next run goes on. A part appears whole, or not at all.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd
from fsspec.implementations.local import LocalFileSystem
from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State

from breedline.classifier import Classifier, Photo, Prediction, Unreadable, read_file
from breedline.errors import BreedlineError
from breedline.fetch import filesystem, reaching
from breedline.images import Undecodable
from breedline.inference import in_batches
from breedline.params import load_params
from breedline.tables import read_csv, write_csv
from breedline.version import VERSION_FIELDS
from flows.artifacts import show_scores
from flows.git_command import git
from flows.names import run_name
from flows.predict import IMAGES, fetched_bundle
from flows.states import Outcome
from flows.tasks import in_task
from flows.workspace import PARAMS, workspace

PART = 1000
"""Photos in a part, which is what a killed run loses at most."""
TOP = 3
"""Classes that are told of each photo."""
READERS = 8
"""Photos that are read at the same time, as a bucket lets one wait for each."""
MAX_BYTES = 100_000_000
"""A larger photo counts as unreadable."""
COLUMNS = {
    "photo": "string",
    "version": "string",
    "label": "string",
    **{f"{what}_{n + 1}": kind for n in range(TOP) for what, kind in (("class", "string"), ("probability", "float64"))},
    "reason": "string",
    "model": "string",
}
"""Types of the table's columns. `photo` is a path below the folder of photos, `version` what its storage tells of its
content. `label` is empty if the photo shows none of the classes, or cannot be read, which has a `reason`. `model` is a
commit."""


@flow(name="score", flow_run_name=run_name, persist_result=False)
def score(repository: str | None = None, ref: str = "main") -> State[Any]:
    """Score what is new in `score.photos` of a branch's params.yaml, with the branch's model.

    Args:
        repository: what to clone: what the folder of this process was cloned from, or one that
            $BREEDLINE_REPOSITORIES names.
        ref: a branch, tag or commit.
    """
    try:
        with workspace(repository, ref, Path.cwd()) as clone:
            settings = load_params(clone.root / PARAMS).score
            if not settings.photos or not settings.predictions:
                raise BreedlineError(f"score: {PARAMS} names no folders: set score.photos and score.predictions")
            commit = git(clone.root, "rev-parse", "HEAD")
            bundle = in_task("model", lambda: fetched_bundle(clone.root, commit))
        table = Table(settings.predictions, settings.format)
        photos, log = settings.photos, get_run_logger()
        labels = in_task("score", lambda: score_new(photos, table, Classifier.load(bundle), commit, log.info))
    except BreedlineError as error:
        return Outcome.FAILED.state(str(error))
    if not labels:
        return Outcome.UNCHANGED.state("no photo is new")
    show_scores(labels)
    return Outcome.COMPLETED.state(f"{labels.total()} new photos scored")


@dataclass(frozen=True)
class Table:
    """A folder of parts, at a path or url."""

    url: str
    format: Literal["parquet", "csv"]
    """Of the parts that are added; there may be others."""

    def known(self) -> pd.DataFrame:
        """Columns photo and version of all rows. Raises BreedlineError or NetworkError if a part cannot be read."""
        fs, folder = filesystem(self.url)
        columns = ["photo", "version"]
        tables = [pd.DataFrame(columns=columns)]
        with reaching(self.url):
            fs.invalidate_cache()
            for path in sorted(fs.find(folder)):
                name = path.rpartition("/")[2]
                if name.startswith("part-") and name.endswith((".parquet", ".csv")):
                    with fs.open(path, "rb") as file:
                        if name.endswith(".csv"):
                            tables.append(read_csv(file, columns, where=path)[columns])
                        else:
                            with _parquet(path):
                                tables.append(pd.read_parquet(file, columns=columns))
        return pd.concat(tables, ignore_index=True)

    def add(self, rows: pd.DataFrame) -> None:
        """Add a part, under a name that its content decides."""
        fs, folder = filesystem(self.url)
        with TemporaryDirectory() as temporary:
            local = Path(temporary) / "part"
            if self.format == "csv":
                write_csv(rows, local)
            else:
                with _parquet():
                    rows.to_parquet(local, index=False)
            name = f"{hashlib.sha256(local.read_bytes()).hexdigest()[:16]}.{self.format}"
            with reaching(self.url):
                fs.makedirs(folder, exist_ok=True)
                fs.put_file(str(local), f"{folder}/.{name}")
                fs.mv(f"{folder}/.{name}", f"{folder}/part-{name}")  # within a folder of this machine, that is atomic


@contextmanager
def _parquet(part: str = "the part") -> Iterator[None]:
    """Turn what pandas raises within the block into a BreedlineError."""
    try:
        yield
    except ImportError as error:
        raise BreedlineError("Parquet needs another package: install pyarrow, or set score.format to csv") from error
    except (ValueError, KeyError) as error:  # of pyarrow's, too
        raise BreedlineError(f"{part} is no part of a table of scores ({error}): move it away") from error


def score_new(
    photos: str, table: Table, classifier: Classifier, model: str, say: Callable[[str], None]
) -> Counter[str]:
    """Add the photos that the table does not have; how many there are with each label, and of each kind without one.

    Args:
        photos: a path or url, in which all images are photos; hidden ones are left out.
        model: what the table calls the model.
        say: told how far it is, after each part.

    Raises:
        BreedlineError: a folder or part is missing or damaged, or the model fails.
        NetworkError: a storage does not answer.
    """
    listed = _listed(photos)
    new = listed[~pd.MultiIndex.from_frame(listed[["photo", "version"]]).isin(pd.MultiIndex.from_frame(table.known()))]
    labels: Counter[str] = Counter()
    for part in in_batches(range(len(new)), PART):
        wanted = new.iloc[part[0] : part[-1] + 1]
        results = {result.source: result for result in classifier.stream(_read(photos, wanted), top=TOP)}
        rows = [
            {"photo": photo, "version": version, "model": model, **_told(results[photo])}
            for photo, version in zip(wanted["photo"], wanted["version"], strict=True)
            if photo in results
        ]
        table.add(pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS))
        labels.update(_kind(result) for result in results.values())
        say(f"{part[-1] + 1} of {len(new)} new photos are scored")
    return labels


def _listed(photos: str) -> pd.DataFrame:
    """Columns photo, version, path, bytes of each photo, in the order of their names."""
    fs, folder = filesystem(photos)
    with reaching(photos):
        fs.invalidate_cache()
        if not fs.exists(folder):
            raise FileNotFoundError(folder)
        found = fs.find(folder, detail=True)
    rows = []
    for path, info in sorted(found.items()):
        name = path[len(folder) :].lstrip("/")
        hidden = any(part.startswith(".") for part in name.split("/"))
        if info["type"] == "file" and name.lower().endswith(IMAGES) and not hidden:
            version = " ".join(str(info[field]) for field in VERSION_FIELDS if field in info)
            rows.append((name, version, path, info["size"] or 0))
    return pd.DataFrame(rows, columns=["photo", "version", "path", "bytes"])


def _read(photos: str, wanted: pd.DataFrame) -> Iterator[Photo | Unreadable]:
    """The photos, in order, READERS at a time; those that are gone by now are left out."""
    fs, _ = filesystem(photos)

    content = read_file if isinstance(fs, LocalFileSystem) else fs.cat_file

    def read(photo: str, path: str, size: int) -> Photo | Unreadable | None:
        if size > MAX_BYTES:
            return Unreadable(photo, f"over {MAX_BYTES / 1e6:g} MB")
        with reaching(photos):
            try:
                return Photo(photo, content(path))
            except Undecodable as error:
                return Unreadable(photo, str(error))
            except FileNotFoundError:
                return None

    with ThreadPoolExecutor(READERS) as threads:
        for some in in_batches(range(len(wanted)), READERS):
            rows = wanted.iloc[some[0] : some[-1] + 1]
            for result in threads.map(read, rows["photo"], rows["path"], rows["bytes"]):
                if result:
                    yield result


def _told(result: Prediction | Unreadable) -> dict[str, Any]:
    if isinstance(result, Unreadable):
        return {"reason": result.reason}
    guesses: dict[str, Any] = {}
    for rank, guess in enumerate(result.top, 1):
        guesses |= {f"class_{rank}": guess.label, f"probability_{rank}": round(guess.probability, 6)}
    return {"label": result.label, **guesses}


def _kind(result: Prediction | Unreadable) -> str:
    if isinstance(result, Unreadable):
        return "(unreadable)"
    return result.label or "(none of the classes)"
