"""Versions and what is in production: tags that git keeps, GTO and DVC read, and a rollback that is one of them."""

import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gto.api
import pytest
from dvc.api import artifacts_show
from dvc.repo import Repo

from breedline.bundle import read_bundle
from breedline.errors import BreedlineError
from flows import cli, predict, registry
from flows.git_command import GitError, git
from flows.registry import Published, assigned, in_production, last_trained, release, released, roll_back
from tests.bundles import CLASSES, bundle

ARTIFACT = "artifacts:\n  classifier: {path: models, type: model}\n"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository, whose dvc.yaml names the model `classifier`; the working folder."""
    for who in ("AUTHOR", "COMMITTER"):
        for what in ("NAME", "EMAIL"):
            monkeypatch.setenv(f"GIT_{who}_{what}", "test@localhost")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    root = Path("repository").absolute()
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch", "main")
    Repo.init(str(root)).close()
    (root / "dvc.yaml").write_text(ARTIFACT)
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "first")
    monkeypatch.chdir(root)
    return root


def published(root: Path) -> str:
    """The next commit, released."""
    git(root, "commit", "--quiet", "--allow-empty", "--message", "another")
    release(root, "better")
    return git(root, "rev-parse", "HEAD")


def shown_by_gto(root: Path) -> list[str]:
    """The version in production, as GTO finds it."""
    return [row["version"] for row in gto.api.show(str(root), "classifier#prod")]


def test_each_release_is_the_next_minor_version_in_production(repository: Path) -> None:
    assert in_production(repository) is None
    first, second = published(repository), published(repository)
    assert git(repository, "tag", "--list").split() == [
        *("classifier#prod#1", "classifier#prod#2"),
        *("classifier@v1.0.0", "classifier@v1.1.0"),
    ]
    assert in_production(repository) == Published("classifier@v1.1.0", second)
    assert git(repository, "rev-parse", "classifier@v1.0.0^{commit}") == first
    assert git(
        repository, "for-each-ref", "--format=%(objecttype) %(contents:subject)", "refs/tags/classifier#prod#2"
    ) == ("tag better")
    git(repository, "tag", "--annotate", "--message", "by hand", "classifier@v2.10.3", first)
    assert release(repository, "x")[0] == "classifier@v2.11.0"


def test_gto_and_dvc_agree_although_all_happens_within_a_second(repository: Path) -> None:
    began = time.time()
    first, second = published(repository), published(repository)
    assert time.time() - began < 1
    assert shown_by_gto(repository) == ["v1.1.0"]
    assert artifacts_show("classifier", stage="prod") == {"path": "models", "rev": second}
    registry._assign(repository, "classifier", first, "back")
    assert shown_by_gto(repository) == ["v1.0.0"]
    assert artifacts_show("classifier", stage="prod") == {"path": "models", "rev": first}
    assert artifacts_show("classifier", version="v1.1.0")["rev"] == second
    assert in_production(repository) == Published("classifier@v1.0.0", first)


def test_what_gto_assigns_is_in_production(repository: Path) -> None:
    first = published(repository)
    published(repository)
    time.sleep(4)  # a tag of GTO has the time of the clock
    gto.api.assign(str(repository), "classifier", "prod", version="v1.0.0", force=True)
    assert in_production(repository) == Published("classifier@v1.0.0", first)
    gto.api.assign(str(repository), "classifier", "canary", version="v1.1.0")
    assert in_production(repository) == Published("classifier@v1.0.0", first)
    assert len(assigned(repository, "classifier", "canary")) == 1


def test_a_tag_that_is_not_annotated_or_of_another_model_says_nothing(repository: Path) -> None:
    first = published(repository)
    published(repository)
    for tag in ("classifier#prod#9", "classifiers#prod#9", "classifier#prod#x", "classifier@v9.0.0", "v3"):
        git(repository, "tag", tag, first)
    git(repository, "tag", "--annotate", "--message", "x", "xclassifier#prod#10", first)
    assert in_production(repository) == Published("classifier@v1.1.0", git(repository, "rev-parse", "HEAD"))


def test_history_goes_back_to_what_was_replaced(repository: Path) -> None:
    """A version that was rolled back is no former one."""
    one, two, three = (published(repository) for _ in range(3))
    assert assigned(repository, "classifier", "prod") == [one, two, three]
    registry._assign(repository, "classifier", two, "back")
    assert assigned(repository, "classifier", "prod") == [one, two]
    four = published(repository)
    assert assigned(repository, "classifier", "prod") == [one, two, four]


@pytest.mark.parametrize(
    "dvc_yaml", ["", "stages: {}\n", "artifacts: {a: {path: x}}\n", "{", ARTIFACT + "  b: {path: b, type: model}\n"]
)
def test_a_repository_without_one_model_is_told(repository: Path, dvc_yaml: str) -> None:
    (repository / "dvc.yaml").write_text(dvc_yaml)
    with pytest.raises(BreedlineError, match=r"dvc.yaml of this folder names no model, or several"):
        in_production(repository)


LOCK = "stages: {{bundle: {{outs: [{{path: models, md5: {}}}]}}}}\n"


def trained(repository: Path, md5: str) -> str:
    """The commit of a model with this hash."""
    (repository / "dvc.lock").write_text(LOCK.format(md5))
    git(repository, "add", "dvc.lock")
    git(repository, "commit", "--quiet", "--message", f"trained {md5}")
    return git(repository, "rev-parse", "HEAD")


def test_what_was_trained_last_is_the_commit_of_the_lock(repository: Path) -> None:
    assert last_trained(repository) is None
    commit = trained(repository, "aa")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "a decision")
    assert last_trained(repository) is None  # no model has itself to beat
    (repository / "dvc.lock").write_text(LOCK.format("bb"))
    assert last_trained(repository) == Published(commit, commit)
    git(repository, "rm", "--quiet", "--force", "dvc.lock")
    git(repository, "commit", "--quiet", "--message", "gone")
    assert last_trained(repository) is None


def test_a_model_is_released_once_a_version_has_it(repository: Path) -> None:
    trained(repository, "aa")
    assert not released(repository)
    release(repository, "the first")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "something else")
    assert released(repository)
    trained(repository, "bb")
    assert not released(repository)
    release(repository, "the second")
    trained(repository, "aa")
    assert released(repository)


# With models


def shell(command: str, folder: Path) -> None:
    done = subprocess.run(command, shell=True, cwd=folder, text=True, capture_output=True)  # noqa: S602
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def versions(repository: Path) -> Path:
    """The repository with three versions, whose models call the first class v0, v1 and v2, and with its origin."""
    dvc = Path(sys.executable).with_name("dvc")
    shell("git init -q --bare -b main ../origin.git && git remote add origin ../origin.git", repository)
    for number in range(3):
        shutil.rmtree("models", ignore_errors=True)
        bundle(classes=[f"v{number}", *CLASSES[1:]])
        shell(f"{dvc} add -q models && git add -A && git commit -qm {number}", repository)
        release(repository, "better")
    shell("git push -q --tags -u origin main", repository)
    return repository


def model_at(model: str) -> str:
    return read_bundle(predict.bundle_of(model)).classes[0]


def at_origin(root: Path) -> list[str]:
    return git(root, "ls-remote", "--tags", "--refs", "origin", "*#prod#*").split("\n")


@pytest.mark.slow
def test_a_rollback_is_a_tag_for_everybody(versions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [model_at(name) for name in ("classifier#prod", "classifier@v1.0.0")] == ["v2", "v0"]
    began = time.monotonic()
    cli.rollback(None)
    assert time.monotonic() - began < 10
    said = "rolled back from classifier@v1.2.0 to classifier@v1.1.0"
    assert capsys.readouterr().out == f"{said} (classifier#prod#4, pushed)\n"
    assert (
        git(versions, "show", "--no-patch", "--format=", "classifier#prod#4").split("\n")[0] == "tag classifier#prod#4"
    )
    assert said in git(versions, "show", "--no-patch", "classifier#prod#4")
    assert model_at("classifier#prod") == "v1"
    assert shown_by_gto(versions) == ["v1.1.0"]
    assert len(at_origin(versions)) == 4
    roll_back(versions, None)
    assert model_at("classifier#prod") == "v0"
    with pytest.raises(BreedlineError, match=r"classifier@v1.0.0 replaced no other version: name one with --to"):
        roll_back(versions, None)
    for name in ("v1.2.0", "classifier@v1.1.0"):
        roll_back(versions, name)
    assert model_at("classifier#prod") == "v1"


@pytest.mark.slow
def test_a_rollback_that_cannot_be_had_changes_nothing(versions: Path) -> None:
    before = at_origin(versions), git(versions, "tag")
    for to, said in {
        "v1.2.0": "classifier@v1.2.0 is in production already",
        "v7.0.0": "there is no version classifier@v7.0.0: `gto show classifier` lists them",
        "--help": "there is no version classifier@--help",
        "*": r"there is no version classifier@\*",
    }.items():
        with pytest.raises(BreedlineError, match=said):
            roll_back(versions, to)
    hook = versions.parent / "origin.git/hooks/pre-receive"
    hook.write_text("#!/bin/sh\necho tags are protected\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(GitError, match="tags are protected"):
        roll_back(versions, None)
    shell("rm -rf .dvc/cache models", versions)
    with pytest.raises(BreedlineError, match="neither DVC's cache nor its remote has models"):
        roll_back(versions, "v1.0.0")
    assert (at_origin(versions), git(versions, "tag")) == before


@pytest.mark.slow
def test_a_rollback_knows_what_others_have_put_into_production(versions: Path) -> None:
    shell("git clone -q origin.git other", versions.parent)
    with contextlib.chdir(versions.parent / "other"):
        shell(
            f"cp {versions}/.dvc/config.local .dvc/ 2>/dev/null; {Path(sys.executable).with_name('dvc')} cache dir --local {versions}/.dvc/cache",
            Path(),
        )
        roll_back(Path(), "v1.0.0")
    with pytest.raises(BreedlineError, match=r"classifier@v1.0.0 is in production already"):
        roll_back(versions, "v1.0.0")
    assert model_at("classifier#prod") == "v0"


@pytest.mark.slow
def test_without_an_origin_a_rollback_is_local(versions: Path) -> None:
    git(versions, "remote", "remove", "origin")
    assert roll_back(versions, None).endswith("(classifier#prod#4)")


def test_nothing_in_production_is_told(repository: Path) -> None:
    with pytest.raises(BreedlineError, match="no version of classifier is in production: a run that publishes"):
        roll_back(repository, None)
    with pytest.raises(BreedlineError, match="classifier#prod is no usable bundle"):
        read_bundle(predict.bundle_of("classifier#prod"))
