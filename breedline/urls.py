"""Urls without their secrets, as they may be shown in logs, errors and reports."""

import re

URL = re.compile(
    r"""(?<![a-z0-9+.-])(?P<scheme>[a-z][a-z0-9+.-]*:/+)
        (?:[^/?\#\n]*@ | (?=[^\s/?\#@]*:)\S*@)?  # user and password; the latter may hold a / or a ?
        (?P<place>[^\s?\#]*)
        (?P<query>[?\#]\S+)?""",
    re.VERBOSE | re.IGNORECASE,
)
PUNCTUATION = "\"'`)>]},.;:!?"
"""At the end of a query it belongs to the sentence around the url."""


def redacted(text: str) -> str:
    """`text` without the user, password, query and fragment of each url in it.

    All of a query goes, since any of its values may be a token or a signature: `https://host/pets.tgz?…`.
    """
    return URL.sub(_bare, text)


def _bare(url: re.Match[str]) -> str:
    query = url["query"] or ""
    secret = query.rstrip(PUNCTUATION)
    shown = f"{query[0]}…" if secret else ""
    return url["scheme"] + url["place"] + shown + query[len(secret) :]
