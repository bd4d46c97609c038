"""The gate at work: champion and challenger answer the same test images, and what they say is compared and decided.

The images are those of the present labels, so that a correction scores the champion anew, too. Both models get the
presized images as photos: each does with them what it does with a user's photo, which to the model that was trained on them
is nothing.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from breedline.bundle import WEIGHTS
from breedline.changed import comparison_page
from breedline.classifier import Classifier, Photo
from breedline.comparison import Comparison, compare, same_test_set, sketch
from breedline.errors import shown
from breedline.items import Item, load_items
from breedline.params import load_params
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from breedline.tables import read_csv
from flows.decisions import Record, decided, look_at
from flows.gate import Decision, decide
from flows.predict import fetched_bundle
from flows.registry import in_production, last_trained, model_of
from flows.remote import Missing
from flows.workspace import PARAMS

LABELS, PRESIZED = "data/labels.csv", "data/presized"
"""Where dvc.yaml has them."""
PAGE = Path("reports/gate.html")
"""Where `breedline gate` shows the images that a challenger changes."""
ANSWERS = ["name", "sha256", "actual", "champion", "champion_probability", "challenger", "challenger_probability"]
AT_ONCE = 32
"""Images that one model answers before it is the other's turn, so that what else the machine does slows both."""


@dataclass(frozen=True)
class Judgement:
    """What the gate says of a challenger."""

    decision: Decision
    record: Record
    known: Record | None
    """The same decision on the same, if it was made before."""
    answers: pd.DataFrame
    """Of each test image: name, sha256, actual, and champion, challenger with their probabilities; empty without a champion."""

    @property
    def why(self) -> str:
        """All reasons in a line."""
        return "; ".join(self.decision.reasons)

    @property
    def changed(self) -> pd.DataFrame:
        """The answers to images that only one of both gets right."""
        right = self.answers[["champion", "challenger"]].eq(self.answers["actual"], axis=0)
        return self.answers[right["champion"] != right["challenger"]]

    def rows(self) -> list[dict[str, Any]]:
        """The reasons and the numbers, as rows of a table."""
        reasons = [{"what": "reason", "value": reason} for reason in self.record.reasons]
        numbers = self.record.model_dump(mode="json", exclude={"reasons", "test_set"}, exclude_none=True)
        return [*reasons, *({"what": name, "value": str(value)} for name, value in numbers.items())]

    def __str__(self) -> str:
        again = f" (as decided on {self.known.time:%Y-%m-%d})" if self.known else ""
        return f"{self.record.verdict}: {self.why}{again}"


class _Champion(NamedTuple):
    name: str
    classifier: Classifier


def judge(root: Path) -> Judgement | None:
    """Compare the model in the workspace at `root` with the one in production, or that of the last commit if none is.

    The model in the workspace has no champion if it is itself that of the last commit, or if nobody can have that one.

    Returns:
        None if both give the same answers to the bit: then there is nothing to decide.

    Raises:
        BreedlineError: a model, the images or an earlier decision cannot be used.
        NetworkError: the DVC remote does not give the champion.
    """
    settings = load_params(root / PARAMS).gate
    bundle = root / model_of(root).path
    challenger = Classifier.load(bundle)
    champion = _champion(root)
    images = ShardSet(root / PRESIZED, PRESIZED_COLUMNS)
    table = read_csv(root / LABELS, ["name", "label", "split", "sha256"])
    items = [item for item in load_items(images, table) if item.split == "test"]
    test_set = sketch(f"{item.sha256} {item.label}" for item in items)
    weights = challenger.spec.files[WEIGHTS]
    megabytes = sum(file.stat().st_size for file in bundle.iterdir()) / 1e6
    earlier = decided(root)
    comparison, slowdown, answers, look = None, None, pd.DataFrame(columns=ANSWERS), 0
    if champion:
        (theirs, ours), slowdown = answer((champion.classifier, challenger), images, items)
        classes = _classes(challenger, items)
        before, after = _columns(theirs, champion.classifier, classes), _columns(ours, challenger, classes)
        if champion.classifier.spec.classes == challenger.spec.classes and np.array_equal(before, after):
            return None
        look = look_at(earlier, champion.name, weights, test_set)
        target = np.array([classes.index(item.label) for item in items], int)
        comparison = compare(settings, classes, target, before, after, look=look)
        answers = _answers(items, classes, before, after)
    decision = decide(settings, comparison, megabytes=megabytes, slowdown=slowdown)
    record = Record(
        verdict=decision.verdict,
        published=decision.publish,
        reasons=decision.reasons,
        time=datetime.now(UTC).replace(microsecond=0),
        champion=champion.name if champion else None,
        challenger=weights,
        metric=settings.metric,
        images=len(items),
        look=look,
        test_set=test_set,
        megabytes=round(megabytes, 3),
        slowdown=slowdown and round(slowdown, 3),
        **_told(comparison),
    )
    return Judgement(decision, record, _same(earlier, record), answers)


