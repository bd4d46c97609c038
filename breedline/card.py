"""The model card: what a person has to know of a model before using it, as the Hugging Face Hub shows it."""

from collections.abc import Mapping

import pandas as pd
import timm
from ruamel.yaml import YAML
from ruamel.yaml.compat import StringIO
from scipy.stats import binomtest

from breedline.architectures import architectures
from breedline.bundle import BundleSpec

WORST = 5
"""Classes in the table of those that the model knows least."""


def model_card(
    spec: BundleSpec,
    numbers: Mapping[str, Mapping[str, float]],
    scores: pd.DataFrame,
    labels: pd.DataFrame,
    licence: str,
    pretrained: str | None,
) -> str:
    """The text of README.md.

    Args:
        spec: what is known of the bundle but for its files.
        numbers: those of evaluate.
        scores: evaluate's table of the scores per class (class, precision, recall, f1, images), the worst first.
        labels: the table of labels, for how many images there were.
        pretrained: what training began with, as TrainedSpec has it.
    """
    test = numbers["test"]
    counts = labels["split"].value_counts()
    low, high = binomtest(round(test["accuracy"] * test["images"]), int(test["images"])).proportion_ci(method="wilson")
    worst = scores[scores["images"] > 0].head(WORST)
    rows = "\n".join(
        f"| {_cell(str(row['class']))} | {float(row['f1']):.3f} | {float(row['precision']):.3f} | {float(row['recall']):.3f} | {row['images']} |"
        for row in worst.to_dict("records")
    )
    size = spec.preprocessing.input_size
    many = "a probability of its own for each class" if spec.loss == "bce" else "probabilities that sum to 1"
    return f"""---
{_front_matter(spec, test, licence, pretrained)}---

# {spec.arch}, {len(spec.classes)} classes

Tells {len(spec.classes)} classes of photos apart. Made by Breedline, whose pipeline downloads, labels, trains and evaluates.

## Use

```python
import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True)

from transformers import pipeline
pipeline("image-classification", model="FOLDER")("photo.jpg")

from breedline import Classifier
Classifier.load("FOLDER").predict(["photo.jpg"])
```

`model.onnx` takes `images` (batch, 3, {size}, {size}) and gives `logits` (batch, {len(spec.classes)}): {many} after {"a sigmoid" if spec.loss == "bce" else "softmax"}.

## Data

{_beginning(pretrained)}

{counts.get("train", 0)} images to train on, {counts.get("valid", 0)} to validate, {counts.get("test", 0)} to test. Their SHA-256 are in breedline.json.

## How good it is

On the {test["images"]:.0f} test images, which training never saw:

| accuracy | 95 % interval (Wilson) | macro F1 | log loss | calibration error | before calibration |
|---|---|---|---|---|---|
| {test["accuracy"]:.4f} | {low:.4f} to {high:.4f} | {test["macro_f1"]:.4f} | {test["log_loss"]:.4f} | {test["calibration_error"]:.4f} | {test["calibration_error_before"]:.4f} |

The classes that it knows least:

| class | F1 | precision | recall | test images |
|---|---|---|---|---|
{rows}

## Intended use and limits

For photos like those it was trained on. It always finds some class; a photo whose highest probability is below
{spec.none_below:.3f} probably shows none of them. Probabilities were calibrated on the validation images (temperature
{spec.temperature:.3f}, already in the weights), and hold for photos of the same kind only.

## Preprocessing

Breedline first reduces a photo to {spec.preprocessing.shorter_side} pixels on its shorter side (Lanczos) and keeps it as
JPEG of quality {spec.preprocessing.quality}; the central square of that is resized to {size} pixels (bicubic). timm and transformers do the second step
to the bit; of a photo of full size they skip the first, so that their probabilities differ slightly.

## Made by

{", ".join(f"{name} {version}" for name, version in spec.versions.items())}. `dvc repro` at the same commit makes it again.
"""


def _beginning(pretrained: str | None) -> str:
    if pretrained is None:
        return "Training began with random weights."
    if pretrained in architectures():
        licence = timm.get_pretrained_cfg(pretrained).license or "unknown"
        return f"Training began with timm's weights {pretrained} (licence: {licence})."
    return f"Training began with the weights of {_cell(pretrained)}, whose licence is to be asked there."


def _front_matter(spec: BundleSpec, test: Mapping[str, float], licence: str, pretrained: str | None) -> str:
    known = timm.get_pretrained_cfg(pretrained) if pretrained in architectures() else None
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": "test split", "type": "image"},
            "metrics": [
                {"type": name, "value": test[key]} for name, key in (("accuracy", "accuracy"), ("f1", "macro_f1"))
            ],
        }
    ]
    stream = StringIO()
    YAML(typ="safe").dump(
        {
            "library_name": "timm",
            "pipeline_tag": "image-classification",
            "license": licence,
            **({"base_model": known.hf_hub_id} if known else {}),
            "tags": ["image-classification", "timm", "breedline"],
            "model-index": [{"name": spec.arch, "results": results}],
        },
        stream,
    )
    return stream.getvalue()


def _cell(text: str) -> str:
    """A text of any origin in a cell of a Markdown table, as text and nothing else."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>()#+-!|~&$" else " " if c.isspace() else c for c in text)
