"""Read each image's label from its name, or from a table, and decide its split."""

import io
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

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


def label(
    params: Label,
    raw: Path,
    corrections: Path,
    duplicates: Path,
    *,
    labels: Path,
    rejected: Path,
    classes: Path,
    metrics: Path,
) -> None:
    """Give every image of `raw` a label and a split, or a reason why it has none.

    Args:
        corrections: table of people's decisions (name, sha256, action relabel|drop, label, reason), found by content.
        duplicates: table of near-duplicates (sha256, leader): each stands where its leader does.
        labels: table of name, label, split, sha256, size (bytes), in the order of `raw`.
        rejected: table of name, sha256, reason, detail.
        classes: table of class, train, valid, test (how many images).
        metrics: counts per split, rejects per reason, duplicates, near-duplicates, corrections.

    Raises:
        BreedlineError: too many rejects, classes that are not as expected, or corrections that contradict themselves or drop every image.
    """
    table, listed = _read(raw, params)
    decisions = read_corrections(corrections)
    unmatched = _correct(table, decisions)
    for line, name, sha256 in zip(unmatched.index, unmatched["name"], unmatched["sha256"], strict=True):
        log.warning(
            "label: %s, line %d (%r): no image has the sha256 %r; %s has all 64 digits of each",
            *(corrections, line, name, sha256, labels),
        )
    _reject_conflicts(table)
    _check_rejects(table, params)

    good = table.loc[table["reason"] == "", ["name", "label", "sha256", "size"]]
    rejects = table.loc[table["reason"] != "", ["name", "sha256", "reason", "detail"]]
    del table  # about 60 MB for a million images
    if good.empty:
        raise BreedlineError(f"{corrections} drops every image that has a label: remove some of its lines")
    _check_classes(good, params)
    near = read_csv(duplicates, ["sha256", "leader"])
    leaders = dict(zip(near["sha256"], near["leader"], strict=True))
    split = partial(
        assign,
        good[["sha256", "label"]],
        valid_pct=params.valid_pct,
        test_pct=params.test_pct,
        seed=params.seed,
        test=_content_of(good, listed, params),
    )
    good.insert(2, "split", split(leaders=leaders))
    moved = int((good["split"] != split(leaders={})).sum()) if leaders else 0
    per_class = (
        good.groupby(["label", "split"]).size().unstack(fill_value=0).reindex(columns=list(SPLITS), fill_value=0)
    )
    counts = {
        "images": len(good),
        "classes": len(per_class),
        "duplicates": int(good["sha256"].duplicated().sum()),
        "near_duplicates": {**_near_duplicates(good, leaders), "moved": moved},
        "split": {name: int(per_class[name].sum()) for name in SPLITS},
        "rejected": {reason.replace(" ", "_"): int((rejects["reason"] == reason).sum()) for reason in REASONS},
        "corrections": {"applied": len(decisions) - len(unmatched), "unmatched": len(unmatched)},
    }
    write_csv(good, labels)
    write_csv(rejects, rejected)
    write_csv(per_class.rename_axis("class").reset_index(), classes)
    write_json(counts, metrics)
    log.info(
        "label: %d images in %d classes (%s), %d files rejected",
        *(len(good), len(per_class), ", ".join(f"{name} {per_class[name].sum()}" for name in SPLITS), len(rejects)),
    )


def _read(raw: Path, params: Label) -> tuple[pd.DataFrame, set[str]]:
    """A table of the images of `raw` with their labels, and the names in the test list.

    Its columns are name, sha256, size, format, label, reason and detail; the last two are empty except for rejects.
    """
    images = ShardSet(raw)
    find = _table(images, params) if params.table else compile_pattern(str(params.pattern))
    listed = _listed(images, params)
    settings = images.index["name"].isin([params.table, params.test_list])
    table = images.index.loc[~settings, ["name", "sha256", "size", "format"]]
    read = (find(_subject(name, params)) for name in table["name"])
    renamed = [params.map.get(label, label) if label else "" for label in read]
    table["label"] = pd.Series(renamed, table.index, dtype="str")
    table["reason"] = table["detail"] = ""
    unread = table.loc[table["label"] == "", "name"]
    _reject(table, unread.index, NO_MATCH, unread.map(lambda name: _subject(name, params)))
    other = table.loc[table["format"] == "", "name"]
    _reject(table, other.index, NOT_AN_IMAGE, other.map(lambda name: PurePosixPath(name).suffix))
    return table, listed


def _subject(name: str, params: Label) -> str:
    """The part of an image's path that the pattern, or the column `name` of the table, is compared with."""
    return name if params.on == "path" else name.rpartition("/")[2]


