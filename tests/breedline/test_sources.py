"""Archives and folders of every kind, whole and broken, honest and hostile, as one stream of files."""

import bz2
import contextlib
import errno
import functools
import gzip
import io
import itertools
import lzma
import multiprocessing
import os
import random
import re
import stat
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard
from PIL import Image

from breedline.errors import BreedlineError, NetworkError
from breedline.params import Download, Params, Source
from breedline.shards import pack
from breedline.sources import members

FILES = {f"pets/{name}_{i}.jpg": random.Random(i).randbytes(i * 60) * 5 for i in range(9) for name in ("cat", "Hund")}  # noqa: S311
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
KINDS = [*PACKERS, "zip"]
Make = Callable[..., Path]
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload([__name__])


@pytest.fixture
def params(defaults: Params) -> Download:
    return defaults.download


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that writes an archive, under a name that does not tell its kind."""

    def write(content: bytes) -> Path:
        path = tmp_path / "archive"
        path.write_bytes(content)
        return path

    return write


def packed(kind: str, files: dict[str, bytes]) -> bytes:
    if kind == "zip":
        return zip_of(*((zipfile.ZipInfo(name), content) for name, content in files.items()))
    return PACKERS[kind](tar_of(*((tarfile.TarInfo(name), content) for name, content in files.items())))


def tar_of(*entries: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for info, content in entries:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(*entries: tuple[zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in entries:
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def forged(size: int, kind: bytes, offset: int) -> bytes:
    """A tar whose header at `offset` says `size`, with a right checksum, as only malice or a bug writes it."""
    block = bytearray(tar_of((tarfile.TarInfo("a"), b"x" * 600), (tarfile.TarInfo("b"), b"")))
    header = memoryview(block)[offset : offset + 512]
    header[124:136] = (size % 256**12).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(block)


def read(path: Path | str, params: Download, **options: Any) -> dict[str, bytes]:
    """Every file of the source."""
    files = members(Source(url=str(path), **options), params)
    return {m.name: b"".join(iter(functools.partial(m.file.read, 16384), b"")) for m in files}


def count(path: Path, params: Download) -> int:
    """How many files the source has."""
    return sum(1 for _ in members(Source(url=str(path)), params))


def peak(does: Callable[..., object], *arguments: object) -> int:
    """The most bytes of Python's that a call holds, in a process of its own, where no thread of another test allocates."""
    with ProcessPoolExecutor(1, FRESH) as process:
        return process.submit(_traced, does, *arguments).result()


def _traced(does: Callable[..., object], *arguments: object) -> int:
    tracemalloc.start()
    does(*arguments)
    return tracemalloc.get_traced_memory()[1]


def refuses(path: Path | str, params: Download, what: str = ".", **options: Any) -> None:
    """The source is refused in one line that names it, what is wrong and a remedy."""
    with pytest.raises(BreedlineError, match=what) as error:
        read(path, params, **options)
    assert str(path) in str(error.value)
    assert re.search(r"fetch it again|pack it again|mend|raise download\.|remove", str(error.value))
    assert "\n" not in str(error.value)


def found(path: Path, params: Download) -> dict[str, bytes] | None:
    """What there is to read, or None if the source is refused."""
    with contextlib.suppress(BreedlineError):
        return read(path, params)
    refuses(path, params, "damaged or incomplete|is no tar")
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_gives_its_files_in_its_order(kind: str, make: Make, params: Download) -> None:
    path = make(packed(kind, FILES))
    assert list(read(path, params).items()) == list(FILES.items())


@pytest.mark.parametrize("kind", PACKERS)
def test_an_archive_may_be_packed_in_parts(kind: str, make: Make, params: Download) -> None:
    whole = packed("tar", FILES)
    path = make(PACKERS[kind](whole[:7000]) + PACKERS[kind](whole[7000:]))
    assert read(path, params) == FILES


