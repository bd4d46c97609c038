"""A cluster of machines that takes work off this one: Dask or Ray, through joblib.

Where work is done decides no byte of a result, so the cluster is no setting of params.yaml, which would make stages run
again, but one of the machine: the environment variable BREEDLINE_BACKEND. The workers run the same environment and see
the workspace and the cache under the same paths.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from joblib import parallel_config

from breedline.errors import BreedlineError

VARIABLE = "BREEDLINE_BACKEND"
SECONDS = 30
"""To wait for a scheduler to answer."""


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
