"""Retrain when the source changes: a look at its version, at an interval; nothing is fetched."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any, cast

from prefect import flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.states import Completed, Failed
from prefect.variables import Variable

from breedline.errors import BreedlineError
from breedline.params import load_params
from breedline.version import version_of
from flows.workspace import PARAMS, origin_of, workspace


@flow(name="watch", persist_result=False)
def watch(repository: str | None = None, ref: str = "main", deployment: str = "retrain/on-demand") -> State[Any]:
    """Start `deployment`, with the download forced, if a source in the branch's params.yaml is not what it was.

    What it was is remembered by the Prefect server, so it does not matter who looks. The first look only remembers.

    Args:
        repository: what to clone: what the folder of this process was cloned from, or one that
            $BREEDLINE_REPOSITORIES names.
        ref: a branch.
    """
    try:
        with workspace(repository, ref, Path.cwd()) as clone:
            params = load_params(clone.root / PARAMS).download
            with contextlib.chdir(clone.root):  # where a relative path is looked for by the stage, too
                now = " ".join(version_of(source, params.timeout) for source in params.sources)
    except BreedlineError as error:
        return Failed(message=str(error))
    name = f"source_{hashlib.sha256(f'{repository or origin_of(Path.cwd())} {ref}'.encode()).hexdigest()[:16]}"
    before = Variable.get(name)
    if before == now:
        return Completed(name="Unchanged", message="the source is what it was")
    if before is None:
        Variable.set(name, now)
        return Completed(name="Remembered", message="the first look at this source")
    parameters = {"repository": repository, "ref": ref, "force": ["download"], "publish": True}
    run = cast(FlowRun, run_deployment(deployment, parameters=parameters, timeout=0, as_subflow=False))
    Variable.set(name, now, overwrite=True)
    return Completed(name="Changed", message=f"the source has changed: started {run.name}")
