"""The failures that a user can mend. Each message is one line and names the remedy; a bug is any other exception."""

import re

from breedline.urls import redacted

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor or turns the direction of text, and bytes that are no UTF-8."""
LONGEST = 500
"""Characters of a message."""


def shown(text: str) -> str:
    """`text` without what could control a terminal."""
    return CONTROL.sub("\ufffd", text)


def one_line(text: str) -> str:
    """`text` as one short line to show; of what is too long the beginning, and the end, which names the remedy."""
    text = shown(re.sub(r"\s*[\r\n]\s*", " ", text.strip()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 203]} … {text[-200:]}"


class BreedlineError(Exception):
    """Base of every expected failure; at the edge it becomes one line and `exit_code`.

    A message may quote what anybody has written: it shows no secret of a url, and is a short line whatever that is.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redacted(message)))


class NetworkError(BreedlineError):
    """The other side did not answer as it should; the same call may succeed later (EX_TEMPFAIL)."""

    exit_code = 75
