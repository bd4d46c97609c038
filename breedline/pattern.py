"""Labels read from names by a regular expression.

RE2 matches in linear time and bounded memory, whatever the pattern. Only a pattern that RE2 cannot express (look-around,
back-references) goes to the `regex` module, which has neither bound: its time is limited by a time-out, its memory by the
size of what it compiles.
"""

import math
import re
import sys
from collections.abc import Callable

import re2
import regex

from breedline.errors import BreedlineError

MAX_LENGTH = 5000
"""Characters of a pattern: room for some hundred class names, compiled in well under a second."""
MAX_COPIES = 200_000
"""Characters of a pattern in which `regex`, as it compiles, has copied what is repeated by a count: about 100 MB."""
COUNT = re.compile(r"\{([^{}]*)\}")
SECONDS_PER_NAME = 0.5
NO_GROUP = "has no group called label: write (?P<label>…) around the part of the name that is the label"
Matcher = Callable[[str], str | None]


def compile_pattern(pattern: str) -> Matcher:
    """A function from a name to its label, or to None where the pattern does not match the whole name.

    Equal labels are one object, so that those of a million names take no memory to speak of.

    Raises:
        ValueError: the pattern is not a regular expression, has no group called `label`, or would take too much memory.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(
            f"is {len(pattern)} characters long, at most {MAX_LENGTH} are allowed: use label.table instead"
        )
    try:
        options = re2.Options()
        options.log_errors = False
        compiled = re2.compile(pattern, options)
    except re2.error:
        return _backtracking(pattern)
    if "label" not in compiled.groupindex:
        raise ValueError(NO_GROUP)
    group = compiled.groupindex["label"]

    def match(name: str) -> str | None:
        # of a str, re2 would count the characters before each group: five times the work
        found = compiled.fullmatch(name.encode())
        label = found and found[group]
        return None if label is None else sys.intern(label.decode("utf-8", "replace"))

    return match


def _backtracking(pattern: str) -> Matcher:
    copies = math.prod(map(_largest, COUNT.findall(pattern)))
    if len(pattern) * copies > MAX_COPIES:
        raise ValueError(f"repeats by counts such as {{2}} up to {copies} times: use * or +, or fewer counts")
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    except RecursionError:
        raise ValueError("is nested too deeply: write it with fewer groups") from None
    if "label" not in compiled.groupindex:
        raise ValueError(NO_GROUP)

    def match(name: str) -> str | None:
        try:
            found = compiled.fullmatch(name, timeout=SECONDS_PER_NAME)
        except TimeoutError as error:
            raise BreedlineError(
                f"label.pattern took over {SECONDS_PER_NAME} s on {name!r}: write it without look-around, as RE2 allows"
            ) from error
        label = found and found.group("label")
        return None if label is None else sys.intern(label)

    return match


def _largest(count: str) -> int:
    """The larger number of a count such as 2 or 2,5, at least 1; white space within it means nothing in (?x)."""
    return max(1, *(int(re.sub(r"\D", "", number) or 0) for number in count.split(",")))
