"""`python -m benchmarks.orchestration`: what Prefect adds to a run in which nothing is to be done, in this repository.

The peer is `dvc repro`, a whole process each time. Ours is the run as the server records it, from Running to Completed, in a
process of its own each time, as a scheduled run has; the server is there already. Both are asked in turn.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time

from flows.serve import running_server

ROUNDS = 5
GOAL = 1.5
RUN = """
import json
from prefect import get_client
from flows.pipeline import pipeline
state = pipeline(return_state=True)
with get_client(sync_client=True) as client:
    run = client.read_flow_run(state.state_details.flow_run_id)
print(json.dumps([run.total_run_time.total_seconds(), state.message]))
"""


def main() -> int:
    """Print both medians and the ratio; the exit code is 1 when the goal is missed."""
    dvc, run, process = [], [], []
    with running_server() as server:
        environment = {**os.environ, **server.settings, "PREFECT_LOGGING_LEVEL": "ERROR"}
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            subprocess.run(["dvc", "repro"], check=True, capture_output=True)
            dvc.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", RUN], env=environment, check=True, stdout=subprocess.PIPE)
            process.append(time.perf_counter() - begun)
            seconds, message = json.loads(done.stdout.splitlines()[-1])
            if not re.fullmatch(r"\d+ UpToDate", message):
                sys.exit(f"there was something to do ({message}): run `dvc repro` before")
            run.append(seconds)
    for name, seconds in (("dvc repro", dvc), ("the flow's run", run), ("its whole process", process)):
        print(f"{name:<18} {statistics.median(seconds):.2f} s   ({min(seconds):.2f} to {max(seconds):.2f})")
    ratio = statistics.median(run) / statistics.median(dvc)
    print(f"run to dvc repro   {ratio:.2f}     (goal: at most {GOAL})")
    return int(ratio > GOAL)


if __name__ == "__main__":
    sys.exit(main())
