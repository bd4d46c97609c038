"""Read each image's label from its name, or from a table, and decide its split."""

import io
import logging
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from breedline.corrections import read_corrections
from breedline.edge import run
from breedline.errors import BreedlineError
from breedline.params import Label
from breedline.pattern import compile_pattern
from breedline.shards import ShardSet
from breedline.split import SPLITS, assign
from breedline.tables import read_csv, write_csv, write_json

log = logging.getLogger("breedline")
NOT_AN_IMAGE = "not an image"
NO_MATCH = "no label"
CONFLICT = "conflicting labels"
DROPPED = "dropped by correction"
REASONS = (NOT_AN_IMAGE, NO_MATCH, CONFLICT, DROPPED)
Find = Callable[[str], str | None]


def label(params: Label, raw: Path, corrections: Path, *, labels: Path, rejected: Path, metrics: Path) -> None:
    """Give every image of `raw` a label and a split, or a reason why it has none.

    Args:
        corrections: table of people's decisions (name, sha256, action relabel|drop, label, reason), found by content.
        labels: table of name, label, split, sha256, size (bytes), in the order of `raw`.
        rejected: table of name, sha256, reason, detail.
        metrics: counts per class and split, rejects per reason, duplicates.

    Raises:
        BreedlineError: too many rejects, classes that are not as expected, or corrections that make no sense.
    """
    images = ShardSet(raw)
    index = images.index
    find = _table(images, params) if params.table else compile_pattern(str(params.pattern))
    listed = _listed(images, params)
    files = index[~index["name"].isin([params.table, params.test_list])]
    names = _subject(files["name"], params)
    read = names.map(find)
    table = pd.DataFrame({"name": files["name"], "label": read.replace(params.map), "sha256": files["sha256"]})
    table["size"], table["reason"], table["detail"] = files["size"], "", ""
    decided = read_corrections(corrections)

    _reject(table, table["label"].isna() | (table["label"] == ""), NO_MATCH, names)
    _reject(table, files["format"] == "", NOT_AN_IMAGE, files["name"].map(lambda name: PurePosixPath(name).suffix))
    applied = _correct(table, decided)
    ok = table[table["reason"] == ""]
    conflicting = ok.groupby("sha256")["label"].transform("nunique") > 1
    _reject(table, conflicting.reindex(table.index, fill_value=False), CONFLICT, table["label"])
    _check_rejects(table, params)

    good = table[table["reason"] == ""].copy()
    _check_classes(good, params)
    good["split"] = assign(
        good,
        valid_pct=params.valid_pct,
        test_pct=params.test_pct,
        seed=params.seed,
        test=_content_of(good, listed, params),
    )
    write_csv(good[["name", "label", "split", "sha256", "size"]], labels)
    write_csv(table.loc[table["reason"] != "", ["name", "sha256", "reason", "detail"]], rejected)
    counts = _counts(table, good, applied, len(decided))
    write_json(counts, metrics)
    log.info(
        "label: %d images in %d classes (%s), %d files rejected",
        *(counts["images"], counts["classes"], ", ".join(f"{name} {n}" for name, n in counts["split"].items())),
        len(table) - len(good),
    )


def _subject(names: pd.Series, params: Label) -> pd.Series:
    return names if params.on == "path" else names.map(lambda name: PurePosixPath(name).name)


def _member(images: ShardSet, path: str, setting: str) -> io.BytesIO:
    """The content of a downloaded file that a setting names."""
    rows = images.index[images.index["name"] == path]
    if rows.empty:
        others = images.index.loc[images.index["format"] == "", "name"].head(3).tolist()
        raise BreedlineError(f"label.{setting} = {path!r} is not among the downloaded files; there are {others}")
    row = rows.iloc[-1]
    return io.BytesIO(images.read(row["shard"], int(row["offset"]), int(row["size"])))


def _table(images: ShardSet, params: Label) -> Find:
    table = read_csv(
        _member(images, str(params.table), "table"), ["name", "label"], where=f"label.table {params.table}"
    )
    twice = table.loc[table["name"].duplicated(), "name"].head(3).tolist()
    if twice:
        raise BreedlineError(f"label.table {params.table} names {twice} more than once: leave one line for each")
    return dict(zip(table["name"], table["label"], strict=True)).get


def _listed(images: ShardSet, params: Label) -> set[str]:
    if params.test_list is None:
        return set()
    lines = _member(images, params.test_list, "test_list").read().decode("utf-8", "replace").splitlines()
    return {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}


