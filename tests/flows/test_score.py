"""Batch scoring: each new photo is a row once, whatever happens on the way."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fsspec.implementations.local import LocalFileSystem
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from ruamel.yaml import YAML
from s3fs import S3FileSystem

from breedline.classifier import Classifier
from breedline.errors import BreedlineError, NetworkError
from flows import score as module
from flows.score import COLUMNS, Table, score, score_new
from tests.bundles import bundle, picture

COMMIT = "0123456789abcdef"


class Killed(BaseException):
    pass


@pytest.fixture
def photos() -> Path:
    """A folder of photos, and of what is none."""
    folder = Path("photos").absolute()
    (folder / "b/deep").mkdir(parents=True)
    for name in ("red", "b/green", "b/deep/blue", "b/[1] é"):
        (folder / f"{name}.png").write_bytes(picture(name.rpartition("/")[2] if "[" not in name else "red"))
    (folder / "torn.JPG").write_bytes(picture("red", "JPEG")[:300])
    for name in (".hidden.png", "b/.hidden/red.png", "b/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture("red"))
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.fixture
def classifier(photos: Path) -> Classifier:
    return Classifier.load(bundle())


def added(
    photos: Path | str, classifier: Classifier, kind: Any = "csv", model: str = COMMIT, to: str = "scores"
) -> int:
    """How many photos were new."""
    return score_new(str(photos), Table(to, kind), classifier, model, lambda _: None).total()


def rows(to: str = "scores") -> pd.DataFrame:
    """The table, in the order of its photos."""
    parts = [
        pd.read_parquet(part) if part.suffix == ".parquet" else pd.read_csv(part) for part in Path(to).glob("part-*")
    ]
    return pd.concat(parts, ignore_index=True).sort_values("photo", ignore_index=True)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_each_new_photo_is_a_row_once(photos: Path, classifier: Classifier, kind: str) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    assert added(photos, classifier, kind) == 5
    table = rows()
    assert list(table.columns) == list(COLUMNS)
    assert table["photo"].to_list() == ["b/[1] é.png", "b/deep/blue.png", "b/green.png", "red.png", "torn.JPG"]
    assert table["label"].fillna("").to_list() == ["red", "blue", "green", "red", ""]
    assert table["class_1"].fillna("").to_list() == ["red", "blue", "green", "red", ""]
    assert table["probability_1"][:4].between(0.5, 1).all()
    assert table["reason"].notna().to_list() == [False] * 4 + [True]
    assert set(table["model"]) == {COMMIT}
    assert added(photos, classifier, kind, "another") == 0
    (photos / "red.png").write_bytes(picture("blue"))
    (photos / "b/one more.png").write_bytes(picture("green"))
    assert added(photos, classifier, kind, "another") == 2
    assert rows().query("model == 'another'")["label"].to_list() == ["green", "blue"]
    assert rows()["photo"].to_list().count("red.png") == 2


def test_parts_have_the_same_types_whatever_is_in_them(photos: Path, classifier: Classifier) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, content in {"good": picture("red"), "bad": b"nothing"}.items():
        Path(name).mkdir()
        (Path(name) / "photo.png").write_bytes(content)
        added(name, classifier, "parquet")
    one, other = (parquet.read_schema(part) for part in Path("scores").iterdir())
    assert one.equals(other)


def test_a_photo_of_none_of_the_classes_has_no_label(photos: Path) -> None:
    added(photos, Classifier.load(bundle(none_below=0.999)))
    table = rows()
    assert table["label"].isna().all()
    assert table["class_1"][:4].to_list() == ["red", "blue", "green", "red"]


def test_a_name_that_is_a_formula_is_text_and_known_again(classifier: Classifier) -> None:
    Path("formulas").mkdir()
    for name in ("=cmd.png", "'=cmd.png", "-1.png"):
        (Path("formulas") / name).write_bytes(picture("red"))
    assert [added("formulas", classifier) for _ in range(2)] == [3, 0]
    assert rows()["photo"].to_list() == ["''=cmd.png", "'-1.png", "'=cmd.png"]


@pytest.mark.parametrize("killed_after", range(4))
def test_a_run_that_is_killed_goes_on_with_the_next_part(
    photos: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    monkeypatch.setattr(module, "PART", 2)  # 5 photos: 3 parts
    added(photos, classifier, to="undisturbed")
    moved: list[str] = []
    move = LocalFileSystem.mv

    def mv(self: LocalFileSystem, path: str, target: str, **options: Any) -> None:
        if len(moved) == killed_after:
            raise Killed
        moved.append(target)
        move(self, path, target, **options)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(LocalFileSystem, "mv", mv)
        added(photos, classifier)
    assert len(list(Path("scores").glob("part-*"))) == killed_after
    assert added(photos, classifier) == max(0, 5 - 2 * killed_after)
    one, other = ({part.name: part.read_bytes() for part in Path(to).iterdir()} for to in ("undisturbed", "scores"))
    assert one == other


def test_buckets_hold_photos_and_the_table(
    photos: Path, classifier: Classifier, s3: S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "ENDPOINT_URL": str(s3.endpoint_url)}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    S3FileSystem.clear_instance_cache()
    s3.mkdir("scored")
    s3.put(str(photos / "b") + "/", "scored/in", recursive=True)
    place, table = "s3://scored/in", "s3://scored/out"
    assert [added(place, classifier, to=table) for _ in range(2)] == [3, 0]
    s3.pipe("scored/in/green.png", picture("blue"))
    assert added(place, classifier, to=table) == 1
    parts = s3.glob("scored/out/part-*.csv")
    assert sorted(s3.find("scored/out")) == sorted(parts)
    labels = pd.concat([pd.read_csv(s3.open(part)) for part in parts])["label"]
    assert sorted(labels) == ["blue", "blue", "green", "red"]
    with pytest.raises(BreedlineError, match="there is no s3://scored/nowhere"):
        added("s3://scored/nowhere", classifier, to=table)


def test_a_photo_that_is_gone_by_now_is_no_row(
    photos: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = module._listed
    monkeypatch.setattr(module, "_listed", lambda place: (listed(place), (photos / "red.png").unlink())[0])
    assert added(photos, classifier) == 4
    assert "red.png" not in rows()["photo"].to_list()


def test_a_storage_that_fails_is_no_unreadable_photo(
    photos: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: str) -> bytes:
        raise ConnectionError("reset")

    monkeypatch.setattr(module, "read_file", fails)
    with pytest.raises(NetworkError, match="reset"):
        added(photos, classifier)
    assert not Path("scores").exists()


def test_a_photo_that_is_too_large_is_not_read(
    photos: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    added(photos, classifier)
    assert rows()["reason"].str.startswith("over").sum() >= 4


@pytest.mark.parametrize("part", ["part-1.csv", "part-1.parquet"])
def test_a_part_that_is_none_is_told(photos: Path, classifier: Classifier, part: str) -> None:
    if part.endswith("parquet"):
        pytest.importorskip("pyarrow")
    Path("scores").mkdir()
    (Path("scores") / part).write_bytes(b"photo\n1,2,3\n4")
    with pytest.raises(BreedlineError, match=part):
        added(photos, classifier)


def test_parquet_without_its_package_is_told(
    photos: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ImportError

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fails)
    with pytest.raises(BreedlineError, match="install pyarrow, or set"):
        added(photos, classifier, "parquet")


# As a flow


@pytest.fixture
def scoring(project: Any, photos: Path) -> Any:
    """The project, whose branch has a model, and settings for the folder of photos and for a table in `scores`."""
    with contextlib.chdir(project.work.parent):
        bundle().rename(project.work / "seen")
    stages = project.work / "dvc.yaml"
    stages.write_text(stages.read_text().replace("{path: bundle,", "{path: seen,"))
    project.run("dvc", "add", "--quiet", "seen")
    settle(project, photos=str(photos), predictions=str(Path("../scores").resolve()))
    return project


def settle(project: Any, **settings: str | None) -> None:
    params = YAML(typ="safe").load(project.work / "params.yaml")
    params["score"] |= settings
    YAML(typ="safe").dump(params, project.work / "params.yaml")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message", "what to score")
    project.git("push", "--quiet")


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_the_branch_says_what_is_scored_and_its_commit_is_in_the_table(scoring: Any, photos: Path) -> None:
    def run() -> tuple[str, str]:
        state = score(return_state=True)
        return str(state.name), str(state.message)

    assert run() == ("Completed", "5 new photos scored")
    table = rows(str(scoring.work.parent / "scores"))
    assert set(table["model"]) == {scoring.tip()}
    assert table["label"].to_list()[:4] == ["red", "blue", "green", "red"]
    assert run() == ("Unchanged", "no photo is new")
    scoring.push_elsewhere(readme_md="another commit")
    (photos / "new.png").write_bytes(picture("green"))
    assert run() == ("Completed", "1 new photos scored")
    assert set(rows(str(scoring.work.parent / "scores"))["model"]) == {scoring.tip(), scoring.tip("main~1")}
    with get_client(sync_client=True) as client:
        (artifact, *_) = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["scores"])), sort=ArtifactSort.CREATED_DESC
        )
    assert json.loads(str(artifact.data)) == [{"label": "green", "photos": 1}]
    scoring.git("pull", "--quiet")
    settle(scoring, photos=None)
    name, message = run()
    assert (name, message) == ("Failed", "score: params.yaml names no folders: set score.photos and score.predictions")
