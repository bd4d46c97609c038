"""A data set of test images, from red to blue, and bundles that take a share of the blue ones for red."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from breedline.shards import PRESIZED_COLUMNS, pack, write_index
from breedline.tables import write_csv
from tests.bundles import bundle, graph

SIDE, QUALITY = 8, 95
IMAGES = 200


def images(root: Path, labels: str = "data/labels.csv", presized: str = "data/presized") -> pd.DataFrame:
    """Write the labels and the presized images below `root`; returns the labels."""
    folder = root / presized
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number in range(IMAGES):
        share = (number + 0.5) / IMAGES
        buffer = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE), (round(255 * (1 - share)), 255, round(255 * share))).save(
            buffer, "JPEG", quality=QUALITY, subsampling=0
        )
        files[f"{number:03d}.jpg"] = buffer.getvalue()
    entries = pack(((name, len(data), io.BytesIO(data)) for name, data in files.items()), folder, "00")
    rows = [(*entry, SIDE, SIDE, "kept", entry.sha256) for entry in entries]
    write_index(pd.DataFrame(rows, columns=PRESIZED_COLUMNS), folder)
    table = pd.DataFrame(rows, columns=PRESIZED_COLUMNS)[["name", "sha256"]]
    table["label"] = ["red" if number < IMAGES / 2 else "blue" for number in range(IMAGES)]
    table["split"] = "test"
    write_csv(table, root / labels)
    return table


def train(wrong: float, folder: Path = Path("models"), **spec: object) -> Path:
    """A bundle that gets this share of the images wrong: red, as long as it is 2 - 4 wrong more than blue."""
    weights = 20 * np.array([[1, -1], [4 * wrong, -4 * wrong], [-1, 1]])
    return bundle(graph(weights), folder, classes=["red", "blue"], **spec)