def test_an_xz_may_be_padded_between_its_streams(make: Make, params: Download) -> None:
    whole = packed("tar", FILES)
    path = make(lzma.compress(whole[:7000]) + bytes(4) + lzma.compress(whole[7000:]) + bytes(8))
    assert read(path, params) == FILES


def test_an_archive_of_many_files_takes_little_memory(make: Make, params: Download) -> None:
    path = make(packed("tar", {f"{i}.jpg": b"" for i in range(3000)}))
    assert peak(count, path, params) < 500_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_archive_never_passes_for_a_smaller_one(kind: str, make: Make, params: Download) -> None:
    whole = packed(kind, FILES)
    content = len(whole.rstrip(b"\0")) if kind == "tar" else len(whole) - 16  # the rest is padding, or a checksum
    for end in {0, 1, 511, 512, 513, 1024, content, len(whole) - 1, *random.Random(1).sample(range(len(whole)), 60)}:  # noqa: S311
        assert found(make(whole[:end]), params) in ([None, FILES] if end > content else [None]), f"cut at {end}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_archive_never_loses_a_file(kind: str, make: Make, params: Download) -> None:
    chance = random.Random(2)  # noqa: S311
    for _ in range(60):
        broken = bytearray(packed(kind, FILES))
        at = chance.randrange(len(broken) - 600)
        broken[at : at + 3] = chance.randbytes(3)
        assert len(found(make(bytes(broken)), params) or FILES) == len(FILES)


def test_a_hole_in_the_middle_is_no_end_of_archive(make: Make, params: Download) -> None:
    broken = bytearray(packed("tar", FILES))
    at = broken.index(b"pets/Hund_5")
    broken[at : at + 512] = bytes(512)
    refuses(make(bytes(broken)), params, "more data after")


def test_an_archive_without_its_end_mark_is_refused(make: Make, params: Download) -> None:
    whole = packed("tar", FILES).rstrip(b"\0")
    refuses(make(whole + bytes(-len(whole) % 512)), params, "damaged or incomplete")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>", "no tar.*<!DOCTYPE"),
        (b"", "no tar"),
        (gzip.compress(b"name,label\n"), "damaged or incomplete"),
        (gzip.compress(b""), "damaged or incomplete"),
        (b"Rar!\x1a\x07\x01\0", "no tar.*Rar!"),
        (tar_of(), "no tar"),
        (gzip.compress(tar_of()), "no files at all"),
        (zip_of(), "no files at all"),
        (tar_of((tarfile.TarInfo(".."), b"x")), r"a file named '\.\.'"),
        (zip_of((zipfile.ZipInfo("a"), b"x"))[:-6] + b"\xff\xff\0\0\0\0", "damaged or incomplete"),
    ],
    ids=[
        "html",
        "nothing",
        "gz of a table",
        "gz of nothing",
        "rar",
        "empty tar",
        "empty tgz",
        "empty zip",
        "no name",
        "lost",
    ],
)
def test_what_is_no_archive_is_refused(content: bytes, what: str, make: Make, params: Download) -> None:
    refuses(make(content), params, what)


def test_a_locked_zip_is_refused(make: Make, params: Download) -> None:
    content = bytearray(zip_of((zipfile.ZipInfo("a.jpg"), b"x")))
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    refuses(make(bytes(content)), params, "password")


def test_only_files_of_a_tar_count(make: Make, params: Download) -> None:
    entries = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        info = tarfile.TarInfo(f"other{kind!r}")
        info.type, info.linkname = kind, "a.jpg"
        entries.append((info, b""))
    path = make(tar_of((tarfile.TarInfo("a.jpg"), b"one"), *entries, (tarfile.TarInfo("b.jpg"), b"two")))
    assert read(path, params) == {"a.jpg": b"one", "b.jpg": b"two"}


@pytest.mark.parametrize("locked", [0, 1])
def test_a_file_without_a_name_is_refused(params: Download, make: Make, locked: int) -> None:
    content = bytearray(zip_of((zipfile.ZipInfo(""), b"x")))
    content[content.index(b"PK\1\2") + 8] |= locked
    path = make(bytes(content))
    with pytest.raises(BreedlineError, match="has a file named ''"):
        list(members(Source(url=str(path)), params))