def _content_of(good: pd.DataFrame, listed: set[str], params: Label) -> set[str]:
    """The content hashes of the images that a test list names: by path, by file name, or without its extension."""
    if not listed:
        return set()
    paths = good["name"].map(PurePosixPath)
    named = good["name"].isin(listed) | paths.map(lambda p: p.name in listed or p.stem in listed)
    if not named.any():
        raise BreedlineError(
            f"label.test_list {params.test_list} names none of the images, such as {good['name'].iloc[0]}"
        )
    return set(good.loc[named, "sha256"])


def _reject(table: pd.DataFrame, which: "pd.Series[bool]", reason: str, detail: pd.Series) -> None:
    table.loc[which, "reason"] = reason
    table.loc[which, "detail"] = detail[which]


def _correct(table: pd.DataFrame, decisions: pd.DataFrame) -> int:
    """Apply the decisions to the images they are about; the number of decisions that found theirs."""
    of = decisions.set_index("sha256")
    correctable = table["sha256"].isin(of.index) & (table["reason"] != NOT_AN_IMAGE)
    action = table["sha256"].map(of["action"])
    relabel, drop = correctable & (action == "relabel"), correctable & (action == "drop")
    table.loc[relabel, "label"] = table["sha256"].map(of["label"])
    table.loc[relabel, ["reason", "detail"]] = ""
    _reject(table, drop, DROPPED, table["sha256"].map(of["reason"]))
    return int(table.loc[correctable, "sha256"].nunique())


def _check_rejects(table: pd.DataFrame, params: Label) -> None:
    undecided = table[table["reason"].isin([NO_MATCH, NOT_AN_IMAGE, CONFLICT])]
    if len(undecided) == len(table):
        hint = (
            f"{undecided['name'].iloc[0]!r} is {undecided['reason'].iloc[0]!r}" if len(table) else "there are no files"
        )
        raise BreedlineError(f"no image has a label: {hint}; mend label.pattern, label.on or label.table")
    percent = 100 * len(undecided) / len(table)
    if percent > params.max_rejected_pct:
        shown = "; ".join(f"{row.name}: {row.reason}" for row in undecided.head(5).itertuples(index=False))
        raise BreedlineError(
            f"{len(undecided)} of {len(table)} files ({percent:.1f} %) are rejected, label.max_rejected_pct allows "
            f"{params.max_rejected_pct:g}: {shown}. Mend the pattern, exclude them in download.sources, or raise it"
        )


def _check_classes(good: pd.DataFrame, params: Label) -> None:
    counts = good.groupby("label")["sha256"].nunique().sort_index()
    found = list(counts.index)
    if isinstance(params.classes, int) and len(found) != params.classes:
        raise BreedlineError(
            f"label.classes expects {params.classes} classes, the names give {len(found)}: {_some(found)}"
        )
    if isinstance(params.classes, list) and set(found) != set(params.classes):
        extra, missing = sorted(set(found) - set(params.classes)), sorted(set(params.classes) - set(found))
        raise BreedlineError(f"classes that label.classes lacks: {_some(extra)}; that it has in vain: {_some(missing)}")
    if len(found) == 1:
        raise BreedlineError(f"every image is {found[0]!r}: a classifier needs two classes; mend label.pattern")
    small = counts[counts < params.min_per_class]
    if len(small):
        shown = ", ".join(f"{name} ({count})" for name, count in small.head(5).items())
        raise BreedlineError(
            f"classes with fewer than label.min_per_class = {params.min_per_class} images: {shown}; "
            "add images, merge them with label.map, or lower it"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


def _counts(table: pd.DataFrame, good: pd.DataFrame, applied: int, decided: int) -> dict[str, Any]:
    split = good["split"].value_counts()
    classes = pd.crosstab(good["label"], good["split"]).reindex(columns=list(SPLITS), fill_value=0)
    reasons = table["reason"].value_counts()
    return {
        "images": len(good),
        "classes": len(classes),
        "duplicates": int(good["sha256"].duplicated().sum()),
        "split": {name: int(split.get(name, 0)) for name in SPLITS},
        "rejected": {reason.replace(" ", "_"): int(reasons.get(reason, 0)) for reason in REASONS},
        "corrections": {"applied": applied, "unmatched": decided - applied},
        "per_class": {name: {s: int(n) for s, n in row.items()} for name, row in classes.to_dict("index").items()},
    }


if __name__ == "__main__":
    run(label)
