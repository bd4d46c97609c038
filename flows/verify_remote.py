"""`breedline verify-remote`: what the DVC remote lacks of what dvc.lock names; sent again from the cache."""

from pathlib import Path

from flows.publish import verify


def main() -> int:
    """Print what was found and done; the exit code is 1 if something is lost."""
    result = verify(Path())
    for what, items in (("sent again", result.repaired), ("lost: in no cache either", result.lost)):
        for item in items:
            print(f"{item.name} ({item.oid}): {what}")
    print(result)
    return int(bool(result.lost))
