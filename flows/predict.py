"""`breedline predict`: photos from wherever they are, through a published model, to a table or lines.

Names of files and classes come from anybody. In a table and in CSV, what could control a terminal is replaced, and a cell
that a spreadsheet would run gets an apostrophe; JSON escapes all but ASCII.
"""

import csv
import glob
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path

from breedline.bundle import SPEC, read_bundle
from breedline.classifier import MAX_BYTES, Classifier, Photo, Prediction, Unreadable
from breedline.errors import BreedlineError, shown
from breedline.files import cache_dir, new_folder, sync
from flows.git_command import GitError, git
from flows.registry import assigned

IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")
"""Suffixes of what is taken for a photo unseen; of other files in folders and archives their first bytes decide."""
ZIP = (b"PK\3\4", b"PK\5\6")
MAX_FILES, MAX_TOTAL_GB, MAX_RATIO = 10**6, 100.0, 100.0
"""Limits on one archive, as `download` has them."""
LONGEST_LINE, LONGEST_NAME = 2**16, 1000
"""Bytes of a line that is read, which is more than a path may have; characters of a name that are told of a file skipped."""
PAGE = 100
"""Photos whose names decide how wide the columns of a table are."""
SECONDS_UNTIL_PROGRESS = 1.0
SOME_UNREADABLE = 3
"""The exit code if a photo could not be read."""
Found = str | Photo | Unreadable


def main(paths: list[str], *, model: str, top: int, min_confidence: float | None, form: str) -> int:
    """Print what the model sees in the photos, in a table or as "csv" or "json"; the result is the exit code."""
    warnings.filterwarnings("ignore", module="PIL")  # of metadata
    classifier = Classifier.load(bundle_of(model))
    bad = 0

    def good(results: Iterable[Prediction | Unreadable]) -> Iterator[Prediction]:
        nonlocal bad
        for result in results:
            if isinstance(result, Prediction):
                yield result
            else:
                bad += 1
                print(f"skipped {shown(result.source[:LONGEST_NAME])}: {shown(result.reason)}", file=sys.stderr)

    results = classifier.stream(_photos(paths), top=top, min_confidence=min_confidence)
    write = {"csv": _write_csv, "json": _write_json}.get(form, _write_table)
    try:
        written = write(good(_with_progress(results)), min(top, len(classifier.spec.classes)))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if not written and not bad:
        raise BreedlineError(f"there is no photo in {shown(' '.join(paths))}: name one, or a folder that has some")
    return SOME_UNREADABLE if bad else 0


# Which model


def bundle_of(model: str) -> Path:
    """The folder `model`, or the bundle of that git revision or stage (`classifier#prod`), fetched once into the cache."""
    folder = Path(model)
    if folder.exists() or not (commit := _commit(model)):
        return folder
    return fetched_bundle(_root(), commit)


def fetched_bundle(root: Path, commit: str) -> Path:
    """The cache's folder with the bundle of a commit of the DVC repository at `root`."""
    fetched = cache_dir("bundles") / commit
    if not (fetched / SPEC).is_file():
        from filelock import FileLock

        from flows.remote import get_model

        with FileLock(f"{fetched}.lock"), new_folder(fetched) as new:
            get_model(root, commit, new)
            read_bundle(new)
            for file in new.iterdir():  # nobody would look again whether a power loss has taken one
                sync(file)
    return fetched


