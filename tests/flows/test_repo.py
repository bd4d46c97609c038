"""What DVC knows: its metrics, its lock file; and a DVC that has changed."""

from collections.abc import Callable
from typing import Any

import dvc
import pytest
from dvc.exceptions import DvcException
from dvc.repo import Repo

from breedline.errors import BreedlineError
from flows.plan import plan
from flows.repo import distrust_remotes, empty_runs, flat, keep_order, metrics, opened


@pytest.mark.parametrize(
    ("version", "error"),
    [("4.0.0", "DVC 4.0.0 has moved what Breedline asks it"), ("3.67.9", "no attribute 'stage_cache'")],
)
def test_a_dvc_that_has_moved_its_insides_is_named(
    make_repository: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, version: str, error: str
) -> None:
    repository = make_repository()
    monkeypatch.setattr(dvc, "__version__", version)
    monkeypatch.delattr(Repo, "stage_cache", raising=False)
    monkeypatch.setattr(Repo, "__init__", lambda self, **_: None)
    monkeypatch.setattr(Repo, "close", lambda self: None)
    monkeypatch.setattr("flows.repo.USED", ("stage_cache",))
    with pytest.raises(BreedlineError if version == "4.0.0" else AttributeError, match=error):
        plan(repository.root)


def test_metrics_are_the_committed_and_the_present_numbers(make_repository: Callable[..., Any]) -> None:
    repository = make_repository(
        "stages: {a: {cmd: cp in m.json, deps: [in], metrics: [m.json: {cache: false}]}}",
        {"in": '{"gone": 1, "same": {"x": 2}, "name": "n"}'},
    )
    repository.repro()
    assert metrics(repository.root) == {"m.json:gone": (None, 1), "m.json:same.x": (None, 2)}
    repository.shell("rm -r .dvc; git init -q; python -m dvc init -q")
    assert metrics(repository.root) == {"m.json:gone": (None, 1), "m.json:same.x": (None, 2)}
    repository.shell("git add -A; git -c user.name=n -c user.email=e commit -qm m")
    (repository.root / "in").write_text('{"same": {"x": 2.5}, "new": 3}')
    repository.repro()
    found = metrics(repository.root)
    assert found == {"m.json:same.x": (2, 2.5), "m.json:new": (None, 3), "m.json:gone": (1, None)}


def test_the_order_of_the_record_is_that_of_dvc_whatever_ends_first(make_repository: Callable[..., Any]) -> None:
    repository = make_repository()
    repository.repro()
    lock = repository.root / "dvc.lock"
    after = lock.read_bytes()
    lock.unlink()
    with keep_order(repository.root, ["a", "b", "c", "d"]):
        for stage in "acbd":
            repository.shell(f"python -m dvc repro -q -s {stage}")
        assert lock.read_bytes() != after
    assert lock.read_bytes() == after


def test_a_folder_that_another_dvc_is_about_to_write_to_is_not_empty(
    make_repository: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_repository().root
    of_a_kill, of_another = (root / f".dvc/cache/runs/00/{name}" for name in ("kill", "another"))
    for folder in (of_a_kill, of_another):
        folder.mkdir(parents=True)
    monkeypatch.setattr("time.sleep", lambda _: (of_another / "run").touch())
    assert empty_runs(root) == [of_a_kill]


def test_nested_settings_are_flat_and_empty_ones_are_kept() -> None:
    settings = {"a": {"b": {"c": 1}, "d": {}}, "e": [], "f": None, "g": {}}
    assert flat(settings) == {"a.b.c": 1, "a.d": {}, "e": [], "f": None, "g": {}}
    assert flat({}) == flat(None) == {}


def test_no_password_in_what_dvc_says_is_shown(make_repository: Callable[..., Any]) -> None:
    with (
        pytest.raises(BreedlineError, match="cannot reach https://localhost/store") as error,
        opened(make_repository().root),
    ):
        raise DvcException("cannot reach https://user:s3cret@localhost/store")
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(("own", "seconds"), [("", "20"), ("read_timeout = 5\n", "5")])
def test_a_run_distrusts_a_remote_as_far_as_nobody_says_how(project: Any, own: str, seconds: str) -> None:
    with (project.work / ".dvc/config").open("a") as config:
        config.write(own)
    distrust_remotes(project.work)
    assert project.run("dvc", "config", "remote.store.verify") == "True"
    assert project.run("dvc", "config", "remote.store.read_timeout") == seconds
    assert project.git("status", "--porcelain", "--", ".dvc/config.local") == ""
