"""Every model is one of timm, by name: its own body and pooling, and a head of one linear layer.

Pretrained weights come out of the folder that the weights stage has filled; nothing here touches the network. timm is
imported where it is used, as it takes as long as torch: by then the stages decode images.
"""

import struct
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from breedline.architectures import HUB, PINNED, Known
from breedline.errors import BreedlineError
from breedline.pretrained import read_note
from breedline.timm_names import timm_names

MISFITS = (
    *(RuntimeError, SafetensorError, EOFError, struct.error),  # of a damaged file; RuntimeError of other layers, too
    *(LookupError, ValueError, TypeError, AttributeError, AssertionError),  # of timm's renaming, which expects its own
)
"""What reading a file of weights raises if it is damaged, no state dict, or that of another architecture."""


def known_architectures() -> list[Known]:
    """Every name that timm lists, plain and tagged, sorted; `make lock` writes them into architectures.csv."""
    import timm

    return [_known(name) for name in sorted({*timm.list_models(), *timm.list_models(pretrained=True)})]


def _known(name: str) -> Known:
    import timm

    config = timm.get_pretrained_cfg(name)
    full = f"{config.architecture}.{config.tag}" if config.tag else name
    if PINNED.search(config.url or ""):
        url = config.url
    elif config.hf_hub_id:
        url = HUB.format(config.hf_hub_id)
    else:
        return Known(name, "", "")
    return Known(name, full, "" if name != full or url == HUB.format(f"timm/{full}") else url)


def create_model(arch: str, n_classes: int) -> nn.Module:
    """The model with random weights. Raises BreedlineError for the few encoders of timm that cannot classify."""
    import timm

    model = timm.create_model(arch, num_classes=n_classes)
    if not hasattr(model, "get_classifier"):
        raise BreedlineError(f"{arch} has no head for classes: choose another train.arch")
    return model


def load_pretrained(arch: str, n_classes: int, folder: Path) -> nn.Module | None:
    """The model with the pretrained weights in `folder`; None if the note there says that there are none.

    A head of another number of classes than the file's stays random.

    Raises:
        BreedlineError: the weights do not fit `arch`.
    """
    from timm.models import load_state_dict

    note = read_note(folder)
    if note.file is None:
        return None
    try:
        # weights_only: a pickle may run code, this loads tensors and nothing else
        state = load_state_dict(str(folder / note.file), device="cpu", weights_only=True)
        pretrained = _with_its_own_head(arch, timm_names(state)).state_dict()
    except MISFITS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = textwrap.shorten(lines[-1], 200, placeholder=" …")
        raise BreedlineError(
            f"the weights {note.source} are not those of {arch} ({reason}): mend weights.source"
        ) from error
    model = create_model(arch, n_classes)
    fits = {name: value.shape for name, value in model.state_dict().items()}
    model.load_state_dict(
        {name: value for name, value in pretrained.items() if value.shape == fits.get(name)}, strict=False
    )
    return model


def _with_its_own_head(arch: str, state: dict[str, Tensor]) -> nn.Module:
    """The model with the head that `state` holds, if any: so timm misses no tensor, but would with another head."""
    import timm

    if not state:
        raise ValueError("there are no weights in it")  # timm would look for others in the network
    config = timm.get_pretrained_cfg(arch)
    head = next(
        (state[f"{name}.weight"] for name in _classifiers(config.classifier) if f"{name}.weight" in state), None
    )
    overlay: dict[str, Any] = {"state_dict": state}
    if head is not None and len(head) != config.num_classes + (config.label_offset or 0):  # trained by somebody else
        overlay |= {"num_classes": len(head), "label_offset": 0}
    n_classes = overlay.get("num_classes", config.num_classes)
    try:
        return timm.create_model(arch, pretrained=True, num_classes=n_classes, pretrained_cfg_overlay=overlay)
    except RuntimeError:
        if head is not None:
            raise
        overlay["num_classes"] = 0  # a body without a head
        return timm.create_model(arch, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)


def statistics(arch: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in 0 to 1, of the images that `arch` was pretrained on, as timm notes them."""
    import timm

    config = timm.get_pretrained_cfg(arch)
    return config.mean, config.std


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the head sees of normalised images (images, 3, side, side): pooled features (images, n_features)."""
    return model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]


def has_linear_head(model: nn.Module) -> bool:
    """Whether one linear layer turns features into logits."""
    head, *others = _heads(model)
    return not others and isinstance(head, nn.Linear)


def divide_logits(model: nn.Module, temperature: float) -> None:
    """Divide the weights of the head, so that all logits are divided by `temperature`. A head that is not linear takes 1 only."""
    if temperature != 1:
        with torch.no_grad():
            for parameter in linear_head(model).parameters():
                parameter.div_(temperature)


def linear_head(model: nn.Module) -> nn.Linear:
    """The layer that turns features into logits. Raises BreedlineError where it is not one linear layer."""
    head = _heads(model)[0]
    if not has_linear_head(model) or not isinstance(head, nn.Linear):
        raise BreedlineError(
            f"the head of a {type(model).__name__} is not one linear layer: set train.freeze_epochs to a number"
        )
    return head


def layer_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters by timm's groups of layers, from the first layers on; those of the head last and alone.

    Models that timm does not group (MetaFormer, for one) have two groups: the body and the head.
    """
    from timm.models import group_parameters

    head = {id(parameter): parameter for layer in _heads(model) for parameter in layer.parameters()}
    groups: Iterable[list[nn.Parameter]] = [list(model.parameters())]
    if hasattr(model, "group_matcher"):
        groups = group_parameters(model, model.group_matcher(coarse=False), return_values=True).values()  # type: ignore[operator]
    bodies = [[parameter for parameter in group if id(parameter) not in head] for group in groups]
    return [*filter(None, bodies), list(head.values())]


def _heads(model: nn.Module) -> list[nn.Module]:
    """The layers that make logits: most models have one; some a second for distillation, or (VOLO) for image patches."""
    classifier = model.get_classifier()  # type: ignore[operator]
    heads = list(classifier) if isinstance(classifier, tuple | list) else [classifier]
    names = _classifiers(model.pretrained_cfg["classifier"])  # type: ignore[index, arg-type]
    return heads + [layer for name, layer in model.named_modules() if name in names and layer not in heads]


def _classifiers(named: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of the layers that timm's config calls the classifier."""
    return (named,) if isinstance(named, str) else named or ()