def test_only_files_of_a_zip_count(make: Make, params: Download) -> None:
    link, folder, file = zipfile.ZipInfo("link"), zipfile.ZipInfo("folder/"), zipfile.ZipInfo("a.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = make(zip_of((link, b"a.jpg"), (folder, b""), (file, b"one")))
    assert read(path, params) == {"a.jpg": b"one"}


def test_only_files_of_a_folder_count_and_links_to_them(tmp_path: Path, params: Download) -> None:
    folder = tmp_path / "pets"
    (folder / "cats").mkdir(parents=True)
    (folder / "b.jpg").write_bytes(b"two")
    (folder / "cats/a.jpg").write_bytes(b"one")
    (folder / "c.jpg").symlink_to(folder / "cats/a.jpg")
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    (tmp_path / "link").symlink_to(folder)
    for url in (folder, f"file://{folder}", f"{folder}/", tmp_path / "link", "../pets"):
        assert list(read(url, params).items()) == [("b.jpg", b"two"), ("c.jpg", b"one"), ("cats/a.jpg", b"one")]


def test_a_folder_that_may_not_be_entered_is_not_passed_over(
    tmp_path: Path, params: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    (tmp_path / "pets/locked").mkdir(parents=True)
    (tmp_path / "pets/a.jpg").write_bytes(b"x")
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(BreedlineError, match=r"may not be read.*locked.*mend its permissions"):
        read(tmp_path / "pets", params)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("/etc/cat.jpg", "etc/cat.jpg"),
        ("//etc/cat.jpg", "etc/cat.jpg"),
        ("../../cat.jpg", "cat.jpg"),
        ("a/../../cat.jpg", "a/cat.jpg"),
        ("./a//cat.jpg", "a/cat.jpg"),
        ("a\\cat.jpg", "a/cat.jpg"),
        ("kätzchen 猫.jpg", "kätzchen 猫.jpg"),
        (b"k\xe4tzchen.jpg".decode("utf-8", "surrogateescape"), "k\ufffdtzchen.jpg"),
        ("Icon\r", "Icon\ufffd"),
        ("a\nb.jpg", "a\ufffdb.jpg"),
        ("x" * 300 + ".jpg", "x" * 300 + ".jpg"),
        ("y" * 90 + "/" + "x" * 200, "y" * 90 + "/" + "x" * 200),
    ],
)
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_stays_inside_and_is_text(given: str, name: str, kind: int, make: Make, params: Download) -> None:
    assert read(make(tar_of((tarfile.TarInfo(given), b"x"), kind=kind)), params) == {name: b"x"}


def test_files_of_one_name_are_all_there(make: Make, params: Download) -> None:
    path = make(tar_of((tarfile.TarInfo("a"), b"one"), (tarfile.TarInfo("a"), b"two")))
    assert [m.file.read() for m in members(Source(url=str(path)), params)] == [b"one", b"two"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, b"?"]
)
@pytest.mark.parametrize("size", [-512, -1024, -2048, -(2**40), 2**38, 2**62])
def test_a_header_that_lies_about_its_size_ends_the_reading(
    size: int, kind: bytes, make: Make, params: Download
) -> None:
    for offset in (0, 1536):
        refuses(make(forged(size, kind, offset)), params)


@pytest.mark.parametrize(
    "records", [{"size": "-1"}, {"size": "-1024"}, {"GNU.sparse.map": "a,b"}, {"GNU.sparse.realsize": "9" * 14}]
)
def test_an_extended_header_that_lies_is_refused(records: dict[str, str], make: Make, params: Download) -> None:
    info = tarfile.TarInfo("a")
    info.pax_headers = records
    refuses(make(tar_of((info, b""), (tarfile.TarInfo("b"), b""), kind=tarfile.PAX_FORMAT)), params)


