"""A DVC remote that misbehaves: each command ends well, or with a line; nothing wrong is taken for right.

And once the remote is healthy again, the same command ends with the right bytes. What the fault and the command were, and
how it ended, is counted (tests/campaigns/counts.py).
"""

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flows.remote import stored
from flows.workspace import Workspace
from tests.campaigns.counts import keep, table
from tests.conftest import LONG
from tests.flows.faulty import ALWAYS, Fault, Proxy
from tests.project import hashes

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]
OUTPUTS = ("raw", "models", "bundle")
SECONDS = 400
"""In which a command ends, whatever the remote does."""
PUBLISH = """
import sys
from pathlib import Path
from breedline.errors import BreedlineError
from flows.publish import commit, verified
from flows.workspace import Workspace
try:
    verified(Path())
    commit(Workspace(Path(), "main"), "ours")
except BreedlineError as error:
    sys.exit(f"error: {error}")
"""
DONE, A_LINE, OVERLOOKED = "done", "a line", "overlooked"
PHOTO = "photo.png"
COMMANDS = {
    "push": ["dvc push"],
    "pull": ["dvc pull"],
    "verify-remote": ["breedline verify-remote"],
    "verify-remote --deep": ["breedline verify-remote --deep"],
    "publish": ["dvc push", f"{sys.executable} -c '{PUBLISH}'"],
    "predict": [f"breedline predict --csv --model HEAD {PHOTO}"],
}
READERS = ("pull", "predict")
ANY = ("PUT", "GET", "HEAD", "LIST")
KINDS = {
    "answers 500": ANY,
    "answers a page": ANY,
    "loses": ["PUT"],
    "alters": ["PUT", "GET"],
    "cuts": ANY,
    "stalls": ANY,
}
FAULTS = [
    *(Fault(kind, method, times) for kind, methods in KINDS.items() for method in methods for times in (1, ALWAYS)),
    *(Fault("vanishes", "", after=after) for after in (0, 1, 3, 6, 10, 15)),
]


class Remote:
    """A published project and a model to publish, on a remote behind the proxy; a new start for each round."""

    def __init__(self, project: Any, trained: Workspace, proxy: Proxy, folder: Path) -> None:
        self.project, self.proxy = project, proxy
        self._trained, self._folder, self._round = trained.root, folder, 0
        self._pristine = shutil.copytree(project.origin, folder / "pristine.git")
        self._bucket = project.remote("").partition("/")[0]
        self._old, self._new = ({item.oid for item in stored(root)} for root in (project.work, trained.root))
        self._contents = {
            oid: (trained.root / ".dvc/cache/files/md5" / oid[:2] / oid[2:]).read_bytes()
            for oid in self._old | self._new
        }

    def start(self, command: str) -> Path:
        """A folder in which the command has something to do."""
        self._round += 1
        self.here.mkdir()
        shutil.rmtree(self.project.origin)
        shutil.copytree(self._pristine, self.project.origin)
        self.before = self.project.tip()
        there = {oid: self._contents[oid] for oid in self._old}
        self.wanted = self._old
        if command in READERS:
            root = self._clone("root")
        elif command == "publish":
            root = shutil.copytree(self._trained, self.here / "root")
            self.wanted = self._new
        else:
            root = shutil.copytree(self.project.work, self.here / "root")
            one, other, *_ = sorted(self._old)
            del there[one]
            there[other] = b"\0" * len(there[other])
            if command == "push":
                there.clear()
        (root / ".dvc/config.local").write_text(
            f"['remote \"store\"']\nendpointurl = {self.proxy.url}\n"
            "read_timeout = 1\nconnect_timeout = 1\nverify = true\n"
        )
        _photo(root)
        self.project.s3.rm(self.project.s3.find(self._bucket))
        self.project.s3.pipe({self.project.remote(oid): content for oid, content in there.items()})
        return root

    @property
    def here(self) -> Path:
        return self._folder / f"round-{self._round}"

    def run(self, command: str, root: Path, *, stalls: bool = False) -> subprocess.CompletedProcess[str]:
        """The command after it has ended; the last of several."""
        environment = {
            **os.environ,
            "AWS_MAX_ATTEMPTS": "1" if stalls else "2",
            "DVC_SITE_CACHE_DIR": str(self.here / "site"),
            "BREEDLINE_CACHE": str(self.here / "cache"),
        }
        options: dict[str, Any] = {"text": True, "capture_output": True, "timeout": SECONDS}
        for each in COMMANDS[command]:
            done = subprocess.run(shlex.split(each), cwd=root, env=environment, **options)
        return done

    def outcome(self, command: str, root: Path, done: subprocess.CompletedProcess[str]) -> str:
        """DONE, A_LINE or OVERLOOKED; anything else is a mistake of the command's."""
        visible = self.project.tip() != self.before
        if done.returncode:
            if "Traceback" in done.stderr:
                return "a traceback"
            if done.args[0] != "dvc" and not re.fullmatch("error: .*\n", done.stderr):
                return "not one line"
            return "visible, but failed" if visible else A_LINE
        if command == "pull":
            right = _files(root) == _files(self.project.work)
        elif command == "predict":
            right = done.stdout == self.predicted
        else:
            right = not self.wrong() and visible == (command == "publish")
        return DONE if right else OVERLOOKED

    def pulled(self) -> dict[str, dict[str, str]]:
        """What a fresh clone gets from the remote without the proxy."""
        clone = self._clone("fresh")
        self.project.run("dvc", "pull", at=clone)
        return _files(clone)

    @cached_property
    def predicted(self) -> str:
        """What is predicted with the bundle that was published."""
        photo = str(_photo(self._folder))
        return (
            self.project.run("breedline", "predict", "--csv", "--model", "bundle", photo).replace(photo, PHOTO) + "\n"
        )

    def wrong(self) -> set[str]:
        """What the remote has to have in the end, and lacks or has with other bytes."""
        found = self.project.s3.find(self._bucket)
        there = self.project.s3.cat(found) if found else {}
        return {oid for oid in self.wanted if there.get(self.project.remote(oid)) != self._contents[oid]}

    def _clone(self, name: str) -> Path:
        return Path(shutil.move(self.project.clone(name), self.here / name))


