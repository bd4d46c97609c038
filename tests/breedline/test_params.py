import re
from collections.abc import Callable
from pathlib import Path

import pytest

from breedline.errors import LONGEST
from breedline.params import MAX_BYTES, ParamsError, load_params

ROOT = Path(__file__).parents[2]
Vary = Callable[..., Path]


@pytest.fixture
def vary(tmp_path: Path) -> Vary:
    """A function that writes the project's params.yaml with some of its lines replaced."""

    def write(**replacements: str) -> Path:
        text = (ROOT / "params.yaml").read_text()
        for key, line in replacements.items():
            text, count = re.subn(
                rf"(?m)^( *)(- )?{key}:.*$", lambda found, line=line: f"{found[1]}{found[2] or ''}{line}", text, count=1
            )
            assert count, key
        path = tmp_path / "params.yaml"
        path.write_text(text)
        return path

    return write


def test_all_mistakes_are_reported_at_once(vary: Vary) -> None:
    path = vary(epochs="epochz: 3", loss="loss: mse", pattern="pattern: (", classes="classes: ten", url="url: 3")
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    message = str(caught.value)
    assert "train.epochz: unknown setting; did you mean epochs?" in message
    assert "train.epochs: missing" in message
    assert "train.loss = 'mse': should be 'cross_entropy' or 'bce'" in message
    assert "label.pattern = '(': is not a regular expression" in message
    assert "label.classes = 'ten': should be a valid integer, or should be a valid list" in message
    assert "download.sources.0.url = 3: should be a valid string" in message
    assert len(message.splitlines()) == 7


@pytest.mark.parametrize(
    ("key", "line", "expected"),
    [
        ("pattern", r"pattern: (\d)_\d+\.png", "has no group called label"),
        ("pattern", r"pattern: (?!x)(\d)_\d+\.png", "has no group called label"),
        ("table", "table: labels.csv", "set either pattern or table"),
        ("valid_pct", "valid_pct: 0.9", "leave nothing to train on"),
        ("epochs", 'epochs: "3"', "train.epochs = '3': should be 'auto', or should be a valid integer"),
        ("epochs", "epochs: -1", "train.epochs = -1: should be"),
        ("freeze_epochs", "freeze_epochs: auto", "train.freeze_epochs = 'auto': should be 'fit'"),
        ("batch_size", "batch_size: fit", "train.batch_size = 'fit': should be 'auto'"),
        ("lr_ratio", "lr_ratio: 0.5", "train.lr_ratio = 0.5: should be greater than or equal to 1"),
        ("base_lr", "base_lr: fast", "train.base_lr = 'fast': should be 'auto'"),
        ("url", "url: x\n      sha256: 12", "download.sources.0.sha256"),
        ("neighbours", "neighbours: 1\nextra: 2", "extra: unknown setting; remove it"),
        ("seed", "seed: 9223372036854775808", "label.seed = 9223372036854775808: should be less than"),
        ("channels_last", "channels_last: true\n  seed: -1", "is not YAML: while constructing a mapping"),
        ("epochs", f"epochs: {'9' * 5000}", "is not YAML: Exceeds the limit"),
        ("epochs", f"epochs: {'[' * 40_000}", "is nested over 100 deep"),
        (
            "batch_size",
            "batch_size: 1000000000",
            "train.batch_size = 1000000000: should be 'auto', or should be less than or equal to",
        ),
    ],
)
def test_a_mistake_names_the_key_and_what_would_be_right(vary: Vary, key: str, line: str, expected: str) -> None:
    with pytest.raises(ParamsError, match=re.escape(expected)):
        load_params(vary(**{key: line}))


@pytest.mark.parametrize(
    ("freeze_epochs", "source", "allowed"),
    [("fit", "imagenet", True), ("fit", "none", False), ("1", "imagenet", False), ("0", "none", False)],
)
def test_no_epochs_are_for_a_head_that_is_fitted_to_a_pretrained_body(
    vary: Vary, freeze_epochs: str, source: str, allowed: bool
) -> None:
    path = vary(epochs="epochs: 0", freeze_epochs=f"freeze_epochs: {freeze_epochs}", source=f"source: {source}")
    if allowed:
        assert load_params(path).train.epochs == 0
    else:
        with pytest.raises(
            ParamsError, match=r"train.epochs: with 0 there is only a fitted head, which takes freeze_e"
        ):
            load_params(path)


@pytest.mark.parametrize(
    ("key", "line", "value"),
    [
        ("batch_size", "batch_size: auto", "auto"),
        ("epochs", "epochs: auto", "auto"),
        ("freeze_epochs", "freeze_epochs: 3", 3),
        ("freeze_epochs", "freeze_epochs: fit", "fit"),
        ("base_lr", "base_lr: auto", "auto"),
        ("base_lr", "base_lr: finder", "finder"),
        ("lr_ratio", "lr_ratio: 1", 1),
    ],
)
def test_what_training_may_choose_itself(vary: Vary, key: str, line: str, value: str | int) -> None:
    assert getattr(load_params(vary(**{key: line})).train, key) == value


def test_a_missing_or_broken_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="is missing"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(ParamsError, match="is not YAML") as caught:
        load_params(tmp_path / "params.yaml")
    assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "params.yaml").unlink()
    (tmp_path / "params.yaml").mkdir()
    with pytest.raises(ParamsError, match=r"cannot be read .*directory"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["", "[1, 2]", "5"])
def test_a_file_without_settings_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError, match="holds no settings: copy one"):
        load_params(tmp_path / "params.yaml")


def test_what_a_few_aliases_stand_for_is_not_told_whole(vary: Vary) -> None:
    """A list of a billion words, in 300 bytes."""
    anchors = ["&a0 [x,x,x,x,x,x,x,x,x]", *(f"&a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
    with pytest.raises(ParamsError, match=r"label\.classes") as caught:
        load_params(vary(classes=f"classes: [{', '.join(anchors)}]"))
    assert max(map(len, str(caught.value).split("\n  "))) <= LONGEST


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("# long\n" * MAX_BYTES)
    with pytest.raises(ParamsError, match=r"has over 200,000 bytes: put what is long into a table"):
        load_params(tmp_path / "params.yaml")


def test_yaml_is_read_as_dvc_reads_it(vary: Vary) -> None:
    params = load_params(vary(base_lr="base_lr: 1e-3", seed="seed: 010"))
    assert params.train.base_lr == 0.001
    assert params.label.seed == 10


def test_a_source_may_be_a_plain_url(vary: Vary) -> None:
    assert load_params(vary(url="digits")).download.sources[0].url == "digits"


def test_params_cannot_be_changed(vary: Vary) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_params(vary()).train.epochs = 3  # type: ignore[misc]