@pytest.mark.parametrize("declared", [601, 1000, 20_000])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_that_declares_more_than_it_holds_is_refused(
    method: int, declared: int, make: Make, tmp_path: Path, params: Download
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.jpg", b"x" * 600)
        content = buffer.getvalue()
        archive.filelist[0].file_size = declared
    forged_one = bytearray(buffer.getvalue())
    forged_one[22:26] = declared.to_bytes(4, "little")
    assert content[:22] == forged_one[:22]
    path = make(bytes(forged_one))
    refuses(path, params, "ends too soon")
    with pytest.raises(BreedlineError, match="ends too soon"):  # as the download stage reads it
        list(pack(members(Source(url=str(path)), params), tmp_path, "00"))


def extended(kind: bytes, *sizes: int) -> Iterator[bytes]:
    """A tar with a file after extended headers of this type and these sizes, of which PAX has one long value each."""
    for size in sizes:
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = kind, size
        yield info.tobuf(tarfile.GNU_FORMAT)
        start = f"{size} comment={os.urandom(4).hex()}".encode() if kind in b"xgX" else b""
        yield start
        yield from itertools.repeat(b"a" * 2**16, size // 2**16)
        yield b"a" * (size % 2**16 - len(start) - 1) + b"\n" + bytes(-size % 512)
    yield tar_of((tarfile.TarInfo("a.jpg"), b"x"))


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K"])
@pytest.mark.parametrize("sizes", [(2**25,), (600_000, 600_000), (90_000,) * 100], ids=["one", "two", "many"])
def test_extended_headers_of_over_a_megabyte_are_refused(
    sizes: tuple[int, ...], kind: bytes, make: Make, params: Download
) -> None:
    path = make(b"".join(extended(kind, *sizes)))
    assert peak(refuses, path, params, "extended headers of over 1 MB") < 8_000_000


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K"])
def test_extended_headers_of_less_are_read(kind: bytes, make: Make, params: Download) -> None:
    files = read(make(b"".join(extended(kind, 400_000, 90_000))), params)
    assert list(files.values()) == [b"x"]


def test_global_headers_do_not_pile_up(make: Make, params: Download) -> None:
    one = b"".join(extended(b"g", 300_000)).rstrip(b"\0")
    path = make(b"".join([one + bytes(-len(one) % 512)] * 50) + bytes(1024))
    assert count(path, params) == 50
    assert peak(count, path, params) < 4_000_000


def test_an_xz_that_wants_a_gigabyte_of_dictionary_is_refused(make: Make, params: Download) -> None:
    content = bytearray(packed("xz", FILES))
    end = 12 + 4 * (content[12] + 1)  # of the block's header, whose last four bytes are its checksum
    at = content.index(b"\x21\x01", 12, end) + 2  # LZMA2, with one byte of properties: the dictionary's size
    content[at] = 36  # 1 GiB
    content[end - 4 : end] = zlib.crc32(content[12 : end - 4]).to_bytes(4, "little")
    refuses(make(bytes(content)), params, "Memory usage limit")


@pytest.mark.parametrize("version", [b"old", b"1.0"])
def test_the_map_of_a_sparse_file_is_not_read(version: bytes, make: Make, params: Download) -> None:
    if version == b"old":
        header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
        header[156:157], header[482] = tarfile.GNUTYPE_SPARSE, 1
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content = bytes(header) + (b"00000000001\0" * 42 + b"\1" + bytes(7)) * 20_000 + bytes(1024)
    else:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
        content = tar_of((info, b"5000000\n" + b"1\n" * 5_000_000), kind=tarfile.PAX_FORMAT)
    path = make(content)
    tracemalloc.start()
    refuses(path, params, "a sparse file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize(
    "bomb",
    [
        gzip.compress(tar_of((tarfile.TarInfo("a"), bytes(2**25)))),
        gzip.compress(tar_of((tarfile.TarInfo("a"), b"x")) + bytes(2**25)),
        zip_of((zipfile.ZipInfo("a"), bytes(2**25))),
        zip_of(*((zipfile.ZipInfo(f"{i}"), bytes(2**23)) for i in range(4))),
    ],
    ids=["tgz", "tgz after its end", "zip of one", "zip of several"],
)
def test_a_bomb_is_refused(bomb: bytes, make: Make, params: Download) -> None:
    refuses(make(bomb), params, "100 times its size: raise download.max_ratio")


@pytest.mark.parametrize(
    ("cap", "what"),
    [({"max_files": 17}, "17 files: raise download.max_files"), ({"max_total_gb": 2e-5}, "2e-05 GB.*max_total_gb")],
)
@pytest.mark.parametrize("kind", [*KINDS, "folder"])
def test_a_cap_is_named(
    cap: dict[str, Any], what: str, kind: str, make: Make, tmp_path: Path, params: Download
) -> None:
    if kind == "folder":
        path = tmp_path / "folder"
        for name, content in FILES.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    else:
        path = make(packed(kind, FILES))
    refuses(path, params.model_copy(update=cap), what)
    assert len(read(path, params.model_copy(update={"max_files": 18, "max_total_gb": 1e-4}))) == 18


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_what_a_mac_adds_is_left_out(kind: str, make: Make, params: Download) -> None:
    mac = {"__MACOSX/pets/._a.jpg": b"", ".DS_Store": b"", "pets/._a.jpg": b"", ".git/config": b"", "pets/a.jpg": b"x"}
    assert read(make(packed(kind, mac)), params) == {"pets/a.jpg": b"x"}
    assert len(read(make(packed(kind, mac)), params, exclude=[])) == 5


def test_globs_choose(make: Make, params: Download) -> None:
    path = make(packed("tar", FILES))
    assert len(read(path, params, include=["pets/cat_*", "*_3.jpg"], exclude=["*_1.jpg"])) == 9
    refuses(path, params, r"its first file is pets/cat_0\.jpg", include=["*.png"])


@pytest.mark.parametrize("name", ["cat.jpg", "labels.csv", "test.txt"])
def test_a_single_picture_or_table_is_a_source(name: str, tmp_path: Path, params: Download) -> None:
    path = tmp_path / name
    if name == "cat.jpg":
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_text("PK,label\n")
    assert read(path, params) == {name: path.read_bytes()}


def test_a_single_file_is_called_without_its_query(
    tmp_path: Path, params: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cached").write_text("name,label\n")
    monkeypatch.setattr("breedline.sources.fetch", lambda *_, **__: tmp_path / "cached")
    assert read("https://host/labels.csv?raw=1", params).keys() == {"labels.csv"}


def test_digits_are_embedded(params: Download) -> None:
    files = read("digits", params)
    assert len(files) == 1797
    image = Image.open(io.BytesIO(files["0_0000.png"]))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))
    assert {0, 80, 239} < {grey for _, grey in image.getcolors()} < {round(level * 255 / 16) for level in range(17)}


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1:1/pets.tgz",
        "data://x",
        "github://main/pets",
        "git://x",
        "reference://x",
        "zip://a.jpg",
        "zip://a.jpg::https://127.0.0.1:1/pets.zip",
        "tar://a.jpg::pets.tar",
        "simplecache::https://127.0.0.1:1/pets.tgz",
        "memory://pets::https://127.0.0.1:1/pets.tgz",
        "generic://x",
        "HTTP://127.0.0.1:1/pets.tgz",
    ],
)
def test_a_url_of_another_kind_is_refused_by_its_name(url: str, params: Download) -> None:
    with pytest.raises(BreedlineError, match=r"is not a url that can be read: mend the url in params\.yaml") as error:
        read(url, params)
    assert error.value.exit_code == 1
    assert str(error.value).startswith(url)