def _photo(folder: Path) -> Path:
    Image.new("RGB", (8, 8), (40, 255, 200)).save(folder / PHOTO)
    return folder / PHOTO


def _files(root: Path) -> dict[str, dict[str, str]]:
    return {name: hashes(root / name) for name in OUTPUTS}


@pytest.fixture
def remote(project: Any, trained: Workspace, tmp_path: Path) -> Iterator[Remote]:
    proxy = Proxy(project.s3.endpoint_url)
    yield Remote(project, trained, proxy, tmp_path)
    proxy.heal()
    proxy.close()


@pytest.mark.parametrize("command", COMMANDS if LONG else ("publish", "verify-remote"))
def test_what_a_remote_that_misbehaves_leaves(
    remote: Remote, command: str, long: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    slowest = 0.0
    faults = [fault for fault in FAULTS if command not in READERS or fault.method != "PUT"]
    for fault in faults if long else random.sample([fault for fault in faults if fault.kind != "stalls"], 1):
        root, began = remote.start(command), time.monotonic()
        remote.proxy.misbehave(fault)
        try:
            done = remote.run(command, root, stalls=fault.kind == "stalls")
        except subprocess.TimeoutExpired:  # dvc asks a silent remote 25 times for each object
            assert (command, fault.kind) == ("pull", "stalls")
            counts[str(fault), f"{command}: waits for over {SECONDS} s"] += 1
            remote.proxy.heal()
            shutil.rmtree(remote.here)
            continue
        met, seconds = remote.proxy.met, time.monotonic() - began
        remote.proxy.heal()
        ended = remote.outcome(command, root, done)
        said = f"{fault}: {ended}: {done}"
        assert ended in (DONE, A_LINE, *([OVERLOOKED] if command == "push" and fault.method == "PUT" else [])), said
        if ended != DONE:
            again = "verify-remote" if ended == OVERLOOKED else command
            done = remote.run(again, root)
            assert remote.outcome(again, root, done) == DONE, f"{said}; then {done}"
        if command not in READERS:
            assert remote.pulled() == _files(root if command == "publish" else remote.project.work), said
        if met:
            slowest = max(slowest, seconds)
            counts[str(fault), f"{command}: {ended}"] += 1
            keep(f"remote-{command.replace(' ', '')}", counts, slowest=round(slowest))
        shutil.rmtree(remote.here)
    with capsys.disabled():
        print(f"\n{table(counts, 'fault', 'faults')}\nthe slowest took {slowest:.0f} s")
