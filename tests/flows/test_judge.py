"""Scoring champion and challenger: the same images, present labels, one path of code, and what is told of it."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from dvc.repo import Repo

from breedline.classifier import Classifier, Photo
from breedline.errors import BreedlineError
from breedline.items import load_items
from breedline.preprocessing import view_of_presized
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from flows import decisions, judge, registry
from flows.decisions import decided, write
from flows.git_command import git
from flows.workspace import override
from tests.bundles import SIZE
from tests.flows.tiny import IMAGES, images, train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def labels() -> pd.DataFrame:
    return images(Path())


def answers(*models: Path, labels: pd.DataFrame) -> list[np.ndarray]:
    shards = ShardSet(Path("data/presized"), PRESIZED_COLUMNS)
    return judge.answer([Classifier.load(model) for model in models], shards, load_items(shards, labels))[0]


def test_the_answers_are_those_to_the_presized_images_to_the_bit(labels: pd.DataFrame) -> None:
    """What the model was evaluated on: presizing again does nothing to them."""
    model = train(0.1)
    ours, again = answers(model, model, labels=labels)
    assert np.array_equal(ours, again)
    shards, classifier = ShardSet(Path("data/presized"), PRESIZED_COLUMNS), Classifier.load(model)
    views = [view_of_presized(shards.read(*row), SIZE) for row in shards.index[["shard", "offset", "size"]].values]
    assert np.allclose(ours, classifier._probabilities(np.stack(views)), atol=1e-6)
    assert (ours.argmax(1) != (labels["label"] == "blue")).sum() == 0.1 * IMAGES


def test_probabilities_are_those_of_predictions(labels: pd.DataFrame) -> None:
    classifier = Classifier.load(train(0.1))
    shards = ShardSet(Path("data/presized"), PRESIZED_COLUMNS)
    photos = [
        Photo(row.name, shards.read(row.shard, row.offset, row.size)) for row in load_items(shards, labels)[90:110]
    ]
    for found, prediction in zip(classifier.probabilities(photos), classifier.predict(photos, top=2), strict=True):
        assert dict(zip(classifier.spec.classes, found, strict=True)) == dict(prediction.top)
    assert classifier.probabilities([]).shape == (0, 2)
    with pytest.raises(BreedlineError, match="'torn' is no usable photo"):
        classifier.probabilities([photos[0], Photo("torn", photos[1].data[:99])])


def test_the_slowdown_is_the_median_of_turns_in_alternating_order(
    labels: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    asked: list[str] = []

    class Slow:
        spec = Classifier.load(train(0.1)).spec

        def __init__(self, name: str) -> None:
            self.name = name

        def probabilities(self, photos: list[Photo]) -> np.ndarray:
            asked.append(self.name)
            for _ in range(2 if self.name == "challenger" else 0):
                next(clock)
            return np.zeros((len(photos), 2))

    monkeypatch.setattr(judge, "perf_counter", lambda: float(next(clock)))
    shards = ShardSet(Path("data/presized"), PRESIZED_COLUMNS)
    both: Any = [Slow("champion"), Slow("challenger")]
    found, slowdown = judge.answer(both, shards, load_items(shards, labels))
    assert [len(of) for of in found] == [IMAGES] * 2
    assert slowdown == 3
    assert asked[2:6] == ["challenger", "champion", "champion", "challenger"]


def test_a_class_that_the_champion_does_not_know_has_probability_0() -> None:
    class Known:
        class spec:  # noqa: N801
            classes = ("b", "a")

    known: Any = Known()
    found = judge._columns(np.array([[0.25, 0.75]]), known, ["a", "new", "b"])
    assert found.tolist() == [[0.75, 0, 0.25]]


# In a repository


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose last commit has a model that gets 8 % wrong; the one in its folder gets 4 % wrong."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    for who in ("AUTHOR", "COMMITTER"):
        for what in ("NAME", "EMAIL"):
            monkeypatch.setenv(f"GIT_{who}_{what}", "test@localhost")
    root = Path("repository").absolute()
    root.mkdir()
    monkeypatch.chdir(root)
    git(root, "init", "--quiet")
    images(root)
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    override(root, {"gate.max_slowdown": 1000})
    (root / "dvc.yaml").write_text(
        "stages: {bundle: {cmd: 'true', outs: [models]}}\nartifacts: {classifier: {path: models, type: model}}\n"
    )
    train(0.08)
    Repo.init(str(root)).close()
    with Repo() as repo:
        repo.commit(force=True)
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "first")
    Path("models").rename("first")
    train(0.04)
    with Repo() as repo:
        repo.commit(force=True)
    return root


def judged(root: Path) -> judge.Judgement:
    found = judge.judge(root)
    assert found
    return found


@pytest.mark.slow
def test_the_champion_is_what_is_in_production_or_else_of_the_last_commit(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    found = judged(repository)
    assert (found.record.verdict, found.record.champion, found.record.look) == ("promote", commit, 1)
    assert (found.record.fixed, found.record.broken, found.record.images) == (8, 0, IMAGES)
    assert list(found.changed["actual"]) == list(found.changed["challenger"]) == ["blue"] * 8
    assert set(found.changed["champion"]) == {"red"}
    assert list(found.answers.columns) == judge.ANSWERS
    registry.release(repository, "the first")
    assert judged(repository).record.champion == "classifier@v1.0.0"


@pytest.mark.slow
def test_a_model_that_nobody_can_have_is_a_champion_only_in_production(repository: Path) -> None:
    shutil.rmtree(".dvc/cache")
    found = judged(repository)
    assert (found.record.verdict, found.record.champion, found.record.look) == ("promote", None, 0)
    registry.release(repository, "the first")
    with pytest.raises(BreedlineError, match=r"^neither DVC's cache nor its remote has models of"):
        judge.judge(repository)


@pytest.mark.slow
def test_the_model_of_the_last_commit_has_not_itself_to_beat(repository: Path) -> None:
    git(repository, "commit", "--quiet", "--all", "--message", "second")
    assert judged(repository).decision.reasons == ["there is no champion yet"]


@pytest.mark.slow
def test_a_correction_of_a_test_image_scores_the_champion_anew(repository: Path) -> None:
    before = judged(repository).record
    text = Path("data/labels.csv").read_text().splitlines()
    for number in range(101, 109):  # the images that the champion took for red are red, says a person
        text[number] = text[number].replace(",blue,", ",red,")
    Path("data/labels.csv").write_text("\n".join(text) + "\n")
    after = judged(repository).record
    assert (before.champion_value, before.challenger_value) == (0.92, 0.96)
    assert (after.champion_value, after.challenger_value) == (0.96, 1.0)
    assert after.test_set != before.test_set
    assert after.look == 1


@pytest.mark.slow
def test_the_same_model_is_nothing_to_decide(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("models").rename("second")
    Path("first").rename("models")
    registry.release(repository, "the first")
    assert judge.judge(repository) is None
    judge.main()
    assert capsys.readouterr().out == "the model gives the same answers as the champion: there is nothing to decide\n"


@pytest.mark.slow
def test_looks_are_counted_by_challenger_and_a_look_again_is_none(repository: Path) -> None:
    first = judged(repository)
    assert (first.known, first.record.look) == (None, 1)
    write(repository, first.record)
    again = judged(repository)
    assert (again.known, again.record.look) == (first.record, 1)
    Path("models").rename("second")
    train(0.05)
    other = judged(repository)
    assert (other.known, other.record.look) == (None, 2)
    write(repository, other.record)
    override(repository, {"gate.metric": "macro_f1"})
    assert (judged(repository).known, judged(repository).record.look) == (None, 2)
    assert len(decided(repository)) == 2


@pytest.mark.slow
def test_the_command_tells_and_records_nothing(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = git(repository, "status", "--porcelain")
    judge.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "promote"
    assert lines[1].startswith("- accuracy 0.9200 -> 0.9600 (+0.0400, ")
    assert "gets 0 right that the model gets wrong, which gets 8 right that it gets wrong" in lines[-2]
    page = judge.PAGE.read_text("utf-8")
    assert page.count('role="img"') == 8
    judge.PAGE.unlink()
    assert git(repository, "status", "--porcelain") == before


# The files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "all of it: Invalid JSON"),
        ("[]", "all of it: Input should be an object"),
        ('{"verdict": "perhaps"}', "verdict: Input should be 'promote', 'hold' or 'undecided'"),
        ("{" * 100_000, "all of it: Invalid JSON"),
        (" " * 2_000_000, "it is too long"),
    ],
)
def test_a_file_that_is_no_decision_is_one_line(content: str, said: str) -> None:
    Path("decisions").mkdir()
    Path("decisions/2026.json").write_text(content)
    with pytest.raises(
        BreedlineError, match=f"^decisions/2026.json is no decision of the gate \\({said}.*\\): restore"
    ):
        decided(Path())


@pytest.mark.slow
def test_a_decision_is_what_is_read_again(repository: Path) -> None:
    record = judged(repository).record
    path = write(repository, record)
    assert decided(repository) == [record]
    told = json.loads(Path(path).read_text())
    assert set(told) >= {"verdict", "published", "reasons", "time", "champion", "challenger", "interval", "test_set"}
    assert path == f"{decisions.FOLDER}/{record.time:%Y%m%dT%H%M%SZ}-{record.challenger[:8]}.json"
    with contextlib.chdir("/"):
        assert decided(repository) == [record]
