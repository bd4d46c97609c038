"""The edge between a stage, which is a plain function, and the process that runs it.

The function's signature is its command line: `params` is its section of params.yaml, the other positional arguments
are inputs, the keyword-only ones are outputs (and, where they have a default, options).
"""

import argparse
import errno
import hashlib
import inspect
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil
from filelock import FileLock, Timeout
from rich.logging import RichHandler

from breedline.errors import BreedlineError
from breedline.files import cache_dir, fingerprint
from breedline.params import load_params
from breedline.progress import console

PARAMS = Path("params.yaml")
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}
ENVIRONMENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE}


def run(stage: Callable[..., None]) -> NoReturn:
    """Run `stage` as this process, and leave with its exit code: 0, an expected error's own, or 130 for Ctrl-C.

    An expected error is one line on standard error; anything else is a bug and keeps its traceback.
    """
    handler: logging.Handler = logging.StreamHandler()
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("breedline").setLevel(logging.INFO)
    _die_with_parent()
    arguments = vars(_parser(stage).parse_args())
    name = stage.__name__
    try:
        with _only_one(name):
            params = _section(name)
            before = _fingerprint(stage, arguments)
            stage(params, **arguments)
            if _section(name) != params or _fingerprint(stage, arguments) != before:
                raise BreedlineError(
                    f"{name}: an input changed while the stage ran, so its outputs are void: run it again"
                )
    except BreedlineError as error:
        _fail(f"{name}: {error}", error.exit_code)
    except KeyboardInterrupt:
        _fail(f"{name}: interrupted; nothing was recorded, and the same command goes on from here", 130)
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        _fail(f"{name}: {error.strerror}{where}: {remedy} and run it again; earlier results are safe in DVC's cache")
    sys.exit(0)


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _parser(stage: Callable[..., None]) -> argparse.ArgumentParser:
    doc = inspect.getdoc(stage) or ""
    parser = argparse.ArgumentParser(prog=f"python -m stages.{stage.__name__}", description=doc.split("\n\n")[0])
    for parameter in list(inspect.signature(stage).parameters.values())[1:]:
        required = parameter.default is parameter.empty
        parser.add_argument(
            f"--{parameter.name}",
            type=parameter.annotation,
            required=required,
            default=None if required else parameter.default,
            metavar=parameter.annotation.__name__.upper(),
        )
    return parser


def _section(name: str) -> Any:
    return getattr(load_params(PARAMS), name)


def inputs_of(stage: Callable[..., None]) -> list[str]:
    """The names of the parameters through which `stage` is given paths to read."""
    parameters = list(inspect.signature(stage).parameters.values())[1:]
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.annotation is Path]


def _fingerprint(stage: Callable[..., None], arguments: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """What the stage reads: its inputs, and the project's own code, which DVC records along with them."""
    inputs = [arguments[name] for name in inputs_of(stage)]
    for path in inputs:
        if not path.exists():
            raise BreedlineError(
                f"{path} is missing: `dvc repro` makes it, `dvc checkout` or `git checkout` restores it"
            )
    code = [Path(__file__).parent, Path(inspect.getfile(stage))]
    return {file: s for file, s in fingerprint([*inputs, *code]).items() if "__pycache__" not in file}


def _only_one(name: str) -> FileLock:
    """One process at a time runs a stage in a working folder; the lock goes with the process, however it ends."""
    key = hashlib.sha256(os.fsencode(Path.cwd())).hexdigest()[:16]
    lock = FileLock(cache_dir("locks") / f"{key}-{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BreedlineError("already running in this folder: wait for it to end, or end it") from None
    return lock


def _die_with_parent() -> None:
    """Follow the process that started this one (dvc, through a shell or not): its end ends this process too.

    A SIGKILL of dvc cannot be passed on, and the orphan would write beside the next run.
    """
    parent = psutil.Process().parent()
    if parent and parent.name() in SHELLS:
        parent = parent.parent()
    if parent is None or parent.pid == 1:
        return

    def watch() -> None:
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