def _member(images: ShardSet, path: str, setting: str) -> io.BytesIO:
    """The content of a downloaded file that a setting names."""
    rows = images.index[images.index["name"] == path]
    if rows.empty:
        others = images.index.loc[images.index["format"] == "", "name"].head(3).tolist()
        raise BreedlineError(f"label.{setting} = {path!r} is not among the downloaded files; there are {others}")
    row = rows.iloc[-1]
    return io.BytesIO(images.read(row["shard"], int(row["offset"]), int(row["size"])))


def _table(images: ShardSet, params: Label) -> Find:
    """A function from a name to its label in the table that label.table names, or to None."""
    table = read_csv(
        _member(images, str(params.table), "table"), ["name", "label"], where=f"label.table {params.table}"
    )
    twice = table.loc[table["name"].duplicated(), "name"].head(3).tolist()
    if twice:
        raise BreedlineError(f"label.table {params.table} names {twice} more than once: leave one line for each")
    return dict(zip(table["name"], table["label"], strict=True)).get


def _listed(images: ShardSet, params: Label) -> set[str]:
    """The first word of each line of the test list, if there is one; lines that begin with # are comments."""
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


def _near_duplicates(good: pd.DataFrame, leaders: dict[str, str]) -> dict[str, int]:
    """How many images are in how many groups of near-duplicates; and how many of them resemble one of a fixed test split."""
    near = good[good["sha256"].isin(leaders.keys() | set(leaders.values()))]
    near = near.assign(leader=near["sha256"].map(lambda sha256: leaders.get(sha256, sha256)))
    contents = near.groupby("leader")["sha256"].nunique()
    near = near[near["leader"].isin(contents.index[contents > 1])]
    tested = near["split"] == "test"
    beside = near.loc[near["leader"].isin(near.loc[tested, "leader"]) & ~tested, "name"].tolist()
    if beside:
        log.warning(
            "label: %d images that label.test_list does not name are near-duplicates of some that it names, and stay out "
            "of test: %s; to train without them, drop them by data/corrections.csv",
            *(len(beside), _first(beside)),
        )
    return {"groups": near["leader"].nunique(), "images": len(near), "beside_test": len(beside)}


def _reject(table: pd.DataFrame, rows: pd.Index, reason: str, detail: pd.Series) -> None:
    """Note in `table`, in place, why `rows` are rejected."""
    table.loc[rows, "reason"] = reason
    table.loc[rows, "detail"] = detail


def _correct(table: pd.DataFrame, decisions: pd.DataFrame) -> pd.DataFrame:
    """Apply each decision to the images of its sha256; returns the decisions that match no image."""
    decided = table["sha256"].isin(decisions["sha256"]) & (table["reason"] != NOT_AN_IMAGE)
    of_content = decisions.set_index("sha256")[["action", "label", "reason"]]
    found = table.loc[decided, ["sha256"]].join(of_content, on="sha256")
    relabel, drop = found[found["action"] == "relabel"], found[found["action"] == "drop"]
    table.loc[relabel.index, "label"] = relabel["label"]
    table.loc[relabel.index, ["reason", "detail"]] = ""
    _reject(table, drop.index, DROPPED, drop["reason"])
    return decisions[~decisions["sha256"].isin(found["sha256"])]


def _reject_conflicts(table: pd.DataFrame) -> None:
    """Reject all images of a content that has more than one label."""
    labelled = table.loc[table["reason"] == "", "sha256"]
    twice = table.loc[labelled.index[labelled.duplicated(keep=False)], ["sha256", "label"]]
    pairs = twice.drop_duplicates()
    conflicting = twice[twice["sha256"].isin(pairs.loc[pairs["sha256"].duplicated(), "sha256"])]
    _reject(table, conflicting.index, CONFLICT, conflicting["label"])


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
    counts = good.loc[~good["sha256"].duplicated(), "label"].value_counts().sort_index()
    found = list(counts.index)
    if isinstance(params.classes, int) and len(found) != params.classes:
        raise BreedlineError(
            f"label.classes expects {params.classes} classes, the names give {len(found)}: {_first(found)}"
        )
    if isinstance(params.classes, list) and set(found) != set(params.classes):
        extra, missing = sorted(set(found) - set(params.classes)), sorted(set(params.classes) - set(found))
        raise BreedlineError(
            f"labels that label.classes lacks: {_first(extra)}; classes there that no image has: {_first(missing)}"
        )
    if len(found) == 1:
        raise BreedlineError(f"every image is {found[0]!r}: a classifier needs two classes; mend label.pattern")
    small = counts[counts < params.min_per_class]
    if len(small):
        shown = ", ".join(f"{name} ({count})" for name, count in small.head(5).items())
        raise BreedlineError(
            f"classes with fewer than label.min_per_class = {params.min_per_class} images: {shown}; "
            "add images, merge them with label.map, or lower it"
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


if __name__ == "__main__":
    run(label)
