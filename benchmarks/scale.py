"""What each step costs for an image as the data grow, beside the same images as files that plain DVC tracks one by one.

    python -m benchmarks.scale [--source ARCHIVE] [--images N …] [--files-up-to N] [--s3-up-to N]

The images are the photos of ARCHIVE, or ones made of noise, over and over: reduced to a shorter side of 128 pixels, each with
a comment of its own so that no two are the same bytes, in one tar archive. In a clone of this checkout whose dvc.yaml has
only the stages of STAGES, each stage runs as `dvc repro` runs it; then DVC keeps what they wrote, and 1 % more images come
as a second source. The peer is a repository with the raw images alone, so that it tracks half as many as ours, which has
them presized, too. S3 is a server on this machine, which answers without delay. Quick steps are the median of three.

Each step is a process; its memory is that of its children, too. Last, benchmarks.label labels a million names. Exits with 1
if a goal is missed.
"""

import argparse
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import fsspec
from moto.server import ThreadedMotoServer
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from benchmarks.goals import goal
from benchmarks.photos import archive_of, photos
from benchmarks.workspace import ROOT, Cost, cost_of, environment, keep_bytecode, write_params
from breedline.images import Presized, presize_image
from breedline.params import Params, load_params
from breedline.tables import write_json
from flows.serve import running_server

STAGES = ("download", "duplicates", "label", "presize")
OUTPUTS = [
    "data/raw",
    "data/duplicates.csv",
    "data/labels.csv",
    "data/rejected.csv",
    "data/classes.csv",
    "data/presized",
]
CLASSES = 37
SOURCE_SIDE, SIDE = 128, 96
"""The shorter side of the images, and of what presize makes of them."""
ROUNDS = 3
WARM_UP = 10 * CLASSES
"""So many images first, for nothing but compiled bytecode."""
TRACK, NOTHING = "dvc commit or add", "dvc repro, nothing to do"
PUSH_S3, PULL_S3 = "dvc push to S3", "dvc pull from S3"
TIMES_THE_COST, NO_OP_SECONDS, PART_OF_FILES, TIMES_FASTER, OF_WHAT_IS_NEW, LABEL_MEGABYTES = 1.2, 3, 0.3, 10, 1.1, 400
"""The goals."""
Costs = dict[str, Cost]
REMOTES = """
[core]
    remote = folder
['remote "folder"']
    url = {folder}
['remote "s3"']
    url = {bucket}
    endpointurl = {server}
"""


class Grown(NamedTuple):
    """What 1 % more images cost."""

    images: int
    decoded: int
    volumes: int
    """Bytes of the volumes that have the new images."""
    uploaded: int


