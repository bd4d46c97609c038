"""Retrain when the source changes: a look at its version, at an interval; nothing is fetched."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any, cast

from prefect import flow, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.variables import Variable

from breedline.errors import BreedlineError
from breedline.params import load_params
from breedline.version import version_of
from flows.names import FROM_WATCH, run_name
from flows.states import Outcome
from flows.workspace import PARAMS, origin_of, workspace


@flow(name="watch", flow_run_name=run_name, persist_result=False)
def watch(
    repository: str | None = None, ref: str = "main", deployment: str = "retrain/on-demand", publish: bool = True
) -> State[Any]:
    """Start `deployment`, with the download forced, if a source in the branch's params.yaml is not what it was.

    What it was is remembered by the Prefect server, so it does not matter who looks. The first look only remembers; a
    new version is remembered when a retraining that a look started for it has completed, and tried again until then.

    Args:
        repository: what to clone: what the folder of this process was cloned from, or one that
            $BREEDLINE_REPOSITORIES names.
        ref: a branch.
        deployment: what to start, as FLOW/DEPLOYMENT.
        publish: whether that publishes what passes the gate.
    """
    try:
        with workspace(repository, ref, Path.cwd()) as clone:
            params = load_params(clone.root / PARAMS).download
            with contextlib.chdir(clone.root):  # where a relative path is looked for by the stage, too
                now = " ".join(version_of(source, params.timeout) for source in params.sources)
    except BreedlineError as error:
        return Outcome.FAILED.state(str(error))
    name = f"source_{_digest(f'{repository or origin_of(Path.cwd())} {ref}')}"
    before = Variable.get(name)
    if before == now:
        return Outcome.UNCHANGED.state("the source is what it was")
    if before is None:
        Variable.set(name, now)
        return Outcome.REMEMBERED.state("the first look at this source")
    version = f"{name}_{_digest(now)}"
    retrainings = _tagged(name)
    if running := [run for run in retrainings if run.state and not run.state.is_final()]:
        return Outcome.WAITING.state(f"the source has changed; {running[0].name} has not ended yet")
    if any(version in run.tags and run.state and run.state.is_completed() for run in retrainings):
        Variable.set(name, now, overwrite=True)
        return Outcome.UNCHANGED.state("the source is what it was at the last retraining")
    parameters = {"repository": repository, "ref": ref, "force": ["download"], "publish": publish}
    tags = [FROM_WATCH, name, version]
    run = cast(FlowRun, run_deployment(deployment, parameters=parameters, timeout=0, as_subflow=False, tags=tags))
    return Outcome.CHANGED.state(f"the source has changed: started {run.name}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tagged(tag: str) -> list[FlowRun]:
    """The latest flow runs with a tag, which are as many as the server gives at once."""
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        )
