"""Fetch, verify and repack the images: with the weights stage, the only one that touches the network."""

from pathlib import Path

import pandas as pd

from breedline.edge import run
from breedline.files import new_folder
from breedline.params import Download
from breedline.progress import progress
from breedline.shards import Entry, pack, write_index
from breedline.sources import members


def download(params: Download, *, raw: Path) -> None:
    """Pack the files of every source into the shard set `raw`.

    The volumes of a source depend on that source alone, so a further source leaves the earlier volumes as they were.

    Raises:
        BreedlineError: a source is not there, not whole, not as pinned, or over a cap.
        NetworkError: a server did not answer; what has arrived is kept for the next run.
    """
    with new_folder(raw) as folder, progress("pack files", None) as advance:
        entries: list[Entry] = []
        for number, source in enumerate(params.sources):
            for entry in pack(members(source, params), folder, f"{number:02d}"):
                entries.append(entry)
                advance(1)
        write_index(pd.DataFrame(entries, columns=Entry._fields), folder)


if __name__ == "__main__":
    run(download)
