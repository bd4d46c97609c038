"""All that was found, as one page that opens anywhere: the numbers, the mistakes, the data, and how to make it again."""

import logging
from pathlib import Path

from breedline import report as contents
from breedline.checkpoints import remove_those_of
from breedline.document import Thumbnails, write_page
from breedline.edge import run
from breedline.params import Report, load_params
from breedline.shards import INDEX, PRESIZED_COLUMNS, ShardSet
from breedline.tables import read_csv, read_json

log = logging.getLogger("breedline")
SUSPECT = ["name", "sha256", "split", "label", "suggested", "label_probability", "suggested_probability", "likely"]
PAIR = [f"{other}{what}" for other in ("", "other_") for what in ("name", "sha256", "split", "label")]


def report(
    params: Report,
    presized: Path,
    labels: Path,
    rejected: Path,
    classes: Path,
    labelled: Path,
    trained: Path,
    evaluated: Path,
    training: Path,
    evaluation: Path,
    suspects: Path,
    near_duplicates: Path,
    settings: Path,
    *,
    page: Path,
) -> None:
    """Write the page: one file that asks no network for anything, and can be read without its script.

    Args:
        labelled: metrics of label.
        trained: metrics of train.
        evaluated: metrics of evaluate.
        training: folder of train's report.
        evaluation: folder of evaluate's report.
        suspects: table of the labels that may be wrong, the worst first.
        near_duplicates: table of pairs of near-duplicates whose label or split differ.
        settings: params.yaml, all of which the page shows.

    Raises:
        BreedlineError: evaluate's report is of other images than the labels, or something is damaged.
    """
    remove_those_of(suspects)
    images = ShardSet(presized, PRESIZED_COLUMNS)
    table = read_csv(labels, ["name", "label", "split", "sha256"])
    answers = contents.read_answers(images, table, evaluation, read_json(evaluated, contents.Evaluated))
    doubtful = read_csv(suspects, SUSPECT, numbers=["label_probability", "suggested_probability"])
    pairs = read_csv(near_duplicates, [*PAIR, "similarity"], numbers=["similarity"])
    shown = Thumbnails(images, contents.pictured(answers, doubtful, pairs, params.thumbnails), params.thumbnails)
    counts = read_csv(classes, ["class", "train", "valid", "test"], ["train", "valid", "test"])
    left_out = [read_csv(rejected, ["name", "reason"]), read_csv(presized / "rejected.csv", ["name", "reason"])]
    known = load_params(settings)
    write_page(
        "report.html",
        page,
        shown,
        settings=known,
        sections=contents.sections(known),
        images=answers.metrics.test["images"],
        headline=contents.headline(answers),
        scores=contents.class_rows(answers, counts),
        matrix=contents.matrix(answers, shown),
        mistakes=contents.mistakes(answers, shown),
        learning=contents.learning(training),
        pictures=contents.training_pictures(training),
        training=read_json(trained, contents.Trained).model_dump(exclude_none=True),
        calibration=contents.calibration(answers),
        thresholds=contents.thresholds(answers),
        labelled=list(contents.flattened(read_json(labelled, contents.Labelled).root)),
        rejects=contents.rejects(*left_out),
        suspects=contents.suspected(doubtful, shown),
        pairs=contents.near(pairs, shown),
        hashes=contents.hashes([labels, presized / INDEX]),
        paths={
            "page": page.as_posix(),
            "evaluation": evaluation.as_posix(),
            "suspects": suspects.as_posix(),
            "near_duplicates": near_duplicates.as_posix(),
            "rejected": rejected.as_posix(),
            "presized": presized.as_posix(),
        },
    )
    log.info("report: %s, %.1f MB with %d thumbnails", page, page.stat().st_size / 1e6, len(shown))


if __name__ == "__main__":
    run(report)
