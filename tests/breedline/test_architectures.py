"""The names of architectures: the generated table is that of the pinned timm, and a typo is told without torch."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from breedline.architectures import architectures, pretrained_name
from breedline.params import ParamsError, load_params

ROOT = Path(__file__).parents[2]


def with_arch(arch: str, weights: str = "none") -> Path:
    text = (ROOT / "params.yaml").read_text()
    text = re.sub("arch: .*", f"arch: {arch!r}", text)
    Path("params.yaml").write_text(re.sub("source: .*", f"source: {weights}", text))
    return Path("params.yaml")


def test_the_table_is_what_make_lock_writes() -> None:
    _, line = (ROOT / "Makefile").read_text().split("\tpython -c ", 1)
    command, _ = line.split(" > breedline/architectures.csv\n", 1)
    written = subprocess.run(
        [sys.executable, "-c", *shlex.split(command)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert written == (ROOT / "breedline" / "architectures.csv").read_text()


def test_a_plain_name_stands_for_the_tag_that_timm_takes() -> None:
    assert pretrained_name("resnet34") == "resnet34.a1_in1k"
    assert pretrained_name("resnet34.tv_in1k") == "resnet34.tv_in1k"
    assert pretrained_name("resnet10t") == "resnet10t.c3_in1k"
    assert pretrained_name("vit_base_patch16_gap_224") is None


def test_each_name_has_the_weights_of_a_row_of_its_own() -> None:
    for name in architectures():
        full = pretrained_name(name)
        assert full is None or (full == name if "." in name else pretrained_name(full) == full)


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


@pytest.mark.parametrize("source", ["none", "imagenet"])
@pytest.mark.parametrize("arch", ["resnet34", "convnext_tiny", "convnext_tiny.in12k_ft_in1k", "tf_efficientnet_lite0"])
def test_architectures_of_timm_are_known_plain_and_with_tags(arch: str, source: str) -> None:
    params = load_params(with_arch(arch, source))
    assert (params.train.arch, params.weights.source) == (arch, source)


def test_weights_that_nobody_has_are_told_before_any_stage() -> None:
    arch = "vit_base_patch16_gap_224"
    with pytest.raises(ParamsError, match=f"no imagenet weights of train.arch '{arch}': take another architecture, or"):
        load_params(with_arch(arch, "imagenet"))
    assert load_params(with_arch(arch, "none")).train.arch == arch


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
