"""What a campaign has counted: printed as the table of docs/reliability.md, and kept as JSON where $BREEDLINE_COUNTS says."""

import json
import os
import sys
from collections import Counter
from pathlib import Path


def table(counts: Counter[tuple[str, str]], rows: str, unit: str) -> str:
    """Counts by (row, column) as a table in Markdown, with sums."""
    columns = sorted({column for _, column in counts})
    lines = [f"| {rows} | {' | '.join(columns)} | all |", f"|---|{'--:|' * (len(columns) + 1)}"]
    for row in sorted({row for row, _ in counts}):
        cells = [counts[row, column] for column in columns]
        lines.append(f"| {row} | {' | '.join(map(str, cells))} | {sum(cells)} |")
    sums = [sum(count for (_, each), count in counts.items() if each == column) for column in columns]
    return "\n".join([*lines, f"| all {unit} | {' | '.join(map(str, sums))} | {sum(sums)} |"])


def keep(name: str, counts: Counter[tuple[str, str]], **facts: object) -> None:
    """Write the counts and what else was seen to NAME.json in the folder $BREEDLINE_COUNTS, if that is set."""
    if folder := os.environ.get("BREEDLINE_COUNTS"):
        nested: dict[str, dict[str, int]] = {}
        for (row, column), count in sorted(counts.items()):
            nested.setdefault(row, {})[column] = count
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.json").write_text(json.dumps({**facts, "counts": nested}, indent=1) + "\n")


def main(paths: list[str]) -> None:
    """Print the tables of the JSON files, those of one campaign (kills-1.json, kills-2.json) as one."""
    campaigns: dict[str, Counter[tuple[str, str]]] = {}
    for path in map(Path, paths):
        counts = json.loads(path.read_text("utf-8"))["counts"]
        cells = {(row, column): count for row, columns in counts.items() for column, count in columns.items()}
        campaigns.setdefault(path.stem.split("-")[0], Counter()).update(cells)
    for name, counted in campaigns.items():
        print(f"{table(counted, name, 'together')}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
