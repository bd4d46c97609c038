"""The end of a run: the commit that everybody sees, on top of what others have pushed meanwhile, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from breedline.errors import BreedlineError
from flows import publish, registry
from flows.git_command import GitError, git
from flows.publish import Lost, changed, commit, record
from flows.remote import stored
from flows.workspace import Workspace

pytestmark = pytest.mark.slow
SETTLED = {"dvc.lock", "params.yaml", "metrics/evaluate.json"}


@pytest.fixture
def before_push(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """A function that lets something happen before our push: the first one, or every one. It returns a list that grows."""

    def before(happen: Callable[[int], object], times: int = 1) -> list[int]:
        pushes: list[int] = []

        def watched(folder: Path, *arguments: str) -> str:
            if arguments[0] == "push":
                if len(pushes) < times:
                    happen(len(pushes))
                pushes.append(1)
            return git(folder, *arguments)

        monkeypatch.setattr(publish, "git", watched)
        return pushes

    return before


def files_of(project: Any, commit: str) -> set[str]:
    return set(project.git("show", "--name-only", "--format=", commit, at=project.origin).split())


def assert_nothing_is_half_done(root: Path) -> None:
    assert not (root / ".git/rebase-merge").exists()
    assert git(root, "branch", "--show-current") == "main"
    assert git(root, "log", "-1", "--format=%s") == "ours"
    assert git(root, "status", "--porcelain", "--untracked-files=no") == ""


def test_the_commit_has_what_the_run_has_changed_and_nothing_else(project: Any, trained: Workspace) -> None:
    (trained.root / "stray").touch()
    before = project.tip()
    hash_ = commit(trained, "ours\n\nand why")
    assert project.tip().startswith(hash_)
    assert project.tip("main~1") == before
    assert files_of(project, "main") == SETTLED
    assert project.git("log", "-1", "--format=%B%an", "main", at=project.origin) == "ours\n\nand why\ntest@localhost"
    assert not changed(trained.root)


def test_what_git_ignores_is_published_where_dvc_has_changed_it(project: Any, trained: Workspace) -> None:
    (trained.root / ".gitignore").write_text("/raw\n/models\n/another\n")
    commit(trained, "ours")
    assert files_of(project, "main") == SETTLED | {".gitignore"}


def test_metrics_that_are_gone_are_no_obstacle(project: Any, trained: Workspace) -> None:
    (trained.root / "metrics/evaluate.json").unlink()
    commit(trained, "ours")
    assert files_of(project, "main") == SETTLED - {"metrics/evaluate.json"}


def test_a_machine_without_a_name_can_publish(
    project: Any, trained: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("GIT_AUTHOR_", "GIT_COMMITTER_"))]:
        monkeypatch.delenv(name)
    for name, value in (("COUNT", "1"), ("KEY_0", "user.useConfigOnly"), ("VALUE_0", "true")):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    commit(trained, "ours")
    assert project.git("log", "-1", "--format=%an, %cn", "main", at=project.origin) == "Breedline, Breedline"


def test_it_goes_on_top_of_an_unrelated_commit_once_the_data_is_verified_again(
    project: Any, trained: Workspace, before_push: Callable[..., list[int]]
) -> None:
    project.push_elsewhere(notes_md="the beginning")
    git(trained.root, "pull", "--quiet", "--rebase", "--autostash", "origin", "main")
    (trained.root / "notes.md").write_text("a stage wrote this into a file that git tracks")
    lost = next(item.oid for item in stored(trained.root) if item.name == "models/weights")

    def happen(_: int) -> None:
        project.push_elsewhere(other_md="the end")
        project.s3.rm_file(project.remote(lost))

    pushes = before_push(happen)
    hash_ = commit(trained, "ours")
    assert len(pushes) == 2
    assert project.tip().startswith(hash_)
    assert project.git("log", "--format=%s", "-3", "main", at=project.origin).split("\n") == [
        "ours",
        *["somebody else's"] * 2,
    ]
    assert files_of(project, "main") == SETTLED
    assert lost in project.objects()


@pytest.mark.parametrize("file", ["dvc_lock", "params_yaml"])
def test_another_run_that_came_first_wins(
    project: Any, trained: Workspace, before_push: Callable[..., list[int]], file: str
) -> None:
    theirs = {
        "dvc_lock": (project.work / "dvc.lock").read_text().replace("train.py 12", "train.py 36"),
        "params_yaml": (project.work / "params.yaml").read_text().replace("epochs: 12", "epochs: 36"),
    }
    tips: list[str] = []
    pushes = before_push(lambda _: tips.append(project.push_elsewhere(**{file: theirs[file]})))
    with pytest.raises(Lost, match="another commit has changed the same files meanwhile"):
        commit(trained, "ours")
    assert len(pushes) == 1
    assert project.tip() == tips[0]
    assert_nothing_is_half_done(trained.root)


def test_a_file_that_others_have_added_where_a_stage_left_one(
    project: Any, trained: Workspace, before_push: Callable[..., list[int]]
) -> None:
    (trained.root / "notes.md").write_text("left by a stage")
    tips: list[str] = []
    before_push(lambda _: tips.append(project.push_elsewhere(notes_md="theirs")))
    with pytest.raises(Lost, match="another commit has changed the same files meanwhile"):
        commit(trained, "ours")
    assert project.tip() == tips[0]
    assert_nothing_is_half_done(trained.root)


@pytest.mark.parametrize(
    ("file", "stages"), [("source_txt", "download, train"), ("train_py", "train"), ("params_yaml", "download")]
)
def test_a_commit_that_changes_what_a_stage_depends_on_wins(
    project: Any, trained: Workspace, before_push: Callable[..., list[int]], file: str, stages: str
) -> None:
    theirs = (project.work / file.replace("_", ".")).read_text().replace("  valid_pct: 0.15", "  valid_pct: 0.25")
    if file != "params_yaml":
        theirs += "\n# more\n"
    tips: list[str] = []
    pushes = before_push(lambda _: tips.append(project.push_elsewhere(**{file: theirs})))
    with pytest.raises(Lost, match=f"another commit has changed what {stages}.* depends on: nothing was published"):
        commit(trained, "ours")
    assert len(pushes) == 1
    assert project.tip() == tips[0]


def test_what_is_lost_meanwhile_is_not_published(
    project: Any, trained: Workspace, before_push: Callable[..., list[int]]
) -> None:
    lost = next(item.oid for item in stored(trained.root) if item.name == "models/weights")
    tips: list[str] = []

    def happen(_: int) -> None:
        tips.append(project.push_elsewhere(notes_md="unrelated"))
        project.s3.rm_file(project.remote(lost))
        (trained.root / ".dvc/cache/files/md5" / lost[:2] / lost[2:]).unlink()

    before_push(happen)
    with pytest.raises(BreedlineError, match="nothing was published"):
        commit(trained, "ours")
    assert project.tip() == tips[0]


def test_a_branch_that_never_rests_is_given_up(
    project: Any, trained: Workspace, before_push: Callable[..., list[int]]
) -> None:
    tips: list[str] = []
    pushes = before_push(lambda number: tips.append(project.push_elsewhere(notes_md=str(number))), times=99)
    with pytest.raises(Lost, match="main moved 5 times"):
        commit(trained, "ours")
    assert len(pushes) == publish.ATTEMPTS == 5
    assert project.tip() == tips[-1]


def test_a_push_that_is_refused_is_told_in_git_s_words_and_not_tried_again(
    project: Any, trained: Workspace, before_push: Callable[..., list[int]]
) -> None:
    hook = project.origin / "hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho main is protected\nexit 1\n")
    hook.chmod(0o755)
    before, pushes = project.tip(), before_push(lambda _: None)
    with pytest.raises(GitError, match=r"^git push: .*main is protected.*pre-receive hook declined"):
        commit(trained, "ours")
    assert len(pushes) == 1
    assert project.tip() == before


def test_a_repository_that_is_gone_is_told_in_git_s_words(project: Any, trained: Workspace) -> None:
    project.origin.rename(project.origin.with_name("elsewhere"))
    with pytest.raises(GitError, match=r"origin\.git"):
        commit(trained, "ours")


def decision(root: Path) -> str:
    (root / "decisions").mkdir()
    (root / "decisions/1.json").write_text("{}")
    return "decisions/1.json"


def tags_of(project: Any) -> dict[str, str]:
    """The commit of each tag that everybody sees."""
    lines = project.git("tag", "--format=%(refname:strip=2) %(*objectname)", at=project.origin).splitlines()
    return dict(line.split() for line in lines)


def test_a_release_is_tags_on_the_commit_that_gets_there(
    project: Any, trained: Workspace, before_push: Callable[..., list[int]]
) -> None:
    pushes = before_push(lambda _: project.push_elsewhere(notes_md="unrelated"))
    commit(trained, "ours [skip ci]\n\nand why", decision(trained.root))
    assert len(pushes) == 2
    assert tags_of(project) == {"classifier#prod#1": project.tip(), "classifier@v1.0.0": project.tip()}
    assert files_of(project, "main") == SETTLED | {"decisions/1.json"}
    assert project.git("tag", "--list", "--format=%(contents:subject)", "*#*", at=project.origin) == "ours"


@pytest.mark.parametrize("hook", ["update", "pre-receive"])
def test_a_remote_that_refuses_the_tag_gets_no_commit_either(project: Any, trained: Workspace, hook: str) -> None:
    path = project.origin / "hooks" / hook
    path.parent.mkdir(exist_ok=True)
    refused = "$1" if hook == "update" else "$(cat)"
    path.write_text(f'#!/bin/sh\ncase "{refused}" in *refs/tags/*) echo no tags; exit 1;; esac\n')
    path.chmod(0o755)
    before = project.tip()
    with pytest.raises(GitError, match="no tags"):
        commit(trained, "ours", decision(trained.root))
    assert (project.tip(), tags_of(project)) == (before, {})
    assert git(trained.root, "tag", "--list") == ""


def test_another_model_in_production_meanwhile_wins(
    project: Any, trained: Workspace, before_push: Callable[..., list[int]]
) -> None:
    def happen(_: int) -> None:
        registry.release(project.work, "theirs")
        project.git("push", "--quiet", "--tags")

    before, pushes = project.tip(), before_push(happen)
    with pytest.raises(Lost, match="another model is in production meanwhile: nothing was published; run it again"):
        commit(trained, "ours", decision(trained.root))
    assert len(pushes) == 1
    assert (project.tip(), set(tags_of(project).values())) == (before, {before})


def test_a_decision_that_publishes_nothing_is_committed_alone_on_top_of_whatever_others_did(
    project: Any, trained: Workspace, before_push: Callable[..., list[int]]
) -> None:
    theirs = (project.work / "dvc.lock").read_text().replace("train.py 12", "train.py 36")
    pushes = before_push(lambda _: project.push_elsewhere(dvc_lock=theirs))
    record(trained, "held", decision(trained.root))
    assert len(pushes) == 2
    assert files_of(project, "main") == {"decisions/1.json"}
    assert project.git("show", "main:dvc.lock", at=project.origin) == theirs.strip()
    assert tags_of(project) == {}
