"""What `breedline doctor` looks at. Each check yields what it finds wrong, and how to mend it; looking changes nothing.

A repair removes what killed processes left behind and damaged objects of DVC's cache, and puts back what is lost; no output,
no setting and nothing that people have decided is touched.
"""

import importlib.metadata as metadata
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from packaging.requirements import Requirement

from breedline.corrections import read_corrections
from breedline.decisions import KEPT
from breedline.files import cache_root, leftovers_of
from breedline.params import load_params
from breedline.tables import read_csv
from flows.cli import REVIEWED, SET_UP
from flows.decisions import decided
from flows.git_command import GitError, git
from flows.locks import busy, held, holders, rwlock, stage_at_work
from flows.plan import OUR_CODE
from flows.publish import verify
from flows.registry import model_of
from flows.remote import Stored, damaged, damaged_beside, has_remote, missing, refill, stored
from flows.repo import LockFileError, altered, check_lock, cut_off, empty_runs, outputs
from flows.service import SERVER_START, answers
from flows.workspace import PARAMS, remove_stale

LOCK = "dvc.lock"
FREE = 2 * 10**9
"""With fewer bytes left, even a small run may fill the disk."""
UNUSED_DAYS = {"checkpoints": 30, "scratch": 1}
"""What is older, in these folders of the cache, is of trainings that nobody resumes and of killed workers."""
CONFLICT = re.compile(rb"^(<{7}|>{7}) ", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    what: str
    """What it is, and why it matters."""
    remedy: str = ""
    problem: bool = True
    """Else it is a warning, which leaves the exit code at 0."""
    repair: Callable[[], str] | None = None
    """Does what is safe of the remedy, and returns what was done."""


def environment(root: Path) -> Iterator[Finding]:
    """The packages are of the versions that the project asks for; there is git, and room on the disk."""
    for needed in map(Requirement, metadata.requires("breedline") or []):
        if needed.marker and not needed.marker.evaluate({"extra": "pipeline"}):
            continue
        found = [one.version for one in islice(metadata.distributions(name=needed.name), 1)]
        if not found or not needed.specifier.contains(found[0], prereleases=True):
            yield Finding(f"{needed.name} is {found[0] if found else 'absent'}, not {needed.specifier}", SET_UP)
    for place in (root.absolute(), cache_root().absolute()):
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            yield Finding(f"{there} is no folder that can be written to", "mend that, or set BREEDLINE_CACHE to one")
        elif (free := shutil.disk_usage(there).free) < FREE:
            remedy = "free some space; `dvc gc --workspace` removes what only earlier commits name"
            yield Finding(f"{there} has {free / 1e9:.1f} GB left, which a run may fill", remedy, problem=False)
    git(root, "version")


def pipeline(root: Path) -> Iterator[Finding]:
    """The settings, the stages and the record of what ran can be read, and the record is committed."""
    if not (root / ".dvc").is_dir():
        yield Finding("there is no DVC repository here", "run this in the project's folder")
        return
    if not _in_git(root):
        yield Finding("this is no git repository, so no result has a history", "`git init`", problem=False)
    for name in (PARAMS, "dvc.yaml", LOCK):
        if (root / name).is_file() and CONFLICT.search((root / name).read_bytes()):
            remedy = f"settle it there, or take a side: `git checkout --ours {name}` or `git checkout --theirs {name}`"
            yield Finding(f"{name} has git's marks of a conflict, so nothing can read it", remedy)
            return
    if (root / OUR_CODE).exists():  # else it is another DVC project, whose settings are its own
        load_params(root / PARAMS)
    try:
        check_lock(root)
    except LockFileError as error:
        remedy = f"`git checkout {LOCK}`, or remove it; what has run, `dvc repro` takes from the run-cache"
        yield Finding(str(error), remedy, repair=partial(_check_out, root))
        return
    outputs(root)
    if _in_git(root) and _uncommitted(root):
        remedy = f"commit it, with {PARAMS} and metrics/; or undo it: `git checkout {LOCK} && dvc checkout`"
        yield Finding(f"{LOCK} is not committed, so nobody else has these results", remedy, problem=False)


def _check_out(root: Path) -> str:
    try:
        git(root, "checkout", "HEAD", "--", LOCK)
    except GitError:  # it has not been committed yet
        return _remove([root / LOCK])
    return f"{LOCK} is the committed one again"


def _in_git(root: Path) -> bool:
    """Whether git keeps the folder. Raises GitError if git cannot read what it keeps."""
    there = any((folder / ".git").exists() for folder in (root.absolute(), *root.absolute().parents))
    return there and git(root, "rev-parse", "--is-inside-work-tree") == "true"


def _uncommitted(root: Path) -> bool:
    # git would write its index anew, with the times of the files
    return git(root, "status", "--porcelain", "--", LOCK, settings={"GIT_OPTIONAL_LOCKS": "0"}) != ""


def work(root: Path) -> Iterator[Finding]:
    """Nothing is running, and no lock is left of what runs no more."""
    noted = holders(root)
    if busy(root):
        what = "DVC or a stage is at work here, so results and leftovers are not looked at"
        yield Finding(what, "look again when it has ended", problem=False)
    elif noted is None:
        what = f"{rwlock(root)} makes no sense, so dvc does not start"
        yield Finding(what, "remove it", repair=partial(_remove, [rwlock(root)]))
    elif noted:
        yield _left([rwlock(root)], "names a dvc that was killed")


def results(root: Path) -> Iterator[Finding]:
    """Outputs and DVC's cache are as dvc.lock says; reads all that it names in the cache."""
    if busy(root):
        return
    differ, objects = altered(root), stored(root, cache_only=True)
    if all(item.bytes is None and differ.get(item.name) == "deleted" for item in objects):
        remedy = "`breedline run` makes it; `dvc pull` fetches what somebody has sent to the DVC remote"
        yield Finding("nothing has run here yet", remedy, problem=False)
        return
    bad = damaged(root, objects)
    for how, problem in (("damaged", True), ("missing", False)):
        if some := [item for item in bad if problem == (item.bytes is not None)]:
            stages = " ".join(dict.fromkeys(item.stage for item in some))
            remedy = f"take it from the output or the DVC remote; if neither has it, `dvc repro {stages}` makes it"
            what = f"{_some(item.name for item in some)}: {how} in DVC's cache, from which nobody can restore it"
            yield Finding(what, remedy, problem, partial(_refill, root, some))
    for change, how in (("deleted", "missing"), ("modified", "not as its stage has left it")):
        if paths := [path for path, found in differ.items() if found == change]:
            remedy = "`dvc checkout` restores it, or `git checkout` what git keeps; `dvc repro` makes it again"
            yield Finding(f"{_some(paths)}: {how}", remedy, problem=False)


def _refill(root: Path, objects: list[Stored]) -> str:
    lost = refill(root, objects)
    return f"DVC's cache: {len(objects) - len(lost)} objects put back, {len(lost)} found nowhere"


def remote(root: Path) -> Iterator[Finding]:
    """The DVC remote has all that dvc.lock names."""
    if not has_remote(root):
        remedy = "`dvc remote add --default NAME URL`, then `dvc push`"
        yield Finding("there is no DVC remote, so these results are on this machine only", remedy, problem=False)
    elif lacking := missing(root, stored(root)):
        committed = _in_git(root) and not _uncommitted(root)  # else it may be sent later
        what = f"{_some(item.name for item in lacking)}: missing or altered on the DVC remote"
        yield Finding(what, "`breedline verify-remote` sends it again", committed, lambda: f"remote: {verify(root)}")


def leftovers(root: Path) -> Iterator[Finding]:
    """No killed run has left anything behind."""
    if not busy(root):
        written = [*outputs(root), PARAMS, REVIEWED["corrections"], REVIEWED["kept"]]
        found = [left for path in written for left in leftovers_of(root / path)]
        found += cut_off(root, time.time() - UNUSED_DAYS["scratch"] * 86_400)
        if found:
            yield _left(found, "a run that was killed was writing it")
        if found := empty_runs(root):
            what = f"{_some(found)}: empty, and dvc fails where it looks for earlier runs of a stage there"
            yield Finding(what, "remove it", repair=partial(_remove, found))
        if found := damaged_beside(root, stored(root, cache_only=True)):
            what = f"{_some(found)}: damaged in DVC's cache, from which dvc would restore it"
            yield Finding(what, "remove it; `dvc repro` makes it again", repair=partial(_remove, found))
    locks = (cache_root() / "workspaces").glob("*.lock")
    if found := [lock.with_suffix("") for lock in locks if lock.with_suffix("").exists() and not held(lock)]:
        yield Finding(f"{_some(found)}: the clone of a run that was killed", "remove it", False, _remove_clones)
    if stage_at_work():  # a clock that has jumped makes what it uses look old
        return
    for name, days in UNUSED_DAYS.items():
        before = time.time() - days * 86_400
        if found := [path for path in (cache_root() / name).glob("*") if path.lstat().st_mtime < before]:
            yield _left(found, f"unused for over {days} days")


def _left(paths: list[Path], why: str) -> Finding:
    return Finding(f"{_some(paths)}: {why}", "remove it", False, partial(_remove, paths))


def _remove(paths: list[Path]) -> str:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return f"removed {_some(paths)}"


def _remove_clones() -> str:
    remove_stale()
    return "removed the clones of runs that were killed"


def decisions(root: Path) -> Iterator[Finding]:
    """The decisions of the gate can be read, and those of people, which agree."""
    decided(root)
    corrections, kept = root / REVIEWED["corrections"], root / REVIEWED["kept"]
    corrected: dict[str, str] = {}
    if corrections.exists():
        table = read_corrections(corrections)
        corrected = dict(zip(table["sha256"], table["label"], strict=True))
    rows = read_csv(kept, KEPT)[KEPT].itertuples(index=False) if kept.exists() else ()
    if both := [name for name, sha, label, _ in rows if corrected.get(sha.strip().lower(), label) != label]:
        what = f"{_some(both)}: kept in {kept}, but {corrections} says otherwise, and counts"
        yield Finding(what, "decide again in `breedline review`, or delete one of the lines", problem=False)


def versions(root: Path) -> Iterator[Finding]:
    """Each version of the model, and what is or was in production, is a commit that is here."""
    name = model_of(root).name
    for tag in git(root, "tag", "--list", f"{name}@*", f"{name}#*").splitlines() if _in_git(root) else []:
        try:
            git(root, "cat-file", "-e", f"refs/tags/{tag}^{{commit}}")
        except GitError:
            yield Finding(f"the commit of {tag} is not here", "`git fetch --tags origin`; a clone without it is no use")


def server(root: Path) -> Iterator[Finding]:
    """The Prefect server that is set answers, and so does each `breedline serve`."""
    for path in (cache_root() / "serve").glob("*.env"):
        url = re.search(r"^export PREFECT_API_URL=(\S+)$", path.read_text(errors="replace"), re.MULTILINE)
        if path.stat().st_mtime < time.time() - SERVER_START and not (url and answers(url[1])):
            yield _left([path], "the address of a server that was killed")
    if (configured := os.environ.get("PREFECT_API_URL")) and not answers(configured):
        remedy = "start it (`breedline serve`), or `unset PREFECT_API_URL PREFECT_API_AUTH_STRING`"
        yield Finding(f"no Prefect server answers at {configured}, where PREFECT_API_URL says", remedy)


CHECKS: tuple[Callable[[Path], Iterator[Finding]], ...] = (
    environment,
    pipeline,
    work,
    results,
    remote,
    leftovers,
    decisions,
    versions,
    server,
)
NEED_PIPELINE = (results, remote, leftovers, versions)


def _some(names: Iterable[object]) -> str:
    shown = [*map(str, names)]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
