"""Urls without their secrets, as they may be shown in logs, errors and reports."""

import re
import string

URL = re.compile(
    r"""(?<![a-z0-9+.-])(?P<scheme>[a-z][a-z0-9+.-]*:/+)
        (?:[^/?\#\n]*@ | (?=[^\s/?\#@]*:)\S*@)?  # user and password; the latter may hold a / or a ?
        (?P<place>[^\s?\#]*)
        (?P<query>[?\#]\S+)?""",
    re.VERBOSE | re.IGNORECASE,
)


def redacted(text: str) -> str:
    """`text` without the user, password, query and fragment of each url in it.

    All of a query goes, since any of its values may be a token or a signature: `https://host/pets.tgz?…`.
    """
    return URL.sub(_bare, text)


def _bare(url: re.Match[str]) -> str:
    query = url["query"] or ""
    after = query[len(query.rstrip(string.punctuation)) :]  # belongs to the sentence around the url
    return url["scheme"] + url["place"] + (f"{query[0]}…{after}" if query else "")