def _commit(model: str) -> str:
    """The commit that `model` names; nothing where there is none, or no git."""
    name, _, stage = model.partition("#")
    with suppress(GitError):
        if name and stage and (history := assigned(Path(), name, stage)):
            return history[-1]
        return git(Path(), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{model}^{{commit}}")
    return ""


def _root() -> Path:
    """The folder of the DVC repository that the working folder is in."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


# Which photos


def _photos(paths: Iterable[str]) -> Iterator[Found]:
    return chain.from_iterable(chain.from_iterable(map(_at, _listed())) if path == "-" else _at(path) for path in paths)


def _listed() -> Iterator[str]:
    """The lines of standard input."""
    for line in iter(lambda: sys.stdin.buffer.readline(LONGEST_LINE), b""):
        if name := line.rstrip(b"\r\n"):
            yield os.fsdecode(name)


def _at(path: str) -> Iterator[Found]:
    """The photos at a path that exists, or at those that match a glob, in the order of their names."""
    try:
        if not os.path.lexists(path) and glob.has_magic(path):
            matches = sorted(glob.iglob(path, recursive=True))  # noqa: PTH207 - Path.glob finds hidden files, too
            # what a `**` matches are folders and all that is in them
            files = [match for match in matches if "**" not in path or not Path(match).is_dir()]
            yield from chain.from_iterable(map(_of, files)) if matches else [Unreadable(path, "no file matches")]
        else:
            yield from _of(path)
    except OSError as error:  # a name that is too long
        yield Unreadable(path, error.strerror or str(error))
    except (ValueError, re.error) as error:  # a zero byte in the path, a range that is none
        yield Unreadable(path, str(error))


def _of(path: str) -> Iterator[Found]:
    """The photos of one file or folder, whatever its name."""
    if Path(path).is_dir():
        yield from _in_folder(path)
    elif not path.lower().endswith(IMAGES) and Path(path).is_file() and _is_archive(path):
        yield from _in_archive(path)
    else:
        yield path


def _in_folder(top: str) -> Iterator[Found]:
    """The photos of a folder, then those of the folders in it; hidden ones and links to folders are left out."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            yield Unreadable(folder, error.strerror or str(error))
            continue
        yield from (e.path for e in entries if e.is_file() and (e.name.lower().endswith(IMAGES) or _is_image(e.path)))
        waiting += [entry.path for entry in reversed(entries) if entry.is_dir(follow_symlinks=False)]


def _head(path: str) -> bytes:
    try:
        with Path(path).open("rb", buffering=0) as file:
            return file.read(512)
    except OSError:
        return b""


def _is_image(path: str) -> bool:
    from breedline.formats import sniff

    return bool(sniff(_head(path)[:32]))


def _is_archive(path: str) -> bool:
    from breedline.sources import OPENERS

    head = _head(path)
    return head.startswith((*OPENERS, *ZIP)) or head[257:262] == b"ustar"


def _in_archive(path: str) -> Iterator[Found]:
    """The photos of a tar or zip, in its order; hidden ones are left out. Nothing is written to disk."""
    from breedline.formats import sniff
    from breedline.params import Download, Source
    from breedline.sources import members

    source = Source(url=str(Path(path).resolve()))
    limits = Download(sources=[source], timeout=1, max_files=MAX_FILES, max_total_gb=MAX_TOTAL_GB, max_ratio=MAX_RATIO)
    try:
        for member in members(source, limits):
            name, is_photo = f"{path}:{member.name}", member.name.lower().endswith(IMAGES)
            if member.size > MAX_BYTES:
                if is_photo:
                    yield Unreadable(name, f"over {MAX_BYTES / 1e9:g} GB")
                continue
            data = member.file.read()
            if is_photo or sniff(data[:32]):
                yield Photo(name, data)
    except BreedlineError as error:  # whose remedies are those of a data set
        yield Unreadable(path, str(error).partition(": raise ")[0].partition(": mend ")[0])
    except OSError as error:
        yield Unreadable(path, error.strerror or str(error))


# How it is told


def _with_progress(results: Iterable[Prediction | Unreadable]) -> Iterator[Prediction | Unreadable]:
    """The results; what takes longer shows its progress on a terminal, unless the results themselves are there."""
    began, waiting = time.monotonic(), 0
    wanted = sys.stderr.isatty() and not sys.stdout.isatty()
    advance: Callable[[int], None] | None = None
    with ExitStack() as stack:
        for result in results:
            waiting += 1
            if wanted and not advance and time.monotonic() - began > SECONDS_UNTIL_PROGRESS:
                from breedline.progress import progress

                advance = stack.enter_context(progress("predict", None))
            if advance:
                advance(waiting)
                waiting = 0
            yield result


def _write_json(predictions: Iterator[Prediction], top: int) -> int:
    written = 0
    for source, label, guesses in predictions:
        classes = [guess._asdict() for guess in guesses]
        print(json.dumps({"source": source, "label": label, "top": classes}))
        written += 1
    return written


def _write_csv(predictions: Iterator[Prediction], top: int) -> int:
    from breedline.tables import FORMULA

    def cell(text: str) -> str:
        """As breedline.tables writes texts, which its `read_csv` gives back."""
        return "'" + text if text.startswith(("'", *FORMULA)) and text.lstrip("'").startswith(FORMULA) else text

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        ["source", "label", *(f"{what}_{rank}" for rank in range(1, top + 1) for what in ("class", "probability"))]
    )
    written = 0
    for source, label, guesses in predictions:
        numbers = chain.from_iterable((cell(shown(guess.label)), f"{guess.probability:.6f}") for guess in guesses)
        writer.writerow([cell(shown(source)), cell(shown(label or "")), *numbers])
        written += 1
    return written


def _write_table(predictions: Iterator[Prediction], top: int) -> int:
    """Pages of rows: a table on a terminal, else aligned text under one header."""
    header = ["photo", "shows", *(f"{rank}." for rank in range(1, top + 1))]
    least = [0] * len(header)
    written = 0
    page: list[list[str]] = []
    for prediction in chain(predictions, [None]):
        if prediction:
            told = (f"{guess.label} {guess.probability:.1%}" for guess in prediction.top)
            page.append([shown(text) for text in (prediction.source, prediction.label or "-", *told)])
        if not page or (prediction and len(page) < PAGE):
            continue
        if sys.stdout.isatty():
            _print_table(header, page)
        else:
            lines = page if written else [header, *page]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            least = [max(both) for both in zip(widths, least, strict=True)]
            for line in lines:
                print("  ".join(text.ljust(width) for text, width in zip(line, least, strict=True)).rstrip())
        written += len(page)
        page = []
    return written


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header)
    for row in rows:
        table.add_row(*map(Text, row))  # of which nothing is markup
    Console().print(table)
