"""Archives built step by step of parts that lie, which the stage download repacks or refuses: within limits, as test_bad_input.py tells.

A tar is made of members with odd names, types and links, of headers whose fields say what is not so, of extended headers,
and of damage; a zip of entries that are changed in the same ways. Either is then packed, once or more often, by what
packs. A stream of zeros, which any packer makes small, is appended to some: bombs by ratio.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator

import pytest
import zstandard
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from tests.campaigns.damage import ABSOLUTE, EDITS, ODDITIES, Edit, damaged
from tests.campaigns.test_bad_input import Campaign, is_well
from tests.conftest import picture

pytestmark = pytest.mark.long
TYPES = st.sampled_from([tarfile.REGTYPE] * 12 + [bytes([kind]) for kind in b"\x00123456789ABKLMSVXgxZ~"])
NAMES = st.one_of(
    st.sampled_from(["a.jpg", "b/c.png", "labels.csv", "../canary", ABSOLUTE, "a\0b", "a\nb.jpg", "..", ".", "/", ""]),
    st.sampled_from(
        ["x" * 10_000, "a/" * 3_000, "\udcff.jpg", "\x1b[31m.jpg", "\u202egpj.a", "-rf", "C:\\x", "a/../../canary"]
    ),
    st.text(max_size=8),
)
CONTENTS = st.sampled_from([b"", b"name,label\n", picture(9), picture(200, kind="PNG"), b"\0" * 5000, b"x" * 513])
FIELDS = st.sampled_from(
    [(0, 100), (100, 8), (108, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8), (345, 155)]
)
RARELY = st.sampled_from([False, False, False, True])
"""So that some archives are left in which only a name or a type is odd."""
NUMBERS = st.sampled_from(
    [
        b"",
        b"0",
        b"77777777777",
        b"-1",
        b"8",
        b"\x80" + b"\0" * 10 + b"\x05",
        b"\x80\0\0\0\x7f" + b"\xff" * 7,
        b"\xff" * 12,
        b"1 1",
        b"10000000",
    ]
)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, 1, mtime=0),
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "zst": zstandard.ZstdCompressor(level=1).compress,
}
ZEROS = {name: pack(bytes(40_000_000)) for name, pack in PACKERS.items()}
HUGE_DICTIONARY = lzma.compress(b"x", lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**30}])


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    running = Campaign("archive", tmp_path_factory.mktemp("archive") / "sandbox")
    yield running
    running.close()


def checked(header: bytes) -> bytes:
    """A header with the checksum that it needs."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


