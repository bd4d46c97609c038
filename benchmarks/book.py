"""Chapter 5 of fast.ai's book as its reader would write it, on the images of a labels.csv: the peer of the train stage.

    python -m benchmarks.book train|test --labels CSV --files FOLDER --weights FOLDER [--epochs FROZEN THEN | --until TIME]

The settings are those of params.yaml in the working folder: architecture, sizes, augmentation. All else is fastai's own:
its head, batch size, loaders and schedule. `train` saves the model, `test` writes evaluate.json, as the evaluate stage does.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.vision import all as book
from timm.models import load_state_dict

from breedline.metrics import summary
from breedline.params import Params, load_params
from breedline.pretrained import read_note
from breedline.tables import read_csv, write_json
from breedline.timm_names import timm_names
from breedline.zoo import statistics

MODEL = "book"
"""The name under which fastai saves the model in the working folder."""


def book_learner(params: Params, table: pd.DataFrame, files: Path, weights: Path, batch_size: int = 64) -> book.Learner:
    """The chapter's learner on the splits `train` and `valid`; 64 is fastai's own batch size.

    Args:
        table: name (of a file in `files`), label, split.
        weights: the folder of the weights stage; its weights, if any, get into the body without a network.
    """
    augment = params.train.augment
    block = book.DataBlock(
        blocks=(book.ImageBlock, book.CategoryBlock),
        get_x=book.ColReader("name", pref=files),
        get_y=book.ColReader("label"),
        splitter=book.ColSplitter("is_valid"),
        item_tfms=book.Resize(params.presize.shorter_side),
        batch_tfms=[
            *book.aug_transforms(
                size=params.train.image_size,
                min_scale=augment.min_scale,
                do_flip=augment.flip,
                **{name: getattr(augment, name) for name in ("max_rotate", "max_zoom", "max_warp", "max_lighting")},
            ),
            book.Normalize.from_stats(*statistics(params.train.arch)),
        ],
    )
    shown = table[table["split"] != "test"]
    dls = block.dataloaders(shown.assign(is_valid=shown["split"] == "valid"), bs=batch_size)
    learn = book.vision_learner(
        dls, params.train.arch, metrics=book.error_rate, pretrained=False, path=Path(), model_dir=Path()
    )
    if file := read_note(weights).file:
        _load_body(learn.model[0].model, weights / file)
    return learn


def _load_body(body: book.nn.Module, file: Path) -> None:
    """Load all but the classifier, which fastai replaces."""
    state = timm_names(load_state_dict(str(file), weights_only=True))
    misfits = body.load_state_dict(state, strict=False)
    missing = [name for name in misfits.missing_keys if not name.endswith("num_batches_tracked")]
    assert not missing, missing
    assert all(name.startswith("classifier.") for name in misfits.unexpected_keys), misfits.unexpected_keys


def train(learn: book.Learner, epochs: tuple[int, int] | None, until: float | None) -> int:
    """`fine_tune` for so many epochs of the head and of everything; or one, and then as many as end at about `until`.

    Returns:
        How many epochs there were, in all.
    """
    with learn.no_bar():
        if epochs:
            learn.fine_tune(epochs[1], freeze_epochs=epochs[0])
            return sum(epochs)
        assert until
        began = time.time()
        learn.fine_tune(0, freeze_epochs=1)
        left = max(1, round((until - time.time()) / (time.time() - began)))
        learn.fine_tune(left, freeze_epochs=0)
    return 1 + left


def test(learn: book.Learner, table: pd.DataFrame) -> dict[str, float]:
    """Metrics on the split `test`."""
    shown = table[table["split"] == "test"]
    with learn.no_bar():
        probabilities, _ = learn.get_preds(dl=learn.dls.test_dl(shown))
    vocab = list(learn.dls.vocab)
    return summary(probabilities.numpy(), np.array([vocab.index(label) for label in shown["label"]]), top_k=1)


def main(arguments: argparse.Namespace) -> None:
    """Train and save the model, or load and test it."""
    params = load_params(Path("params.yaml"))
    table = read_csv(arguments.labels, ["name", "label", "split"])
    book.set_seed(params.train.seed)
    learn = book_learner(params, table, arguments.files, arguments.weights)
    if arguments.what == "train":
        epochs = train(learn, arguments.epochs, arguments.until)
        learn.save(MODEL, with_opt=False)
        write_json({"epochs": epochs}, Path("train.json"))
    else:
        learn.load(MODEL)
        write_json({"test": test(learn, table)}, Path("evaluate.json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.book", description=main.__doc__)
    parser.add_argument("what", choices=("train", "test"))
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--epochs", nargs=2, type=int, metavar=("FROZEN", "THEN"))
    parser.add_argument("--until", type=float, help="when to end, in seconds since 1970")
    main(parser.parse_args())
