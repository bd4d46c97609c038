"""The bundle: what is written can be read, and nothing that differs from it by a bit."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from breedline.bundle import FILES, MAX_SPEC, SPEC, BundleSpec, read_bundle, seal
from breedline.errors import BreedlineError
from breedline.preprocessing import Preprocessing

FOLDER = Path("models")
FLIPS = 200


def fields(**others: Any) -> dict[str, Any]:
    how = Preprocessing(shorter_side=40, quality=92, input_size=32, mean=(0.5,) * 3, std=(0.2,) * 3)
    return {
        "arch": "test_resnet",
        "classes": ["beagle", "Bärenhund"],
        "preprocessing": how,
        "loss": "bce",
        "temperature": 1.25,
        "none_below": 0.5,
        "data": {"presized": "1" * 64},
        "code": "0" * 64,
        "versions": {"timm": "1.0"},
        **others,
    }


@pytest.fixture
def sealed() -> BundleSpec:
    FOLDER.mkdir()
    for number, name in enumerate(FILES):
        (FOLDER / name).write_bytes(np.random.default_rng(number).bytes(3000))
    return seal(FOLDER, **fields())


def refused(why: str) -> None:
    with pytest.raises(
        BreedlineError, match=f"models is no usable bundle .*{why}.*: `dvc checkout models` restores it"
    ):
        read_bundle(FOLDER)


def test_what_is_sealed_is_read(sealed: BundleSpec) -> None:
    assert read_bundle(FOLDER) == sealed
    assert sealed.classes == ["beagle", "Bärenhund"]
    before = (FOLDER / SPEC).read_bytes()
    (FOLDER / SPEC).unlink()
    assert seal(FOLDER, **fields()) == sealed
    assert (FOLDER / SPEC).read_bytes() == before


@pytest.mark.parametrize("name", [SPEC, *FILES])
def test_no_bit_can_be_flipped_unseen(sealed: BundleSpec, name: str) -> None:
    path, draw = FOLDER / name, np.random.default_rng(list(name.encode()))
    content = path.read_bytes()
    for bit in draw.choice(8 * len(content), FLIPS, replace=False):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises(BreedlineError, match="models is no usable bundle"):
            read_bundle(FOLDER)
    path.write_bytes(content)
    assert read_bundle(FOLDER) == sealed


@pytest.mark.parametrize("name", [SPEC, *FILES])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["missing", "empty"])
def test_a_file_that_is_missing_or_empty_is_told(
    sealed: BundleSpec, name: str, damage: Callable[[Path], object]
) -> None:
    damage(FOLDER / name)
    refused("" if name == SPEC else name)


def test_a_file_that_does_not_belong_there_is_told(sealed: BundleSpec) -> None:
    (FOLDER / "\x1b[31mmodel.pkl").touch()
    refused(r"\\x1b\[31mmodel.pkl' is missing, or does not belong there")


def test_a_pipe_is_not_waited_for(sealed: BundleSpec) -> None:
    for name in (FILES[0], SPEC):
        (FOLDER / name).unlink()
        os.mkfifo(FOLDER / name)
        refused(name)


def test_no_folder_and_no_bundle_are_told() -> None:
    refused("no file breedline.json")
    FOLDER.mkdir()
    refused("no file breedline.json")


def test_a_spec_that_is_too_long_is_not_read(sealed: BundleSpec) -> None:
    with (FOLDER / SPEC).open("ab") as file:
        file.truncate(MAX_SPEC + 1)
    refused("breedline.json is too long")


@pytest.mark.parametrize(
    "values",
    [
        {"preprocessing": {"input_size": 10**9}},
        {"preprocessing": {"shorter_side": 10**9}},
        {"preprocessing": {"mean": [float("nan"), 0.5, 0.5]}},
        {"preprocessing": {"std": [0, 1, 1]}},
        {"classes": [str(number) for number in range(10**6)]},
        {"classes": []},
        {"classes": ["a" * 2000]},
        {"temperature": float("inf")},
        {"none_below": 2},
        {"loss": "hinge"},
        {"arch": "../../somewhere"},
        {"format": "breedline-2"},
        {"files": {"/etc/hostname": "0" * 64}},
        {"more": 1},
    ],
    ids=lambda values: "-".join(values),
)
def test_a_hostile_spec_is_refused_although_its_hashes_are_right(sealed: BundleSpec, values: dict[str, Any]) -> None:
    written = json.loads((FOLDER / SPEC).read_text())
    for name, value in values.items():
        written[name] = written[name] | value if name == "preprocessing" else value
    opened = json.dumps(written | {"sha256": ""}, indent=2, ensure_ascii=False) + "\n"
    written["sha256"] = hashlib.sha256(opened.encode()).hexdigest()
    (FOLDER / SPEC).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    with pytest.raises(BreedlineError) as told:
        read_bundle(FOLDER)
    assert "was altered" not in str(told.value) or "files" in values


def test_a_class_without_a_text_cannot_be_sealed(sealed: BundleSpec) -> None:
    for classes in ([""], ["\ud800"]):
        with pytest.raises(ValueError, match="classes"):
            seal(FOLDER, **fields(classes=classes))


def test_a_copy_elsewhere_is_the_same_bundle(sealed: BundleSpec) -> None:
    shutil.copytree(FOLDER, "elsewhere")
    assert read_bundle(Path("elsewhere")) == sealed
