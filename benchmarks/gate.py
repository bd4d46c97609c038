"""How often the gate is wrong: simulated champions and challengers, whose true accuracies are known.

    python -m benchmarks.gate [--repetitions N]

A challenger is as accurate as its champion, or a point worse, and they differ in their answers to 2, 5 or 10 % of the
images. Beside the gate stands the rule that it has replaced: publish unless the accuracy is lower by more than 0.005.
Then 20 challengers in a row, each a point worse, meet one test set. Exits with 1 if an error is more frequent than it
may be.
"""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.goals import goal
from breedline import comparison
from breedline.comparison import compare, spent
from breedline.params import Gate, load_params
from flows.gate import decide

IMAGES = (260, 1_478, 3_669)
ACCURACIES = (0.95, 0.90)
DIFFERENT = (0.02, 0.05, 0.10)
LOSS = 0.01
CLASSES = 10
RESAMPLES = 999
"""Of the bootstrap, rather than its 9,999: to take minutes."""
LOOKS = 20
WRONG = 0.05
TOLERANCE = 0.005


def main(repetitions: int) -> bool:
    """Print how often each verdict is reached, and whether no error is too frequent."""
    gate = load_params(Path(__file__).parents[1] / "params.yaml").gate
    rng = np.random.default_rng(0)
    most = WRONG + 1.64 * math.sqrt(WRONG * (1 - WRONG) / repetitions)
    table = Table(
        "images", "accuracy", "different", "truth", "promote", "hold", "undecided", "old: publish", "old: hold"
    )
    worst: dict[str, float] = {}
    for images in IMAGES:
        for accuracy in ACCURACIES:
            for different in DIFFERENT:
                for loss in (0.0, LOSS):
                    found = Counter[str]()
                    for _ in range(repetitions):
                        champion = rng.random(images) < accuracy
                        found.update(_verdicts(gate, champion, _challenger(rng, champion, accuracy, different, loss)))
                    shares = {name: count / repetitions for name, count in found.items()}
                    error = f"{images:,} images, {'promoted, a point worse' if loss else 'held, equal'}"
                    worst[error] = max(worst.get(error, 0), shares.get("promote" if loss else "hold", 0))
                    table.add_row(
                        f"{images:,}",
                        f"{accuracy:.2f}",
                        f"{different:.0%}",
                        "a point worse" if loss else "equal",
                        *(f"{shares.get(name, 0):.1%}" for name in ("promote", "hold", "undecided")),
                        *(f"{shares.get(name, 0):.1%}" for name in ("old promote", "old hold")),
                    )
    Console(width=120).print(table)
    print(f"{repetitions:,} repetitions; at most {WRONG:.0%}, plus 1.64 standard errors of the simulation\n")
    met = [goal(f"{error}, %", 100 * share, most=100 * most) for error, share in worst.items()]
    spending = _ever_promoted(gate, rng, repetitions)
    met.append(goal(f"{LOOKS} looks, each a point worse, one promoted, %", 100 * spending, most=100 * most))
    # a look's part of alpha is that of the first look, and this is made alpha
    plain = gate.model_copy(update={"alpha": gate.alpha**2 / spent(gate.alpha, 1)})
    goal("the same, with all of alpha for each look, %", 100 * _ever_promoted(plain, rng, repetitions, counted=False))
    return all(met)


def _challenger(
    rng: np.random.Generator, champion: np.ndarray, accuracy: float, different: float, loss: float
) -> np.ndarray:
    """Whether the challenger is right: it differs on a share of `different` images, and loses `loss` more than it gains."""
    lost, gained = (different + loss) / 2 / accuracy, (different - loss) / 2 / (1 - accuracy)
    return champion ^ (rng.random(len(champion)) < np.where(champion, lost, gained))


def _verdicts(gate: Gate, champion: np.ndarray, challenger: np.ndarray, look: int = 1) -> tuple[str, str]:
    target = np.arange(len(champion)) % CLASSES
    classes = [str(number) for number in range(CLASSES)]
    answers = (_probabilities(target, right) for right in (champion, challenger))
    decision = decide(gate, compare(gate, classes, target, *answers, look=look), megabytes=0)
    return decision.verdict, "old promote" if challenger.mean() >= champion.mean() - TOLERANCE else "old hold"


def _probabilities(target: np.ndarray, right: np.ndarray) -> np.ndarray:
    """0.9 for the answer, which is the next class where it is wrong."""
    answer = np.where(right, target, (target + 1) % CLASSES)
    return np.where(np.arange(CLASSES) == answer[:, None], 0.9, 0.1 / (CLASSES - 1))


def _ever_promoted(gate: Gate, rng: np.random.Generator, repetitions: int, *, counted: bool = True) -> float:
    """Share of the test sets that one of LOOKS challengers, each a point worse, gets promoted by."""
    images, accuracy, different = IMAGES[1], ACCURACIES[0], DIFFERENT[1]
    wrong = 0
    for _ in range(repetitions):
        champion = rng.random(images) < accuracy
        wrong += any(
            "promote"
            in _verdicts(gate, champion, _challenger(rng, champion, accuracy, different, LOSS), look if counted else 1)
            for look in range(1, LOOKS + 1)
        )
    return wrong / repetitions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=main.__doc__)
    parser.add_argument("--repetitions", type=int, default=1_000, help="of each case")
    with mock.patch.object(comparison, "RESAMPLES", RESAMPLES):
        sys.exit(not main(parser.parse_args().repetitions))