def _champion(root: Path) -> _Champion | None:
    """What is in production, or else the model of the last commit, unless nobody can have that."""
    production = in_production(root)
    if not (found := production or last_trained(root)):
        return None
    try:
        return _Champion(found.name, Classifier.load(fetched_bundle(root, found.commit)))
    except Missing:
        if production:
            raise
        return None  # as in a clone of this project with other images: only its lock came along


def answer(
    models: Sequence[Classifier], images: ShardSet, items: Sequence[Item]
) -> tuple[list[np.ndarray], float | None]:
    """What each model says of the images, (images, classes), and how many times the first one's seconds the last one takes.

    They answer in turns, and the ratio is the median one of all turns.
    """
    found: list[list[np.ndarray]] = [[np.empty((0, len(model.spec.classes)))] for model in models]
    ratios = []
    for start in range(0, len(items), AT_ONCE):
        batch = [
            Photo(item.name, images.read(item.shard, item.offset, item.size)) for item in items[start : start + AT_ONCE]
        ]
        if not start:
            for model in models:
                model.probabilities(batch)  # the first time takes longer
        seconds = [0.0] * len(models)
        turns = list(enumerate(models))
        for number, model in turns if start // AT_ONCE % 2 else reversed(turns):
            began = perf_counter()
            found[number].append(model.probabilities(batch))
            seconds[number] = perf_counter() - began
        ratios.append(seconds[-1] / seconds[0])
    return [np.concatenate(parts) for parts in found], statistics.median(ratios) if ratios else None


def _classes(challenger: Classifier, items: Sequence[Item]) -> list[str]:
    """The challenger's classes, and after them the labels that it does not know."""
    known = set(challenger.spec.classes)
    return [*challenger.spec.classes, *sorted({item.label for item in items} - known)]


def _columns(probabilities: np.ndarray, model: Classifier, classes: list[str]) -> np.ndarray:
    """The probabilities of a model for `classes`: 0 for those that it does not know."""
    frame = pd.DataFrame(probabilities, columns=model.spec.classes)
    return frame.reindex(columns=classes, fill_value=0.0).to_numpy()


def _answers(items: Sequence[Item], classes: list[str], before: np.ndarray, after: np.ndarray) -> pd.DataFrame:
    best = [(np.array(classes, object)[of.argmax(1)], of.max(1).round(6)) for of in (before, after)]
    images = ([getattr(item, name) for item in items] for name in ("name", "sha256", "label"))
    return pd.DataFrame(dict(zip(ANSWERS, [*images, *best[0], *best[1]], strict=True)))


def _told(comparison: Comparison | None) -> dict[str, Any]:
    """What of a comparison is in its record under the same name."""
    known = Record.model_fields.keys() - {"metric", "images", "look"}
    return {name: value for name, value in vars(comparison).items() if name in known} if comparison else {}


def _same(earlier: list[Record], record: Record) -> Record | None:
    """The last decision on these two and this test set, if it was the same."""
    asked = (record.champion, record.challenger, record.metric)
    again = [
        one
        for one in earlier
        if (one.champion, one.challenger, one.metric) == asked and same_test_set(one.test_set, record.test_set)
    ]
    same = again and (again[-1].verdict, again[-1].published) == (record.verdict, record.published)
    return again[-1] if same else None


def main() -> None:
    """Print what the gate says of the model in the working folder, and show it as a page; it is no look that counts."""
    judgement = judge(Path())
    if not judgement:
        print("the model gives the same answers as the champion: there is nothing to decide")
        return
    record = judgement.record
    done = f", and gate.undecided says: {'promote' if record.published else 'hold'}"
    print(f"{record.verdict}{done if record.verdict == 'undecided' else ''}")
    print("\n".join(f"- {shown(reason)}" for reason in record.reasons))
    if record.champion:
        print(
            f"look {record.look} at these {record.images:,} test images; {record.champion} gets {record.broken} right that "
            f"the model gets wrong, which gets {record.fixed} right that it gets wrong (McNemar's p = {record.mcnemar_p:.2g})"
        )
        PAGE.parent.mkdir(exist_ok=True)
        images = ShardSet(Path(PRESIZED), PRESIZED_COLUMNS)
        comparison_page(record.model_dump(mode="json"), judgement.answers, images, PAGE)
        print(f"{PAGE} shows the images")
