"""What a bundle says of photos when timm, ONNX Runtime and transformers load it: python without_breedline.py FOLDER PHOTO …

It needs these three, torch and torchvision, but nothing of Breedline. Prints a line of JSON for each photo: by library, the
probability of each class. The photos should be presized, as the pipeline's own are, for Breedline's very numbers.
"""

import json
import sys
from pathlib import Path

import onnxruntime
import timm
import torch
from PIL import Image
from transformers import pipeline


def main(folder: str, paths: list[str]) -> None:
    """Print the answers of all three."""
    photos = [Image.open(path).convert("RGB") for path in paths]
    config = json.loads(Path(folder, "config.json").read_text("utf-8"))
    names = config["label_names"]

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    inputs = torch.stack([transform(photo) for photo in photos])
    with torch.inference_mode():
        logits = {"timm": model(inputs)}

    session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    logits["onnxruntime"] = torch.from_numpy(session.run(["logits"], {"images": inputs.numpy()})[0])

    several = "problem_type" in config  # each class has a probability of its own
    found = {
        library: (values.sigmoid() if several else values.softmax(1)).tolist() for library, values in logits.items()
    }
    answers = pipeline("image-classification", model=folder, top_k=len(names))(photos)

    for number, path in enumerate(paths):
        said = {library: dict(zip(names, values[number], strict=True)) for library, values in found.items()}
        said["transformers"] = {answer["label"]: answer["score"] for answer in answers[number]}
        print(json.dumps({"photo": path, **said}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
