"""What people decide about suspects, each decision at once a line of a table that git tracks.

A wrong label or a bad image is a line of the corrections, which label applies; a label that is right is a line of the kept
ones, so that nobody is asked about it twice. New lines come last: with `merge=union` in .gitattributes git then merges
several people's tables. All other lines stay as they are, byte for byte.
"""

import csv
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from breedline.corrections import CORRECTION, read_corrections
from breedline.errors import BreedlineError
from breedline.files import cache_dir, new_file
from breedline.tables import FORMULA, read_csv

KEPT = ["name", "sha256", "label", "reason"]
KEEP = "keep"
SECONDS_TO_WAIT = 10
"""For another process that writes the same tables, which takes milliseconds."""


class Decision(NamedTuple):
    """What somebody has decided about an image."""

    name: str
    sha256: str
    action: str
    """keep, relabel or drop."""
    label: str
    """What the image shows; "" if it is dropped. Two decisions of the same label are the same."""
    reason: str


class Meanwhile(BreedlineError):
    """The tables say something else than whoever decides has seen: `decision`, which may be none."""

    def __init__(self, decision: Decision | None) -> None:
        super().__init__("somebody else has decided about this image meanwhile: look again")
        self.decision = decision


class Table(NamedTuple):
    """A CSV table with a column sha256, edited line by line. It may be missing until there is something to write."""

    path: Path
    columns: list[str]
    """Of a new one; one that people have made may have them in another order, and more of them."""

    def replace(self, sha256: str, *records: str) -> list[str]:
        """Write `records` at the end, in place of those about an image, which are returned as they were written."""
        before = self._text()
        place = self._header(before).index("sha256")
        about: list[str] = []
        others: list[str] = []
        for written, cells in _records(before):
            mine = len(cells) > place and cells[place].strip().lower() == sha256
            (about if mine else others).append(written)
        after = "".join(others)
        line_end = "\r\n" if after.partition("\n")[0].endswith("\r") else "\n"
        for record in records:
            if not after.endswith(("\r", "\n")):
                after += line_end
            after += record.rstrip("\r\n") + line_end
        if after != before and (records or about):
            self._write(after)
        return about

    def record(self, decision: "Decision") -> str:
        """The decision as a record of the table."""
        given = decision._asdict()
        buffer = io.StringIO()
        # the line end is one that has csv put both of its characters, and so any line end in a name, in quotes
        csv.writer(buffer, lineterminator="\r\n").writerow(
            _as_text(given.get(column, "")) for column in self._header(self._text())
        )
        return buffer.getvalue()

    def _text(self) -> str:
        return self.path.read_bytes().decode() if self.path.exists() else ",".join(self.columns)

    def _header(self, text: str) -> list[str]:
        """The names of the columns, before which there may be blank lines and a byte order mark."""
        return next([cell.lstrip("\ufeff") for cell in cells] for _, cells in _records(text) if len(cells) > 1)

    def _write(self, text: str) -> None:
        try:
            with new_file(self.path) as temporary:
                temporary.write_text(text, "utf-8", newline="")
                if self.path.exists():
                    shutil.copymode(self.path, temporary)
        except OSError as error:
            raise BreedlineError(
                f"{self.path} cannot be written ({error.strerror}): mend that, and decide again"
            ) from error


class Change(NamedTuple):
    """A decision that was written, and the records of each table that it replaced, as they were written."""

    decision: Decision
    replaced: list[tuple[Table, list[str]]]


class Decisions:
    """Two tables of decisions. People and other processes may change them meanwhile: each time they are read anew."""

    def __init__(self, corrections: Path, kept: Path, labels: Mapping[str, str]) -> None:
        """`labels` are those that images have now, by sha256."""
        self.corrections, self.kept = Table(corrections.resolve(), CORRECTION), Table(kept.resolve(), KEPT)
        self.labels = labels
        self._changes: list[Change] = []

    def read(self) -> dict[str, Decision]:
        """The decision about each image, by its sha256. A label that was kept counts for as long as the image has it.

        Raises:
            BreedlineError: a table is none, or the corrections contradict themselves.
        """
        decided = {}
        if self.kept.path.exists():
            for name, sha256, label, reason in read_csv(self.kept.path, KEPT)[KEPT].itertuples(index=False):
                content = sha256.strip().lower()
                if self.labels.get(content) == label:
                    decided[content] = Decision(name, content, KEEP, label, reason)
        if self.corrections.path.exists():
            for row in read_corrections(self.corrections.path)[CORRECTION].itertuples(index=False):
                decided[row.sha256] = Decision(*row)
        return decided

    def decide(self, decision: Decision, former: str | None) -> Decision:
        """Write a decision in place of the one whose label is `former`, or where there is none, if that is None.

        Returns the one that is then in the tables: somebody else's, if that says the same.

        Raises:
            Meanwhile: the tables say neither that nor the same as the new one.
            BreedlineError: a table is none, contradicts itself or cannot be written.
        """
        with self._alone():
            found = self.read().get(decision.sha256)
            if found and found.label == decision.label:
                return found
            if found and found.label != former:
                raise Meanwhile(found)
            target, other = (self.kept, self.corrections) if decision.action == KEEP else (self.corrections, self.kept)
            # first the new one, so that a kill in between leaves two decisions rather than none
            replaced = [
                (target, target.replace(decision.sha256, target.record(decision))),
                (other, other.replace(decision.sha256)),
            ]
            self._changes.append(Change(decision, replaced))
            return decision

    def undo(self) -> str | None:
        """Take back the last decision that was made here, and return the sha256 of its image; None if there is none.

        Raises:
            Meanwhile: somebody else has changed that decision.
            BreedlineError: a table is none, contradicts itself or cannot be written.
        """
        with self._alone():
            if not self._changes:
                return None
            decision, replaced = self._changes[-1]
            found = self.read().get(decision.sha256)
            if found and found.label == decision.label:
                for table, records in reversed(replaced):
                    table.replace(decision.sha256, *records)
            self._changes.pop()
            if not found or found.label != decision.label:
                raise Meanwhile(found)
            return decision.sha256

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process decides in these tables meanwhile."""
        key = hashlib.sha256(os.fsencode(self.corrections.path)).hexdigest()[:16]
        try:
            lock = FileLock(cache_dir("locks") / f"{key}-decisions.lock").acquire(timeout=SECONDS_TO_WAIT)
        except Timeout:
            raise BreedlineError("another program holds the tables of decisions: end it, and decide again") from None
        with lock:
            yield


def _records(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each record of a CSV text: as it is written, over however many lines, and its cells; a blank line is a record, too."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            taken.append(line)
            yield line

    try:
        for cells in csv.reader(lines()):
            yield "".join(taken), cells
            taken.clear()
    except csv.Error as error:
        raise BreedlineError(f"a line of a table of decisions makes no sense ({error}): mend it") from error


def _as_text(cell: str) -> str:
    """A cell that no spreadsheet runs, as tables.py has it."""
    return f"'{cell}" if cell.lstrip("'").startswith(FORMULA) else cell
