"""A small image task whose model is trained in a second without torch: ten shapes, and a bundle that tells them."""

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from project.bundle.manifest import write_manifest

CLASSES = [f"shape {i}" for i in range(10)]


def shapes(n, seed=0):
    """Images of 28 x 28 bytes and their labels: a pattern of blocks a class, moved by a pixel at most, with noise."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    patterns = np.kron(fixed.random((10, 6, 6)) < 0.45, np.ones((3, 3)))  # 18 x 18
    labels = rng.integers(0, 10, n)
    images = np.zeros((n, 28, 28))
    for image, label, (top, left) in zip(images, labels, rng.integers(4, 7, (n, 2)), strict=True):
        image[top : top + 18, left : left + 18] = patterns[label] * rng.uniform(90, 220)
    return np.clip(images + rng.normal(0, 45, images.shape), 0, 255).astype(np.uint8), labels


@dataclass
class Shapes:
    """What `make_reference` asks of a task's data."""

    task: str = "shapes"
    hash: str = "5" * 64

    @property
    def classes(self):
        return CLASSES

    def split(self, name):
        return shapes({"train": 1500, "val": 2000, "test": 1000}[name], {"train": 1, "val": 2, "test": 3}[name])


def _trained(images, labels, width=48):
    """Weights of two layers: a fixed random one, and one by ridge regression; and what the logits are multiplied by."""
    rng = np.random.default_rng(0)
    x = images.reshape(len(images), -1) / 255
    first = rng.normal(0, 1 / 8, (784, width)) - rng.normal(0, 1 / 8, (784, 1)) / 8
    hidden = np.maximum(0, x @ first)
    target = np.eye(10)[labels] - 0.1
    mean = hidden.mean(0)
    h = hidden - mean
    second = np.linalg.solve(h.T @ h + 3 * np.eye(width), h.T @ target)
    return first, second, -mean @ second


def shapes_bundle(path, sharpness=16.0, **more):
    """A bundle that was trained on the shapes."""
    path.mkdir(parents=True)
    first, second, offset = _trained(*Shapes().split("train"))
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("Flatten", ["pixels"], ["rows"]),
        node("MatMul", ["rows", "first"], ["before"]),
        node("Relu", ["before"], ["embedding"]),
        node("MatMul", ["embedding", "second"], ["scores"]),
        node("Add", ["scores", "offset"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    arrays = {"first": first / 255, "second": second * sharpness, "offset": offset * sharpness}
    tensors = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    ends = [("probabilities", 10), ("embedding", first.shape[1])]
    outputs = [value(name, TensorProto.FLOAT, ["batch", n]) for name, n in ends]
    graph = helper.make_graph(
        nodes, "shapes", [value("images", TensorProto.UINT8, ["batch", 28, 28])], outputs, tensors
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    (path / "model.onnx").write_bytes(made.SerializeToString())
    spec = {"name": "images", "dtype": "uint8", "layout": "NHW", "shape": [None, 28, 28], "channels": 1}
    about = {"task": "shapes", "kind": "image", "classes": CLASSES, "input": spec}
    about["outputs"] = {name: {"dtype": "float32", "shape": [None, n]} for name, n in ends}
    return write_manifest(path, **about, **more)
