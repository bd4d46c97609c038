"""Progress of long work: a bar on a terminal, elsewhere a log line every few seconds."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from breedline.ranks import rank

log = logging.getLogger("breedline")
SECONDS_BETWEEN_LINES = 10.0
console = Console(stderr=True)


@contextmanager
def progress(what: str, total: int | None, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Yield a function `advance(count)` to call after each further `count` pieces of work.

    Args:
        what: a short description of the work, shown as it is.
        total: number of pieces, or None if it is unknown.
        in_bytes: whether the pieces are bytes.
    """
    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), count, TimeRemainingColumn())
    if console.is_terminal and rank() == 0:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda pieces: bar.advance(task, pieces)
        return

    done, said = 0, time.monotonic()

    def advance(pieces: int) -> None:
        nonlocal done, said
        done += pieces
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            scale, unit = (1e6, " MB") if in_bytes else (1, "")
            log.info("%s: %.0f%s%s", what, done / scale, f" of {total / scale:.0f}" if total else "", unit)

    yield advance