class Repository:
    """A git and DVC repository with a remote in a folder beside it."""

    def __init__(self, root: Path, outputs: list[str], server: str, variables: dict[str, str]) -> None:
        """`server` is the URL of the S3 server, `variables` what processes get beyond their usual environment."""
        self.root, self.outputs, self.remote = root, outputs, root.with_name(f"{root.name}-remote")
        self._variables = environment(root.parent, root) | variables
        bucket = f"s3://bucket/{root.parent.name}/{root.name}"
        (root / ".dvc/config.local").write_text(REMOTES.format(folder=self.remote, bucket=bucket, server=server))

    def run(self, *command: str, rounds: int = 1) -> Cost:
        """The cost of the command, the median of some rounds."""
        cost = sorted(cost_of(list(command), self.root, self._variables) for _ in range(rounds))[rounds // 2]
        print(f"{self.root.name}: {cost.seconds:.2f} s, of the CPU {cost.cpu:.2f} s: {shlex.join(command)}", flush=True)
        return cost

    def nothing_to_do(self, *command: str, rounds: int = 1) -> Cost:
        """The cost of a command that is to find everything up to date."""
        cost = self.run(*command, rounds=rounds)
        if "up to date" not in cost.said and "UpToDate" not in cost.said:
            sys.exit(f"there was something to do: {cost.said}")
        return cost

    def forget(self, *more: str) -> None:
        """Delete the outputs, and what else is named."""
        for name in (*self.outputs, *more):
            path = self.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def uploaded(self) -> int:
        """The bytes that the remote has."""
        return sum(path.stat().st_size for path in self.remote.rglob("*") if path.is_file())


def main(arguments: argparse.Namespace) -> bool:
    """Print the tables; whether every goal was met."""
    params = load_params(ROOT / "presets/pets.yaml")
    ours: dict[int, Costs] = {}
    files: dict[int, Costs] = {}
    with TemporaryDirectory() as temporary, running_server() as prefect:
        folder = Path(temporary)
        keep_bytecode(folder / "bytecode")
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        s3 = "http://{}:{}".format(*server.get_host_and_port())
        variables = _variables(folder, s3) | prefect.settings
        pictures = [_reduced(photo) for photo in photos(arguments.source, params.download)]
        met = []
        Bench(folder / "warm-up", pictures, WARM_UP, s3, variables).ours(params, with_s3=False)
        for images in sorted(arguments.images):
            bench = Bench(folder / str(images), pictures, images, s3, variables)
            with_s3 = images <= arguments.s3_up_to
            ours[images], grown = bench.ours(params, with_s3)
            files[images] = bench.files(with_s3) if images <= arguments.files_up_to else {}
            shutil.rmtree(bench.folder)
            _show(images, ours[images], files[images])
            met += _goals_of_growth(grown) + _goals_beside_files(ours[images], files[images])
        server.stop()
        met += _goals_of_size(ours, sorted(arguments.images))
        labelled = cost_of([sys.executable, "-m", "benchmarks.label"], folder, environment(folder))
        met.append(goal("memory of label, a million names", labelled.megabytes, "MB", most=LABEL_MEGABYTES))
    return all(met)


def _variables(folder: Path, s3: str) -> dict[str, str]:
    """For the processes: who they are to the S3 server, whose bucket is made, and a place for what DVC keeps."""
    fsspec.filesystem("s3", key="key", secret="secret", endpoint_url=s3).mkdir("bucket")  # noqa: S106 - of no one
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    return keys | {"DVC_SITE_CACHE_DIR": str(folder / "dvc"), "DVC_NO_ANALYTICS": "1"}


def _reduced(photo: bytes) -> bytes:
    match presize_image(photo, SOURCE_SIDE, 85):
        case Presized(data=data):
            return data


def _name(number: int) -> str:
    return f"class{number % CLASSES:02d}_{number:06d}.jpg"


class Bench:
    """One size of the data: the same images in both ways."""

    def __init__(self, folder: Path, pictures: list[bytes], images: int, s3: str, variables: dict[str, str]) -> None:
        """Pack the images into archives in `folder`."""
        self.folder, self.s3, self.variables, self.new = folder, s3, variables, max(images // 100, 1)
        folder.mkdir()
        self.all = archive_of(folder / "all.tar", pictures, range(images), _name)
        self.more = archive_of(folder / "more.tar", pictures, range(images, images + self.new), _name)

    def ours(self, params: Params, with_s3: bool) -> tuple[Costs, Grown]:
        """The stages, what DVC does with their outputs, and 1 % more images."""
        root = self.folder / "ours"
        subprocess.run(["git", "clone", "--quiet", ROOT, root], check=True)
        stages = YAML(typ="safe").load(root / "dvc.yaml")["stages"]
        write_json({"stages": {name: stages[name] for name in STAGES}}, root / "dvc.yaml")  # which is YAML, too
        (root / "dvc.lock").unlink()
        repository = Repository(root, OUTPUTS, self.s3, self.variables)
        write_params(root, _sections(params, self.all))
        costs = {name: repository.run(*shlex.split(stages[name]["cmd"])) for name in STAGES}
        costs[TRACK] = repository.run("dvc", "commit", "--force")
        costs["breedline plan"] = repository.run("breedline", "plan", rounds=ROUNDS)
        costs["breedline run, nothing to do"] = repository.nothing_to_do("breedline", "run")
        costs |= _kept(repository, with_s3)
        write_params(root, _sections(params, self.all, self.more))
        said = [repository.run(*shlex.split(stages[name]["cmd"])).said for name in STAGES][-1]
        return costs, self._grown(repository, said)

    def files(self, with_s3: bool) -> Costs:
        """The same with one file for each image."""
        root = self.folder / "files"
        (root / "images").mkdir(parents=True)
        subprocess.run(["tar", "xf", self.all, "-C", root / "images"], check=True)
        subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
        subprocess.run(["dvc", "init", "--quiet"], cwd=root, env=os.environ | self.variables, check=True)
        shutil.copy(ROOT / ".dvc/config", root / ".dvc/config")
        repository = Repository(root, ["images"], self.s3, self.variables)
        return {TRACK: repository.run("dvc", "add", "images"), **_kept(repository, with_s3, "images.dvc")}

    def _grown(self, repository: Repository, said: str) -> Grown:
        counts = re.search(r"presize: (\d+) images: .*; (\d+) of them from the cache", said)
        if counts is None:
            sys.exit(f"presize did not say what it did: {said}")
        volumes = sum(volume.stat().st_size for volume in repository.root.glob("data/*/01-*.tar"))
        before = repository.uploaded()
        repository.run("dvc", "commit", "--force")
        repository.run("dvc", "push")
        return Grown(self.new, int(counts[1]) - int(counts[2]), volumes, repository.uploaded() - before)


def _sections(params: Params, *archives: Path) -> dict[str, Any]:
    sections = params.model_dump()
    sections["download"] |= {"sources": [{"url": str(archive)} for archive in archives]}
    sections["duplicates"] |= {"similarity": None}  # there are only a few photos, over and over
    sections["presize"] |= {"shorter_side": SIDE}
    return sections


def _kept(repository: Repository, with_s3: bool, *target: str) -> Costs:
    """What is done with data that DVC tracks, in whatever form."""
    costs = {
        "dvc status": repository.run("dvc", "status", rounds=ROUNDS),
        NOTHING: repository.nothing_to_do("dvc", "repro", *target, rounds=ROUNDS),
    }
    repository.forget()
    costs["dvc checkout"] = repository.run("dvc", "checkout")
    costs["dvc push to a folder"] = repository.run("dvc", "push")
    if with_s3:
        costs[PUSH_S3] = repository.run("dvc", "push", "--remote=s3")
        repository.forget(".dvc/cache")
        costs[PULL_S3] = repository.run("dvc", "pull", "--remote=s3")
    return costs


def _show(images: int, ours: Costs, files: Costs) -> None:
    table = Table(title=f"{images:,} images")
    for column in ("", "seconds", "of the CPU", "ms of it an image", "MB", "as files: seconds", "of the CPU", "MB"):
        table.add_column(column, justify="right" if column else "left")
    for step, cost in ours.items():
        figures = [f"{cost.seconds:.2f}", f"{cost.cpu:.2f}", f"{1000 * cost.cpu / images:.3f}", f"{cost.megabytes:.0f}"]
        if peer := files.get(step):
            figures += [f"{peer.seconds:.2f}", f"{peer.cpu:.2f}", f"{peer.megabytes:.0f}"]
        table.add_row(step, *figures)
    Console(width=120).print(table)


def _goals_of_growth(grown: Grown) -> list[bool]:
    new, tables = grown.volumes / 1e6, (grown.uploaded - grown.volumes) / 1e6
    print(
        f"1 % more, {grown.images:,} images: {new:.2f} MB of volumes to upload; beside them tables of {tables:.2f} MB"
    )
    return [
        goal("1 % more: images decoded, for each new one", grown.decoded / grown.images, most=1),
        goal(
            "1 % more: bytes uploaded, for each of the new volumes", grown.uploaded / grown.volumes, most=OF_WHAT_IS_NEW
        ),
    ]


def _goals_beside_files(ours: Costs, files: Costs) -> list[bool]:
    return [
        goal(f"{step}: quicker than files", files[step].seconds / ours[step].seconds, "times", least=TIMES_FASTER)
        for step in (PUSH_S3, PULL_S3)
        if step in ours and step in files
    ] + [
        goal("nothing to do: seconds", ours[NOTHING].seconds, "s", most=NO_OP_SECONDS)
        or (NOTHING in files and _quick_beside_files(ours, files))
    ]


def _quick_beside_files(ours: Costs, files: Costs) -> bool:
    return goal(
        "nothing to do: of the files' seconds", ours[NOTHING].seconds / files[NOTHING].seconds, most=PART_OF_FILES
    )


def _goals_of_size(ours: dict[int, Costs], sizes: list[int]) -> list[bool]:
    """The CPU's seconds for an image of the largest size, of those of the second largest; that they fall is no miss."""
    if len(sizes) < 2:
        return []
    few, many = sizes[-2:]
    return [
        goal(
            f"{step}: an image of {many:,}, of {few:,}",
            (cost.cpu / many) / (ours[few][step].cpu / few),
            most=TIMES_THE_COST,
        )
        for step, cost in ours[many].items()
        if step in ours[few]
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=main.__doc__)
    parser.add_argument("--source", type=Path, metavar="ARCHIVE", help="real photos to use, rather than noise")
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000], metavar="N", help="the sizes")
    parser.add_argument("--files-up-to", type=int, default=10_000, metavar="N", help="larger sizes have no peer")
    parser.add_argument("--s3-up-to", type=int, default=10_000, metavar="N", help="larger sizes do without S3")
    sys.exit(not main(parser.parse_args()))
