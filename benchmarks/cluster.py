"""Presizing on a cluster: the same bytes, how quick, what goes over the network, and what killed workers cost.

    python -m benchmarks.cluster [--source ARCHIVE] [--images N] [--workers N …]

A Dask scheduler and its workers, of one thread each, run as processes of this machine, as a user starts them on several.
The presize stage, a process of its own with an empty cache, is timed without them and with each number of workers; then
with two workers, of which one is killed every five seconds. Exits with 1 if a goal is missed.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.goals import goal
from benchmarks.photos import photos
from benchmarks.workspace import ROOT, environment, keep_bytecode, stage, write_params
from breedline.files import sha256_of
from breedline.params import Params, load_params
from breedline.shards import COLUMNS, pack, write_index
from breedline.tables import write_csv

VOLUME_BYTES = 8 * 2**20
"""Of the raw volumes: a few seconds of work each."""
SECONDS_BETWEEN_KILLS = 5
KIB_PER_IMAGE = 1.0
"""Goal: over the network, at most; here all that goes over loopback counts."""


def main(arguments: argparse.Namespace) -> bool:
    """Print the tables; whether every goal was met."""
    params = load_params(ROOT / "presets/pets.yaml")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        keep_bytecode(folder / "bytecode")
        volumes = _prepare(folder, arguments, params)
        print(f"{arguments.images} images in {volumes} volumes, {os.cpu_count()} cores")
        table = Table("", "seconds", "images/s", "KiB per image", "same bytes")
        alone, wanted, _ = _run(folder, "here")
        again, _, _ = _run(folder, "again", keep_cache=True)
        table.add_row("this machine", f"{alone:.1f}", f"{arguments.images / alone:.0f}", "", "")
        table.add_row("this machine, all in the cache", f"{again:.1f}", f"{arguments.images / again:.0f}", "", "")
        met = True
        for workers in arguments.workers:
            with _dask(folder, workers):
                _run(folder, "warm")  # the workers import what they need
                seconds, made, sent = _run(folder, f"there{workers}")
            kib = sent / 1024 / arguments.images
            met &= made == wanted and kib <= KIB_PER_IMAGE
            row = (f"{seconds:.1f}", f"{arguments.images / seconds:.0f}", f"{kib:.2f}", str(made == wanted))
            table.add_row(f"{workers} workers", *row)
        Console().print(table)
        with _dask(folder, 2) as workers_, _killing(workers_) as kills:
            seconds, made, _ = _run(folder, "killed")
        again_made = len(list((folder / "cache" / "scratch").iterdir()))
        print(f"a worker killed every {SECONDS_BETWEEN_KILLS} s: {seconds:.1f} s, same bytes: {made == wanted}")
        met &= made == wanted
        met &= goal(f"volumes made again, after {len(kills)} kills", again_made, most=len(kills))
    return met


def _prepare(folder: Path, arguments: argparse.Namespace, params: Params) -> int:
    """Raw volumes of photos with distinct bytes, and the table of their labels; how many volumes."""
    pictures = photos(arguments.source, params.download)

    def files() -> Iterator[tuple[str, int, io.BytesIO]]:
        for number in range(arguments.images):
            photo, comment = pictures[number % len(pictures)], b"\xff\xfe\x00\x0a%08d" % number
            content = photo[:2] + comment + photo[2:]
            yield f"{number:06d}.jpg", len(content), io.BytesIO(content)

    (folder / "raw").mkdir()
    index = pd.DataFrame(list(pack(files(), folder / "raw", "00", VOLUME_BYTES)), columns=COLUMNS)
    write_index(index, folder / "raw")
    write_csv(index[["name", "sha256"]], folder / "labels.csv")
    write_params(folder, params.model_dump())
    return int(index["shard"].nunique())


def _run(folder: Path, name: str, keep_cache: bool = False) -> tuple[float, dict[str, str], int]:
    """Seconds of the stage into folder `name`, the SHA-256 of each file that it made, and bytes over loopback."""
    if not keep_cache:
        subprocess.run(["rm", "-rf", folder / "cache"], check=True)
    command = stage("presize", "--raw=raw", "--labels=labels.csv", f"--presized={name}")
    before, began = psutil.net_io_counters(pernic=True)["lo"].bytes_sent, time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment(folder), text=True, capture_output=True)
    seconds, sent = time.perf_counter() - began, psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, {path.name: sha256_of(path) for path in (folder / name).iterdir()}, sent


@contextmanager
def _dask(folder: Path, workers: int) -> Iterator[list[psutil.Popen]]:
    """A scheduler and workers, which BREEDLINE_BACKEND names; the workers."""
    file = folder / f"scheduler{workers}.json"
    file.unlink(missing_ok=True)
    variables = {**environment(folder), "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1000"}
    with ExitStack() as stack:

        def start(what: str, *options: str) -> psutil.Popen:
            command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--host=127.0.0.1", "--no-dashboard"]
            log = stack.enter_context((folder / f"{what}.log").open("w"))
            process = psutil.Popen([*command, *options], cwd=folder, env=variables, stdout=log, stderr=log)
            stack.callback(_end, process)
            return process

        start("scheduler", "--port=0", f"--scheduler-file={file}")
        while not file.exists() or not file.read_text():
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        os.environ["BREEDLINE_BACKEND"] = address.replace("tcp://", "dask://")
        stack.callback(os.environ.pop, "BREEDLINE_BACKEND")
        yield [start("worker", address, "--nthreads=1", "--memory-limit=0") for _ in range(workers)]


def _end(process: psutil.Popen) -> None:
    for each in [*process.children(recursive=True), process]:
        each.kill()
    process.wait()


@contextmanager
def _killing(workers: list[psutil.Popen]) -> Iterator[list[int]]:
    """Kill the workers in turn, which their nannies start anew; the list of those killed so far."""
    killed: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(SECONDS_BETWEEN_KILLS):
            for worker in workers[len(killed) % len(workers)].children():
                worker.send_signal(signal.SIGKILL)
                killed.append(worker.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=main.__doc__)
    parser.add_argument("--source", type=Path, metavar="ARCHIVE", help="real photos to use, rather than noise")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", nargs="*", type=int, default=[2, 4, 8])
    sys.exit(not main(parser.parse_args()))
