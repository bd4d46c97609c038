"""The project's own files as a DVC repository of their own, on a few tiny pictures, and commands that run in it."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
TRACKED = ["dvc.yaml", "data/corrections.csv", ".dvc/config", ".dvcignore"]
TRACKED += [".gitignore", ".dvc/.gitignore", "data/.gitignore", "reports/.gitignore"]
STAGES: list[str] = list(YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"])
COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 40, 60)}
PICTURES_PER_CLASS = 12


def _picture(colour: tuple[int, int, int], seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(-30, 30, (40, 40, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype("uint8")).save(buffer, "JPEG")
    return buffer.getvalue()


def pictures() -> bytes:
    """A tar of coloured pictures, each named after its colour."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for colour, rgb in COLOURS.items():
            for number in range(PICTURES_PER_CLASS):
                content = _picture(rgb, number)
                info = tarfile.TarInfo(f"{colour}_{number}.jpg")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Project:
    """A copy of the project in a folder, with a machine's cache of its own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        home = folder.parent / f"{folder.name}-home"
        home.mkdir(exist_ok=True)
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "BREEDLINE_CACHE": str(home / "cache"),
            "DVC_SITE_CACHE_DIR": str(home / "dvc"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            **{f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
            **environment,
        }

    def run(self, *command: str, fails: bool = False) -> str:
        """What the command says."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=240
        )
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def repro(self, *arguments: str, fails: bool = False) -> tuple[list[str], str]:
        """The stages that `dvc repro` ran, and what it said."""
        said = self.run("dvc", "repro", *arguments, fails=fails)
        return re.findall(r"^Running stage '(\w+)'", said, re.M), said

    def json(self, *command: str) -> Any:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True, timeout=240, check=True
        )
        return json.loads(done.stdout)

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "a test")

    def set(self, section: str, **settings: Any) -> None:
        """Change settings in params.yaml."""
        path = self.folder / "params.yaml"
        params = YAML(typ="safe").load(path)
        params[section].update(settings)
        YAML(typ="safe").dump(params, path)

    def lock(self) -> bytes:
        return (self.folder / "dvc.lock").read_bytes()

    def outs(self, stage: str) -> Any:
        """The hashes of the stage's outputs, as recorded."""
        return YAML(typ="safe").load(self.lock())["stages"][stage]["outs"]

    def copy(self, folder: Path, **environment: str) -> "Project":
        shutil.copytree(self.folder, folder)
        return Project(folder, **environment)


def hashes(path: Path) -> dict[str, str]:
    """The hash of each file at or below `path`."""
    files = path.rglob("*") if path.is_dir() else [path]
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def fresh_project(folder: Path) -> Project:
    """The project in git in `folder`, of which nothing has run yet; it learns three colours."""
    for package in ("stages", "breedline"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in TRACKED:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    source = folder.with_name("pictures.tar")
    source.write_bytes(pictures())
    shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
    project = Project(folder)
    project.set("download", sources=[str(source)])
    project.set(
        "label", pattern=r"(?P<label>[a-z]+)_\d+\.jpg", classes=3, min_per_class=4, valid_pct=0.25, test_pct=0.25
    )
    project.set("weights", source="none")
    project.set("train", arch="resnet18", batch_size=8, freeze_epochs=0, epochs=1)
    project.run("git", "init", "--quiet")
    project.commit()
    return project