def test_a_folder_may_have_a_name_like_a_chain_of_urls(tmp_path: Path, params: Download) -> None:
    (tmp_path / "zip::pets").mkdir()
    (tmp_path / "zip::pets/a.jpg").write_bytes(b"x")
    assert read(tmp_path / "zip::pets", params) == {"a.jpg": b"x"}


@pytest.mark.parametrize(
    "url", ["nowhere", "~/nowhere", "file:///nowhere", "memory://nowhere", "data:,nowhere", "http::/nowhere"]
)
def test_a_source_that_is_not_there_is_named(url: str, params: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home")
    with pytest.raises(BreedlineError, match=r"there is no .*nowhere.*mend the url in params\.yaml"):
        read(url, params)


def test_a_home_is_found(tmp_path: Path, params: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets/a.jpg").write_bytes(b"x")
    (tmp_path / "pets.tar").write_bytes(packed("tar", {"a.jpg": b"x"}))
    assert read("~/pets", params) == read("~/pets.tar", params) == {"a.jpg": b"x"}


def test_a_folder_has_no_hash(tmp_path: Path, params: Download) -> None:
    refuses(tmp_path, params, "has no sha256: remove", sha256="0" * 64)


def test_memory_holds_archives_and_folders(params: Download) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/sources/pets.tgz", packed("gz", FILES))
    memory.pipe({f"/sources/folder/{name}": content for name, content in FILES.items()})
    assert read("memory://sources/pets.tgz", params) == FILES
    assert list(read("memory://sources/folder", params).items()) == sorted(FILES.items())


@pytest.mark.parametrize("size", [51, 99, 1000, -1])
def test_a_file_that_shrinks_while_it_is_read_is_refused(size: int, params: Download) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/sources/shrinking/a.jpg": b"x" * 99, "/sources/shrinking/b.jpg": b"y" * 99})
    files = members(Source(url="memory://sources/shrinking"), params)
    next(files)
    memory.pipe("/sources/shrinking/b.jpg", b"y" * 50)
    with pytest.raises(BreedlineError, match="ends too soon"):
        next(files).file.read(size)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError("403"), "may not be read.*mend its permissions"),
        (FileNotFoundError("gone"), "there is no .*mend the url"),
        (TimeoutError("late"), "late: look at the connection"),
        (OSError(errno.EIO, "broken"), "broken: look at the connection"),
    ],
)
@pytest.mark.parametrize(
    "method", ["MemoryFileSystem.isdir", "MemoryFileSystem.ls", "MemoryFileSystem.open", "MemoryFile.read"]
)
def test_a_storage_that_refuses_is_one_line(
    method: str, error: OSError, says: str, params: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    fsspec.filesystem("memory").pipe("/sources/refused/a.jpg", b"x")
    monkeypatch.setattr(f"fsspec.implementations.memory.{method}", refuse, raising=False)
    with pytest.raises(BreedlineError, match=says):
        read("memory://sources/refused", params)


def test_a_missing_package_is_named(params: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(BreedlineError, match=r"gs://bucket/pets\.tgz needs another package.*gcsfs.*install it"):
        read("gs://bucket/pets.tgz", params)


@pytest.mark.slow
def test_s3_holds_archives_and_folders_and_its_refusals_are_one_line(
    params: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("of-sources")
        bucket.pipe(
            {"of-sources/pets.tgz": packed("gz", FILES), **{f"of-sources/folder/{n}": c for n, c in FILES.items()}}
        )
        for marker in ("folder/", "folder/pets/"):
            bucket.call_s3("put_object", Bucket="of-sources", Key=marker, Body=b"")
        assert read("s3://of-sources/pets.tgz", params) == FILES
        assert read("s3://of-sources/folder", params) == FILES
        refuses("s3://of-sources/nowhere", params, "there is no")
    finally:
        server.stop()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(NetworkError, match=r"s3://of-sources/folder: Unable to locate credentials.*your credentials"):
        read("s3://of-sources/folder", params)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_extracted_to_disk(kind: str, make: Make, tmp_path: Path, params: Download) -> None:
    path = make(packed(kind, FILES | {"../../escaped": b"x"}))
    before = sorted(tmp_path.parent.rglob("*"))
    read(path, params)
    assert sorted(tmp_path.parent.rglob("*")) == before
