"""The whole loop once, as people go through it: wrong labels, a first model, a review in a browser, a better model, and back."""

import contextlib
import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import dvc.api
import gto.api
import pytest
from playwright.sync_api import expect

from tests.breedline.test_review import browsed
from tests.project import Project, fresh_project, pictures

WRONG = {"blue_6.jpg": "red", "blue_1.jpg": "green", "green_1.jpg": "red", "red_0.jpg": "blue"}
"""What some pictures are called, whatever their colour: all but the second are in the split `train`, that one in `test`."""
CARDS = 12


def renamed(pictures: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The tar with the pictures of `WRONG` under their wrong names; and the content of those."""
    buffer, wrong = io.BytesIO(), {}
    with tarfile.open(fileobj=io.BytesIO(pictures)) as right, tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in right:
            content = right.extractfile(member).read()  # type: ignore[union-attr]
            if member.name in WRONG:
                wrong[member.name] = content
                member.name = f"{WRONG[member.name]}_9{member.name.partition('_')[2]}"
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue(), wrong


def sees(project: Project, photo: Path, model: str) -> str:
    """What a model says of a photo: every class with its probability."""
    return project.run("breedline", "predict", "--json", "--model", model, str(photo))


@pytest.fixture
def project(long: bool, tmp_path: Path, preloaded: str, prefect_server: str) -> Project:
    """The project, a git origin, and a DVC remote; its pictures are those of `renamed`. A head is all that it trains."""
    if not long:
        pytest.skip("`make test-long` goes the whole loop")
    folder = fresh_project(tmp_path / "project").folder
    (tmp_path / "pictures.tar").write_bytes(renamed(pictures())[0])
    project = Project(folder, PATH=preloaded, PREFECT_API_URL=prefect_server, PREFECT_HOME=str(tmp_path / "prefect"))
    project.set("weights", source="imagenet")  # they come with the environment
    project.set("train", arch="tf_efficientnet_lite0", freeze_epochs="fit", epochs=0)
    project.set("gate", max_slowdown=1000, max_calibration_rise=1)
    project.run("git", "init", "--quiet", "--bare", "--initial-branch", "main", str(tmp_path / "origin.git"))
    project.run("git", "branch", "--move", "main")
    project.run("git", "remote", "add", "origin", str(tmp_path / "origin.git"))
    project.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "store"))
    project.commit()
    project.run("git", "push", "--quiet", "--set-upstream", "origin", "main")
    return project


@pytest.mark.slow
@pytest.mark.long
def test_labels_are_cleaned_and_what_learns_from_them_is_published_and_taken_back(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", project.environment["DVC_SITE_CACHE_DIR"])
    wrong = {hashlib.sha256(content).hexdigest(): name for name, content in renamed(pictures())[1].items()}

    def share() -> str:
        """Commit and push what `dvc repro` has made, and have it published."""
        project.commit()
        project.run("git", "push", "--quiet")
        said = project.run("breedline", "retrain", "--publish")
        project.run("git", "pull", "--quiet", "--tags")
        return said

    project.repro()
    assert "promote: there is no champion yet" in share()

    with contextlib.chdir(project.folder), browsed() as page:
        card = page.locator("#card")
        expect(card).to_have_attribute("data-shown", re.compile("."))
        for _ in range(CARDS):
            sha256 = str(card.get_attribute("data-shown"))
            given, suggested = card.locator(".name").all_inner_texts()
            right = wrong[sha256].partition("_")[0] if sha256 in wrong else given
            page.keyboard.press({given: "k", suggested: "r"}.get(right, "/"))
            if right not in (given, suggested):
                page.keyboard.type(right)
                page.keyboard.press("Enter")
            expect(card).not_to_have_attribute("data-shown", sha256)
    corrections = (project.folder / "data/corrections.csv").read_text()
    assert all(sha256 in corrections for sha256 in wrong)
    assert len((project.folder / "data/kept.csv").read_text().splitlines()) == 1 + CARDS - len(wrong)

    stages, _ = project.repro()
    assert set(stages) == {"label", "presize", "suspects", "train", "evaluate", "report", "bundle"}
    said = project.run("breedline", "gate")
    assert "look 1 at these" in said
    assert (project.folder / "reports/gate.html").is_file()
    share()
    decision = json.loads(max((project.folder / "decisions").iterdir()).read_text())
    assert (decision["champion"], decision["published"], decision["look"]) == ("classifier@v1.0.0", True, 1)
    assert decision["champion_value"] <= decision["challenger_value"] == 1

    root = str(project.folder)
    assert [row["version"] for row in gto.api.show(root, "classifier#prod")] == ["v1.1.0"]
    released = project.run("git", "rev-parse", "classifier@v1.1.0^{commit}").strip()
    assert dvc.api.artifacts_show("classifier", stage="prod", repo=root) == {"rev": released, "path": "models"}

    photo = tmp_path / "photo.jpg"
    photo.write_bytes(next(iter(renamed(pictures())[1].values())))
    first, second = (sees(project, photo, f"classifier@{version}") for version in ("v1.0.0", "v1.1.0"))
    assert first != second == sees(project, photo, "classifier#prod")
    assert "from classifier@v1.1.0 to classifier@v1.0.0" in project.run("breedline", "rollback")
    assert sees(project, photo, "classifier#prod") == first
