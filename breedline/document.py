"""Pages that are one file: whole from disk, without a network, and under a policy that lets nothing else run or load.

All text is escaped by the template (Jinja's autoescape). The page's script is the same for all pages and holds no data.
"""

import base64
import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from breedline.files import new_file
from breedline.images import DAMAGE
from breedline.shards import ShardSet
from breedline.urls import redacted

SIDE, QUALITY = 160, 65
"""Pixels of a thumbnail's longer side, at most, and the quality of its WebP."""
TINY = 64
"""Pixels of the longer side up to which an image is enlarged without smoothing, so that its pixels can be seen."""
MAX_BYTES = 1_800_000
"""Of all thumbnails of a page; further ones are left out."""
MAX_TEXT = 60
"""Characters of a label or a name; in a longer one, the middle is left out."""
HERE = Path(__file__).parent


class Thumbnails:
    """Small pictures of some of `images`: each is in the page once, as a class of its style sheet, however often it is shown."""

    def __init__(self, images: ShardSet, wanted: Iterable[str], most: int) -> None:
        """Take the first `most` of the `wanted` raw files (SHA-256) whose image is in the set."""
        order = list(dict.fromkeys(wanted))
        rows = images.index[images.index["origin"].isin(order)].drop_duplicates("origin")
        places: Iterator[Any] = rows[["origin", "shard", "offset", "size"]].itertuples(index=False)
        where = {origin: place for origin, *place in places}
        self._classes: dict[str, str] = {}
        self._rules: list[str] = []
        taken = 0
        for sha256 in filter(where.__contains__, order):
            if len(self._rules) == most:
                break
            found = _webp(images.read(*where[sha256]))
            if not found or taken + len(found[0]) > MAX_BYTES:
                continue
            encoded, tiny = found
            taken += len(encoded)
            name = f"i{len(self._rules)}"
            self._classes[sha256] = f"{name} tiny" if tiny else name
            self._rules.append(f".{name}{{background-image:url(data:image/webp;base64,{encoded})}}")

    def __iter__(self) -> Iterator[str]:
        """The raw files that it shows."""
        return iter(self._classes)

    def __contains__(self, sha256: object) -> bool:
        return sha256 in self._classes

    def __len__(self) -> int:
        return len(self._rules)

    def __getitem__(self, sha256: str) -> str:
        """The classes of the element that shows it."""
        return self._classes[sha256]

    @property
    def style(self) -> str:
        """The rules of those classes."""
        return "\n".join(self._rules)


def _webp(data: bytes) -> tuple[str, bool] | None:
    """A file as a small WebP in base64, and whether it is so small that its pixels are to be seen; None if it is damaged."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            tiny = max(image.size) <= TINY
            image.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "WEBP", quality=QUALITY, method=4)
    except (*DAMAGE, Image.DecompressionBombError):
        return None
    return base64.b64encode(buffer.getvalue()).decode(), tiny


def short(text: object, most: int = MAX_TEXT) -> str:
    """`text` in at most that many printable characters."""
    shown = "".join(character if character.isprintable() else " " for character in str(text))
    half = most // 2
    return shown if len(shown) <= most else f"{shown[: half - 1]}…{shown[-half:]}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as percent, never rounded to all or nothing unless it is that; an en dash for None."""
    if share is None:
        return "–"
    least = 10 ** -(digits + 2)
    if 1 - least / 2 <= share < 1:
        return f"over {1 - least:.{digits}%}"
    if 0 < share < least / 2:
        return f"under {least:.{digits}%}"
    return f"{share:.{digits}%}"


def write_page(template: str, path: Path, thumbnails: Thumbnails, **content: Any) -> None:
    """Write the page that `template`, a file beside this one, makes of `content`; equal bytes for equal content."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "percent": percent, "bare": redacted, "number": "{:,}".format}
    style = (HERE / "document.css").read_text("utf-8") + thumbnails.style
    script = (HERE / "document.js").read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    html = environment.get_template(template).render(
        **content, thumbnails=thumbnails, policy=policy, style=style, script=script
    )
    with new_file(path) as temporary:
        temporary.write_text(html, "utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
