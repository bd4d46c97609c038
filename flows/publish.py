"""Publishing as a transaction: data is pushed and verified before the commit that names it becomes visible.

A crash between any two steps leaves the branch as it was; the next run finds the results in DVC's cache and resumes.
The commit and the tags that put its model into production become visible together.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from breedline.errors import BreedlineError, NetworkError
from flows import registry
from flows.git_command import GitError, author, git
from flows.plan import Action, plan
from flows.remote import Stored, missing, stored, upload
from flows.repo import recorded
from flows.workspace import PARAMS, Workspace

ATTEMPTS = 5
SKIP_CI = " [skip ci]"
"""Ends the subject of what a run commits, for GitHub and GitLab."""


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
        NetworkError: the remote does not answer, or does not keep what it is sent.
    """
    objects = stored(root)
    lacking = missing(root, objects, deep=deep)
    unsent = upload(root, lacking)
    lost = missing(root, lacking, deep=deep)
    if unkept := [item.name for item in lost if item not in unsent]:
        raise NetworkError(
            f"DVC remote: {len(unkept)} of {len(objects)} objects were sent, but are missing or altered there "
            f"({', '.join(unkept[:3])}, …): run it again; if that does not help, use another remote"
        )
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


def commit(workspace: Workspace, message: str, decision: str | None = None) -> str:
    """Commit dvc.lock, params.yaml and the metrics, push to the branch, and return the new commit's short hash.

    If others have pushed meanwhile, the commit is rebased onto theirs, provided that afterwards every stage is still up
    to date and the remote still has everything.

    Args:
        decision: path of the decision that lets the model of the commit into production: it is committed, too, and the
            tags that say so are pushed together with the commit, or neither is.

    Raises:
        Lost: it conflicts with what others have pushed, or another model is in production meanwhile; branch and tags are
            as they left them.
        GitError: git cannot push for another reason.
    """
    root = workspace.root
    _commit(root, message, [*_published(root), *([decision] if decision else [])])

    def rebase(onto: str) -> None:
        _rebase(root, onto)
        if stale := [step.stage for step in plan(root) if step.action is not Action.UP_TO_DATE]:
            raise Lost(
                f"another commit has changed what {', '.join(stale)} depends on: nothing was published; run it again"
            )
        verified(root)

    return _push(workspace, rebase, message.splitlines()[0].removesuffix(SKIP_CI) if decision else None)


def record(workspace: Workspace, message: str, decision: str) -> str:
    """Commit a decision that publishes nothing, and that alone; push it to the branch, and return the commit's short hash.

    Raises:
        Lost, GitError: as `commit`.
    """
    _commit(workspace.root, message, [decision])
    return _push(workspace, lambda onto: _rebase(workspace.root, onto), None)


def _commit(root: Path, message: str, paths: list[str]) -> None:
    git(root, "add", "--", *paths)
    git(root, *author(root), "commit", "--quiet", "--message", message)


def _push(workspace: Workspace, rebase: Callable[[str], None], release: str | None) -> str:
    """Push HEAD to the branch, rebased by `rebase` onto what others have pushed; its short hash.

    Args:
        release: what the tags of a new version in production say; they are on the commit that gets there.
    """
    root, branch = workspace.root, workspace.branch
    champion = registry.in_production(root) if release else None
    for _ in range(ATTEMPTS):
        tags = registry.release(root, release) if release else []
        refs = [f"HEAD:refs/heads/{branch}", *(f"refs/tags/{tag}" for tag in tags)]
        try:
            git(root, "push", "--quiet", "--atomic", "origin", *refs)
        except GitError:
            registry.drop(root, tags)
            git(root, "fetch", "--quiet", "--tags", "origin", str(branch))
            if release and registry.in_production(root) != champion:
                raise Lost("another model is in production meanwhile: nothing was published; run it again") from None
            if _contains(root, "FETCH_HEAD"):
                raise  # nobody else has pushed, so the push failed for another reason
            rebase("FETCH_HEAD")
        else:
            return git(root, "rev-parse", "--short", "HEAD")
    raise Lost(f"{branch} moved {ATTEMPTS} times while this was being pushed: run it again")


def _contains(root: Path, commit: str) -> bool:
    try:
        git(root, "merge-base", "--is-ancestor", commit, "HEAD")
    except GitError:
        return False
    return True


def _rebase(root: Path, onto: str) -> None:
    try:
        git(root, *author(root), "-c", "rebase.autoStash=true", "rebase", "--quiet", onto)
    except GitError as error:
        with contextlib.suppress(GitError):  # the rebase may not even have begun
            git(root, "rebase", "--abort")
        raise Lost(
            "another commit has changed the same files meanwhile: nothing was published; run it again"
        ) from error
