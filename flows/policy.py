"""A stage's run policy for Prefect (retries, timeout, resources), read from its `meta:` in dvc.yaml."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from breedline.errors import BreedlineError


class Policy(BaseModel):
    """The key `prefect` of a stage's `meta:`. DVC ignores `meta:`, and its other keys belong to other tools."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    retries: int = Field(default=0, ge=0)
    retry_delay: Annotated[float, Field(strict=False)] = Field(default=0, ge=0)
    """Seconds before the next attempt."""
    retry_on: list[int] = []
    """The exit codes after which the stage is retried; 128 + n stands for signal n."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds after which an attempt is ended; its exit code is then 124, as of timeout(1)."""
    resources: list[str] = []
    """Global concurrency limits of which the stage holds one slot each while it runs, such as `gpu`."""
    show: list[str] = []
    """Outputs to look at: a .csv becomes a table artifact, an image a picture, a page a line that says where it is."""


def policy_of(stage: str, meta: dict[str, Any]) -> Policy:
    """The policy in `meta`; the default one where it says nothing.

    Raises:
        BreedlineError: with every mistake in it.
    """
    try:
        return Policy.model_validate(meta.get("prefect", {}))
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, m['loc']))}: {m['msg']}" for m in error.errors())
        raise BreedlineError(f"dvc.yaml, {stage}, meta.prefect: {mistakes}") from error
