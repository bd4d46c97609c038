"""Git, run as a command: it needs nothing but the program, which everybody has who has a clone."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from breedline.errors import BreedlineError

PROTOCOLS = "file:git:http:https:ssh"
"""Transports that git may use unless GIT_ALLOW_PROTOCOL is set; `ext` would run a command from the url."""


class GitError(BreedlineError):
    """A git command that failed."""


def git(folder: Path, *arguments: str, settings: Mapping[str, str] | None = None) -> str:
    """What git prints, without the end of the line; it never asks for a password.

    Args:
        settings: environment variables beside those of this process.

    Raises:
        GitError: with git's own words; or there is no git, or it cannot be given such arguments (a NUL).
    """
    environment = {"GIT_ALLOW_PROTOCOL": PROTOCOLS, **os.environ, "GIT_TERMINAL_PROMPT": "0", **(settings or {})}
    command = next(word for word in arguments if not word.startswith("-") and "=" not in word)
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, ValueError) as error:
        raise GitError(f"git {command}: {error}") from error
    if done.returncode:
        raise GitError(f"git {command}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def author(root: Path) -> list[str]:
    """Options for git that name an author if none is configured."""
    try:
        git(root, "var", "GIT_AUTHOR_IDENT")
    except GitError:
        return ["-c", "user.name=Breedline", "-c", "user.email=breedline@localhost"]
    return []
