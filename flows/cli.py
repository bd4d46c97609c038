"""The command `breedline`: one subcommand for each thing to do. Each imports what it needs only when it runs."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from breedline.errors import BreedlineError

NEIGHBOURS = "reports/evaluate/neighbours.safetensors"
"""Where evaluate leaves training photos to show, beside the folder of the bundle."""
REVIEWED = {
    "suspects": "reports/suspects.csv",
    "presized": "data/presized",
    "labels": "data/labels.csv",
    "corrections": "data/corrections.csv",
    "kept": "data/kept.csv",
}
"""What a review reads and writes."""
SET_UP = "`make plan` in a clone sets up the whole environment"


def plan() -> None:
    """Show what `dvc repro` would do with each stage, and why; changes nothing."""
    from flows.plan import main

    main()


def run(force: list[str]) -> int:
    """Run the pipeline in this folder as a Prefect flow; the result is that of `dvc repro`."""
    from flows.plan import plan

    plan(Path())  # tells a mistake at once, where the flow first starts a server
    from flows.pipeline import pipeline

    return int(not pipeline(force=tuple(force), return_state=True).is_completed())


def retrain(ref: str, overrides: list[tuple[str, Any]], force: list[str], publish: bool) -> int:
    """Run the pipeline in a private clone of this folder's origin, and publish what passes the gate if asked to."""
    from flows.workspace import unpushed

    if unpushed(Path(), ref):
        print(
            f"the run clones {ref} of the origin: what is changed or committed here counts once it is pushed",
            file=sys.stderr,
        )
    from flows.retrain import retrain

    state = retrain(ref=ref, overrides=dict(overrides), force=force, publish=publish, return_state=True)
    return int(not state.is_completed())


def watch(ref: str, deployment: str, publish: bool) -> int:
    """Start a retraining if a source has changed since the last look."""
    from flows.watch import watch

    return int(not watch(ref=ref, deployment=deployment, publish=publish, return_state=True).is_completed())


def score(ref: str) -> int:
    """Score what is new in the folder or bucket that params.yaml names, with the model of a branch."""
    from flows.score import score

    return int(not score(ref=ref, return_state=True).is_completed())


def serve() -> None:
    """Run the deployments of prefect.yaml on this machine, with a Prefect server of its own, until Ctrl-C."""
    from flows.serve import main

    main()


def gate() -> None:
    """Tell what the gate would say of the model in this folder, and why; nothing is recorded."""
    from flows.judge import main

    main()


def rollback(to: str | None) -> None:
    """Put the version before into production again, for everybody; the tag that does it is the record."""
    from flows.registry import roll_back

    print(roll_back(Path(), to))


def verify_remote(deep: bool) -> int:
    """Ask the DVC remote for every object that dvc.lock names; what is missing or altered is sent again."""
    from flows.verify_remote import main

    return main(deep)


def doctor(repair: bool) -> int:
    """Tell what is wrong here: environment, settings, results and their cache, remote, leftovers, decisions, server."""
    from flows.doctor import main

    return main(repair)


def predict(paths: list[str], model: str, top: int, min_confidence: float | None, form: str) -> int:
    """Tell what a published model sees in photos: files, folders, globs, archives, or `-` for a list of them on stdin."""
    from flows.predict import main

    return main(paths, model=model, top=top, min_confidence=min_confidence, form=form)


def app(model: str, neighbours: str | None, port: int | None) -> None:
    """Show what a published model sees in photos, and what it looks at, on a page for this machine alone, until Ctrl-C."""
    from breedline.app import main
    from flows.predict import bundle_of

    bundle = bundle_of(model)
    beside = bundle.absolute().parent / NEIGHBOURS
    main(bundle, Path(neighbours) if neighbours else beside, port, needed=neighbours is not None)


def review(port: int | None) -> None:
    """Decide which labels are wrong, on a page for this machine alone; each decision is a line of a table in data/."""
    from breedline.review import main

    main(**{name: Path(path) for name, path in REVIEWED.items()}, port=port)


def completion(shell: str) -> None:
    """Print what completes the command in a shell; for bash: `eval "$(breedline completion bash)"`."""
    import shtab

    print(shtab.complete(_parser(), shell))


