"""A private clone to work in: the user's checkout is never touched; DVC's cache is shared with it."""

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from breedline.errors import BreedlineError
from breedline.files import cache_dir, new_file
from breedline.params import ParamsError, load_params
from breedline.urls import redacted
from flows.git_command import GitError, git
from flows.repo import share_cache

PARAMS = "params.yaml"
REPOSITORIES = "BREEDLINE_REPOSITORIES"
"""The environment variable that names what may be cloned besides the checkout's own origin, separated by blanks."""
REMOTE = re.compile(r"[^/]*:")
"""What git takes for a url, not a folder: `https://host/…`, `user@host:path`, `ext::command`."""


@dataclass(frozen=True)
class Workspace:
    """A temporary clone of a repository."""

    root: Path
    branch: str | None
    """The branch that is checked out; None at a commit or a tag."""


@contextlib.contextmanager
def workspace(repository: str | None, ref: str, checkout: Path) -> Iterator[Workspace]:
    """Clone `repository` at `ref`, a branch, tag or commit; what a killed run left behind is removed first.

    Args:
        repository: the origin of `checkout`, which is the default, or one that $BREEDLINE_REPOSITORIES names: a clone's
            dvc.yaml runs commands as this user, so whoever asks for a run may not bring a repository of their own.
        checkout: where this process works. Clones of its origin, and no others, use its DVC cache and its
            .dvc/config.local, which may hold credentials.

    Raises:
        BreedlineError: the repository is neither, git cannot clone it, or it has no such ref.
    """
    source, own = _allowed(repository, checkout)
    with _free_folder() as folder:
        git(checkout, "clone", "--quiet", "--", source, str(folder))
        branch = _check_out(folder, ref)
        if own and (checkout / ".dvc").is_dir():
            share_cache(checkout, folder)
        yield Workspace(folder, branch)


def unpushed(checkout: Path, branch: str) -> bool:
    """Whether the folder has changes or commits that its origin's branch, as last seen, has not: a clone lacks them, too."""
    try:
        changes = git(checkout, "status", "--porcelain", "--untracked-files=no")
        return bool(changes or git(checkout, "rev-list", "--max-count=1", f"origin/{branch}..{branch}", "--"))
    except GitError:  # no repository, or no such branch
        return False


def _allowed(repository: str | None, checkout: Path) -> tuple[str, bool]:
    """The url or folder to clone when a run asks for `repository`, and whether that is the origin of `checkout`.

    It is returned as the deployment's owner has written it: the requested text is only compared, and never given to git.
    """
    origin = origin_of(checkout)
    if not repository or _place(repository, checkout) == _place(origin, checkout):
        return origin, True
    for allowed in os.environ.get(REPOSITORIES, "").split():
        if _place(repository, checkout) == _place(allowed, checkout):
            return allowed, False
    shown = redacted(repository[:2000])[:200]  # not the other way round: half a password is not recognised
    raise BreedlineError(
        f"{shown!r} is not where this checkout was cloned from: leave it out, or let the "
        f"deployment's owner name it in {REPOSITORIES} in the worker's environment (urls and folders, separated by blanks)"
    )


def _place(repository: str, checkout: Path) -> str:
    """A repository's folder (its real path) or url, without a final slash or `.git`: equal for all ways to spell it."""
    path = repository.removeprefix("file://")
    if path != repository or not REMOTE.match(repository):
        with contextlib.suppress(ValueError):  # a NUL or a lone surrogate cannot be in a path
            repository = str((checkout / path).resolve())
    return repository.rstrip("/").removesuffix(".git").rstrip("/")


def remove_stale() -> None:
    """Remove the clones that killed runs have left behind."""
    for lock in cache_dir("workspaces").glob("*.lock"):
        with contextlib.suppress(Timeout), FileLock(lock, timeout=0):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)


@contextlib.contextmanager
def _free_folder() -> Iterator[Path]:
    """The first folder of workspaces/1, 2, … that no other run uses.

    The names are used again and again, as DVC keeps a cache (its site cache) for each path that it has ever opened.
    """
    remove_stale()
    workspaces = cache_dir("workspaces").absolute()  # git runs in the checkout, where a relative path is another folder
    for number in itertools.count(1):
        with contextlib.suppress(Timeout), FileLock(workspaces / f"{number}.lock", timeout=0):
            folder = workspaces / str(number)
            shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def _check_out(folder: Path, ref: str) -> str | None:
    with contextlib.suppress(GitError):
        git(folder, "rev-parse", "--verify", "--quiet", f"refs/remotes/origin/{ref}^{{commit}}")
        git(folder, "checkout", "--quiet", "-B", ref, f"refs/remotes/origin/{ref}")
        return ref
    try:
        commit = git(folder, "rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}")
    except GitError:
        raise BreedlineError(f"there is no branch, tag or commit called {ref[:200]!r}") from None
    git(folder, "checkout", "--quiet", "--detach", commit)
    return None


def origin_of(checkout: Path) -> str:
    """Where the checkout was cloned from; the checkout itself if it has no origin."""
    try:
        return git(checkout, "remote", "get-url", "origin")
    except GitError:
        return str(checkout.resolve())


class _Spelled(RoundTripRepresenter):
    """Writes null as `null`, as params.yaml does, rather than as nothing."""


_Spelled.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))


def override(root: Path, settings: Mapping[str, Any]) -> None:
    """Write settings such as {"train.epochs": 3} into params.yaml at `root`, keeping the comments and the layout.

    Raises:
        ParamsError: with every mistake in the file, before or after the change.
    """
    path = root / PARAMS
    load_params(path)
    if not settings:
        return
    yaml = YAML()
    yaml.Representer = _Spelled
    yaml.preserve_quotes, yaml.width = True, 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    params = yaml.load(path)
    for key, value in settings.items():
        *sections, last = key.split(".")
        section = params
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ParamsError(f"{key}: {name} is a setting itself, not a section")
        section[last] = value
    try:
        with new_file(path) as temporary, temporary.open("wb") as file:
            yaml.dump(params, file)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ParamsError(f"{', '.join(settings)}: it cannot be written as YAML ({error})") from error
    load_params(path)
