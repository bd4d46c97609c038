from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from breedline.findings import _class_pictures
from breedline.pictures import MAX_CLASSES


def test_of_many_classes_the_worst_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr("breedline.findings.f1_picture", lambda *drawn: titles.append(drawn[2]))
    names = [f"class {number}" for number in range(MAX_CLASSES + 20)]
    predictions = pd.DataFrame({"actual": names, "predicted": names[:1] * 20 + names[20:]})
    scores = pd.DataFrame({"class": names, "f1": [0.0] * 20 + [1.0] * MAX_CLASSES, "images": 1})
    _class_pictures(predictions, scores, tmp_path)
    assert titles == [f"Test split: F1 of the worst {MAX_CLASSES} of {len(names)} classes"]
    with Image.open(tmp_path / "confusion.png") as picture:
        assert 2000 < picture.width < 3000
