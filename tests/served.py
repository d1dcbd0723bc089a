"""Tiny bundles in a registry, and the real service in a process of its own, for tests of the page and the client."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from serve_process import Server, onnx_bytes
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from project.bundle.manifest import open_bundle, write_manifest
from project.bundle.registry import Registry

HOSTILE = "<img src=x onerror=document.title='owned'>"
SHADES = ["bright", "dark", HOSTILE, *(f"shade_{i}" for i in range(11))]  # more classes than are shown at once
POINTS = {"[PAD]": (0, 0), "[UNK]": (0, 0), "shocking": (2, 0), "miracle": (3, 0), "minister": (0, 2), "said": (0, 1)}


def _model(nodes, inputs, outputs, tensors):
    value = helper.make_tensor_value_info
    return onnx_bytes(nodes, inputs, [value(name, TensorProto.FLOAT, ["batch", n]) for name, n in outputs], tensors)


def shades(path, sign=1.0, task="shades", classes=SHADES):
    """A bundle that calls an image bright or dark by its mean; with `sign=-1` another one, which is always wrong."""
    path.mkdir(parents=True)
    signs, tensor, node = [sign, -sign, *[0.0] * (len(classes) - 2)], helper.make_tensor, helper.make_node
    nodes = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("Flatten", ["pixels"], ["rows"]),
        node("ReduceMean", ["rows", "axis"], ["embedding"], keepdims=1),
        node("Sub", ["embedding", "half"], ["above"]),
        node("Mul", ["above", "sign"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    tensors = [
        tensor("half", TensorProto.FLOAT, [1], [127.0]),
        tensor("sign", TensorProto.FLOAT, [1, len(signs)], [s / 20 for s in signs]),
        tensor("axis", TensorProto.INT64, [1], [1]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8])
    ends = [("probabilities", len(classes)), ("embedding", 1)]
    (path / "model.onnx").write_bytes(_model(nodes, [images], ends, tensors))
    grey = np.stack([np.full((8, 8), v, np.uint8) for v in (240, 10, 200)])
    np.savez(path / "samples.npz", inputs=grey, labels=np.array([0, 1, 1]))
    spec = {"name": "images", "dtype": "uint8", "layout": "NHW", "shape": [None, 8, 8], "channels": 1}
    return _bundle(path, task, "image", classes, spec, ends, {"test/acc": 0.9, "test/n": 100})


def news(path, fields=("title", "text"), task="fake_news"):
    """A bundle that counts two kinds of words."""
    path.mkdir(parents=True)
    tensor, node = helper.make_tensor, helper.make_node
    nodes = [
        node("Gather", ["points", "ids"], ["each"]),
        node("ReduceSum", ["each", "axis"], ["embedding"], keepdims=0),
        node("Softmax", ["embedding"], ["probabilities"], axis=1),
    ]
    points = np.array([*POINTS.values()], np.float32)
    tensors = [
        tensor("points", TensorProto.FLOAT, points.shape, points),
        tensor("axis", TensorProto.INT64, [1], [1]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    ends = [("probabilities", 2), ("embedding", 2)]
    (path / "model.onnx").write_bytes(_model(nodes, [ids], ends, tensors))
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(POINTS)}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    (path / "tokenizer.json").write_text(words.to_str(), encoding="utf-8")
    rows = [["The minister said no", "On Monday, she said."], ["Shocking miracle", "They do not want you to know."]]
    np.savez(path / "samples.npz", texts=np.array([row[: len(fields)] for row in rows]), labels=np.array([1, 0]))
    spec = {"name": "ids", "dtype": "int64", "layout": "NL", "shape": [None, None], "max_length": 64}
    spec |= {"vocabulary": len(POINTS), "fields": list(fields)}
    return _bundle(path, task, "text", ["fake", "real"], spec, ends, {})


def _bundle(path, task, kind, classes, spec, ends, metrics):
    about = {"task": task, "kind": kind, "classes": classes, "input": spec, "metrics": metrics}
    about["outputs"] = {name: {"dtype": "float32", "shape": [None, n]} for name, n in ends}
    write_manifest(path, **about, created="2026-01-01T00:00:00+00:00", versions={}, run="20260101-toy", commit="c0ffee")
    return open_bundle(path)


def registry(folder, *bundles):
    """A registry in which each bundle is in production."""
    place = Registry(folder)
    for bundle in bundles:
        place.alias(bundle.task, "production", place.add(bundle).name)
    return place


class Service(Server):
    """A server whose registry is in its folder, with settings by the names of their variables."""

    def __init__(self, folder, **settings):
        given = {"PROJECT_ROOT": str(folder), "OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in settings.items()}
        super().__init__(Path(folder), env=given, ready=False, log=given.get("PROJECT_SERVE_LOG"), drain=0)

    def get(self, path, **headers):
        """The body of an answer, as JSON where it is."""
        answer = self.client.get(path, headers=headers).raise_for_status()
        self.headers = answer.headers
        return answer.json() if "json" in answer.headers["content-type"] else answer.text
