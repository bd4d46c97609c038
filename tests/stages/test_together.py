"""Several processes that train together do what one does: real processes of torchrun, with gloo on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

import breedline.together
from breedline.together import one_process_for_each_gpu

ROOT = Path(__file__).parents[2]
Pipeline = Any


@pytest.fixture
def torchrun(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """A function that starts the train stage in two processes, with a working folder and a cache of its own."""

    def start(pipeline: Pipeline, name: str, *options: str, **settings: Any) -> subprocess.Popen[str]:
        folder = tmp_path / name
        folder.mkdir()
        sections = pipeline.params.model_dump()
        sections["train"] |= settings
        with (folder / "params.yaml").open("w") as file:
            YAML(typ="safe").dump(json.loads(json.dumps(sections)), file)
        inputs = [f"--{what}={pipeline.folder / path}" for what, path in INPUTS.items()]
        outputs = ["--item_size=40", "--trained=model", "--metrics=train.json", "--report=report"]
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
        command = [sys.executable, *many, "-m", "stages.train", *inputs, *outputs]
        variables = os.environ | {"PYTHONPATH": str(ROOT), "BREEDLINE_CACHE": str(folder / "cache")}
        return subprocess.Popen(command, cwd=folder, env=variables, stderr=subprocess.PIPE, text=True)

    return start


INPUTS = {"presized": "presized", "labels": "labels.csv", "weights": "weights"}


def numbers(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "train.json").read_text())
    return found


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(
    pretrained: Pipeline, tmp_path: Path, torchrun: Callable[..., subprocess.Popen[str]]
) -> None:
    settings = {"batch_size": 7, "epochs": 10, "base_lr": 0.02, "lr_ratio": 3.0}  # a process has three images or four
    one = pretrained.train(tmp_path / "one", **settings)
    with torchrun(pretrained, "two", **settings) as run:
        said = run.communicate()[1]
    assert run.returncode == 0, said
    two = tmp_path / "two"
    losses = [
        pd.read_csv(folder / "report/live/plots/metrics/train_loss.tsv", sep="\t")["train_loss"]
        for folder in (one, two)
    ]
    assert (losses[0] - losses[1]).abs().max() < 1e-5
    assert numbers(two)["accuracy"] == numbers(one)["accuracy"]
    assert numbers(two)["valid_loss"] == pytest.approx(numbers(one)["valid_loss"], abs=1e-5)
    weights = [load_file(folder / "model/model.safetensors") for folder in (one, two)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])
    assert len(list((two / "cache/checkpoints").iterdir())) == 1, "until evaluate reads the model"
    assert said.count("epoch 1/10") == 1, "the first process alone reports"


@pytest.mark.slow
def test_the_first_process_alone_tells_a_mistake(
    pretrained: Pipeline, torchrun: Callable[..., subprocess.Popen[str]]
) -> None:
    with torchrun(pretrained, "two", batch_size=1) as run:
        said = run.communicate()[1]
    assert run.returncode
    assert said.count("error: train: 2 processes share batches of 1 images: raise train.batch_size") == 1


@pytest.mark.slow
@pytest.mark.long
def test_if_one_process_is_killed_all_resume_after_the_last_saved_epoch(
    pretrained: Pipeline, tmp_path: Path, torchrun: Callable[..., subprocess.Popen[str]], long: bool
) -> None:
    if not long:
        pytest.skip("on busy cores gloo may not find the processes that torchrun has started again; `make test-long`")
    with torchrun(pretrained, "whole", epochs=6) as run:
        run.communicate()
    said = []
    with torchrun(pretrained, "killed", "--max-restarts=3", epochs=6) as run:
        assert run.stderr
        for line in run.stderr:
            said.append(line)
            if "epoch 3/6" in line:
                time.sleep(0.2)
                psutil.Process(run.pid).children()[1].send_signal(signal.SIGKILL)
    assert run.returncode == 0, "".join(said)
    assert any("train: resuming after epoch" in line for line in said)
    one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def test_a_process_starts_for_each_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(breedline.together.os, "execv", lambda path, command: started.append(command))
    monkeypatch.setattr(sys, "argv", ["train.py", "--trained=data/trained"])
    for gpus in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        one_process_for_each_gpu("stages.train")
    assert not started
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    one_process_for_each_gpu("stages.train")
    (command,) = started
    assert command[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert command[4:] == ["--nproc-per-node=4", "--max-restarts=3", "-m", "stages.train", "--trained=data/trained"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    one_process_for_each_gpu("stages.train")
    assert len(started) == 1, "torchrun's own processes start no more"
