"""The download stage: any source becomes the same shard set, byte for byte, or nothing at all."""

import bz2
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard
from PIL import Image
from ruamel.yaml import YAML

from breedline.errors import BreedlineError
from breedline.params import Download, Params, Source
from breedline.shards import INDEX, ShardSet
from stages.download import download

ROOT = Path(__file__).parents[2]
RAW = Path("raw")
Run = Callable[..., dict[str, bytes]]


def image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, kind)
    return buffer.getvalue()


FILES = {"a/cat.jpg": image("JPEG"), "b/dog.jpg": image("PNG"), "c/cow": image("GIF"), "labels.csv": b"name,label\n"}


@pytest.fixture
def run(defaults: Params) -> Run:
    """A function that runs the stage on these sources and gives what is in the raw folder: {name: bytes}."""

    def run(*urls: Path | str, **settings: Any) -> dict[str, bytes]:
        sources = [Source(url=str(url)) for url in urls]
        params: Download = defaults.download.model_copy(update={"sources": sources, **settings})
        download(params, raw=RAW)
        return raw()

    return run


def raw() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(RAW.iterdir())}


def packed_as(kind: str, path: Path) -> Path:
    """FILES as a folder, a zip or a tar, compressed by `kind`."""
    if kind == "folder":
        for name, content in FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in FILES.items():
                archive.writestr(name, content)
    else:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, content in FILES.items():
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.uname = len(content), 1e9, "somebody"
                tar.addfile(info, io.BytesIO(content))
        packer = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}.get(
            kind, bytes
        )
        path.write_bytes(packer(buffer.getvalue()))
    return path


def test_digits_are_downloaded_twice_alike(run: Run) -> None:
    first = run("digits")
    assert len(ShardSet(RAW).index) == 1797
    assert list(first) == ["00-00000.tar", INDEX]
    assert run("digits") == first


@pytest.mark.parametrize("kind", ["folder", "zip", "gz", "bz2", "xz", "zst"])
def test_however_packed_the_bytes_are_the_same(kind: str, run: Run, tmp_path: Path) -> None:
    assert run(packed_as(kind, tmp_path / kind)) == run(packed_as("tar", tmp_path / "tar"))


def test_the_index_says_what_the_volumes_hold(run: Run, make_tar: Callable[..., Path]) -> None:
    odd = {
        name: name.encode("utf-8", "surrogateescape")
        for name in ("NA", "ü, ö.jpg", 'a"b', "x" * 300, "Icon\r", "\udce4.jpg")
    }
    run(make_tar(FILES | odd, "pets.tgz", "w:gz"), "digits")
    index, held = ShardSet(RAW).index, []
    for shard in sorted(RAW.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for info in tar:
                content = tar.extractfile(info).read()  # type: ignore[union-attr]
                held.append((info.name, shard.name, info.offset_data, info.size, hashlib.sha256(content).hexdigest()))
    assert [tuple(row) for row in index[["name", "shard", "offset", "size", "sha256"]].itertuples(index=False)] == held
    assert [*FILES, "NA", "ü, ö.jpg", 'a"b', "x" * 300, "Icon\ufffd", "\ufffd.jpg"] == index["name"].tolist()[:10]


def test_a_format_is_read_from_the_content(run: Run, tmp_path: Path) -> None:
    run(packed_as("folder", tmp_path / "pets"))
    index = ShardSet(RAW).index
    assert dict(zip(index["name"], index["format"], strict=True)) == {
        "a/cat.jpg": "JPEG",
        "b/dog.jpg": "PNG",
        "c/cow": "GIF",
        "labels.csv": "",
    }


def test_a_further_source_leaves_the_earlier_volumes_alone(run: Run, tmp_path: Path) -> None:
    first = run("digits")
    both = run("digits", packed_as("gz", tmp_path / "pets.tgz"))
    assert list(both) == ["00-00000.tar", "01-00000.tar", INDEX]
    assert both["00-00000.tar"] == first["00-00000.tar"]
    assert both[INDEX].startswith(first[INDEX])


def test_a_failing_run_leaves_the_earlier_one(run: Run, tmp_path: Path) -> None:
    first = run("digits")
    archive = packed_as("zip", tmp_path / "pets.zip")
    broken = bytearray(archive.read_bytes())
    broken[-300] ^= 255
    archive.write_bytes(broken)
    with pytest.raises(BreedlineError, match=r"pets\.zip"):
        run("digits", archive)
    assert raw() == first
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["raw"]


def test_nothing_but_the_outputs_appears(run: Run, tmp_path: Path) -> None:
    run(packed_as("gz", tmp_path / "pets.tgz"), "digits")
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "pets.tgz",
        *(f"work/raw/{name}" for name in ("00-00000.tar", "01-00000.tar", INDEX)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("found", [True, False])
def test_a_secret_of_a_url_is_written_nowhere(found: bool, tmp_path: Path) -> None:
    """The stage as dvc runs it, in a checkout of which only params.yaml holds the secret."""
    files = tmp_path / "served"
    files.mkdir()
    if found:
        packed_as("gz", files / "pets.tgz")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        url = f"http://user:s3cret@127.0.0.1:{server.server_port}/pets.tgz?token=s3cret"
        settings = YAML(typ="safe").load(ROOT / "params.yaml")
        settings["download"]["sources"] = [{"url": url}]
        Path("params.yaml").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "stages.download", "--raw", "raw"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(command, env=environment, text=True, capture_output=True)
        server.shutdown()
    assert done.returncode == (0 if found else 1)
    assert f"http://127.0.0.1:{server.server_port}/pets.tgz?…" in done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "params.yaml"]
    assert written
    assert not any("s3cret" in str(path) or b"s3cret" in path.read_bytes() for path in written)


def test_the_light_stages_start_without_torch() -> None:
    code = "import stages.download, stages.weights, stages.duplicates, stages.label, stages.presize, sys; print({'torch', 'torchvision', 'fastai'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"
