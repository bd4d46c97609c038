"""Bad input of every kind is read, or refused in one line: within limits, and without a trace outside of its folder.

An example is valid files and what is done to them: cut, spliced, flipped, lines repeated, words swapped or replaced by what
is odd (damage.py); archives are built step by step of parts that lie. A sandbox of each kind (sandbox.py) reads the
examples, and its limits are the kernel's. What a campaign has found stands below as examples of their own.

`make test-long` does MANY examples of each kind, in rounds, whose number is their seed, and prints what became of them; where
BREEDLINE_COUNTS names a folder, also as JSON there. An example that fails is written to the folder `found`, as small as
hypothesis can make it, and read first from then on. With BREEDLINE_CAMPAIGN_SECONDS=600 each kind takes little longer than
these, however many examples that are.
"""

import ast
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.campaigns.damage import EDITS, Edit
from tests.campaigns.sandbox import Answer, Sandbox
from tests.conftest import LONG

pytestmark = pytest.mark.long
KINDS = (
    "params", "corrections", "decisions", "label", "index", "presize", "image", "bundle", "neighbours", "suspects",
    "records", "dvc", "report",
)  # fmt: skip
WELL = ("accepted", "refused")
LETTERS = 100_000
"""Of an example that is kept, at most."""
SHORT, MANY = 25, 100_000
ROUND = 200
"""Examples of one seed, which is the number of the round: so each can be made again."""
FOUND = Path(__file__).with_name("found")
SECONDS = float(os.environ.get("BREEDLINE_CAMPAIGN_SECONDS", "inf"))
"""For each kind, at most, after which no further round begins."""


class Campaign:
    """A sandbox, and what became of the examples that it has read."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self._sandbox = kind, Sandbox(kind, folder)
        self._began = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.slowest = self.most = 0.0
        self._found = FOUND / f"{kind}.txt"
        self._failed = ""

    def read(self, *example: Any) -> Answer:
        answer = self._sandbox.read(*example)
        if answer.outcome.startswith("over ") and answer.outcome.endswith(" s"):
            # once more: beside other work, the same may take twice the time of the CPU
            answer = self._sandbox.read(*example)
        if answer.outcome not in WELL:
            self._failed = f"{example!r}\n"
        self.counts[answer.outcome] += 1
        self.slowest, self.most = max(self.slowest, answer.seconds), max(self.most, answer.megabytes)
        return answer

    def read_found(self) -> None:
        """Read what has failed once."""
        for line in self._lines():
            is_well(self.read(*ast.literal_eval(line)))

    def _lines(self) -> list[str]:
        return self._found.read_text("utf-8").splitlines(keepends=True) if self._found.exists() else []

    def rounds(self) -> Iterator[tuple[int, settings]]:
        """The settings of one round after the other, until MANY examples are read; in the short form of a small one."""
        for number in range(MANY // ROUND if LONG else 1):
            if time.monotonic() - self._began < SECONDS:
                print(f"{self.kind}: round {number}")
                yield (
                    number,
                    settings(
                        max_examples=ROUND if LONG else SHORT,
                        database=None,
                        phases=[Phase.generate, Phase.shrink],
                        suppress_health_check=list(HealthCheck),
                    ),
                )

    def close(self) -> None:
        self._sandbox.close()
        if self._failed and len(self._failed) < LETTERS and self._failed not in self._lines():
            FOUND.mkdir(exist_ok=True)
            with self._found.open("a", encoding="utf-8") as file:
                file.write(self._failed)
        counts = {
            "examples": self.counts.total(),
            **self.counts,
            "slowest_cpu_seconds": round(self.slowest, 3),
            "highest_mb": round(self.most, 1),
        }
        told = {
            "campaign": f"bad input: {self.kind}",
            "counts": counts,
            "seconds": round(time.monotonic() - self._began, 1),
        }
        print(json.dumps(told))
        if folder := os.environ.get("BREEDLINE_COUNTS"):
            Path(folder, f"bad-input-{self.kind}.json").write_text(json.dumps(told, indent=2) + "\n")


@pytest.fixture(scope="module", params=KINDS)
def campaign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    running = Campaign(request.param, tmp_path_factory.mktemp(request.param) / "sandbox")
    yield running
    running.close()


def is_well(answer: Answer) -> None:
    assert answer.outcome in WELL, f"{answer.outcome}: {answer.said}"


def test_what_is_valid_is_accepted(campaign: Campaign) -> None:
    assert campaign.read([], True) == Answer(
        "accepted", seconds=pytest.approx(0, abs=10), megabytes=pytest.approx(0, abs=300)
    )


def test_what_was_found_once_is_read_or_refused(campaign: Campaign) -> None:
    campaign.read_found()


def test_bad_input_is_read_or_refused_in_one_line(campaign: Campaign) -> None:
    def read(edits: list[Edit], sealed: bool) -> None:
        is_well(campaign.read([tuple(edit) for edit in edits], sealed))

    for number, of_round in campaign.rounds():
        seed(number)(of_round(given(EDITS, st.booleans())(read)))()
