"""The edge between a stage, which is a plain function, and the process that runs it.

The function's signature is its command line: `params` is its section of params.yaml, the other positional arguments
are inputs, the keyword-only ones are outputs (and, where they have a default, options).
"""

import argparse
import errno
import inspect
import logging
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from filelock import AcquireReturnProxy, FileLock, Timeout
from rich.logging import RichHandler
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from breedline.code import code_of
from breedline.errors import BreedlineError
from breedline.files import cache_dir, fingerprint, folder_key
from breedline.params import load_params
from breedline.parents import end, end_with_dvc
from breedline.progress import console
from breedline.ranks import rank

PARAMS = Path("params.yaml")
SECONDS_FOR_THE_FIRST = 10
"""That other processes which train together leave to the first one, to tell an error."""
ENVIRONMENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE}

Stage = Callable[..., None]


def run(stage: Stage) -> NoReturn:
    """Run `stage` as this process, and leave with its exit code: 0, an expected error's own, or 130 for Ctrl-C.

    An expected error is one line on standard error; anything else is a bug and keeps its traceback.
    """
    handler: logging.Handler = logging.StreamHandler()
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("breedline").setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # stages/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with_dvc()
    arguments = vars(_parser(stage).parse_args())
    name = stage.__name__
    try:
        with _only_one(name) if rank() == 0 else nullcontext():
            params = getattr(load_params(PARAMS), name)
            read = _read_by(stage, arguments)
            before = _state(name, read)
            stage(params, **arguments)
            after = _state(name, read)
            if changed := [what for what in before | after if before.get(what) != after.get(what)]:
                raise BreedlineError(f"{changed[0]} changed while it ran, so its outputs are void: run it again")
    except BreedlineError as error:
        _fail(f"{name}: {error}", error.exit_code)
    except KeyboardInterrupt:
        _fail(f"{name}: interrupted; nothing was recorded, and the same command takes it up again", 130)
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        path = error.filename2 or error.filename  # of a copy, it is the target that has no room
        where = f" ({path})" if path else ""
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        _fail(f"{name}: {error.strerror}{where}: {remedy} and run it again; earlier results are safe in DVC's cache")
    sys.exit(0)


def _fail(message: str, code: int = 1) -> NoReturn:
    if rank() > 0:
        # most mistakes are every process's: then the first one tells it, and torchrun ends this one meanwhile
        time.sleep(SECONDS_FOR_THE_FIRST)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _parser(stage: Stage) -> argparse.ArgumentParser:
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


def inputs_of(stage: Stage) -> list[str]:
    """The names of the parameters through which `stage` is given paths to read."""
    parameters = list(inspect.signature(stage).parameters.values())[1:]
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.annotation is Path]


def _read_by(stage: Stage, arguments: dict[str, Any]) -> list[Path]:
    """What the stage reads: its inputs, and the code that DVC records along with them."""
    inputs = [arguments[name] for name in inputs_of(stage)]
    for path in inputs:
        if not path.exists():
            raise BreedlineError(
                f"{path} is missing: `dvc repro` makes it, `dvc checkout` or `git checkout` restores it"
            )
    return [*inputs, *code_of(Path(inspect.getfile(stage)))]


def _state(name: str, read: list[Path]) -> dict[str, object]:
    """The files as they stand, and the section as it is written, whatever the rest of params.yaml says by now."""
    return {**fingerprint(path for path in read if path.exists()), f"{name} in {PARAMS}": _section(name)}


def _section(name: str) -> object:
    try:
        return YAML(typ="safe").load(PARAMS.read_bytes())[name]
    except (OSError, YAMLError, ValueError, RecursionError, LookupError, TypeError):  # gone, or only half there
        return None


def _only_one(name: str) -> AcquireReturnProxy[FileLock]:
    """One process at a time runs a stage in a working folder; the lock goes with the process, however it ends."""
    try:
        return FileLock(cache_dir("locks") / f"{folder_key(Path.cwd())}-{name}.lock").acquire(blocking=False)
    except Timeout:
        raise BreedlineError("already running in this folder: wait for it to end, or end it") from None
