"""The nouns of the pipeline: shard sets, patterns, splits, images, learners and bundles. Knows no Prefect.

`from breedline import Classifier` gives what a published model is used with, `breedline.learner("models")` the same for those
who want fastai. They are imported only then, as the stages need no ONNX Runtime.
"""

TYPE_CHECKING = False  # as of typing, whose import would cost more than all of this
if TYPE_CHECKING:
    from breedline.classifier import Classifier
    from breedline.notebook import dataloaders, learner, new_learner

__all__ = ["Classifier", "dataloaders", "learner", "new_learner"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("breedline.classifier" if name == "Classifier" else "breedline.notebook"), name)
