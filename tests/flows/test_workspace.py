"""The private clone: at any ref, with the cache of the checkout but without a trace in it; and settings changed in it."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from breedline.errors import BreedlineError
from breedline.files import cache_dir
from breedline.params import ParamsError
from flows.plan import Action, plan
from flows.workspace import PARAMS, GitError, git, origin_of, override, unpushed, workspace

ROOT = Path(__file__).parents[2]
PRIVATE = "not for strangers"
HOLD = """
import sys
from pathlib import Path
from flows.workspace import workspace
with workspace(None, "main", Path(sys.argv[1])) as clone:
    print(clone.root, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository without DVC: `file` says one at the tag `v1`, two at the tip of main and branch of `a/branch`."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "test")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "test@localhost")
    root = tmp_path / "plain"
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch", "main")
    for content, name in (("one", ["tag", "v1"]), ("two", ["branch", "a/branch"])):
        (root / "file").write_text(content)
        git(root, "add", "file")
        git(root, "commit", "--quiet", "--message", content)
        git(root, *name)
    return root


def files(folder: Path) -> dict[str, bytes]:
    """All of a checkout, git's own files too, but for what DVC keeps on what it has seen."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".dvc/tmp" not in str(path)
    }


@pytest.mark.parametrize(
    ("ref", "content", "branch"),
    [("main", "two", "main"), ("a/branch", "two", "a/branch"), ("v1", "one", None), ("v1^{commit}", "one", None)],
)
def test_a_clone_is_at_a_branch_a_tag_or_a_commit(plain: Path, ref: str, content: str, branch: str | None) -> None:
    with workspace(str(plain), ref, plain) as clone:
        assert clone.branch == branch
        assert (clone.root / "file").read_text() == content
        assert git(clone.root, "branch", "--show-current") == (branch or "")
    assert not clone.root.exists()


def test_a_clone_is_at_a_hash(plain: Path) -> None:
    commit = git(plain, "rev-parse", "v1")
    for ref in (commit, commit[:8]):
        with workspace(str(plain), ref, plain) as clone:
            assert git(clone.root, "rev-parse", "HEAD") == commit
            assert clone.branch is None


def test_a_branch_comes_before_a_tag_of_its_name(plain: Path) -> None:
    git(plain, "tag", "main", "v1")
    with workspace(str(plain), "main", plain) as clone:
        assert (clone.root / "file").read_text() == "two"
        assert clone.branch == "main"


@pytest.mark.parametrize(
    "ref",
    ["nowhere", "-f", "--all", "", "a b", "HEAD:file", "main..v1", "@{-1}", "ma\0in", "\0", "\ud800", "x" * 200_000],
)
def test_an_unknown_ref_is_one_line(plain: Path, ref: str) -> None:
    with (
        pytest.raises(BreedlineError, match=f"^there is no branch, tag or commit called {re.escape(repr(ref[:200]))}$"),
        workspace(str(plain), ref, plain),
    ):
        pass
    assert not any(path.is_dir() for path in cache_dir("workspaces").iterdir())


def test_a_repository_that_is_not_there_is_one_line(plain: Path) -> None:
    git(plain, "remote", "add", "origin", "nowhere")
    with (
        pytest.raises(BreedlineError, match=r"^git clone: .*nowhere.*does not exist.*$"),
        workspace(None, "main", plain),
    ):
        pass


def test_no_password_in_a_url_is_shown(plain: Path) -> None:
    git(plain, "remote", "add", "origin", "foo://user:s3cret@localhost/plain.git?token=s3cret")
    other = "https://user:s3cret@localhost/other.git"
    long = f"https://user:{'s3cret' * 40}@localhost/other.git"
    for repository, said in ((None, "git clone: .*foo"), (other, "is not where"), (long, "is not where")):
        with pytest.raises(BreedlineError, match=said) as error, workspace(repository, "main", plain):
            pass
        assert "s3cret" not in str(error.value)


@pytest.fixture
def checkout(plain: Path, tmp_path: Path) -> Path:
    """A clone of `plain` whose settings for this machine alone hold a secret, and which is a DVC repository."""
    Repo.init(str(plain)).close()
    git(plain, "commit", "--quiet", "--message", "dvc")
    root = tmp_path / "checkout"
    git(tmp_path, "clone", "--quiet", str(plain), str(root))
    (root / ".dvc/config.local").write_text(
        f"['remote \"store\"']\n    url = ssh://localhost/store\n    password = {PRIVATE}\n"
    )
    return root


def test_a_clone_of_the_checkout_s_origin_has_its_cache_and_its_settings(checkout: Path) -> None:
    with workspace(None, "main", checkout) as clone:
        settings = (clone.root / ".dvc/config.local").read_text()
    assert PRIVATE in settings
    assert str(checkout / ".dvc/cache") in settings


@pytest.mark.parametrize(
    "spelling",
    ["{0}", "{0}/", "{0}.git", "{0}/.git", "file://{0}", "file://{0}.git/", "../plain", "../link", ""],
)
def test_the_origin_may_be_spelled_in_several_ways_and_is_cloned_in_its_own(
    plain: Path, checkout: Path, tmp_path: Path, spelling: str
) -> None:
    (tmp_path / "link").symlink_to(plain)
    shutil.copytree(plain, tmp_path / "plain.git")  # which git would take for `plain.git`
    with workspace(spelling.format(plain), "main", checkout) as clone:
        assert git(clone.root, "remote", "get-url", "origin") == str(plain)


@pytest.mark.parametrize(
    "repository",
    [
        "{0}/another",
        "../another",
        "file://{0}/another",
        ".",
        "https://localhost/another.git",
        "git@localhost:another.git",
        "ext::sh -c 'touch {0}/canary'",
        "ext::touch {0}/canary",
        "--upload-pack=touch {0}/canary",
        "-u touch {0}/canary",
        "fd::17",
        "{0}/pl\0ain",
        "\ud800",
        "x" * 200_000,
    ],
)
def test_any_other_repository_is_refused_before_git_is_asked(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: str
) -> None:
    shutil.copytree(checkout, tmp_path / "another")
    asked: list[str] = []

    def watched(folder: Path, *arguments: str) -> str:
        asked.extend(arguments)
        return git(folder, *arguments)

    monkeypatch.setattr("flows.workspace.git", watched)
    with (
        pytest.raises(BreedlineError, match=r"is not where this checkout was cloned from.*BREEDLINE_REPOSITORIES"),
        workspace(repository.format(tmp_path), "main", checkout),
    ):
        pass
    assert "clone" not in asked
    assert not (tmp_path / "canary").exists()


def test_what_the_owner_allows_is_cloned_without_the_settings_and_the_cache_of_the_checkout(
    plain: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = tmp_path / "another"
    shutil.copytree(plain, another)
    monkeypatch.setenv("BREEDLINE_REPOSITORIES", f"https://localhost/another.git {another}/")
    with workspace(f"file://{another}", "main", checkout) as clone:
        assert git(clone.root, "remote", "get-url", "origin") == f"{another}/"
        assert not (clone.root / ".dvc/config.local").exists()
        with contextlib.chdir(clone.root), Repo() as repo:
            assert Path(repo.cache.local.path).is_relative_to(clone.root)
        assert PRIVATE.encode() not in b"".join(files(clone.root).values())


def test_git_runs_no_command_that_stands_in_a_url(plain: Path, tmp_path: Path) -> None:
    git(plain, "config", "protocol.allow", "always")
    with pytest.raises(GitError, match="transport 'ext' not allowed"):
        git(plain, "fetch", f"ext::touch {tmp_path}/canary")
    assert not (tmp_path / "canary").exists()


def test_the_cache_folder_may_be_relative(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BREEDLINE_CACHE", "kept")
    with workspace(None, "main", plain) as clone:
        assert (clone.root / "file").read_text() == "two"


def test_two_at_once_have_folders_of_their_own_and_names_are_used_again(plain: Path) -> None:
    with workspace(str(plain), "main", plain) as one, workspace(str(plain), "v1", plain) as two:
        assert one.root != two.root
        assert [(clone.root / "file").read_text() for clone in (one, two)] == ["two", "one"]
    with workspace(str(plain), "main", plain) as three:
        assert three.root == one.root


@pytest.mark.slow
def test_the_folder_of_a_killed_run_is_removed_and_that_of_a_living_one_is_not(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(plain)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start() as killed, start() as living:
        left, held = (Path(process.stdout.readline().strip()) for process in (killed, living))
        (left / "left").touch()
        (held / "held").touch()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert (left / "left").exists()
        with workspace(str(plain), "main", plain) as clone:
            assert clone.root == left
            assert not (left / "left").exists()
            assert (held / "held").exists()
        living.communicate("", timeout=30)
        assert living.returncode == 0
        assert not held.exists()


def test_where_a_checkout_comes_from(plain: Path, tmp_path: Path) -> None:
    assert origin_of(plain) == str(plain)
    git(tmp_path, "clone", "--quiet", str(plain), "clone")
    assert origin_of(tmp_path / "clone") == str(plain)


@pytest.mark.slow
def test_the_checkout_is_as_it_was_whatever_is_changed_in_it(project: Any) -> None:
    (project.work / "source.txt").write_text("stashed")
    project.git("stash", "--quiet")
    (project.work / "train.py").write_text("staged")
    project.git("add", "train.py")
    (project.work / "params.yaml").write_text("changed")
    (project.work / "untracked").write_text("untracked")
    (project.work / "models/bundle").unlink()
    (project.work / "dvc.lock").write_text("broken: [")
    before = files(project.work)
    with workspace(str(project.origin), "main", project.work) as clone:
        assert [step.action for step in plan(clone.root)] == [Action.RESTORE, Action.RESTORE]
        override(clone.root, {"train.epochs": 1})
        project.run("dvc", "repro", "--quiet", at=clone.root)
        git(clone.root, "commit", "--quiet", "--all", "--message", "in the clone")
    after = files(project.work)
    new = {name for name in after if name not in before}
    assert all(name.startswith(".dvc/cache/") for name in new)
    assert {name: content for name, content in after.items() if name not in new} == before


@pytest.mark.slow
def test_what_the_cache_of_the_checkout_has_is_restored_and_not_run(project: Any) -> None:
    project.ran()
    with workspace(str(project.origin), "main", project.work) as clone:
        project.run("dvc", "repro", at=clone.root)
        assert (clone.root / "models/bundle").read_text() == "12 epochs"
        assert project.run("dvc", "status", at=clone.root) == "Data and pipelines are up to date."
        assert git(clone.root, "status", "--porcelain") == ""
    assert project.ran() == []


@pytest.mark.slow
def test_local_settings_mean_the_same_in_the_clone(project: Any) -> None:
    (project.work / ".dvc/cache").rename(project.work / "elsewhere")
    project.run("dvc", "cache", "dir", "--local", "elsewhere")
    project.run("dvc", "remote", "add", "--local", "--default", "near", "../near")
    with workspace(str(project.origin), "main", project.work) as clone:
        assert project.run("dvc", "cache", "dir", at=clone.root) == str(project.work / "elsewhere")
        remotes = project.run("dvc", "remote", "list", at=clone.root)
        assert f"near{project.work.parent / 'near'}" in "".join(remotes.split())  # dvc breaks long lines
        assert [step.action for step in plan(clone.root)] == [Action.RESTORE, Action.RESTORE]
        assert git(clone.root, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    "file", [ROOT / "params.yaml", *sorted(ROOT.glob("presets/*.yaml"))], ids=lambda file: file.stem
)
def test_a_setting_changes_one_line_and_leaves_the_rest(file: Path, tmp_path: Path) -> None:
    before = file.read_text()
    (tmp_path / PARAMS).write_text(before)
    override(tmp_path, {"train.epochs": 99})
    assert (tmp_path / PARAMS).read_text() == re.sub(r"(\n  epochs: )\w+", r"\g<1>99", before)


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        (
            {"train.augment.flip": True, "gate.margin": 0.5},
            ["    flip: true # a mirrored digit is another sign", "  margin: 0.5 # a loss of a point"],
        ),
        ({"label.map": {"1": "one"}}, ["  map:", "    '1': one"]),
        ({"label.test_list": "list.txt"}, ["  test_list: list.txt"]),
        ({"download.sources": [{"url": "digits"}]}, ["    - url: digits"]),
    ],
)
def test_settings_of_every_kind(tmp_path: Path, settings: dict[str, Any], lines: list[str]) -> None:
    (tmp_path / PARAMS).write_text((ROOT / PARAMS).read_text())
    override(tmp_path, settings)
    written = (tmp_path / PARAMS).read_text()
    assert set(lines) <= {re.sub(" +#", " #", line) for line in written.splitlines()}
    params = YAML(typ="safe").load(written)
    for key, value in settings.items():
        section, *deeper = key.split(".")
        found = params[section]
        for name in deeper:
            found = found[name]
        assert found == value


def test_no_settings_leave_the_file_alone(tmp_path: Path) -> None:
    strange = (ROOT / PARAMS).read_text().replace("epochs: 6", "epochs:    0xc   # hex")
    (tmp_path / PARAMS).write_text(strange)
    override(tmp_path, {})
    assert (tmp_path / PARAMS).read_text() == strange


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / PARAMS).write_text((ROOT / PARAMS).read_text())
    with pytest.raises(ParamsError) as error:
        override(tmp_path, {"train.epoch": 3, "train.batch_size": "many", "gates.margin": 1, "gate.margin": -1})
    for key in (
        "train.epoch: unknown setting; did you mean epochs?",
        "train.batch_size = 'many'",
        "gates",
        "gate.margin = -1",
    ):
        assert key in str(error.value)


def test_a_setting_is_no_section(tmp_path: Path) -> None:
    (tmp_path / PARAMS).write_text((ROOT / PARAMS).read_text())
    with pytest.raises(ParamsError, match=r"^train.epochs.first: epochs is a setting itself, not a section$"):
        override(tmp_path, {"train.epochs.first": 3})


@pytest.mark.parametrize("settings", [{"train.epochs": 3}, {}])
@pytest.mark.parametrize(
    "content", ["train: [", "", "[]", "- train", "train", "train: 1\ntrain: 2", "\t", "train: [1]"]
)
def test_a_broken_file_is_told_before_anything_is_written_into_it(
    tmp_path: Path, content: str, settings: dict[str, Any]
) -> None:
    (tmp_path / PARAMS).write_text(content)
    with pytest.raises(ParamsError, match=PARAMS):
        override(tmp_path, settings)
    assert (tmp_path / PARAMS).read_text() == content


def test_a_folder_called_params_yaml_is_told(tmp_path: Path) -> None:
    (tmp_path / PARAMS).mkdir()
    with pytest.raises(ParamsError, match=PARAMS):
        override(tmp_path, {"train.epochs": 3})


@pytest.mark.parametrize(
    ("value", "message"),
    [("\ud800", "params.yaml is not YAML"), (10**5000, "^label.pattern: it cannot be written as YAML")],
    ids=["half a character", "5001 digits"],
)
def test_a_value_that_yaml_cannot_hold_is_told(tmp_path: Path, value: object, message: str) -> None:
    (tmp_path / PARAMS).write_text((ROOT / PARAMS).read_text())
    with pytest.raises(ParamsError, match=message):
        override(tmp_path, {"label.pattern": value})


def test_what_is_not_pushed_is_known(plain: Path, tmp_path: Path) -> None:
    assert not unpushed(tmp_path, "main")
    git(plain, "clone", "--quiet", str(plain), str(tmp_path / "clone"))
    assert not unpushed(tmp_path / "clone", "main")
    assert not unpushed(tmp_path / "clone", "v1")
    (tmp_path / "clone/file").write_text("three")
    (tmp_path / "clone/other").touch()
    assert unpushed(tmp_path / "clone", "main")
    git(tmp_path / "clone", "commit", "--quiet", "--all", "--message", "three")
    assert unpushed(tmp_path / "clone", "main")
    git(tmp_path / "clone", "push", "--quiet", "origin", "HEAD:refs/heads/next")
    git(tmp_path / "clone", "update-ref", "refs/remotes/origin/main", "HEAD")
    assert not unpushed(tmp_path / "clone", "main")
