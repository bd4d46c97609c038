"""params.yaml as a typed, frozen model: one section per stage and the gate, each setting documented beside its field.

The whole file is checked before any stage does any work, and all mistakes are reported together.
"""

import contextlib
import difflib
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from breedline.architectures import Architecture, pretrained_name
from breedline.errors import BreedlineError, one_line
from breedline.pattern import compile_pattern
from breedline.urls import redacted

BETWEEN, MOST_MISTAKES = "\n  ", 50
"""What stands between mistakes, and how many are told."""


MAX_BYTES = 200_000
"""A longer params.yaml is not read."""
DEEPEST = 100
"""Mappings and lists within each other, in a YAML file."""
_short = reprlib.Repr()  # of a value in a mistake: what a few aliases of YAML stand for can fill the memory
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring, _short.maxother = 2, 10, 10, 200, 200


class ParamsError(BreedlineError):
    """params.yaml says something that cannot be meant. Each mistake has a line of its own, up to MOST_MISTAKES."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message)
        first, *mistakes = map(one_line, redacted(message).split(BETWEEN))
        if len(mistakes) > MOST_MISTAKES:
            mistakes = [*mistakes[:MOST_MISTAKES], f"and {len(mistakes) - MOST_MISTAKES} more"]
        self.args = (BETWEEN.join([first, *mistakes]),)


class _Section(BaseModel):
    # No setting may be called size or nfiles: DVC's run-cache overlooks keys of these names (its issue 10296), and would
    # restore the results of another value.
    # strict: `epochs: "3"` is a mistake, not a three
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), BeforeValidator(lambda v: v.lower() if type(v) is str else v)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
BatchSize = Annotated[int, Field(gt=0, le=16384)]
"""Whoever may only ask for a run may not ask for memory without bound."""


class Source(_Section):
    """Where images come from."""

    url: str = Field(min_length=1)
    """`digits` (embedded), a local archive or folder, or the url of one: http(s)://, s3://, gs://, az://."""
    sha256: Sha256 | None = None
    """Of the archive's bytes: pins the data. A folder has none."""
    include: list[str] | None = None
    """Globs on the whole path in the source; `*` crosses `/`. None given: every file."""
    exclude: list[str] | None = None
    """Globs of what to leave out, of what was included. None given: hidden files (`breedline.sources.HIDDEN`)."""

    @model_validator(mode="before")
    @classmethod
    def _a_plain_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class Download(_Section):
    """Settings of the download stage."""

    sources: list[Source] = Field(min_length=1)
    """New data is a new entry at the end: the volumes of the earlier ones keep their bytes."""
    timeout: float = Field(gt=0)
    """Seconds without a byte before the connection is given up and tried again."""
    max_files: Positive
    """More files than this in one source are refused."""
    max_total_gb: float = Field(gt=0)
    """A source that unpacks to more is refused."""
    max_ratio: float = Field(gt=0)
    """An archive that unpacks to more than this many times its size is refused: images hardly compress."""


class WeightsFile(_Section):
    """Pretrained weights from a place of one's own: a state dict as safetensors or as a torch file."""

    url: str = Field(min_length=1)
    sha256: Sha256 | None = None


class Weights(_Section):
    """Settings of the weights stage."""

    source: Literal["none", "imagenet"] | WeightsFile
    """`imagenet` for the architecture that train names, `none` to start from random ones, or `{url, sha256}`."""
    timeout: float = Field(gt=0)
    """Seconds without a byte before the connection is given up and tried again."""


class Duplicates(_Section):
    """Settings of the duplicates stage."""

    similarity: float | None = Field(ge=0.5, le=1)
    """From which correlation of their grey values, at 16 x 16 pixels, on two images are near-duplicates; null: there are none.

    For images that look alike at this size without being so (digits, scanned forms, X-rays), null or nearly 1.
    """


class Label(_Section):
    """Settings of the label stage."""

    pattern: str | None = None
    """RE2 expression with a group `label`; it must match the whole name."""
    table: str | None = None
    """Instead of a pattern: a CSV of name,label among the downloaded files, by its path there."""
    on: Literal["name", "path"]
    """What the pattern (or the table's `name`) is about: the file's name, or its whole path in the source."""
    map: dict[str, str]
    """Labels to rename or merge: read label -> label to use."""
    classes: Positive | list[str] | None
    """The number of classes, or their names, if known: anything else is then an error."""
    valid_pct: Fraction
    test_pct: Fraction
    seed: Seed
    """Another seed is another split."""
    test_list: str | None
    """A text file among the downloaded ones: the first word of each line names an image of the test split."""
    max_rejected_pct: float = Field(ge=0, le=100)
    """More rejected files than this, in percent, are an error."""
    min_per_class: Positive
    """A class with fewer images is an error."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            compile_pattern(pattern)
        return pattern

    @field_validator("map")
    @classmethod
    def _seen_by_dvc(cls, labels: dict[str, str]) -> dict[str, str]:
        if overlooked := {"size", "nfiles"} & set(labels):
            raise ValueError(
                f"DVC overlooks a key called {overlooked.pop()}: rename that class in data/corrections.csv"
            )
        return labels

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.pattern is None) == (self.table is None):
            raise ValueError("set either pattern or table, and leave the other null")
        if self.valid_pct + self.test_pct >= 1:
            raise ValueError("valid_pct and test_pct leave nothing to train on: together they must be below 1")
        return self


class Presize(_Section):
    """Settings of the presize stage."""

    shorter_side: int = Field(ge=8, le=4096)
    """Pixels; larger images are reduced to it, smaller ones stay as they are."""
    quality: int = Field(ge=1, le=95)
    """JPEG quality of what has to be encoded anew."""


class Augment(_Section):
    """fastai's `aug_transforms`: how far each training image may be changed."""

    flip: bool
    max_rotate: float = Field(ge=0, le=180)
    """Degrees."""
    max_zoom: float = Field(ge=1)
    max_warp: float = Field(ge=0, lt=1)
    max_lighting: float = Field(ge=0, lt=1)
    min_scale: float = Field(gt=0, le=1)
    """Smallest part of the image, by area, that the random crop may take."""


