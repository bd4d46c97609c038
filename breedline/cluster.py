"""A cluster of machines that takes work off this one: Dask or Ray, through joblib.

Where work is done decides no byte of a result, so the cluster is no setting of params.yaml, which would make stages run
again, but one of the machine: the environment variable BREEDLINE_BACKEND. The workers run the same environment and see
the workspace and the cache under the same paths.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

from joblib import Parallel, delayed, parallel_config
from joblib.parallel import get_active_backend

from breedline.errors import BreedlineError

log = logging.getLogger("breedline")
S = TypeVar("S")
T = TypeVar("T")

VARIABLE = "BREEDLINE_BACKEND"
SECONDS = 30
"""To wait for a scheduler to answer."""
TRIES = 3
"""Times that the cluster may lose a worker before one more piece of work is done."""


def is_set() -> bool:
    """Whether there is a cluster to give work to."""
    return bool(os.environ.get(VARIABLE))


def each(function: Callable[[S], T], work: Sequence[S], what: str) -> Iterator[T]:
    """What `function` returns for each piece of work, in order; the workers of the cluster call it.

    What a lost worker was doing, and what it had not handed over, is done again. So `function` should leave its result in
    the cache, which all machines share, and return little.

    Args:
        what: the stage, for the log.

    Raises:
        BreedlineError: the cluster does not answer.
    """
    done = tries = 0
    while done < len(work):
        with cluster() as lost:
            # Ray's engine gives all results at the end, or none
            how = "generator" if get_active_backend()[0].supports_return_generator else "list"
            before = done
            try:
                for result in Parallel(n_jobs=-1, return_as=how)(delayed(function)(piece) for piece in work[done:]):
                    done += 1
                    yield result
            except lost as error:
                tries = 0 if done > before else tries + 1
                if tries == TRIES:
                    raise
                log.warning("%s: the cluster lost a worker (%s): what it was making is made again", what, error)


@contextmanager
def cluster() -> Iterator[tuple[type[Exception], ...]]:
    """Within it, joblib's `Parallel` runs on the cluster; yields what it raises when a worker is lost, nothing if there is none.

    Raises:
        BreedlineError: BREEDLINE_BACKEND names no cluster, or one that does not answer, or whose library is not installed.
    """
    address = os.environ.get(VARIABLE, "")
    kind = address.partition("://")[0]
    if not address:
        yield ()
    elif kind == "dask":
        distributed = _library("distributed", "dask")
        try:
            client = distributed.Client(address.replace("dask://", "tcp://", 1), timeout=SECONDS)
        except (OSError, ValueError) as error:
            raise BreedlineError(f"{VARIABLE} is {address}, where no Dask scheduler answers ({error})") from error
        with client, parallel_config(backend="dask"):
            try:
                client.wait_for_workers(1, timeout=SECONDS)
            except TimeoutError as error:
                raise BreedlineError(f"{VARIABLE} is {address}, which has no workers: start some") from error
            yield distributed.KilledWorker, distributed.client.FutureCancelledError, distributed.comm.CommClosedError
    elif kind == "ray":
        ray = _library("ray", "ray")
        import_module("ray.util.joblib").register_ray()
        try:
            ray.init("auto" if address == "ray://auto" else address, log_to_driver=False)
        except (OSError, ValueError) as error:
            raise BreedlineError(f"{VARIABLE} is {address}, where no Ray cluster answers ({error})") from error
        try:
            with parallel_config(backend="ray"):
                yield (ray.exceptions.RayError,)
        finally:
            ray.shutdown()
    else:
        raise BreedlineError(f"{VARIABLE} is {address}: make it dask://HOST:PORT, ray://HOST:PORT or ray://auto")


def _library(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise BreedlineError(
            f"{VARIABLE} asks for {extra}, which is not installed: install breedline[{extra}]"
        ) from error
