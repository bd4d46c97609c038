"""Damage to valid files: what a hypothesis strategy draws, and what it does to the bytes."""

import re
import tempfile
from collections.abc import Callable
from typing import NamedTuple

from hypothesis import strategies as st

MOST = 1_000_000
"""Bytes that damage makes of a file, at most."""
ABSOLUTE = f"{tempfile.gettempdir()}/canary-of-breedline/passwd"
"""Where nothing is, nor may be after an example."""
ODD = [
    b"", b"\0", b"\n", b"\r\n", b"\r", b",", b'"', b"'", b'""', b"\t", b" ", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff", b"\xed\xa0\x80",
    b"\x1b[31m", b"\x1b]0;owned\x07", "\u202e".encode(), "\u2028".encode(), "\x85".encode(), "\U0001f408".encode(), "é".encode(),
    b"0", b"-1", b"1", b"-0", b"1e309", b"-1e309", b"1e400", b"nan", b"NaN", b"inf", b"-Infinity", b"NA", b"null", b"None", b"true", b"True",
    b"2147483648", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809", b"18446744073709551616",
    b"9" * 400, b"1" * 5000, b"0x10", b"1_000", b"0.1", b"1.5", b"1e3", b"99999999",
    b"x" * 10_000, b"a," * 5_000, b"\n" * 3_000, b'"' * 1_001, b"[" * 2_000, b"{" * 2_000, b"(" * 2_000, b"- " * 2_000, b'{"a":' * 2_000,
    b"../canary", b"../../canary", ABSOLUTE.encode(), b"..", b".", b"/", b"//", b"../canary.csv", b"\\..\\canary", b"file://" + ABSOLUTE.encode(),
    b"00-00000.tar", b"http://user:secret@host/x?token=secret", b"s3://bucket/x", b"~/canary", b"$HOME", b"%s%n", b"{0}", b"${a}",
    b"=cmd|' /C calc'!A0", b"<script>alert(1)</script>", b"a" * 64, b"0" * 64, b"train", b"valid", b"test", b"relabel", b"drop", b"keep", b"pug",
    b"&a [*a, *a]", b"&a {<<: *a}", b"*a", b"&a", b"!!python/object/apply:os.system ['touch ../canary']", b"!!binary x", b"!<x> y", b"? ",
    b": ", b"- ", b"---\n", b"...\n", b"%YAML 9.9\n", b"%TAG ! x\n", b"|\n", b">-\n", b"{", b"}", b"[", b"]", b"#", b"@", b"`",
    b"&a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
    b"e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g,*g]\n",
    b"(?P<label>(a+)+)b", b"(?P<label>" + b"(a{9}){9}" * 20 + b")", b"(?P<label>(?=(a+))\\1)", b"2026-01-01T00:00:00Z", b"99999-01-01",
    b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 8,
]  # fmt: skip
WORD = re.compile(rb"[\w.+-]+")


class Edit(NamedTuple):
    """One change of one file."""

    file: int
    how: str
    place: int
    """0 to 65,535, from the beginning to the end of the file, or of what is counted in it."""
    other: int
    odd: bytes


def _at(place: int, count: int) -> int:
    return place * count // 65536


def _cut(data: bytes, edit: Edit, _: list[bytes]) -> bytes:
    start, end = sorted((_at(edit.place, len(data) + 1), _at(edit.other, len(data) + 1)))
    return data[:start] + data[end:]


def _end(data: bytes, edit: Edit, _: list[bytes]) -> bytes:
    return data[: _at(edit.place, len(data) + 1)]


def _flip(data: bytes, edit: Edit, _: list[bytes]) -> bytes:
    place = _at(edit.place, len(data) or 1)
    return data[:place] + bytes(byte ^ (1 << edit.other % 8) for byte in data[place : place + 1]) + data[place + 1 :]


def _insert(data: bytes, edit: Edit, _: list[bytes]) -> bytes:
    place = _at(edit.place, len(data) + 1)
    return data[:place] + edit.odd + data[place:]


def _overwrite(data: bytes, edit: Edit, _: list[bytes]) -> bytes:
    place = _at(edit.place, len(data) + 1)
    return data[:place] + edit.odd + data[place + len(edit.odd) :]


def _repeat(data: bytes, edit: Edit, _: list[bytes]) -> bytes:
    start, end = sorted((_at(edit.place, len(data) + 1), _at(edit.other, len(data) + 1)))
    times = min((2, 3, 100, 10_000)[(edit.place + edit.other) % 4], MOST // max(1, end - start))
    return data[:start] + data[start:end] * max(1, times) + data[end:]


def _splice(data: bytes, edit: Edit, files: list[bytes]) -> bytes:
    other = files[edit.other % len(files)]
    place, theirs = _at(edit.place, len(data) + 1), _at(edit.other, len(other) + 1)
    return data[:place] + other[theirs : theirs + 4096] + data[place:]


def _word(data: bytes, edit: Edit, _: list[bytes]) -> bytes:
    """Put something odd in place of a word: a field of a table, a value or a key of JSON or YAML."""
    if not (words := list(WORD.finditer(data[:200_000]))):
        return edit.odd
    word = words[_at(edit.place, len(words))]
    return data[: word.start()] + edit.odd + data[word.end() :]


def _swap(data: bytes, edit: Edit, _: list[bytes]) -> bytes:
    """Swap two words."""
    if not (words := list(WORD.finditer(data[:200_000]))):
        return data
    one, other = sorted((words[_at(place, len(words))] for place in edit[2:4]), key=re.Match.start)
    if one.start() == other.start():
        return data
    return data[: one.start()] + other[0] + data[one.end() : other.start()] + one[0] + data[other.end() :]


def _lines(data: bytes, edit: Edit, _: list[bytes]) -> bytes:
    """Move a line to another place, or repeat it there."""
    lines = data.splitlines(keepends=True) or [b""]
    line = lines[_at(edit.place, len(lines))]
    if edit.other % 2:
        lines.remove(line)
    lines.insert(_at(edit.other, len(lines) + 1), line)
    return b"".join(lines)


def _line_ends(data: bytes, edit: Edit, _: list[bytes]) -> bytes:
    return data.replace(b"\n", (b"\r\n", b"\r", b"\n\n", b"\0\n", b" \n")[edit.place % 5])


def _encode(data: bytes, edit: Edit, _: list[bytes]) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(("utf-16", "utf-32", "utf-8-sig", "utf-16-le", "cp037")[edit.place % 5], "replace")


HOW: dict[str, Callable[[bytes, Edit, list[bytes]], bytes]] = {
    function.__name__[1:]: function
    for function in (
        _word, _insert, _flip, _cut, _end, _overwrite, _repeat, _splice, _swap, _lines, _line_ends, _encode,
    )
}  # fmt: skip
PLACE = st.integers(0, 65535)
ODDITIES = st.one_of(st.sampled_from(ODD), st.binary(max_size=12))
EDITS = st.lists(
    st.builds(Edit, st.integers(0, 15), st.sampled_from(list(HOW)), PLACE, PLACE, ODDITIES), min_size=1, max_size=4
)


def damaged(files: dict[str, bytes], edits: list[Edit]) -> dict[str, bytes]:
    """The files after the edits."""
    changed, valid = dict(files), list(files.values())
    names = list(files)
    for edit in map(Edit._make, edits):
        name = names[edit.file % len(names)]
        changed[name] = HOW[edit.how](changed[name], edit, valid)[:MOST]
    return changed
