"""What every peer does with an upload, so that only the serving differs: the same decoding, model and answer."""

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(os.environ["PEER_BUNDLE"])
_MANIFEST = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
CLASSES, INPUT = _MANIFEST["classes"], _MANIFEST["input"]["name"]


def pixels(content):
    """A grey image as (H, W) unsigned bytes."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"))


def session():
    """The model in ONNX Runtime, with the threads that our service gives it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(FOLDER / "model.onnx"), options, providers=["CPUExecutionProvider"])


def answer(p):
    """What a client gets for one row of probabilities."""
    best = int(p.argmax())
    shown = dict(zip(CLASSES, p.tolist(), strict=True))
    return {"class": CLASSES[best], "confidence": shown[CLASSES[best]], "probabilities": shown}