class Train(_Section):
    """Settings of the train stage."""

    arch: Architecture
    """An architecture of timm: plain (resnet34), or with the tag of its weights (resnet34.tv_in1k), as timm lists them."""
    image_size: int = Field(ge=8, le=2048)
    """Pixels: the model sees a square of this side."""
    batch_size: Literal["auto"] | BatchSize
    """`auto`: 32."""
    freeze_epochs: Literal["fit"] | Annotated[int, Field(ge=0)]
    """Epochs with the body frozen, the new head alone learning.

    `fit`: none; the head is fitted to convergence on features that the frozen body computes once.
    """
    epochs: Literal["auto"] | Annotated[int, Field(ge=0, lt=2**31)]
    """Epochs with everything learning; 0 to publish the fitted head alone.

    `auto`: 6; with fewer than 512 images, as many as make 32 steps, but at least 4 and at most 16; from scratch, three
    times that.
    """
    base_lr: Literal["auto", "finder"] | Annotated[float, Field(gt=0, lt=10)]
    """Learning rate of the head while the body is frozen; fine-tuning goes up to half of it.

    `auto`: 0.002, and 0.005 from scratch; `finder`: the valley of fastai's learning-rate finder.
    """
    lr_ratio: float = Field(ge=1)
    """How many times the learning rate of the first layers that of the head is, in fine-tuning."""
    freeze_statistics: bool
    """Keep the batch-norm statistics of a pretrained body, rather than take those of each batch."""
    loss: Literal["cross_entropy", "bce"]
    """`bce` gives every class its own probability, so that an image may be none of them."""
    label_smoothing: Fraction
    augment: Augment
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    """`auto`: bf16 on a GPU or CPU with instructions for it, else fp16 on CUDA, else fp32."""
    channels_last: bool
    compile: Literal["auto", "none", "default", "reduce-overhead"]
    """How the model's kernels are started. `auto`: as CUDA graphs on one GPU, else `none`, one by one.

    The others are modes of `torch.compile`, which has to compile before each phase.
    """
    keep_images: Literal["auto", "gpu", "ram", "disk"]
    """Where decoded images are kept between epochs; `disk`: nowhere, each epoch decodes them again.

    `auto`: on the GPU if they fit, else in memory, else on disk.
    """
    deterministic: bool
    """On a GPU: equal numbers in every run, at some cost in speed. A CPU's are always equal."""
    seed: Seed


class Suspects(_Section):
    """Settings of the suspects stage."""

    batch_size: BatchSize
    most: Annotated[int, Field(ge=1, le=100_000)]
    """Lines of each of its tables, at most: the worst are kept."""


class Evaluate(_Section):
    """Settings of the evaluate stage."""

    batch_size: BatchSize
    top_k: Positive
    tta: int = Field(ge=0, le=100)
    """Augmented views averaged with the plain one; 0 for none."""
    none_error: Fraction
    """Share of the validation images that may be taken for none of the classes: it decides from which probability on."""
    top_losses: int = Field(gt=0, le=1000)
    """Pictures on the sheet of the worst mistakes."""
    neighbours: int = Field(ge=0, le=10_000)
    """Training photos that are kept in the report, at most, for `breedline app` to show the most similar of; 0 for none.

    A model whose head is not one linear layer gets none.
    """


class Report(_Section):
    """Settings of the report stage."""

    thumbnails: int = Field(ge=0, le=1000)
    """Small pictures in the page, at most: of mistakes, suspects, near-duplicates and what was right."""


class Bundle(_Section):
    """Settings of the bundle stage."""

    license: str = Field(min_length=1, max_length=100)
    """Licence of the model, for its card: an SPDX identifier in lower case, or other."""


