"""A private clone to work in: the user's checkout is never touched, and DVC's cache is shared."""

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from breedline.errors import BreedlineError
from breedline.files import cache_dir, new_file
from breedline.params import ParamsError, load_params
from flows.repo import share_cache

PARAMS = "params.yaml"


@dataclass(frozen=True)
class Workspace:
    """A clone of a repository, of which nothing stays."""

    root: Path
    branch: str | None
    """The branch that is checked out; None at a commit or a tag."""


@contextlib.contextmanager
def workspace(repository: str, ref: str, checkout: Path) -> Iterator[Workspace]:
    """Clone `repository` at `ref`, a branch, tag or commit; what a killed run had to leave behind is removed.

    Args:
        checkout: where this process works: its DVC cache and its local DVC settings (credentials) are used.

    Raises:
        BreedlineError: git cannot clone, or knows no such ref.
    """
    with _free_folder() as folder:
        git(checkout, "clone", "--quiet", "--", repository, str(folder))
        branch = _check_out(folder, ref)
        if (checkout / ".dvc").is_dir():
            share_cache(checkout, folder)
        yield Workspace(folder, branch)


@contextlib.contextmanager
def _free_folder() -> Iterator[Path]:
    """The first folder that no other run holds. The names are few, as DVC keeps notes on every place it has seen."""
    workspaces = cache_dir("workspaces")
    for lock in workspaces.glob("*.lock"):
        with contextlib.suppress(Timeout), FileLock(lock, timeout=0):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)  # of a run that was killed
    for number in itertools.count(1):
        with contextlib.suppress(Timeout), FileLock(workspaces / f"{number}.lock", timeout=0):
            folder = workspaces / str(number)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
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
        raise BreedlineError(f"there is no branch, tag or commit called {ref}") from None
    git(folder, "checkout", "--quiet", "--detach", commit)
    return None


class GitError(BreedlineError):
    """git said no."""


def git(folder: Path, *arguments: str) -> str:
    """What git says, without the end of the line; never asks for a password.

    Raises:
        GitError: with git's own words.
    """
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    done = subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        command = next(word for word in arguments if not word.startswith("-") and "=" not in word)
        raise GitError(f"git {command}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def origin_of(checkout: Path) -> str:
    """Where the checkout was cloned from; the checkout itself if it was not."""
    try:
        return git(checkout, "remote", "get-url", "origin")
    except GitError:
        return str(checkout.resolve())


class _Spelled(RoundTripRepresenter):
    """Writes null as a word, as the file does."""


_Spelled.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))


def override(root: Path, settings: Mapping[str, Any]) -> None:
    """Write settings such as {"train.epochs": 3} into params.yaml at `root`; the rest of the file stays as it is.

    Raises:
        ParamsError: with every mistake in what comes out.
    """
    path = root / PARAMS
    if settings:
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
        with new_file(path) as temporary:
            yaml.dump(params, temporary)
    load_params(path)