def main() -> NoReturn:
    """Run one subcommand, and exit with its code: 0, an expected error's own, 2 for a mistake in the command itself."""
    arguments = vars(_parser().parse_args())
    command: Callable[..., int | None] = arguments.pop("command")
    # dvc, prefect and the stages' `python` are those of this environment, activated or not
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        sys.exit(command(**arguments))
    except BreedlineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        name = (error.name or "breedline").partition(".")[0]
        if name in ("breedline", "stages", "flows"):
            raise  # a bug of ours
        print(f"error: {name} is not installed; only predict and app do without: {SET_UP}", file=sys.stderr)
        sys.exit(BreedlineError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="breedline", description="Images whose file names carry the label in, a versioned classifier out."
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(command: Callable[..., int | None]) -> argparse.ArgumentParser:
        """A subcommand of the function's name and docstring; its options are the function's parameters."""
        text = command.__doc__
        name = command.__name__.replace("_", "-")
        subparser = subparsers.add_parser(name, help=text, description=text)
        subparser.set_defaults(command=command)
        return subparser

    force: dict[str, Any] = {
        "action": "append",
        "default": [],
        "metavar": "STAGE",
        "help": "run it although nothing has changed",
    }
    publish: dict[str, Any] = {"action": "store_true", "help": "send the data to the DVC remote, then push a commit"}
    add(plan)
    add(run).add_argument("--force", **force)
    command = add(retrain)
    command.add_argument("--ref", default="main", help="a branch; without --publish, a tag or commit will do (main)")
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="another setting, such as train.epochs=20; may be given again",
    )
    command.add_argument("--force", **force)
    command.add_argument("--publish", **publish)
    command = add(watch)
    command.add_argument("--ref", default="main", help="a branch (main)")
    command.add_argument("--deployment", default="retrain/on-demand", help="what to start (retrain/on-demand)")
    command.add_argument("--publish", **publish)
    add(score).add_argument("--ref", default="main", help="a branch, tag or commit (main)")
    add(gate)
    add(rollback).add_argument("--to", metavar="VERSION", help="another version, such as v1.2.0")
    add(serve)
    add(verify_remote).add_argument(
        "--deep", action="store_true", help="read every object, whatever checksum the remote tells"
    )
    add(doctor).add_argument("--repair", action="store_true", help="do what is safe of what it advises, and look again")
    model: dict[str, Any] = {
        "default": "models",
        "metavar": "DIR",
        "help": "a bundle's folder, a git revision that has one, or what is in production: classifier#prod (models)",
    }
    command = add(predict)
    command.add_argument("paths", nargs="+", metavar="PATH")
    command.add_argument("--model", **model)
    command.add_argument(
        "--top", default=3, type=_count, metavar="N", help="how many classes to tell of each photo (3)"
    )
    command.add_argument(
        "--min-confidence",
        type=_share,
        metavar="P",
        help="the probability below which a photo shows none of the classes (as the model was published with)",
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="print a CSV table")
    form.add_argument(
        "--json", dest="form", action="store_const", const="json", help="print a line of JSON for each photo"
    )
    command.set_defaults(form="table")
    command = add(app)
    command.add_argument("--model", **model)
    command.add_argument(
        "--neighbours", metavar="FILE", help=f"training photos to show the most similar of ({NEIGHBOURS}, if it fits)"
    )
    at_port: dict[str, Any] = {
        "type": _port,
        "metavar": "N",
        "help": "of 127.0.0.1 (8000, or another if that is taken)",
    }
    command.add_argument("--port", **at_port)
    add(review).add_argument("--port", **at_port)
    add(completion).add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no count: give 1 or more")


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and 0 < int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port: give 1 to 65535")


def _share(text: str) -> float:
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no probability: give 0 to 1")


def _setting(text: str) -> tuple[str, Any]:
    """`train.epochs=20` as ("train.epochs", 20): the value is YAML, as in params.yaml."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, equals, value = text.partition("=")
    try:
        if key and equals:
            return key, YAML(typ="safe").load(value)
    except YAMLError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as train.epochs=20")
