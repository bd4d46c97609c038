"""The failures that a user can mend. Each message is one line and names the remedy; a bug is any other exception."""


class BreedlineError(Exception):
    """Base of every expected failure; at the edge it becomes one line and `exit_code`."""

    exit_code = 1


class NetworkError(BreedlineError):
    """The other side did not answer as it should; the same call may succeed later (EX_TEMPFAIL)."""

    exit_code = 75