class Gate(_Section):
    """When a scheduled run may publish what it has trained: docs/gate.md."""

    metric: Literal["accuracy", "balanced_accuracy", "macro_f1"]
    """Of the test images, which the champion and the challenger both answer."""
    margin: float = Field(gt=0, lt=1)
    """A challenger is promoted once a loss of this much is excluded."""
    alpha: float = Field(gt=0, lt=0.5)
    """How often a test set may promote what is worse by the margin, and how often hold what is equal, over all looks at it."""
    undecided: Literal["hold", "promote"]
    """What happens to a challenger that the test images prove neither good enough nor worse."""
    class_images: Positive
    """Classes with at least as many test images may not lose recall."""
    max_calibration_rise: float = Field(gt=0, le=1)
    """The calibration error may be this much above the champion's."""
    max_mb: float = Field(gt=0)
    """A larger bundle is held."""
    max_slowdown: float = Field(gt=0)
    """A challenger that takes more than this many times the champion's seconds for an image is held."""


def _is_place(text: str) -> str:
    if "://" not in text and not text.startswith("/"):
        raise ValueError(
            "is relative, and a run works in a folder of its own: give an absolute path, or a url such as s3://…"
        )
    return text


Place = Annotated[str, AfterValidator(_is_place)]


class Score(_Section):
    """Settings of the flow that scores new photos."""

    photos: Place | None
    """The folder of the photos, an absolute path or url; null if there is none."""
    predictions: Place | None
    """The folder that gets the table, an absolute path or url."""
    format: Literal["csv", "parquet"]
    """Parquet needs the package pyarrow."""


class Params(_Section):
    """The whole of params.yaml."""

    download: Download
    weights: Weights
    duplicates: Duplicates
    label: Label
    presize: Presize
    train: Train
    suspects: Suspects
    evaluate: Evaluate
    report: Report
    bundle: Bundle
    gate: Gate
    score: Score

    @model_validator(mode="after")
    def _weights_are_known(self) -> Self:
        arch = self.train.arch
        if self.weights.source == "imagenet" and not pretrained_name(arch):
            raise ValueError(
                f"weights.source: there are no imagenet weights of train.arch {arch!r}: "
                "take another architecture, or set weights.source to none or the url of a file"
            )
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if self.train.epochs == 0 and (self.train.freeze_epochs != "fit" or self.weights.source == "none"):
            raise ValueError(
                "train.epochs: with 0 there is only a fitted head, which takes freeze_epochs: fit and pretrained weights"
            )
        return self


def load_params(path: Path) -> Params:
    """Read and check the whole file.

    Raises:
        ParamsError: with every mistake at once: the key, the value, and what would be right.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ParamsError(f"{path} has over {MAX_BYTES:,} bytes: put what is long into a table (label.table)")
        check_nesting(path)
        settings = YAML(typ="safe").load(path.read_text("utf-8"))  # YAML 1.2, as DVC reads it: `on` is a word
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing: `git checkout {path}` restores it") from None
    except OSError as error:
        raise ParamsError(f"{path} cannot be read ({error.strerror}): `git checkout {path}` restores it") from error
    except (YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a number of thousands of digits
        raise ParamsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ParamsError(f"{path} holds no settings: copy one of the files in presets/")
    try:
        return Params.model_validate(settings)
    except ValidationError as error:
        raise ParamsError(BETWEEN.join([f"{path} needs mending:", *_describe(error)])) from error


def check_nesting(path: Path) -> None:
    """Refuse a YAML file that is nested so deeply that its reader, which recurses in C, would end this process.

    Raises:
        ParamsError: it is. What else may be wrong with it, its reader tells.
    """
    depth = 0
    with contextlib.suppress(OSError, YAMLError, UnicodeError):
        for event in YAML(typ="safe").parse(path.read_text("utf-8")):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > DEEPEST:
                raise ParamsError(f"{path} is nested over {DEEPEST} deep: `git checkout {path}` restores it")


def _describe(error: ValidationError) -> list[str]:
    known = _keys(Params)
    mistakes: dict[str, list[str]] = {}
    for mistake in error.errors():
        # pydantic names the branch of a union in the location; the file knows only keys and positions
        loc = [part for part in mistake["loc"][:-1] if isinstance(part, int) or part in known]
        last = mistake["loc"][-1] if mistake["loc"] else ""
        unknown = mistake["type"] == "extra_forbidden"
        key = ".".join(map(str, [*loc, last] if unknown or last in known or isinstance(last, int) else loc))
        if unknown:
            near = difflib.get_close_matches(str(last), known, 1, 0.75)
            mistakes[key] = [f": unknown setting; did you mean {near[0]}?" if near else ": unknown setting; remove it"]
        elif mistake["type"] == "missing":
            mistakes[key] = [": missing; the files in presets/ have every setting"]
        else:
            what = mistake["msg"].removeprefix("Value error, ").removeprefix("Input ")
            value = "" if isinstance(mistake["input"], dict) else f" = {_short.repr(mistake['input'])}"
            mistakes.setdefault(key, [f"{value}: {what}"]).append(what)
    return [
        f"{key or 'the file'}{', or '.join([first, *more[1:]])}" for key, (first, *more) in sorted(mistakes.items())
    ]


def _keys(model: type[BaseModel]) -> set[str]:
    inner = [f.annotation for f in model.model_fields.values() if isinstance(f.annotation, type)]
    sections = [section for section in inner if issubclass(section, BaseModel)]
    return set(model.model_fields).union(*map(_keys, sections), Source.model_fields, WeightsFile.model_fields)
