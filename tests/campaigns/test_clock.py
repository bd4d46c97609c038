"""The clock jumps, by hours or days, forward and back: runs have the same bytes, and nothing that lives is taken for old.

A library in C, loaded before all others, moves the time of a process by what a file says, and lets the monotonic clock be.
With the package libfaketime, Python cannot sleep then. The times that the system gives to files do not jump; for what compares
them with the clock that is the same.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.campaigns.counts import keep, table
from tests.campaigns.run import Run, left
from tests.project import Project

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static volatile long *offset; /* seconds */

__attribute__((constructor)) static void start(void) {
    int file = open(getenv("CLOCK_OFFSET"), O_RDONLY);
    offset = mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (offset && clock == CLOCK_REALTIME) now->tv_sec += *offset;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    now->tv_sec = time.tv_sec, now->tv_usec = time.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    if (now) *now = time.tv_sec;
    return time.tv_sec;
}
"""
HOUR, DAY = 3600, 86_400
JUMPS = [HOUR, 5 * HOUR, DAY, 40 * DAY, 400 * DAY]


class Clock:
    """The clock of the processes that have `environment`."""

    def __init__(self, folder: Path) -> None:
        self.offset, library = folder / "offset", folder / "clock.so"
        self.set(0)
        command = ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(library), "-ldl"]
        subprocess.run(command, input=SHIM, text=True, check=True)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(self.offset)}

    def set(self, seconds: int) -> None:
        with self.offset.open("r+b" if self.offset.exists() else "wb") as file:  # never shorter, as it is mapped
            file.write(seconds.to_bytes(8, sys.byteorder, signed=True))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    clock = Clock(tmp_path)
    program = "import time; print(int(time.time()), time.sleep(0.01))"
    clock.set(DAY)
    said = subprocess.check_output([sys.executable, "-c", program], env=os.environ | clock.environment, text=True)
    assert abs(int(said.split()[0]) - DAY - time.time()) < HOUR
    return clock


def test_a_run_during_which_the_clock_jumps_has_the_same_bytes(
    fresh: Project, tmp_path: Path, clock: Clock, long: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [] if long else ["duplicates"]
    seed = int(os.environ.get("BREEDLINE_SEED", random.randrange(1 << 32)))  # noqa: S311 - not a secret
    print(f"seed {seed}")
    chance = random.Random(seed)  # noqa: S311
    undisturbed = fresh.copy(tmp_path / "undisturbed")
    undisturbed.set("train", epochs=3)
    undisturbed.repro(*stages)
    counts: Counter[tuple[str, str]] = Counter()
    for number in range(3 if long else 1):
        project = fresh.copy(tmp_path / f"project-{number}", **clock.environment)
        project.set("train", epochs=3)
        trains_on = False
        run = Run(project, *stages)
        while run.dvc.poll() is None:
            jump = chance.choice(JUMPS) * chance.choice([-1, 1])
            clock.set(jump)
            counts[run.at_work(), "forward" if jump > 0 else "back"] += 1
            time.sleep(chance.uniform(0.05, 0.5))
            if not trains_on and any(Path(project.environment["BREEDLINE_CACHE"]).rglob("epoch-*.pt")):
                trains_on = True  # the next run does, from the checkpoint
                run.kill(signal.SIGKILL, "all")
                run.ends()
                run = Run(project, *stages)
        assert run.ends() == 0, run.said.read_text()
        assert trains_on == long
        assert left(project) == left(undisturbed)
        clock.set(0)
        assert project.repro(*stages)[0] == []
    keep("clock", counts)
    with capsys.disabled():
        print(f"\n{table(counts, 'at work', 'jumps')}")
