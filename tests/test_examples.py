"""The notebook in examples/ is run for real, in a folder whose stages have run on a few of the digits."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from ruamel.yaml import YAML

from breedline.params import load_params
from examples.render import METADATA, NOTEBOOK, executed
from stages.bundle import bundle
from stages.download import download
from stages.duplicates import duplicates
from stages.evaluate import evaluate
from stages.label import label
from stages.presize import presize
from stages.train import train
from stages.weights import weights

ROOT = Path(__file__).parents[1]
MAX_BYTES = 300_000
pytestmark = pytest.mark.slow


def _settings(path: Path) -> None:
    """Write a params.yaml of settings that train a tiny network on a tenth of the digits."""
    settings = YAML(typ="safe").load(ROOT / "params.yaml")
    settings["download"]["sources"] = [{"url": "digits", "include": ["*0.png", "*5.png"]}]
    settings["label"] |= {"min_per_class": 3}
    settings["weights"]["source"] = "none"
    settings["presize"]["shorter_side"] = 32
    settings["train"] |= {"arch": "test_resnet", "image_size": 32, "batch_size": 32, "epochs": 4, "freeze_epochs": 0}
    settings["train"] |= {"base_lr": 0.01, "precision": "fp32"}
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(settings, file)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the notebook, and with what the stages have made."""
    root = tmp_path_factory.mktemp("repository")
    _settings(root / "params.yaml")
    params, data = load_params(root / "params.yaml"), root / "data"
    corrections, near = root / "corrections.csv", data / "duplicates.csv"
    corrections.write_text("name,sha256,action,label,reason\n")
    raw, labels, presized, trained = data / "raw", data / "labels.csv", data / "presized", data / "trained"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BREEDLINE_CACHE", str(root / "cache"))
        download(params.download, raw=raw)
        weights(params.weights, params.train.arch, weights=data / "weights")
        tables = {"rejected": data / "rejected.csv", "classes": data / "classes.csv"}
        duplicates(params.duplicates, raw, duplicates=near)
        label(params.label, raw, corrections, near, labels=labels, **tables, metrics=root / "label.json")
        presize(params.presize, raw, labels, presized=presized)
        inputs = (presized, labels, data / "weights", params.presize.shorter_side)
        train(params.train, *inputs, trained=trained, metrics=root / "train.json", report=root / "report")
        metrics, report = root / "evaluate.json", root / "evaluated"
        evaluate(params.evaluate, trained, presized, labels, metrics=metrics, report=report)
        found = (trained, presized, labels, metrics, report, params.presize.shorter_side, params.presize.quality)
        bundle(params.bundle, *found, models=root / "models")
    (root / "examples").mkdir()
    shutil.copy(NOTEBOOK, root / "examples")
    return root


def _texts(notebook: NotebookNode) -> str:
    """All that the cells print or show as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/html", "") for output in outputs)


def _pictures(notebook: NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_each_cell_works(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    notebook = executed(repository / "examples" / NOTEBOOK.name)
    said = _texts(notebook)
    of_test = json.loads((repository / "evaluate.json").read_text())["test"]
    assert f"accuracy {of_test['accuracy']:.4f}" in said
    assert "classes: 0 1 2 3 4 5 6 7 8 9" in said
    assert "this is '" in said
    assert "trained more: loss" in said
    assert "<th>valid_loss</th>" in said
    assert _pictures(notebook) == 4
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before


def test_what_is_kept_is_small_and_has_nothing_of_one_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    assert notebook.metadata == METADATA
    assert [cell.id for cell in notebook.cells] == [f"cell-{number}" for number in range(len(notebook.cells))]
    assert not any(cell.metadata for cell in notebook.cells)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert all(not line.startswith("/") for line in _texts(notebook).splitlines())
    assert _pictures(notebook) == 4


def test_its_code_is_what_was_run() -> None:
    """Each cell has run once, from the first to the last."""
    counts = [cell.execution_count for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
