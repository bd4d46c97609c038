"""Publishing as a transaction: data is pushed and verified before the commit that names it becomes visible.

A crash between any two steps leaves the branch as it was; the next run finds the results in DVC's cache and resumes.
"""

import contextlib
from pathlib import Path
from typing import NamedTuple

from breedline.errors import BreedlineError
from flows.plan import Action, plan
from flows.remote import Stored, missing, stored, upload
from flows.repo import recorded
from flows.workspace import PARAMS, GitError, Workspace, git

ATTEMPTS = 5


class Verified(NamedTuple):
    """What a verification of the remote found: the number of objects, those sent again, those that are lost."""

    objects: int
    repaired: list[Stored]
    lost: list[Stored]

    def __str__(self) -> str:
        return (
            f"{self.objects} objects: {len(self.repaired)} were missing or altered and sent again, "
            f"{len(self.lost)} are lost"
        )


class Lost(BreedlineError):
    """Somebody else's commit came first and conflicts with this one; the branch is as they left it."""


def changed(root: Path) -> bool:
    """Whether there is anything to publish: dvc.lock, params.yaml or metrics differ from the last commit."""
    return git(root, "status", "--porcelain", "--", *_published(root)) != ""


def _published(root: Path) -> list[str]:
    return [path for path in [PARAMS, *recorded(root)] if (root / path).exists()]


def verify(root: Path, *, deep: bool = False) -> Verified:
    """Ask the remote for every object that dvc.lock names, and send again from the cache what is missing or altered.

    Args:
        deep: read every object, rather than trust the checksum that the remote reports, if any.

    Raises:
        BreedlineError: there is no remote, or one that cannot be verified.
        NetworkError: the remote does not answer.
    """
    objects = stored(root)
    lacking = missing(root, objects, deep=deep)
    upload(root, lacking)
    lost = missing(root, lacking, deep=deep)
    return Verified(len(objects), [item for item in lacking if item not in lost], lost)


def verified(root: Path) -> Verified:
    """Verify as `verify` does, and raise BreedlineError if anything is lost."""
    result = verify(root)
    if result.lost:
        names = ", ".join(item.name for item in result.lost[:3])
        raise BreedlineError(
            f"{len(result.lost)} of {result.objects} objects are neither on the remote nor in the cache ({names}, …): "
            "nothing was published; run their stages again with `dvc repro --force --single-item`"
        )
    return result


def commit(workspace: Workspace, message: str) -> str:
    """Commit dvc.lock, params.yaml and the metrics, push to the branch, and return the new commit's short hash.

    If others have pushed meanwhile, the commit is rebased onto theirs, provided that afterwards every stage is still up
    to date and the remote still has everything.

    Raises:
        Lost: it conflicts with what others have pushed; the branch is as they left it.
        GitError: git cannot push for another reason.
    """
    root, branch = workspace.root, workspace.branch
    git(root, "add", "--", *_published(root))
    git(root, *_author(root), "commit", "--quiet", "--message", message)
    for _ in range(ATTEMPTS):
        try:
            git(root, "push", "--quiet", "origin", f"HEAD:refs/heads/{branch}")
        except GitError:
            git(root, "fetch", "--quiet", "origin", str(branch))
            if _contains(root, "FETCH_HEAD"):
                raise  # nobody else has pushed, so the push failed for another reason
            _rebase_onto(root, "FETCH_HEAD")
        else:
            return git(root, "rev-parse", "--short", "HEAD")
    raise Lost(f"{branch} moved {ATTEMPTS} times while this was being pushed: run it again")


def _author(root: Path) -> list[str]:
    """Options for git that name an author if none is configured."""
    try:
        git(root, "var", "GIT_AUTHOR_IDENT")
    except GitError:
        return ["-c", "user.name=Breedline", "-c", "user.email=breedline@localhost"]
    return []


def _contains(root: Path, commit: str) -> bool:
    try:
        git(root, "merge-base", "--is-ancestor", commit, "HEAD")
    except GitError:
        return False
    return True


def _rebase_onto(root: Path, commit: str) -> None:
    try:
        git(root, *_author(root), "-c", "rebase.autoStash=true", "rebase", "--quiet", commit)
    except GitError as error:
        with contextlib.suppress(GitError):  # the rebase may not even have begun
            git(root, "rebase", "--abort")
        raise Lost(
            "another commit has changed the same files meanwhile: nothing was published; run it again"
        ) from error
    if stale := [step.stage for step in plan(root) if step.action is not Action.UP_TO_DATE]:
        raise Lost(
            f"another commit has changed what {', '.join(stale)} depends on: nothing was published; run it again"
        )
    verified(root)
