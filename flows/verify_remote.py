"""`breedline verify-remote`: what is missing or altered on the DVC remote is sent again from the cache."""

from pathlib import Path

from flows.publish import verify


def main(deep: bool) -> int:
    """Print what was found and done; the exit code is 1 if something is lost.

    Args:
        deep: read every object.
    """
    result = verify(Path(), deep=deep)
    for what, items in (("sent again", result.repaired), ("lost: in no cache either", result.lost)):
        for item in items:
            print(f"{item.name} ({item.oid}): {what}")
    print(result)
    return int(bool(result.lost))
