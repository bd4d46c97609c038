"""`python -m benchmarks.label [IMAGES]`: time and peak memory of the label stage, by default for a million images.

Only the index is real: the volumes are sparse files, as the stage reads none of their bytes.
"""

import hashlib
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from breedline.params import load_params
from breedline.shards import COLUMNS, INDEX
from stages.label import label

PER_VOLUME, IMAGE_BYTES, CLASSES = 3000, 40_960, 37


def main(images: int) -> None:
    """Make the index, label its images, and print the seconds and the memory (imports included)."""
    section = load_params(Path(__file__).parents[1] / "params.yaml").label
    params = section.model_copy(update={"pattern": r"(?P<label>.+)_\d+\.jpg", "classes": CLASSES})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _make(folder / "raw", images)
        (folder / "corrections.csv").write_text("name,sha256,action,label,reason\n")
        (folder / "duplicates.csv").write_text("sha256,leader\n")
        outputs = {name: folder / name for name in ("labels", "rejected", "classes", "metrics")}
        wall, cpu = time.perf_counter(), time.process_time()
        label(params, folder / "raw", folder / "corrections.csv", folder / "duplicates.csv", **outputs)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{images:,} images: {wall:.1f} s, of the CPU {cpu:.1f} s; {megabytes:.0f} MB at the peak")


def _make(raw: Path, images: int) -> None:
    raw.mkdir()
    with (raw / INDEX).open("w") as index:
        print(*COLUMNS, sep=",", file=index)
        for number in range(images):
            volume, place = divmod(number, PER_VOLUME)
            shard = f"00-{volume:05d}.tar"
            if place == 0:
                (raw / shard).touch()
                os.truncate(raw / shard, PER_VOLUME * IMAGE_BYTES)
            name = f"images/breed_number_{number * 7919 % CLASSES}_of_the_world_{number}.jpg"
            sha256 = hashlib.sha256(str(number).encode()).hexdigest()
            print(name, shard, place * IMAGE_BYTES, IMAGE_BYTES, sha256, "JPEG", sep=",", file=index)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10**6)
