"""A training that was interrupted resumes as if it had not been."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

from breedline.files import sha256_of
from breedline.history import History

Pipeline = Any


class Killed(BaseException):
    pass


@pytest.fixture
def train_until(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that trains into a folder and ends as if killed, after some whole epochs and before the next is."""

    def run(pipeline: Pipeline, epochs: int, folder: Path, **settings: Any) -> None:
        def end(history: History) -> None:
            if len(history.epochs) == epochs:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(History, "before_validate", end, raising=False)
            with pytest.raises(Killed):
                pipeline.train(folder, **settings)

    return run


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_interrupted_training_resumes_bit_for_bit(
    pipeline: Pipeline,
    trained: Path,
    tmp_path: Path,
    assert_same: Callable[..., None],
    train_until: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    epoch: int,
) -> None:
    train_until(pipeline, epoch - 1, tmp_path / "killed")
    caplog.set_level("INFO")
    again = pipeline.train(tmp_path / "again")
    assert (f"train: resuming after epoch {epoch - 1} of 3" in caplog.messages) == (epoch > 1)
    assert_same(trained, again, "report/schedule.png")
    history = pd.read_csv(again / "report/live/plots/metrics/accuracy.tsv", sep="\t")
    assert history["step"].tolist() == [1, 2, 3]
    assert not any((tmp_path / "cache/checkpoints").iterdir())


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_fine_tuning_of_a_fitted_head_resumes_bit_for_bit(
    pretrained: Pipeline,
    fine_tuned: Path,
    tmp_path: Path,
    assert_same: Callable[..., None],
    train_until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    epoch: int,
) -> None:
    train_until(pretrained, epoch - 1, tmp_path / "killed")
    monkeypatch.setattr("breedline.probe.compute_features", lambda *_: pytest.fail("computed again"))
    again = pretrained.train(tmp_path / "again")
    assert_same(fine_tuned, again, "report/schedule.png", "report/live/plots/metrics/valid_loss.tsv")
    assert not any((tmp_path / "cache/checkpoints").iterdir())


