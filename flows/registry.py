"""The registry: which versions of the model there are, and which is in production, as git tags that GTO and DVC read, too.

| annotated tag | says of its commit |
|---|---|
| `classifier@v1.2.0` | its model is this version |
| `classifier#prod#7` | its model is in production from now on; the number counts what was ever said |

The name is that of the artifact in dvc.yaml. Tags are only added, so they are the history as well: who put what into
production, when and why (`gto history`, `git show`). GTO goes by their times, so each is later than the last one.
"""

import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from breedline.errors import BreedlineError
from flows.git_command import GitError, author, git

STAGE = "prod"
VERSION = re.compile(r"v(\d+)\.(\d+)\.(\d+)")
FIRST = "v1.0.0"


class Model(NamedTuple):
    """An artifact of type `model` in a dvc.yaml: its name, and the folder of its bundle."""

    name: str
    path: str


class Published(NamedTuple):
    """A model that was published: `classifier@v1.2.0`, or the commit where no tag names a version."""

    name: str
    commit: str


class _Tag(NamedTuple):
    name: str
    commit: str
    time: int


def model_in(dvc_yaml: str | bytes, whose: str) -> Model:
    """The one artifact of type `model`. Raises BreedlineError where there is none, or several; `whose` file it is, is told."""
    try:
        artifacts = YAML(typ="safe").load(dvc_yaml)["artifacts"]
        ((name, path),) = (
            (n, artifact["path"]) for n, artifact in artifacts.items() if artifact.get("type") == "model"
        )
    except (YAMLError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise BreedlineError(
            f"dvc.yaml of {whose} names no model, or several: name a commit that has one artifact of type `model`"
        ) from error
    return Model(str(name), str(path))


def model_of(root: Path) -> Model:
    """The model that dvc.yaml of the folder `root` names. Raises BreedlineError as `model_in`."""
    path = root / "dvc.yaml"
    return model_in(path.read_bytes() if path.is_file() else b"", "this folder")


def in_production(root: Path) -> Published | None:
    """What is in production, as far as the repository at `root` knows; None if nothing is."""
    name = model_of(root).name
    history = assigned(root, name, STAGE)
    return _published(root, name, history[-1]) if history else None


def last_trained(root: Path) -> Published | None:
    """The last commit that changed dvc.lock, if that has a model, which is another one than the folder's."""
    try:
        commit = git(root, "log", "-1", "--format=%H", "--", "dvc.lock")
    except GitError:  # no commit at all
        return None
    model = _recorded(root, commit) if commit else None
    return Published(commit, commit) if model and model != _recorded(root) else None


def released(root: Path) -> bool:
    """Whether the model that HEAD records is that of a version, be that in production or not."""
    name, model = model_of(root).name, _recorded(root, "HEAD")
    return model is not None and any(
        _recorded(root, tag.commit) == model for _, tag in reversed(_versions(_tags(root, name), name))
    )


def _recorded(root: Path, commit: str | None = None) -> dict[str, Any] | None:
    """What dvc.lock of a commit, or else of the folder, says of the model: its path, hash and size; None if nothing."""
    try:
        dvc_yaml, lock = (
            git(root, "show", f"{commit}:{name}") if commit else (root / name).read_text("utf-8")
            for name in ("dvc.yaml", "dvc.lock")
        )
        path = model_in(dvc_yaml, "a commit").path
        stages = YAML(typ="safe").load(lock)["stages"].values()
        return next((out for stage in stages for out in stage.get("outs", []) if out["path"] == path), None)
    except (BreedlineError, OSError, YAMLError, LookupError, TypeError, AttributeError):
        return None


def assigned(root: Path, name: str, stage: str) -> list[str]:
    """The commits that were assigned to a stage, up to the present one: those before it are what it replaced, in order.

    A commit that is assigned again takes back all that came after it: rolled back from 3 to 2, the former one is 1.
    """
    pattern = re.compile(rf"{re.escape(name)}#{re.escape(stage)}(!?)#\d+")
    history: list[str] = []
    for tag in _tags(root, name):
        if found := pattern.fullmatch(tag.name):
            if tag.commit in history:
                del history[history.index(tag.commit) :]
            if not found[1]:  # with an exclamation mark, GTO takes the assignment back
                history.append(tag.commit)
    return history


def release(root: Path, message: str) -> list[str]:
    """Tag HEAD as a new version, the next minor one, and as what is in production; returns the names of the tags."""
    name = model_of(root).name
    versions = [tuple(map(int, found.groups())) for found, _ in _versions(_tags(root, name), name)]
    major, minor, _ = max(versions, default=(0, 0, 0))
    version = f"v{major}.{minor + 1}.0" if versions else FIRST
    return [_add(root, name, f"@{version}", "HEAD", message), _assign(root, name, "HEAD", message)]


def drop(root: Path, tags: list[str]) -> None:
    """Delete tags that nobody has seen."""
    if tags:
        git(root, "tag", "--delete", *tags)


def roll_back(root: Path, to: str | None) -> str:
    """Put the former version into production again, or the version `to`, for everybody if there is an origin; tells so.

    The record is the tag that does it: annotated, with who, when, and from what to what.

    Raises:
        BreedlineError: there is no such version, it is in production, or its model cannot be had.
        GitError: git cannot fetch or push; nothing has changed.
    """
    from flows.predict import fetched_bundle

    shared = bool(git(root, "remote")) and "origin" in git(root, "remote").split()
    if shared:
        git(root, "fetch", "--quiet", "--tags", "origin")
    name = model_of(root).name
    history = assigned(root, name, STAGE)
    if not history:
        raise BreedlineError(f"no version of {name} is in production: a run that publishes puts it there")
    now = _published(root, name, history[-1])
    if to:
        then = _named(root, name, to)
    elif len(history) > 1:
        then = _published(root, name, history[-2])
    else:
        raise BreedlineError(f"{now.name} replaced no other version: name one with --to (`gto show {name}`)")
    if then.commit == now.commit:
        raise BreedlineError(f"{then.name} is in production already")
    fetched_bundle(root, then.commit)  # raises where nobody could use it
    said = f"rolled back from {now.name} to {then.name}"
    tag = _assign(root, name, then.commit, said)
    if shared:
        try:
            git(root, "push", "--quiet", "--atomic", "origin", f"refs/tags/{tag}")
        except GitError:
            drop(root, [tag])
            raise
    return f"{said} ({tag}{', pushed' if shared else ''})"


def _named(root: Path, name: str, version: str) -> Published:
    """A version by its name, with or without that of the model before it."""
    wanted = f"{name}@{version.removeprefix(f'{name}@')}"
    for tag in _tags(root, name):
        if tag.name == wanted and VERSION.fullmatch(wanted.removeprefix(f"{name}@")):
            return Published(tag.name, tag.commit)
    raise BreedlineError(f"there is no version {wanted}: `gto show {name}` lists them")


def _published(root: Path, name: str, commit: str) -> Published:
    """The highest version of a commit."""
    tags = [tag for tag in _tags(root, name) if tag.commit == commit]
    newest = max(_versions(tags, name), key=lambda one: tuple(map(int, one[0].groups())), default=None)
    return Published(newest[1].name if newest else commit, commit)


def _versions(tags: list[_Tag], name: str) -> list[tuple[re.Match[str], _Tag]]:
    found = [(VERSION.fullmatch(tag.name.removeprefix(f"{name}@")), tag) for tag in tags]
    return [(match, tag) for match, tag in found if match]


def _tags(root: Path, name: str) -> list[_Tag]:
    """The annotated tags of a model, in the order of their times, and of their numbers where these are equal."""
    form = "%(refname:strip=2) %(*objectname) %(taggerdate:unix)"
    lines = git(root, "for-each-ref", f"--format={form}", f"refs/tags/{name}@*", f"refs/tags/{name}#*").splitlines()
    rows = [row for row in map(str.split, lines) if len(row) == 3]  # a tag that is not annotated has only its name
    tags = [_Tag(tag, commit, int(when)) for tag, commit, when in rows]
    return sorted(tags, key=lambda tag: (tag.time, _number(tag)))


def _number(tag: _Tag) -> int:
    found = re.search(r"#(\d+)$", tag.name)
    return int(found[1]) if found else 0


def _assign(root: Path, name: str, commit: str, message: str) -> str:
    number = max(map(_number, _tags(root, name)), default=0) + 1
    return _add(root, name, f"#{STAGE}#{number}", commit, message)


def _add(root: Path, name: str, what: str, commit: str, message: str) -> str:
    last = max((tag.time for tag in _tags(root, name)), default=0)
    when = {"GIT_COMMITTER_DATE": f"@{max(int(time.time()), last + 1)} +0000"}
    git(root, *author(root), "tag", "--annotate", "--message", message, f"{name}{what}", commit, settings=when)
    return f"{name}{what}"
