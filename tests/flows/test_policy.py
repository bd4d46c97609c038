"""What a stage's `meta:` may say."""

from typing import Any

import pytest

from breedline.errors import BreedlineError
from flows.policy import Policy, policy_of


@pytest.mark.parametrize("meta", [{}, {"prefect": {}}, {"another tool": {"retries": "many"}}])
def test_who_says_nothing_gets_the_default(meta: dict[str, Any]) -> None:
    assert policy_of("a", meta) == Policy()


def test_numbers_may_be_whole() -> None:
    policy = policy_of("a", {"prefect": {"retries": 2, "retry_delay": 3, "retry_on": [75], "timeout": 5}})
    assert (policy.retries, policy.retry_delay, policy.retry_on, policy.timeout) == (2, 3, [75], 5)


def test_every_mistake_is_named_with_its_stage() -> None:
    with pytest.raises(BreedlineError) as raised:
        policy_of(
            "train@x", {"prefect": {"retry": 1, "retries": -1, "retry_on": ["75"], "timeout": 0, "resources": "gpu"}}
        )
    message = str(raised.value)
    assert message.startswith("dvc.yaml, train@x, meta.prefect: ")
    assert all(f"{key}: " in message for key in ("retry", "retries", "retry_on.0", "timeout", "resources"))
    assert "\n" not in message
