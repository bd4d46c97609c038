"""Labels read from names by a regular expression.

RE2 matches in linear time, whatever the pattern. Only a pattern that RE2 cannot express (look-around,
back-references) goes to the `regex` module, under a time limit.
"""

from collections.abc import Callable

import re2
import regex

from breedline.errors import BreedlineError

SECONDS_PER_NAME = 0.5
Matcher = Callable[[str], str | None]


def compile_pattern(pattern: str) -> Matcher:
    """A function from a name to its label, or to None where the pattern does not match the whole name.

    Raises:
        ValueError: the pattern is not a regular expression, or has no group called `label`.
    """
    try:
        options = re2.Options()
        options.log_errors = False
        compiled = re2.compile(pattern, options)
    except re2.error:
        return _backtracking(pattern)
    if "label" not in compiled.groupindex:
        raise ValueError(NO_GROUP)

    def match(name: str) -> str | None:
        found = compiled.fullmatch(name)
        return found and found.group("label")

    return match


NO_GROUP = "has no group called label: write (?P<label>…) around the part of the name that is the label"


def _backtracking(pattern: str) -> Matcher:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    if "label" not in compiled.groupindex:
        raise ValueError(NO_GROUP)

    def match(name: str) -> str | None:
        try:
            found = compiled.fullmatch(name, timeout=SECONDS_PER_NAME)
        except TimeoutError as error:
            raise BreedlineError(
                f"label.pattern took over {SECONDS_PER_NAME} s on {name!r}: write it without look-around, as RE2 allows"
            ) from error
        return found and found.group("label")

    return match
