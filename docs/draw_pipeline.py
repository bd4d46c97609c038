"""Draws docs/pipeline.svg from dvc.yaml: `python docs/draw_pipeline.py` after a change of the graph.

The stages lie on the diagonal in the order in which they run. What a stage writes leaves it to the right and falls
onto those that read it; what people give back, the corrections, leaves the last report to the left and rises. So each
path stands where the row of its writer meets the column of its reader.
"""

import textwrap
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/pipeline.svg"
COLUMN, ROW = 172, 88
"""Pixels from a stage to the next one."""
BOX, LINE = (132, 58), 16
"""The size of a stage, and the height of a line of text."""
MARGIN = 20
CORRECT = "you look, and correct"
GATE = ("gate, publish", "not worse? the data, then the commit")
STYLE = """
text { font: 12px system-ui, sans-serif; text-anchor: middle; fill: #24292f }
.name { font-weight: 600; font-size: 14px }
.path { font-family: ui-monospace, monospace; font-size: 11.5px }
.stage { fill: #ddf4ff; stroke: #0969da }
.gate { fill: #dafbe1; stroke: #1a7f37 }
.page { fill: #ffffff }
.flow { fill: none; stroke: #57606a; stroke-width: 1.5 }
.back { fill: none; stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 5 3 }
.flow-tip { fill: #57606a }
.back-tip { fill: #bc4c00 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.stage { fill: #121d2f; stroke: #4493f8 }
.gate { fill: #12261e; stroke: #3fb950 }
.page { fill: #0d1117 }
.flow { stroke: #9198a1 }
.back { stroke: #db6d28 }
.flow-tip { fill: #9198a1 }
.back-tip { fill: #db6d28 }
}
"""


def draw(pipeline: dict[str, Any]) -> str:
    """The picture of a dvc.yaml, as SVG: equal text for an equal graph."""
    stages = pipeline["stages"]
    width, height = (2 * MARGIN + (len(stages) + 1) * side for side in (COLUMN, ROW))
    svg = Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", role="img")
    SubElement(svg, "title").text = "The pipeline: what each stage writes, and who reads it"
    SubElement(svg, "style").text = STYLE
    SubElement(svg, "rect", {"class": "page", "width": str(width), "height": str(height), "rx": "8"})
    flows = _flows(stages)
    for row, column in flows:
        _arrow(svg, row, column, "back" if column < row else "flow")
    for (row, column), paths in flows.items():
        _write(svg, _x(column), _y(row), [CORRECT, *paths] if column < row else paths, "path")
    for place, (name, stage) in enumerate(stages.items()):
        _box(svg, place, "stage", name, stage["desc"])
    _box(svg, len(stages), "gate", *GATE)
    indent(svg)
    return tostring(svg, "unicode") + "\n"


def _flows(stages: dict[str, Any]) -> dict[tuple[int, int], list[str]]:
    """The paths that go from the stage of a row to that of a column; the last column is the gate.

    What no stage reads, such as metrics, is for people and the gate. What no stage writes is people's answer.
    """
    written = [_paths(stage, "outs", "metrics") for stage in stages.values()]
    read = [_paths(stage, "deps") for stage in stages.values()]
    of_stages, for_stages = set().union(*written), set().union(*read)
    gate = len(stages)
    looked_at = max(place for place, paths in enumerate(written) if any(path.startswith("reports/") for path in paths))
    flows = {}
    for reader, paths in enumerate(read):
        for writer in range(len(stages)):
            flows[writer, reader] = [path for path in written[writer] if path in paths]
        flows[looked_at, reader] += [path for path in paths if path not in of_stages]
    for writer, paths in enumerate(written):
        flows[writer, gate] = [path for path in paths if path not in for_stages]
    return {places: paths for places, paths in flows.items() if paths}


def _paths(stage: dict[str, Any], *kinds: str) -> list[str]:
    """The paths that a stage of dvc.yaml names, but for code and settings."""
    entries = [entry for kind in kinds for entry in stage.get(kind, [])]
    paths = [path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)]
    return [path for path in paths if path != "params.yaml" and not path.startswith(("breedline/", "stages/"))]


def _x(column: int) -> int:
    return MARGIN + column * COLUMN + COLUMN // 2


def _y(row: int) -> int:
    return MARGIN + row * ROW + ROW // 2


def _arrow(svg: Element, row: int, column: int, kind: str) -> None:
    """From the side of one box to above or below another."""
    towards = 1 if column > row else -1
    start, end = _x(row) + towards * BOX[0] // 2, _y(column) - towards * (BOX[1] // 2 + 7)
    SubElement(svg, "path", {"class": kind, "d": f"M{start} {_y(row)}H{_x(column)}V{end}"})
    SubElement(svg, "path", {"class": f"{kind}-tip", "d": f"M{_x(column)} {end + towards * 7}l-4 {-towards * 8}h8z"})


def _box(svg: Element, place: int, kind: str, name: str, what: str) -> None:
    width, height = BOX
    x, y = _x(place), _y(place)
    corner = {"x": str(x - width // 2), "y": str(y - height // 2)}
    SubElement(svg, "rect", {"class": kind, **corner, "width": str(width), "height": str(height), "rx": "6"})
    SubElement(svg, "text", {"class": "name", "x": str(x), "y": str(y - 11)}).text = name
    _write(svg, x, y + 12, textwrap.wrap(what, 20), "")


def _write(svg: Element, x: int, y: int, lines: list[str], kind: str) -> None:
    """Lines of text around a point; paths have a ground of their own, so that an arrow ends and begins at them."""
    top = y - LINE * len(lines) // 2
    if kind == "path":
        width = 7 * max(map(len, lines)) + 6
        ground = {"x": str(x - width // 2), "y": str(top), "width": str(width), "height": str(LINE * len(lines))}
        SubElement(svg, "rect", {"class": "page", **ground})
    for number, line in enumerate(lines):
        SubElement(svg, "text", {"class": kind, "x": str(x), "y": str(top + LINE * number + 12)}).text = line


if __name__ == "__main__":
    PICTURE.write_text(draw(YAML(typ="safe").load(ROOT / "dvc.yaml")), "utf-8")