class Archives(RuleBasedStateMachine):
    """One archive, from an empty one on; what it is at the end is read."""

    campaign: Campaign

    def __init__(self) -> None:
        super().__init__()
        self.data, self.headers, self.last, self.packed = b"", [0], 0, False

    @precondition(lambda self: not self.packed)
    @rule(name=NAMES, kind=TYPES, content=CONTENTS, link=NAMES, style=st.sampled_from([0, 1, 2]))
    def add(self, name: str, kind: bytes, content: bytes, link: str, style: int) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = kind, len(content), link
        if kind == b"x":
            content = b"%d path=%s\n" % (len(name) + 9, name.encode("utf-8", "surrogateescape")) + content
            info.size = len(content)
        self.last = len(self.data)
        with io.BytesIO() as buffer:
            try:
                head = info.tobuf(style, "utf-8", "surrogateescape")
            except (ValueError, UnicodeError):
                return
            buffer.write(head + content + bytes(-len(content) % 512))
            self.data += buffer.getvalue()
        self.headers.append(len(self.data))

    @precondition(lambda self: not self.packed and self.data)
    @rule(field=FIELDS, value=NUMBERS, right=st.booleans(), really=RARELY)
    def lie(self, field: tuple[int, int], value: bytes, right: bool, really: bool) -> None:
        """Let a field of the last header say something else, with a checksum that is right or not."""
        if not really:
            return
        header = bytearray(self.data[self.last : self.last + 512])
        start, size = field
        header[start : start + size] = value[:size].ljust(size, b"\0")
        self.data = (
            self.data[: self.last] + (checked(bytes(header)) if right else bytes(header)) + self.data[self.last + 512 :]
        )

    @precondition(lambda self: not self.packed)
    @rule(key=st.sampled_from([b"path", b"size", b"linkpath", b"GNU.sparse.map", b"GNU.sparse.major", b"hdrcharset", b"mtime", b""]),
          value=ODDITIES, length=st.sampled_from([None, 0, 3, 10**9]), every=st.booleans(), really=RARELY)  # fmt: skip
    def extend(self, key: bytes, value: bytes, length: int | None, every: bool, really: bool) -> None:
        """Add an extended header, whose record may say that it has another length."""
        if not really:
            return
        record = b" %s=%s\n" % (key, value)
        size = len(record) + len(str(len(record) + 4))
        content = b"%d" % (size if length is None else length) + record
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XGLTYPE if every else tarfile.XHDTYPE, len(content)
        self.data += info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)

    @precondition(lambda self: not self.packed)
    @rule(blocks=st.sampled_from([1, 2, 20]))
    def end(self, blocks: int) -> None:
        self.data += bytes(512 * blocks)

    @precondition(lambda self: not self.packed)
    @rule(entries=st.lists(st.tuples(NAMES, CONTENTS, st.sampled_from([0, 0o120777 << 16, 0o020666 << 16]), st.sampled_from([0, 8, 12, 14])),
                           min_size=1, max_size=3),
          field=st.sampled_from([None] * 5 + [6, 8, 10, 16, 20, 24, 28, 42]), value=st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x09\0\0\0"]), really=RARELY)  # fmt: skip
    def zip(self, entries: list[tuple[str, bytes, int, int]], field: int | None, value: bytes, really: bool) -> None:
        """Make a zip, one field of whose directory may say something else."""
        if not really:
            return
        buffer = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
            warnings.simplefilter("ignore")  # of a name that is there twice
            for name, content, attributes, method in entries:
                try:
                    info = zipfile.ZipInfo(name)
                    info.external_attr, info.compress_type = attributes, method
                    archive.writestr(info, content)
                except (ValueError, UnicodeError):
                    return
        self.data = buffer.getvalue()
        directory = self.data.rfind(b"PK\1\2")
        if field is not None and directory >= 0:
            self.data = self.data[: directory + field] + value + self.data[directory + field + len(value) :]
        self.packed = True

    @rule(edits=EDITS, really=RARELY)
    def damage(self, edits: list[Edit], really: bool) -> None:
        if really:
            self.data = damaged({"archive": self.data}, edits)["archive"]

    @precondition(lambda self: len(self.data) < 1_000_000)
    @rule(packer=st.sampled_from(list(PACKERS)), zeros=RARELY, really=RARELY)
    def pack(self, packer: str, zeros: bool, really: bool) -> None:
        if really:
            self.data = PACKERS[packer](self.data) + ZEROS[packer] * zeros
            self.packed = True

    @precondition(lambda self: self.packed)
    @rule(really=RARELY)
    def dictionary(self, really: bool) -> None:
        """Of a gigabyte, as an xz file may ask for."""
        if really:
            self.data = HUGE_DICTIONARY

    def teardown(self) -> None:
        is_well(self.campaign.read(self.data))


def test_what_was_found_once_is_repacked_or_refused(campaign: Campaign) -> None:
    campaign.read_found()


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
def test_archives_are_repacked_or_refused_in_one_line(campaign: Campaign) -> None:
    machine = type("Archives", (Archives,), {"campaign": campaign})
    for number, of_round in campaign.rounds():
        run_state_machine_as_test(seed(number)(machine), settings=settings(of_round, stateful_step_count=8))
