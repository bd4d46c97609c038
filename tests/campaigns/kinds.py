"""The kinds of input: what is valid of each, made as the pipeline makes it, and what reads it.

These functions run in the process of a sandbox; their names are those of the kinds.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from breedline.errors import BreedlineError
from breedline.params import load_params
from breedline.shards import PRESIZED_COLUMNS, ShardSet, pack, write_index
from breedline.tables import write_csv
from tests.campaigns.damage import damaged
from tests.campaigns.sandbox import Kind

ROOT = Path(__file__).parents[2]
REFUSALS = (BreedlineError,)
CLASSES = ("beagle", "pug", 'cat, "the" first')
HERE = Path()


def made(name: str) -> tuple[Kind, Callable[..., dict[str, bytes]]]:
    """The kind of that name, and the function from an example to files."""
    kind: Kind = globals()[name]()
    kind = kind._replace(refusals=kind.refusals or REFUSALS)
    return kind, (lambda content: {"archive": content}) if name == "archive" else (
        lambda edits, sealed: damaged(kind.files, edits)
    )


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _picture(shade: int, kind: str = "JPEG", mode: str = "RGB", side: int = 12) -> bytes:
    noise = np.random.default_rng(shade).integers(-20, 20, (side, side + 3, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(noise + shade, 0, 255).astype("uint8")).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def _photos() -> dict[str, bytes]:
    return {f"{label}/{number}.jpg": _picture(20 * number + len(label)) for label in CLASSES for number in range(4)}


def _raw(folder: Path, more: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    files = [(name, len(data), io.BytesIO(data)) for name, data in (_photos() | more).items()]
    write_index(pd.DataFrame(pack(files, folder, "00"), columns=PRESIZED_COLUMNS[:6]), folder)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# From the source to the split


def archive() -> Kind:
    """An archive, which the machine of the campaign has made: the stage download repacks it."""
    from breedline.params import Source
    from stages.download import download

    settings = load_params(ROOT / "params.yaml").download
    limits = {"sources": [Source(url="archive")], "max_files": 2000, "max_total_gb": 0.03, "max_ratio": 50.0}
    params = settings.model_copy(update=limits)

    def read(folder: Path) -> None:
        download(params, raw=HERE / "raw")
        images = ShardSet(HERE / "raw")
        for row in images.index.itertuples(index=False):
            assert _sha256(images.read(row.shard, row.offset, row.size)) == row.sha256
            assert not row.name.startswith("/")
            assert ".." not in row.name.split("/")
        for shard in images.index["shard"].unique():
            with tarfile.open(HERE / "raw" / shard) as tar:
                assert all(info.isreg() for info in tar)

    return Kind({}, read)


def label() -> Kind:
    """What the stage label reads: a table of labels and a list among the downloaded files, corrections, near-duplicates."""
    from stages.label import label as stage

    photos = _photos()
    hashes = [_sha256(data) for data in photos.values()]
    write_csv(
        pd.DataFrame([(name, name.rpartition("/")[0]) for name in photos], columns=["name", "label"]), Path("train.csv")
    )
    files = {
        "train.csv": Path("train.csv").read_bytes(),
        "test.txt": b"# the images to test with\nbeagle/0.jpg 1\npug/1.jpg\n2\n",
        "corrections.csv": (
            f'name,sha256,action,label,reason\nx,{hashes[0]},relabel,pug,seen\nx,{hashes[5]},drop,,"bad, very"\n'
        ).encode(),
        "duplicates.csv": f"sha256,leader\n{hashes[2]},{hashes[1]}\n{hashes[9]},{hashes[8]}\n".encode(),
    }
    settings = load_params(ROOT / "params.yaml").label
    of_table = {"pattern": None, "table": "train.csv", "on": "path", "test_list": "test.txt", "classes": None}
    params = settings.model_copy(update=of_table | {"min_per_class": 1, "map": {}, "max_rejected_pct": 50.0})

    def read(folder: Path) -> None:
        _raw(HERE / "raw", {name: (HERE / name).read_bytes() for name in ("train.csv", "test.txt")})
        outputs = {name: HERE / "out" / name for name in ("labels", "rejected", "classes", "metrics")}
        stage(params, HERE / "raw", HERE / "corrections.csv", HERE / "duplicates.csv", **outputs)

    return Kind(files, read)


def index() -> Kind:
    """A presized shard set and the labels: opened, joined, and each of its images read."""
    from breedline.items import load_items
    from breedline.tables import read_csv

    _presized(HERE / "presized")

    def read(folder: Path) -> None:
        images = ShardSet(HERE / "presized", PRESIZED_COLUMNS)
        labels = read_csv(HERE / "labels.csv", ["name", "label", "split", "sha256"])
        for item in load_items(images, labels)[:1000]:
            assert len(images.read(item.shard, item.offset, item.size)) == item.size

    files = _files(HERE / "presized")
    return Kind(
        {f"presized/{name}": files[name] for name in sorted(files, reverse=True)} | {"labels.csv": _labels()}, read
    )


def presize() -> Kind:
    """A raw shard set and the labels, which the stage presize reads."""
    from stages.presize import presize as stage

    _raw(HERE / "raw", {"a.png": _picture(90, "PNG", side=40), "b.gif": _picture(7, "GIF", "P")})
    params = load_params(ROOT / "params.yaml").presize.model_copy(update={"shorter_side": 10})

    def read(folder: Path) -> None:
        stage(params, HERE / "raw", HERE / "labels.csv", presized=HERE / "presized", workers=1)
        ShardSet(HERE / "presized", PRESIZED_COLUMNS)

    files = _files(HERE / "raw")
    changed = {f"raw/{name}": files[name] for name in sorted(files, reverse=True)} | {"labels.csv": _labels()}
    return Kind(changed, read, seconds=3)  # for up to 10,000 images


def image() -> Kind:
    """Image files of each format."""
    from breedline.images import Undecodable, presize_image, shorter_side

    buffers = {f"{kind}-{mode}": _picture(99, kind, mode, 20) for kind, mode in _FORMATS}
    progressive, animated = io.BytesIO(), io.BytesIO()
    Image.open(io.BytesIO(_picture(5))).save(
        progressive, "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0"
    )
    frames = [Image.open(io.BytesIO(_picture(shade))) for shade in (1, 2, 3)]
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    files = buffers | {"JPEG-progressive": progressive.getvalue(), "WEBP-animated": animated.getvalue()}

    def read(folder: Path) -> None:
        changed = next((path for path in HERE.iterdir() if path.read_bytes() != files[path.name]), HERE / "JPEG-RGB")
        data = changed.read_bytes()
        shorter_side(data[: 2**20])
        made = presize_image(data, 16, 90)
        with Image.open(io.BytesIO(made.data)) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            assert picture.size == (made.width, made.height)

    return Kind(files, read, refusals=(Undecodable,))


_FORMATS = [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "1"),
    ("GIF", "P"), ("BMP", "RGB"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("TIFF", "CMYK"), ("TIFF", "1"),
]  # fmt: skip


# What people write


def params() -> Kind:
    """params.yaml, all of whose mistakes are told, each on a line."""
    files = {
        "params.yaml": (ROOT / "params.yaml").read_bytes(),
        "photos.yaml": (ROOT / "presets/photos.yaml").read_bytes(),
    }

    def read(folder: Path) -> None:
        for name in files:
            load_params(HERE / name)

    return Kind(files, read, lines=100)


def corrections() -> Kind:
    """The table of corrections."""
    from breedline.corrections import read_corrections

    rows = [f'{n}.jpg,{_sha256(bytes([n]))},{"drop," if n % 3 else "relabel,pug"},"it is, I think"\n' for n in range(9)]

    def read(folder: Path) -> None:
        table = read_corrections(HERE / "corrections.csv")
        assert set(table["action"]) <= {"relabel", "drop"}
        assert table["sha256"].is_unique

    return Kind({"corrections.csv": ("name,sha256,action,label,reason\n" + "".join(rows)).encode()}, read)


def decisions() -> Kind:
    """Both tables of decisions, in which somebody then decides, and takes that back."""
    from breedline.decisions import Decision, Decisions

    hashes = [_sha256(bytes([number])) for number in range(9)]
    rows = [f"{n}.jpg,{sha256},{'drop,' if n % 2 else 'relabel,pug'},why\n" for n, sha256 in enumerate(hashes[:3])]
    kept = [f"{n}.jpg,{sha256},beagle,seen\n" for n, sha256 in enumerate(hashes[3:6])]
    files = {
        "corrections.csv": ("name,sha256,action,label,reason\n" + "".join(rows)).encode(),
        "kept.csv": ("name,sha256,label,reason\n" + "".join(kept)).encode(),
    }

    def read(folder: Path) -> None:
        tables = Decisions(HERE / "corrections.csv", HERE / "kept.csv", dict.fromkeys(hashes, "beagle"))
        for sha256, action, label in (
            (hashes[0], "keep", "beagle"),
            (hashes[3], "drop", ""),
            (hashes[8], "relabel", "pug"),
        ):
            found = tables.read().get(sha256)
            decision = Decision("=a\r\n.jpg", sha256, action, label, "why")
            tables.decide(decision, found and found.label)
            assert tables.read()[sha256].label == label
        for _ in range(3):
            tables.undo()

    return Kind(files, read, seconds=3)  # for six decisions, with 44,000 lines before them


def dvc() -> Kind:
    """dvc.yaml, dvc.lock and params.yaml, as plan reads them."""
    from dvc.repo import Repo

    from flows.plan import plan, rows

    files = {
        "dvc.yaml": (
            b"stages:\n"
            b"  a: {cmd: cat in > a, deps: [in], params: [a], outs: [a], meta: {prefect: {retries: 2, timeout: 60}}}\n"
            b"  b:\n    cmd: echo ${b.x} && cat a > b\n    desc: two\n    deps: [a]\n    params: [b]\n    outs: [b: {cache: false}]\n"
            b'  c:\n    foreach: [1, 2]\n    do:\n      cmd: echo ${item} > c${item}\n      deps: [b]\n      metrics: ["c${item}": {cache: false}]\n'
        ),
        "params.yaml": b"a: {depth: 1, hue: red}\nb: {x: 1, y: [1, 2]}\n",
        "in": b"1\n",
        "a": b"1\n",
    }
    Path(".dvc").mkdir()
    for name, content in files.items():
        Path(name).write_bytes(content)
    Repo.init(no_scm=True, force=True).close()
    with Repo() as repo:
        repo.reproduce()
    files["dvc.lock"] = Path("dvc.lock").read_bytes()

    def read(folder: Path) -> None:
        Path(".dvc").mkdir()
        Path(".dvc/config").write_text("[core]\n    no_scm = True\n")
        rows(plan(Path()))

    # who writes these files is trusted: DVC reads a megabyte of them in several seconds
    return Kind(files, read, seconds=20)


# What the pipeline and others have made


def bundle() -> Kind:
    """A bundle, with a photo to predict."""
    from breedline.bundle import FILES, SPEC
    from breedline.classifier import Classifier, Photo
    from tests import bundles

    bundles.bundle(bundles.graph(beside=bundles.FEATURES))
    photo = Photo("a.png", bundles.picture("red"))

    def seal(folder: Path) -> None:
        try:
            spec = json.loads((HERE / "models" / SPEC).read_bytes())
            spec["files"] = {name: _sha256((HERE / "models" / name).read_bytes()) for name in FILES}
            spec["sha256"] = ""
            text = (json.dumps(spec, indent=2, ensure_ascii=False) + "\n").encode()
            spec["sha256"] = _sha256(text)
            (HERE / "models" / SPEC).write_bytes((json.dumps(spec, indent=2, ensure_ascii=False) + "\n").encode())
        except (ValueError, TypeError, RecursionError):
            pass  # no JSON any more, or other than a mapping

    def read(folder: Path) -> None:
        Classifier.load("models").predict([photo])

    names = (SPEC, "model.onnx", "config.json", "README.md", "model.safetensors")
    return Kind({f"models/{name}": Path("models", name).read_bytes() for name in names}, read, seal)


def neighbours() -> Kind:
    """A file of training photos."""
    from safetensors.numpy import load, save

    from breedline import neighbours as of
    from tests.breedline.test_neighbours import FILE, MODEL, written

    content = written()

    def seal(folder: Path) -> None:
        try:
            tensors = load(FILE.read_bytes())
            note = json.loads(tensors["note"].tobytes())
            for sha256 in ("", None):
                note["sha256"] = _sha256(FILE.read_bytes()) if sha256 is None else sha256
                text = json.dumps(note, separators=(",", ":"), ensure_ascii=False).encode()
                FILE.write_bytes(save({**tensors, "note": np.frombuffer(text, np.uint8)}))
        except Exception:  # noqa: S110 - then it is no such file any more
            pass

    def read(folder: Path) -> None:
        of.read(FILE, MODEL, 4).nearest(np.array([1, 2, 3, 4], np.float32), 3)

    return Kind({str(FILE): content}, read, seal)


def _presized(folder: Path) -> None:
    folder.mkdir()
    photos = _photos()
    entries = pack([(name, len(data), io.BytesIO(data)) for name, data in photos.items()], folder, "00")
    rows = [(*entry, 12, 15, "kept", entry.sha256) for entry in entries]
    write_index(pd.DataFrame(rows, columns=PRESIZED_COLUMNS), folder)


def _labels() -> bytes:
    rows = [
        (name, name.rpartition("/")[0], ("train", "valid", "test")[n % 3], _sha256(data), len(data))
        for n, (name, data) in enumerate(_photos().items())
    ]
    write_csv(pd.DataFrame(rows, columns=["name", "label", "split", "sha256", "size"]), Path("labels.csv"))
    return Path("labels.csv").read_bytes()


def suspects() -> Kind:
    """The tables that `breedline review` shows."""
    from breedline.review import Review

    _presized(HERE / "presized")
    hashes = [_sha256(data) for data in _photos().values()]
    rows = [
        (
            f"{n}",
            hashes[n],
            "train",
            CLASSES[n // 4],
            "pug",
            0.25,
            0.5,
            0.125,
            n < 2,
            f"{hashes[1]} {hashes[2]}",
            hashes[5],
        )
        for n in range(4)
    ]
    columns = "name sha256 split label suggested label_probability suggested_probability score likely like_label like_suggested"
    write_csv(pd.DataFrame(rows, columns=columns.split()), HERE / "suspects.csv")
    files = {"suspects.csv": Path("suspects.csv").read_bytes(), "labels.csv": _labels()}
    files["presized/index.csv"] = (HERE / "presized/index.csv").read_bytes()
    volume = (HERE / "presized/00-00000.tar").read_bytes()

    def read(folder: Path) -> None:
        (HERE / "presized/00-00000.tar").write_bytes(volume)
        paths = (HERE / name for name in ("suspects.csv", "presized", "labels.csv", "corrections.csv", "kept.csv"))
        review = Review(*paths)
        json.dumps(review.told(), allow_nan=False)
        for sha256 in review.suspects:
            review.picture(sha256)

    return Kind(files, read)


def records() -> Kind:
    """The decisions of the gate."""
    from datetime import UTC, datetime

    from flows.decisions import Record, decided, look_at, write

    record = Record(
        verdict="undecided", published=False, reasons=["too few images"], time=datetime(2026, 1, 1, tzinfo=UTC),
        champion="classifier@v1.2.0", challenger="a" * 64, metric="accuracy", champion_value=0.5, challenger_value=0.75,
        difference=0.25, interval=(-0.125, 0.5), level=0.95, fixed=3, broken=1, mcnemar_p=0.5, images=8,
        images_to_decide=100, look=1, test_set=["ab", "cd"], megabytes=1.5, slowdown=1.0,
    )  # fmt: skip
    write(HERE, record)
    write(HERE, record.model_copy(update={"challenger": "b" * 64, "champion": None}))

    def read(folder: Path) -> None:
        look_at(decided(HERE), "classifier@v1.2.0", "a" * 64, ["ab", "cd"])

    return Kind({f"decisions/{name}": content for name, content in _files(HERE / "decisions").items()}, read)


def report() -> Kind:
    """The tables and numbers that the stage report reads."""
    from breedline.params import Report
    from stages.report import report as stage
    from tests.pages import INPUTS, add_curves, found

    add_curves(found(HERE / "found", ["cat", "dog", "elm"], 24))
    inputs = {name: HERE / path for name, path in INPUTS.items()}
    settings = (ROOT / "params.yaml").read_bytes()

    def read(folder: Path) -> None:
        Path("params.yaml").write_bytes(settings)
        stage(Report(thumbnails=5), **inputs, settings=Path("params.yaml"), page=Path("index.html"))

    files = _files(HERE / "found")
    for name in list(files):
        if name.endswith(".tar"):
            files[name] = files.pop(name)  # last
    return Kind(files, read, seconds=3, reserved=4000)
