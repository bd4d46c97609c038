"""The nouns of the pipeline: shard sets, patterns, splits, images, learners and bundles. Knows no Prefect.

`from breedline import Classifier` gives what a published model is used with. It is imported only then, as the stages need
no ONNX Runtime.
"""

TYPE_CHECKING = False  # as of typing, whose import would cost more than all of this
if TYPE_CHECKING:
    from breedline.classifier import Classifier

__all__ = ["Classifier"]


def __getattr__(name: str) -> object:
    if name == "Classifier":
        from breedline.classifier import Classifier

        return Classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
