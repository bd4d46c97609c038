"""The unattended run: clone, pipeline, gate, and publishing as a transaction."""

from collections import deque
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State

from breedline.errors import BreedlineError, NetworkError
from breedline.params import ParamsError, load_params
from flows import publish as transaction
from flows.artifacts import changes, show_decision
from flows.decisions import write
from flows.judge import Judgement, judge
from flows.names import run_name
from flows.pipeline import run_stages
from flows.plan import Action, plan
from flows.process import Processes
from flows.registry import released
from flows.remote import check_remote, has_remote, missing, stored
from flows.repo import distrust_remotes, metrics
from flows.states import Outcome
from flows.tasks import in_task
from flows.workspace import PARAMS, Workspace, override, workspace

FOR_COMMITTERS = ("download", "weights", "gate", "score")
"""Sections that a run may not change: a source may be any folder that this process can read, secrets included, scores may
be written to any, and a wider gate would publish anything. Whoever only asks for a run decides none of these."""


SAME = "the model gives the same answers as the champion"


@flow(name="retrain", flow_run_name=run_name, persist_result=False)
def retrain(
    repository: str | None = None,
    ref: str = "main",
    overrides: dict[str, Any] | None = None,
    force: list[str] | None = None,
    publish: bool = True,
) -> State[Any]:
    """Run the pipeline in a private clone, and publish what passes the gate: data to the DVC remote, then a commit and tags.

    Args:
        repository: what to clone: what the folder of this process was cloned from, or one that
            $BREEDLINE_REPOSITORIES names.
        ref: a branch; or, without `publish`, a tag or commit.
        overrides: settings to change in params.yaml, such as {"train.epochs": 20}, which are published with the result;
            not those of FOR_COMMITTERS.
        force: stages to run although nothing they depend on has changed, such as download.
        publish: whether to publish at all.
    """
    checkout = Path.cwd()
    try:
        with workspace(repository, ref, checkout) as clone, Processes() as processes:
            if publish:
                if not clone.branch:
                    raise BreedlineError(f"{ref} is no branch, and only to a branch can be published: name one")
                check_remote(clone.root)
            distrust_remotes(clone.root)
            _override(clone.root, overrides or {})
            in_task("pull", lambda: _pull(clone.root, processes))
            state = run_stages(clone.root, tuple(force or ()))
            if not state.is_completed():
                return state
            if not publish:
                return Outcome.COMPLETED.state(f"{state.message}; not published, as publish is off")
            return _publish(clone, processes)
    except BreedlineError as error:
        return Outcome.FAILED.state(str(error))


def _override(root: Path, overrides: dict[str, Any]) -> None:
    """Change settings in the clone at `root`; a mistake is told in terms of the overrides, not of the clone's files."""
    try:
        load_params(root / PARAMS)
    except ParamsError as error:
        raise ParamsError(str(error).replace(f"{root}/", "")) from error
    if refused := sorted(key for key in overrides if key.split(".")[0] in FOR_COMMITTERS):
        raise ParamsError(
            f"overrides: {', '.join(refused)} cannot be changed for a run: where images and weights come from, what is scored, and what "
            f"the gate lets pass, is changed in {PARAMS} on the branch"
        )
    try:
        override(root, overrides)
    except ParamsError as error:
        first, *mistakes = (line.strip() for line in str(error).splitlines())
        raise ParamsError(f"overrides: {'; '.join(mistakes) or first}") from error


def _pull(root: Path, processes: Processes) -> str:
    """Fetch the outputs of the stages that need not run, where the remote has them and the local cache does not."""
    stages = [step.stage for step in plan(root, pulled=True) if step.action is Action.RESTORE]
    if not stages or not has_remote(root):
        return "nothing to pull"
    try:
        _dvc(processes, root, "pull", "--allow-missing", *stages)
    except NetworkError:
        if not missing(
            root, stored(root)
        ):  # the server answers; the objects it lacks are made again by running their stages
            raise
    return f"pulled what there is of {', '.join(stages)}"


def _push(root: Path, processes: Processes) -> str:
    """Send what the remote lacks; object by object where dvc cannot, as with the list of a folder altered there."""
    try:
        return _dvc(processes, root, "push")
    except NetworkError:
        return str(transaction.verified(root))


def _publish(clone: Workspace, processes: Processes) -> State[Any]:
    """Judge the challenger and do what the gate says; the decision is committed whatever it is, but only once."""
    root = clone.root
    changed = transaction.changed(root)
    if not changed and released(root):
        return Outcome.UNCHANGED.state("everything is as it was published")
    judgement = in_task("gate", lambda: judge(root))
    if not changed and not judgement:
        return Outcome.UNCHANGED.state(SAME)
    if judgement:
        show_decision(judgement.record.verdict, judgement.rows(), judgement.changed)
        if judgement.known and judgement.known.published:
            return Outcome.HELD.state(
                f"this model was published on {judgement.known.time:%Y-%m-%d} and rolled back since: "
                "`breedline rollback --to` puts it into production again"
            )
        if not judgement.decision.publish:
            if not judgement.known:
                path = write(root, judgement.record)
                in_task("record", lambda: transaction.record(clone, _subject("Held", judgement), path))
            return Outcome.HELD.state(str(judgement))
    in_task("push", lambda: _push(root, processes))
    in_task("verify", lambda: transaction.verified(root))
    decision = write(root, judgement.record) if judgement else None
    message = "\n".join([_subject("Retrain", judgement), "", *_numbers(metrics(root))])
    commit = in_task("commit", lambda: transaction.commit(clone, message, decision))
    return Outcome.PUBLISHED.state(f"{commit} on {clone.branch}: {judgement or SAME}")


def _subject(what: str, judgement: Judgement | None) -> str:
    return f"{what}: {judgement.why if judgement else SAME}{transaction.SKIP_CI}"


def _numbers(table: dict[str, tuple[float | None, float | None]]) -> list[str]:
    return [
        f"{row['metric']}: {row['committed']} -> {row['now']}"
        for row in changes(table)
        if row["committed"] != row["now"]
    ]


def _dvc(processes: Processes, root: Path, *arguments: str) -> str:
    said: deque[str] = deque(maxlen=3)
    log = get_run_logger()

    def say(line: str) -> None:
        log.info(line)
        said.append(line)

    if code := processes.dvc(root, list(arguments), say):
        raise NetworkError(f"dvc {arguments[0]} ended with exit code {code}: {' '.join(said)}")
    return said[-1] if said else ""
