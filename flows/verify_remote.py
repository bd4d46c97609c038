"""`python -m flows.verify_remote`: what the DVC remote lacks of what dvc.lock names; sent again from the cache."""

import sys
from pathlib import Path

from breedline.errors import BreedlineError
from flows.publish import verify


def main() -> int:
    """Print what was found and done; the exit code is 1 if something is lost."""
    try:
        result = verify(Path())
    except BreedlineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for what, items in (("sent again", result.repaired), ("lost: in no cache either", result.lost)):
        for item in items:
            print(f"{item.name} ({item.oid}): {what}")
    print(result)
    return int(bool(result.lost))


if __name__ == "__main__":
    sys.exit(main())
