"""A `dvc repro` to disturb, and what it leaves behind."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil

from tests.project import Project, hashes

SECONDS_TO_END = 5
"""In which what was started by a dvc that was killed has to end."""
SECONDS_TO_FINISH = 600
"""In which a dvc that minds no signal has to go through all the stages, on a busy machine too."""

TAKEN = re.compile(r"No such file or directory: '\S+/runs/\S+\.tmp'")
"""What dvc says when another dvc with the same cache has taken its half-written file in the run-cache for damaged, and removed it."""


class Run:
    """A `dvc repro`, of all stages unless some are named, in a process group of its own."""

    def __init__(self, project: Project, *stages: str) -> None:
        self.said = project.folder.with_name("said")
        with self.said.open("wb") as said:
            self.dvc = subprocess.Popen(
                ["dvc", "repro", *stages],
                cwd=project.folder,
                env=project.environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                process_group=0,  # in the session of the server that starts the stages
            )

    def begins(self, count: int = 1) -> None:
        """Return once so many stages have begun, or there is none to begin."""
        while self.dvc.poll() is None and self.said.read_bytes().count(b"Running stage") < count:
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        """All that live and were started by it."""
        found = []
        for process in psutil.process_iter(["status"]):
            try:
                if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == self.dvc.pid:
                    found.append(process)
            except ProcessLookupError:
                continue
        return found

    def stage(self) -> tuple[str, psutil.Process] | None:
        """The stage at work and its process, which is the one that was forked if it has been forked already."""
        name, process = "", None
        for each in self.processes():
            try:
                words = each.cmdline()
            except psutil.Error:
                continue
            if name_of := re.match(r"\S*python.* -m stages\.(\w+)", " ".join(words)):
                name, process = name_of[1], process or each
            elif "serve" in words:
                process = each
        return (name, process) if name and process else None

    def at_work(self) -> str:
        """The stage at work, or what dvc is doing."""
        if stage := self.stage():
            return stage[0]
        return "dvc: records" if b"Running stage" in self.said.read_bytes() else "dvc: starts"

    def kill(self, number: signal.Signals, victim: str) -> str:
        """Send the signal; who has got it."""
        if victim == "all":
            os.killpg(self.dvc.pid, number)
        elif victim == "the stage" and (stage := self.stage()):
            stage[1].send_signal(number)
        else:
            victim = "dvc"
            self.dvc.send_signal(number)
        return victim

    def ends(self) -> int:
        """Its exit code, once all its processes have ended."""
        try:
            code = self.dvc.wait(SECONDS_TO_FINISH)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs: {[each.cmdline() for each in self.processes()]}") from None
        end = time.monotonic() + SECONDS_TO_END
        while living := self.processes():
            assert time.monotonic() < end, f"an orphan: {[process.cmdline() for process in living]}"
            time.sleep(0.05)
        return code


def left(project: Project, cache: Path | None = None) -> dict[str, str]:
    """What a run leaves behind: in the workspace by its hash, in the caches by name; `cache` is DVC's, if it is elsewhere."""
    home = Path(project.environment["BREEDLINE_CACHE"])
    names = [path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"]
    names += [path for path in (cache or project.folder / ".dvc/cache").rglob("*") if path.is_file()]
    workspace = hashes(project.folder)
    return {
        **{name: sha256 for name, sha256 in workspace.items() if not name.startswith((".git/", ".dvc/"))},
        **{f"{path.parts[-3:]}": "" for path in names},
    }