@pytest.mark.parametrize("moment", ["features", "fit_linear", "publish_best"])
def test_a_kill_between_epochs_and_steps_changes_nothing(
    pretrained: Pipeline,
    fine_tuned: Path,
    tmp_path: Path,
    assert_same: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Killed

    module = {"features": "breedline.features", "fit_linear": "breedline.probe"}.get(moment, "stages.train")
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{moment}", killed)
        with pytest.raises(Killed):
            pretrained.train(tmp_path / "killed")
    assert not (tmp_path / "killed/model").exists()
    assert_same(fine_tuned, pretrained.train(tmp_path / "again"))


def test_a_training_that_ended_unrecorded_has_its_result_at_once(
    pretrained: Pipeline,
    fine_tuned: Path,
    tmp_path: Path,
    assert_same: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tests.stages.conftest.remove_those_of", lambda _: None)  # evaluate does not come to it
        pretrained.train(tmp_path / "unrecorded")
    caplog.set_level("INFO")
    monkeypatch.setattr("breedline.probe.compute_features", lambda *_: pytest.fail("computed again"))
    again = pretrained.train(tmp_path / "again")
    assert "train: resuming after epoch 2 of 2" in caplog.messages
    assert_same(fine_tuned, again, "report/schedule.png", "report/live/plots/metrics/valid_loss.tsv")
    assert not any((tmp_path / "cache/checkpoints").iterdir())


def test_other_settings_start_clean_and_the_finder_is_asked_once(
    pipeline: Pipeline,
    tmp_path: Path,
    assert_same: Callable[..., None],
    train_until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"base_lr": "finder", "batch_size": 16}
    train_until(pipeline, 1, tmp_path / "killed", **settings)
    caplog.set_level("INFO")
    other = pipeline.train(tmp_path / "other", **settings, seed=43)
    assert not any("resuming" in message for message in caplog.messages)
    with monkeypatch.context() as patch:
        patch.setattr("breedline.finetune._find_lr", lambda *_, **__: pytest.fail("asked again"))
        again = pipeline.train(tmp_path / "again", **settings)
    assert any("resuming after epoch 1 of 3" in message for message in caplog.messages)
    whole = pipeline.train(tmp_path / "whole", **settings)
    assert_same(whole, again, "report/lr_find.png")
    assert sha256_of(whole / "model/model.safetensors") != sha256_of(other / "model/model.safetensors")


def _start(pipeline: Pipeline, folder: Path, path: str) -> subprocess.Popen[str]:
    """The stage as a process of its own, by the `python` of `path`, which trains into `folder`."""
    YAML().dump(pipeline.params.model_dump(), folder / "params.yaml")
    paths: dict[str, object] = {name: pipeline.path(name) for name in ("presized", "weights")}
    paths |= {"labels": pipeline.path("labels.csv"), "item_size": 40}
    paths |= {"trained": "model", "metrics": "train.json", "report": "report"}
    command = ["python", "-m", "stages.train", *(f"--{name}={value}" for name, value in paths.items())]
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


@pytest.fixture
def run_with_a_kill(tmp_path: Path, preloaded: str) -> Callable[[Pipeline, str | None], str]:
    """A function that trains as a process of its own and kills it a moment after it has said something; what it said."""

    def run(pipeline: Pipeline, kill_after: str | None) -> str:
        process = _start(pipeline, tmp_path, preloaded)
        said = []
        assert process.stderr
        with process, process.stderr as lines:
            for line in lines:
                said.append(line)
                if kill_after and kill_after in line:
                    time.sleep(random.uniform(0, 0.1))  # noqa: S311 - an epoch takes about as long
                    process.kill()
        assert process.returncode == (-signal.SIGKILL if kill_after else 0), said
        return "".join(said)

    return run


@pytest.mark.slow
def test_a_kill_in_every_epoch_of_both_phases_changes_nothing(
    pipeline: Pipeline,
    trained: Path,
    tmp_path: Path,
    assert_same: Callable[..., None],
    run_with_a_kill: Callable[..., str],
) -> None:
    for moment in ("of the head alone", "epoch 1/3", "epoch 2/3"):
        run_with_a_kill(pipeline, moment)
    assert "resuming after epoch" in run_with_a_kill(pipeline, None)
    assert_same(trained, tmp_path)


@pytest.mark.slow
def test_a_kill_while_or_after_a_head_is_fitted_changes_nothing(
    pretrained: Pipeline,
    fine_tuned: Path,
    tmp_path: Path,
    assert_same: Callable[..., None],
    run_with_a_kill: Callable[..., str],
) -> None:
    fitted = "the head alone, fitted to features"
    run_with_a_kill(pretrained, "when decoded")
    assert fitted in run_with_a_kill(pretrained, fitted)
    assert fitted not in run_with_a_kill(pretrained, "epoch 1/2")
    assert fitted not in run_with_a_kill(pretrained, None), "it is kept"
    assert_same(fine_tuned, tmp_path)


def test_a_resumed_training_keeps_its_smaller_batches(
    pipeline: Pipeline,
    tmp_path: Path,
    train_until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = set()

    def too_much(history: History) -> None:
        if history.training:
            sizes.add(len(history.learn.yb[0]))
            if len(history.learn.yb[0]) > 8:
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(History, "after_pred", too_much, raising=False)
    train_until(pipeline, 1, tmp_path, batch_size=16)
    assert sizes == {16, 8}
    sizes.clear()
    caplog.clear()
    caplog.set_level("INFO")
    pipeline.train(tmp_path, batch_size=16)
    assert "train: resuming after epoch 1 of 3" in caplog.messages
    assert sizes == {8}


@pytest.mark.gpu
def test_on_a_gpu_a_training_resumes_with_the_same_schedule_and_about_the_same_numbers(
    pipeline: Pipeline, tmp_path: Path, train_until: Callable[..., None]
) -> None:
    whole = pipeline.train(tmp_path / "whole")
    train_until(pipeline, 2, tmp_path / "killed")
    again = pipeline.train(tmp_path / "again")
    assert sha256_of(whole / "report/schedule.png") == sha256_of(again / "report/schedule.png")
    one, other = (json.loads((folder / "train.json").read_text()) for folder in (whole, again))
    assert other["valid_loss"] == pytest.approx(one["valid_loss"], abs=0.1)
