"""Real servers for tests: small bundles, a registry of them, and a process on a port of its own."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from pytest_notebooks import ROOT
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from project.bundle.manifest import open_bundle, write_manifest
from project.bundle.registry import Registry

CLASSES = ["bright", "dark"]
WORDS = {"[PAD]": (0, 0), "[UNK]": (0, 0), "bad": (2, 0), "good": (0, 2)}


def onnx_bytes(nodes, inputs, outputs, constants):
    """A model as a file's content."""
    graph = helper.make_graph(nodes, "toy", inputs, outputs, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return made.SerializeToString()


def notebook(text):
    """A tiny executed notebook, with mischief in it."""
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": f"# {text}\n<script>alert(1)</script>"},
        {
            "cell_type": "code",
            "id": "b",
            "metadata": {},
            "source": "1 + 1",
            "execution_count": 1,
            "outputs": [
                {"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": "2"}}
            ],
        },
    ]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def image_bundle(path, sharpness=4.0, size=28, work=0, task="brightness", classes=CLASSES):
    """Calls an image bright or dark by its mean, the surer the sharper; `work` makes it slow."""
    path.mkdir(parents=True)
    value, node = helper.make_tensor_value_info, helper.make_node
    steps = 8 if work else 0  # multiplications that change nothing, and that cannot be done beforehand
    nodes = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("Flatten", ["pixels"], ["rows"]),
        node("ReduceMean", ["rows", "axis"], ["embedding"], keepdims=1),
        node("Sub", ["embedding", "half"], ["above"]),
        node("Mul", ["above", "sign"], ["scores"]),
        *([node("MatMul", ["rows", "nothing"], ["w0"])] if work else []),
        *[node("MatMul", [f"w{i}", "same"], [f"w{i + 1}"]) for i in range(steps)],
        *(
            [node("ReduceMax", [f"w{steps}", "axis"], ["zero"]), node("Add", ["scores", "zero"], ["logits"])]
            if work
            else []
        ),
        node("Softmax", ["logits" if work else "scores"], ["probabilities"], axis=1),
    ]
    constants = [
        numpy_helper.from_array(np.array([127.5], np.float32), "half"),
        numpy_helper.from_array(np.array([[sharpness, -sharpness]], np.float32) / 127.5, "sign"),
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
        *([numpy_helper.from_array(np.zeros((size**2, work), np.float32), "nothing")] if work else []),
        *([numpy_helper.from_array(np.eye(work, dtype=np.float32), "same")] if work else []),
    ]
    outputs = [value("probabilities", 1, ["batch", 2]), value("embedding", 1, ["batch", 1])]
    inputs = [value("images", TensorProto.UINT8, ["batch", size, size])]
    (path / "model.onnx").write_bytes(onnx_bytes(nodes, inputs, outputs, constants))
    (path / "notebook.ipynb").write_text(notebook(task), encoding="utf-8")
    pixels = np.stack([np.full((size, size), v, np.uint8) for v in (250, 5)])
    np.savez(path / "samples.npz", inputs=pixels, labels=np.array([0, 1]))
    spec = {"name": "images", "dtype": "uint8", "layout": "NHW", "shape": [None, size, size], "channels": 1}
    return _written(path, task, "image", classes, spec, 1)


