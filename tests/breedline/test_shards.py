import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from breedline.errors import BreedlineError
from breedline.formats import FORMATS, sniff
from breedline.shards import COLUMNS, PRESIZED_COLUMNS, Entry, ShardSet, Volume, pack, write_index

FILES = {
    "a.txt": b"hello",
    "pets/empty.jpg": b"",
    "pets/" + "long" * 60 + ".jpg": b"x" * 513,
    "Katzen/Käse-🐱.jpg": b"y" * 512,
    "NA": b"z" * 5000,
    'odd/a "b", c.jpg': b"q" * 1024,
}
Pack = Callable[..., list[Entry]]


@pytest.fixture
def pack_set() -> Pack:
    """A function that packs {name: content} into a whole shard set."""

    def make(folder: Path, files: dict[str, bytes], volume_bytes: int = 2**20) -> list[Entry]:
        folder.mkdir()
        stream = ((name, len(content), io.BytesIO(content)) for name, content in files.items())
        entries = list(pack(stream, folder, "00", volume_bytes))
        write_index(pd.DataFrame(entries, columns=COLUMNS), folder)
        return entries

    return make


def test_every_file_comes_back_by_its_row(tmp_path: Path, pack_set: Pack) -> None:
    pack_set(tmp_path / "set", FILES)
    shards = ShardSet(tmp_path / "set")
    rows = shards.index.to_dict("records")
    assert {row["name"]: shards.read(row["shard"], row["offset"], row["size"]) for row in rows} == FILES
    assert [row["sha256"] for row in rows] == [hashlib.sha256(content).hexdigest() for content in FILES.values()]


def test_offsets_are_those_that_tarfile_finds(tmp_path: Path, pack_set: Pack) -> None:
    entries = pack_set(tmp_path / "set", FILES)
    with tarfile.open(tmp_path / "set" / "00-00000.tar") as tar:
        assert [(m.name, m.offset_data, m.size) for m in tar] == [(e.name, e.offset, e.size) for e in entries]


def test_tar_unpacks_the_volumes(tmp_path: Path, pack_set: Pack) -> None:
    pack_set(tmp_path / "set", FILES, volume_bytes=2048)
    (tmp_path / "unpacked").mkdir()
    volumes = sorted((tmp_path / "set").glob("*.tar"))
    assert len(volumes) > 1
    for volume in volumes:
        subprocess.run(["tar", "xf", volume], cwd=tmp_path / "unpacked", check=True, capture_output=True)
    found = {
        str(path.relative_to(tmp_path / "unpacked")): path.read_bytes()
        for path in (tmp_path / "unpacked").rglob("*")
        if path.is_file()
    }
    assert found == FILES


