"""dvc.yaml as a Prefect flow: one task per stage. DVC decides what is up to date, runs the stage and keeps the record."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prefect import allow_failure, flow, get_client, get_run_logger
from prefect.client.schemas.objects import State
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.tasks import Task

from breedline.errors import BreedlineError
from flows import artifacts
from flows.limits import create_limit
from flows.names import run_name
from flows.plan import Action, Step, plan
from flows.process import Ended, Processes, RunEnded
from flows.repo import keep_order
from flows.service import SERVER_START
from flows.states import Outcome
from flows.tasks import task_of

LEASE = 60.0
"""Seconds after which the slot of a killed run is free again; the least that Prefect allows."""
LINES_IN_MESSAGE = 5


@dataclass(frozen=True)
class Result:
    """How a stage ended: a row of the summary."""

    stage: str
    state: Outcome
    seconds: float = 0
    why: str = ""
    code: int = 0


@dataclass
class Run:
    """State that the tasks of one run share."""

    root: Path
    force: tuple[str, ...]
    processes: Processes
    results: dict[str, Result] = field(default_factory=dict)


@flow(name="pipeline", flow_run_name=run_name, persist_result=False)
def pipeline(root: Path = Path(), force: tuple[str, ...] = ()) -> State[Any]:
    """Bring every stage of dvc.yaml at `root` up to date, as `dvc repro` would; independent stages run in parallel.

    Args:
        root: a DVC repository.
        force: stages to run although nothing they depend on has changed.
    """
    try:
        return run_stages(root, force)
    except BreedlineError as error:
        return Outcome.FAILED.state(str(error))


def run_stages(root: Path, force: tuple[str, ...]) -> State[Any]:
    """The work of `pipeline`, for any flow: tasks and artifacts belong to the flow run in which this is called.

    Raises:
        BreedlineError: there is no plan, as of a dvc.yaml that DVC cannot read, or no such stage to force.
    """
    root = root.resolve()
    steps = plan(root)
    stages = [step.stage for step in steps]
    if unknown := [name for name in force if name not in stages]:
        raise BreedlineError(f"there is no stage called {unknown[0]} to force: there are {', '.join(stages)}")
    artifacts.show_plan(steps)
    with get_client(sync_client=True) as client:
        for resource in {resource for step in steps for resource in step.policy.resources}:
            create_limit(client, resource)
    with keep_order(root, stages), Processes() as processes:
        run = Run(root, force, processes)
        futures: dict[str, Any] = {}
        for step in steps:
            upstream = [allow_failure(futures[name]) for name in step.needs]
            futures[step.stage] = _task(step, run).submit(return_state=False, wait_for=upstream)
        for future in futures.values():
            future.wait()
    results = [run.results.get(step.stage, Result(step.stage, Outcome.FAILED, why="see its log")) for step in steps]
    artifacts.show_results(root, steps, [asdict(result) for result in results])
    failed = [f"{result.stage}: {result.why}" for result in results if result.state is Outcome.FAILED]
    return Outcome.FAILED.state("\n".join(failed)) if failed else Outcome.COMPLETED.state(_counted(results))


def _task(step: Step, run: Run) -> Task[[], State[Any]]:
    policy = step.policy

    def may_end_better() -> bool:
        result = run.results.get(step.stage)
        return run.processes.open and result is not None and result.code in policy.retry_on

    return task_of(
        step.stage,
        lambda: _bring_up_to_date(step, run),
        retries=policy.retries,
        delay=policy.retry_delay,
        again=may_end_better,
    )


def _bring_up_to_date(step: Step, run: Run) -> State[Any]:
    started = time.monotonic()
    needs = [run.results.get(name, Result(name, Outcome.FAILED)) for name in step.needs]
    code, why = 0, "; ".join(step.why)
    forced = step.stage in run.force
    if bad := [need.stage for need in needs if need.state.bad]:
        state, why = Outcome.SKIPPED, f"{', '.join(bad)} did not end well"
    elif step.action is Action.UP_TO_DATE and not forced and all(need.state is Outcome.UP_TO_DATE for need in needs):
        state = Outcome.UP_TO_DATE
    else:
        try:
            with _slots(step.policy.resources, run):
                ended = run.processes.run(run.root, step.stage, step.policy, get_run_logger().info, force=forced)
            state, code = ended.state, ended.code
            if state is Outcome.FAILED:
                why = _last_words(ended)
        except RunEnded:
            state = Outcome.CANCELLED
    if not run.processes.open:
        state, why = Outcome.CANCELLED, "its run has ended"
    run.results[step.stage] = Result(step.stage, state, round(time.monotonic() - started, 1), why, code)
    return state.state(why)


def _last_words(ended: Ended) -> str:
    return "\n".join([f"exit code {ended.code}", *ended.said[-LINES_IN_MESSAGE:]])


def _counted(results: list[Result]) -> str:
    states = [result.state for result in results]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


@contextlib.contextmanager
def _slots(resources: list[str], run: Run) -> Iterator[None]:
    """Hold one slot of each of the concurrency limits, after waiting for them.

    Raises:
        RunEnded: the run ended meanwhile.
    """
    if not resources:
        yield
        return
    # A server outage must not cost hours of training: the stage goes on when its lease cannot be renewed, and has
    # succeeded even if the lease cannot be released, which then expires by itself.
    options: dict[str, Any] = {"strict": True, "lease_duration": LEASE, "raise_on_lease_renewal_failure": False}
    slots, answered = contextlib.ExitStack(), time.monotonic()
    while True:
        try:
            slots.enter_context(concurrency(resources, timeout_seconds=5, **options))
            break
        except TimeoutError:
            answered = time.monotonic()
        except ConcurrencySlotAcquisitionError as error:
            away = isinstance(error.__cause__, httpx.TransportError)
            if not away or time.monotonic() - answered > SERVER_START:
                raise
            time.sleep(1)  # the server was killed, and is about to start again
        run.processes.check_open()
    try:
        yield
    finally:
        with contextlib.suppress(httpx.TransportError):
            slots.close()
