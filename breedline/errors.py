"""The failures that a user can mend. Each message is one line and names the remedy; a bug is any other exception."""

from breedline.urls import redacted


class BreedlineError(Exception):
    """Base of every expected failure; at the edge it becomes one line and `exit_code`. It shows no secret of a url."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class NetworkError(BreedlineError):
    """The other side did not answer as it should; the same call may succeed later (EX_TEMPFAIL)."""

    exit_code = 75