def test_equal_files_give_equal_bytes(tmp_path: Path, pack_set: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_set(tmp_path / "one", FILES)
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setattr("os.getuid", lambda: 4711)
    pack_set(tmp_path / "two", FILES)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["00-00000.tar", "index.csv"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_volumes_are_bounded_and_a_larger_file_has_one_to_itself(tmp_path: Path, pack_set: Pack) -> None:
    bound = 2**17
    files = {f"{number}.bin": bytes(30_000) for number in range(12)} | {"large": bytes(300_000)} | {"last": b"x"}
    entries = pack_set(tmp_path / "set", files, volume_bytes=bound)
    volumes = pd.DataFrame(entries).groupby("shard")["name"].agg(list)
    assert list(volumes.index) == [f"00-{number:05d}.tar" for number in range(len(volumes))]
    assert [name for names in volumes for name in names] == list(files)
    assert ["large"] in list(volumes)
    for shard, names in volumes.items():
        ending = tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE
        assert (tmp_path / "set" / str(shard)).stat().st_size <= bound + ending or names == ["large"]


def test_content_is_streamed_never_held_whole(tmp_path: Path) -> None:
    class Zeros:
        largest = 0

        def read(self, size: int) -> bytes:
            self.largest = max(self.largest, size)
            return bytes(size)

    zeros = Zeros()
    with Volume(tmp_path / "volume.tar") as volume:
        volume.add("large", zeros, 50 * 2**20)  # type: ignore[arg-type]
    assert zeros.largest <= 2**20


def test_a_volume_that_fails_is_closed_and_the_error_goes_on(tmp_path: Path) -> None:
    class Broken:
        def read(self, size: int) -> bytes:
            raise BreedlineError("the source broke")

    with pytest.raises(BreedlineError, match="the source broke"):  # and an open file would be a warning
        list(pack([("a", 3, io.BytesIO(b"abc")), ("b", 3, Broken())], tmp_path, "00"))  # type: ignore[list-item]


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_is_known_by_its_first_bytes(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, kind)
    assert sniff(buffer.getvalue()[:32]) == kind


@pytest.mark.parametrize(
    "head", [b"", b"\xff", b"hello", b"%!PS-Adobe-3.0", b"P6 1 1 255 abc", b"<svg xmlns='", bytes(32)]
)
def test_anything_else_is_no_image(head: bytes) -> None:
    assert sniff(head) == ""


def test_a_format_is_recorded_by_content_not_by_name(tmp_path: Path, pack_set: Pack) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "GIF")
    entries = pack_set(tmp_path / "set", {"a.jpg": buffer.getvalue(), "b.jpg": b"a web page"})
    assert [entry.format for entry in entries] == ["GIF", ""]


def test_a_folder_without_an_index_is_no_set(tmp_path: Path, pack_set: Pack) -> None:
    pack_set(tmp_path / "set", FILES)
    (tmp_path / "set" / "index.csv").unlink()
    with pytest.raises(BreedlineError, match=r"^.*set holds no whole shard set: run `dvc repro`, .*$"):
        ShardSet(tmp_path / "set")


@pytest.mark.parametrize("left", [None, 0, 5000])
def test_a_set_with_a_missing_or_short_volume_does_not_open(tmp_path: Path, pack_set: Pack, left: int | None) -> None:
    entries = pack_set(tmp_path / "set", FILES, volume_bytes=2048)
    volume = tmp_path / "set" / entries[-2].shard
    content = volume.read_bytes()
    volume.unlink()
    if left is not None:
        volume.write_bytes(content[:left])
    damage = "is missing: `dvc checkout` restores it" if left is None else "is cut short, or .* restores both"
    with pytest.raises(BreedlineError, match=rf"^.*{volume.name} {damage}$"):
        ShardSet(tmp_path / "set")


@pytest.mark.parametrize(
    "shard",
    [
        "../outside/00-00000.tar",
        "ABSOLUTE",
        "sub/00-00000.tar",
        "./00-00000.tar",
        "index.csv",
        "",
        ".",
        "00-00000.tar\n",
        "00-0000\u0660.tar",  # a digit to some, none of ours
        "9" * 300 + "-00000.tar",
    ],
)
def test_only_volumes_of_our_own_naming_are_read(tmp_path: Path, pack_set: Pack, shard: str) -> None:
    pack_set(tmp_path / "outside", FILES)
    entries = pack_set(tmp_path / "set", FILES)
    (tmp_path / "set" / "sub").mkdir()
    shutil.copy(tmp_path / "set" / "00-00000.tar", tmp_path / "set" / "sub" / "00-00000.tar")
    shard = str(tmp_path / "outside" / "00-00000.tar") if shard == "ABSOLUTE" else shard
    write_index(pd.DataFrame([*entries[:-1], entries[-1]._replace(shard=shard)], columns=COLUMNS), tmp_path / "set")
    with pytest.raises(BreedlineError, match=r"index\.csv is damaged: .* is no volume of a shard set; `dvc checkout`"):
        ShardSet(tmp_path / "set")


def test_a_volume_that_is_a_link_is_not_followed(tmp_path: Path, pack_set: Pack) -> None:
    pack_set(tmp_path / "set", FILES)
    (tmp_path / "set" / "00-00000.tar").rename(tmp_path / "secret")
    (tmp_path / "set" / "00-00000.tar").symlink_to(tmp_path / "secret")
    with pytest.raises(BreedlineError, match=r"00-00000\.tar is a link, .*: set DVC's cache\.type to reflink,copy"):
        ShardSet(tmp_path / "set")


LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("offset", -1),
        ("offset", LARGEST),  # with the size it overflows to something below zero
        ("offset", -LARGEST - 1),
        ("size", -1),
        ("size", LARGEST),
        ("size", -LARGEST - 1),
        ("size", 10**5),
    ],
)
def test_an_image_that_lies_outside_of_its_volume_is_damage(
    tmp_path: Path, pack_set: Pack, column: str, value: int
) -> None:
    entries = pack_set(tmp_path / "set", FILES)
    table = pd.DataFrame(entries, columns=COLUMNS)
    table.loc[2, column] = value
    write_index(table, tmp_path / "set")
    with pytest.raises(
        BreedlineError, match=r"^.*00-00000\.tar is cut short, or .*index\.csv is damaged: `dvc checkout`"
    ):
        ShardSet(tmp_path / "set")


@pytest.mark.parametrize("value", [0, -1, 65_536, 10**12])
@pytest.mark.parametrize("side", ["height", "width"])
def test_an_image_larger_than_a_jpeg_can_be_is_damage(tmp_path: Path, pack_set: Pack, side: str, value: int) -> None:
    table = pd.DataFrame(pack_set(tmp_path / "set", FILES)).assign(height=1, width=65_535, made="", origin="")
    write_index(table, tmp_path / "set")
    assert ShardSet(tmp_path / "set", PRESIZED_COLUMNS).index["width"].tolist() == [65_535] * len(FILES)
    table.loc[2, side] = value
    write_index(table, tmp_path / "set")
    with pytest.raises(BreedlineError, match=rf"index\.csv is damaged: no JPEG has a {side} of {value} pixels"):
        ShardSet(tmp_path / "set", PRESIZED_COLUMNS)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a/.."])
def test_a_volume_holds_nothing_that_would_unpack_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(BreedlineError, match="leads out of its folder"):
        list(pack([(name, 1, io.BytesIO(b"x"))], tmp_path, "00"))


def test_a_set_of_nothing_opens(tmp_path: Path, pack_set: Pack) -> None:
    pack_set(tmp_path / "set", {})
    assert len(ShardSet(tmp_path / "set").index) == 0