def text_bundle(path, task="news", fields=("title", "text")):
    """Calls a text good or bad by its words."""
    path.mkdir(parents=True)
    value, node = helper.make_tensor_value_info, helper.make_node
    nodes = [
        node("Gather", ["points", "ids"], ["each"]),
        node("ReduceSum", ["each", "axis"], ["embedding"], keepdims=0),
        node("Softmax", ["embedding"], ["probabilities"], axis=1),
    ]
    constants = [
        numpy_helper.from_array(np.array([*WORDS.values()], np.float32), "points"),
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
    ]
    inputs = [value("ids", TensorProto.INT64, ["batch", "length"])]
    outputs = [value(name, TensorProto.FLOAT, None) for name in ("probabilities", "embedding")]
    (path / "model.onnx").write_bytes(onnx_bytes(nodes, inputs, outputs, constants))
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[PAD]"])
    (path / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    rows = [["Good", "good"], ["Bad, bad", "bad"]]
    np.savez(path / "samples.npz", texts=np.array([row[: len(fields)] for row in rows]), labels=np.array([1, 0]))
    spec = {"name": "ids", "dtype": "int64", "layout": "NL", "shape": [None, None], "max_length": 64}
    spec |= {"fields": [*fields], "vocabulary": len(WORDS)}
    return _written(path, task, "text", ["fake", "real"], spec, 2)


def _written(path, task, kind, classes, spec, width):
    outputs = {
        name: {"dtype": "float32", "shape": [None, n]} for name, n in (("probabilities", 2), ("embedding", width))
    }
    about = {"metrics": {"test/acc": 0.5}, "run": "20261121-000000-toy-0000", "commit": "c" * 40, "data_hash": "d" * 64}
    write_manifest(path, task=task, kind=kind, classes=classes, input=spec, outputs=outputs, **about)
    return open_bundle(path)


def make_registry(folder):
    """A registry with two tasks in production, and a second version of the first."""
    registry = Registry(folder / "registry")
    versions = []
    for i, sharpness in enumerate((4.0, 1.0)):
        versions.append(registry.add(image_bundle(folder / f"image{i}", sharpness)).name)
    registry.alias("brightness", "production", versions[0])
    registry.alias("news", "production", registry.add(text_bundle(folder / "text")).name)
    return registry, versions


def png(value=250, size=28, mode="L"):
    """An image of one colour."""
    out = io.BytesIO()
    Image.new(mode, (size, size), value if mode == "L" else (value,) * 3).save(out, "PNG")
    return out.getvalue()


def all_of(connection):
    """What comes until the other side closes."""
    found = b""
    try:
        while got := connection.recv(65536):
            found += got
    except ConnectionResetError:
        pass
    return found


class Server:
    """A server process; `with Server(folder, …) as server: server.client.get(…)`."""

    def __init__(self, folder, workers=1, env=None, ready=True, **settings):
        self.folder, self.workers, self.ready = folder, workers, ready
        self.settings = {"log": str(folder / "log.db"), "poll": 0.1} | settings
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PROJECT_SERVE_", "PROJECT_API", "AIP_"))}
        self.env |= {"PROJECT_REGISTRY": str(folder / "registry"), "PROJECT_ROOT": str(ROOT)}
        self.env |= {"PROJECT_CACHE": str(folder / "cache")} | (env or {})

    def __enter__(self):
        code = f"from project.serve.api import serve; serve(port=0, workers={self.workers}, **{self.settings!r})"
        self.out = self.folder / f"out-{time.monotonic_ns()}.txt"
        self.err = self.out.with_suffix(".err")
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], env=self.env, stdout=out, stderr=err, cwd=ROOT
            )
        try:
            self.wait_for(self._found_port)
            self.client = httpx.Client(base_url=self.url, timeout=30)
            if self.ready:
                self.wait_for(self.is_ready)
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        return self

    def _found_port(self):
        found = re.search(r"running on (http://127\.0\.0\.1:(\d+))", self.errors())
        if found:
            self.url, self.port = found[1], int(found[2])
        return found

    def is_ready(self):
        """Whether requests should be sent."""
        try:
            return self.client.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def errors(self):
        """What the process said on its error stream."""
        return self.err.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, what, seconds=60):
        """Wait until something holds, or the process has ended."""
        end = time.monotonic() + seconds
        while not (found := what()):
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.errors()}")
            assert time.monotonic() < end, f"waited {seconds} s in vain:\n{self.errors()}"
            time.sleep(0.02)
        return found

    def memory(self):
        """Bytes in memory, of the process alone."""
        numbers = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()
        return int(numbers[1]) * os.sysconf("SC_PAGE_SIZE")

    def children(self):
        """Ids of the workers."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = map(int, path.read_text(encoding="ascii").split())
        return [pid for pid in found if b"spawn_main" in _command(pid)]

    def stop(self, sig=signal.SIGINT):
        """End the process; SIGINT lets coverage be written."""
        if hasattr(self, "client"):
            self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)

    def __exit__(self, *_):
        self.stop()


def _command(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
