"""project.bundle.compress: what becomes 8 bits and what does not, what is refused, and that nothing is half-written."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession, SessionOptions
from torch import nn

from project.bundle import compress as c
from project.bundle.compress import CompressError, agreement, int8_graph, quantize
from project.bundle.export import export_bundle
from project.bundle.lineage import as_trained
from project.bundle.manifest import BundleError, open_bundle, run_bundle, write_manifest
from project.bundle.registry import Registry, verify_bundle
from project.cli import app
from project.core import sha256
from project.data.readers import Texts
from project.data.store import Data, build
from project.data.tokens import encode, train_tokenizer
from project.serve.predictor import Predictor

FAST = {"calibration": 64, "seconds": 0.001}


class Looks(nn.Module):
    """What the library's networks consist of: pooling before the normalisation, a bias, one by depth, a sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.deep = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 10)

    def embed(self, x):
        x = self.norm(nn.functional.max_pool2d(self.conv1(x / 255), 2)).relu()
        return (x + nn.functional.relu6(self.deep(self.conv2(x)))).amax((2, 3))

    def forward(self, x):
        return self.head(self.embed(x))


class Reads(nn.Module):
    """A layer of a small transformer without attention: words, a norm, two products, and a sum beside them."""

    def __init__(self, vocabulary, width=64):
        super().__init__()
        self.words, self.norm = nn.Embedding(vocabulary, width, padding_idx=0), nn.LayerNorm(width)
        self.inner, self.outer, self.head = nn.Linear(width, 128), nn.Linear(128, width), nn.Linear(width, 2)

    def embed(self, ids):
        x, there = self.norm(self.words(ids)), (ids != 0).float().unsqueeze(2)
        x = x + self.outer(nn.functional.gelu(self.inner(x)))
        return (x * there).sum(1) / there.sum(1).clamp_min(1)

    def forward(self, ids):
        return self.head(self.embed(ids))


def lively(net, x):
    """Give a network running statistics of its own, and answers that differ from row to row."""
    with torch.no_grad():
        for _ in range(5):
            net(x)
        net.eval().head.weight.mul_(6)
        net.head.bias.sub_(net(x).mean(0))
    return net


@pytest.fixture(scope="module")
def grey(samples, tmp_path_factory):
    """The committed sample, cut so that 150 rows are held out."""
    data = build("fashion_mnist", tmp_path_factory.mktemp("grey") / "data", source=samples)
    order = np.random.default_rng(0).permutation(500)
    parts = {"train": np.sort(order[:350]), "val": np.sort(order[350:]), "test": data.splits["test"]}
    return replace(data, splits=parts)


@pytest.fixture(scope="module")
def looks(grey, tmp_path_factory):
    """A bundle of a network that looks, flip averaging included."""
    torch.manual_seed(0)
    x = np.array(grey.split("val")[0])
    about = {"task": "fashion_mnist", "classes": grey.classes, "data_hash": grey.hash, "run": "r1", "commit": "c" * 40}
    about |= {"metrics": {"test/acc": 0.9, "train/seconds": 3.0}, "model": "small", "temperature": 1.5}
    notes = tmp_path_factory.mktemp("notes") / "notes.json"
    notes.write_text("{}", encoding="utf-8")
    path = tmp_path_factory.mktemp("looks") / "bundle"
    net = lively(Looks(), torch.tensor(x)[:, None])
    return export_bundle(net, path, images=x[:20], tta="flip", extra_files=[notes], **about)


@pytest.fixture(scope="module")
def words():
    """Rows of words that do not matter, and their labels."""
    rng, some = np.random.default_rng(0), [f"word{i}" for i in range(1200)]
    rows = [" ".join(rng.choice(some, rng.integers(1, 40))) for _ in range(500)]
    facts = {"task": "fake_titles", "kind": "text", "classes": ["fake", "real"], "hash": "d" * 64}
    parts = {"train": np.arange(300), "val": np.arange(300, 450), "test": np.arange(450, 500)}
    texts = Texts.from_rows([[row] for row in rows], ("title",))
    return Data(None, facts, None, rng.integers(0, 2, 500), parts, texts=texts)


@pytest.fixture(scope="module")
def reads(words, tmp_path_factory):
    """A bundle of a network that reads; its table of words is large enough to matter."""
    torch.manual_seed(0)
    rows = words.texts.joined()
    tokenizer = train_tokenizer(rows, least=1)
    tokens = encode(tokenizer, rows)
    net = Reads(tokenizer.get_vocab_size())
    lively(net, torch.nn.utils.rnn.pad_sequence([torch.tensor(t.astype(np.int64)) for t in tokens], batch_first=True))
    about = {"task": "fake_titles", "classes": words.classes, "data_hash": words.hash, "fields": ["title"], "run": "r2"}
    about |= {"tokens": [tokens[i] for i in range(20)], "tokenizer": tokenizer, "max_length": 32}
    return export_bundle(net, tmp_path_factory.mktemp("reads") / "bundle", **about)


@pytest.fixture(scope="module")
def small(looks, grey, tmp_path_factory):
    """The network that looks, in 8 bits."""
    return quantize(looks, tmp_path_factory.mktemp("small") / "bundle", grey, **FAST)


@pytest.fixture(scope="module")
def short(reads, words, tmp_path_factory):
    """The network that reads, in 8 bits."""
    return quantize(reads, tmp_path_factory.mktemp("short") / "bundle", words, **FAST)


def left(folder):
    """What lies in a folder, hidden or not."""
    return sorted(p.name for p in folder.iterdir())


def executed(bundle, folder):
    """The operators of a graph as onnxruntime runs it."""
    options = SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "executed.onnx"), 3
    InferenceSession(str(bundle.onnx), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "executed.onnx").graph.node)


# --- the new bundle


def test_convolutions_run_in_integers(small, tmp_path):
    ran = executed(small, tmp_path)
    assert ran["QLinearConv"] == 6 and not ran["Conv"] and not ran["BatchNormalization"]
    assert ran["QuantizeLinear"] == 2  # the image and its mirror image; nothing goes back to 32 bits on the way
    assert small.manifest["compression"]["nodes"] == {"Conv": 6}


def test_products_run_in_integers_and_sums_do_not(short, reads, tmp_path):
    ran = executed(short, tmp_path)
    assert ran["MatMulIntegerToFloat"] == 2 and not ran["MatMul"]
    assert short.manifest["compression"]["nodes"] == {"MatMul": 2, "Gather": 1}
    assert short.onnx.stat().st_size < 0.4 * reads.onnx.stat().st_size


@pytest.mark.parametrize("which", ["small", "short"])
def test_standard_operators_and_no_trace_of_the_machine(which, request, tmp_path):
    bundle = request.getfixturevalue(which)
    model = onnx.load(bundle.onnx)
    onnx.checker.check_model(model)
    assert {n.domain for n in model.graph.node} | {o.domain for o in model.opset_import} <= {"", "ai.onnx"}
    assert str(tmp_path.parent.parent).encode() not in bundle.onnx.read_bytes()
    assert {p.key for p in model.metadata_props} >= {"task", "temperature"}


def test_weights_have_seven_bits(small):
    parts = [
        numpy_helper.to_array(t) for t in onnx.load(small.onnx).graph.initializer if t.data_type == TensorProto.INT8
    ]
    assert parts and max(np.abs(p.astype(int)).max() for p in parts) <= 63


@pytest.mark.parametrize("which", ["small", "short"])
def test_answers_do_not_depend_on_the_rows_beside(which, request):
    bundle = request.getfixturevalue(which)
    rows = request.getfixturevalue("grey" if which == "small" else "words").split("val")[0]
    rows = np.array(rows) if which == "small" else rows.joined()
    alone, together = (run_bundle(bundle, rows, size)[0] for size in (1, 150))
    np.testing.assert_allclose(alone, together, atol=1e-4)


@pytest.mark.parametrize(("which", "parent", "data"), [("small", "looks", "grey"), ("short", "reads", "words")])
def test_the_manifest_says_what_was_done(which, parent, data, request):
    bundle, old, data = (request.getfixturevalue(name) for name in (which, parent, data))
    assert open_bundle(bundle.path) == bundle
    m, told = bundle.manifest, bundle.manifest["compression"]
    for name in ("task", "kind", "classes", "input", "outputs", "run", "commit", "data_hash", "temperature", "tta"):
        assert m.get(name) == old.manifest.get(name), name
    assert (told["parent_hash"], told["parent"]) == (old.hash, old.manifest)
    assert told["parent_manifest"] == sha256(old.path / "manifest.json")
    rows = told["calibration"]
    assert (rows["split"], rows["rows"], rows["seed"], rows["data_hash"]) == ("train", 64, 0, data.hash)
    assert len(rows["sha256"]) == 64 and told["versions"]["onnxruntime"]
    assert told["bytes"]["after"] == bundle.onnx.stat().st_size < told["bytes"]["before"]
    assert told["speed"]["batch of 1"]["faster"] > 0 and told["speed"]["threads"] == 1
    assert set(m["files"]) == set(old.manifest["files"]) - {"weights.safetensors"}


def test_agreement_is_that_of_the_held_out_rows(small, looks, grey):
    rows, labels = np.array(grey.split("val")[0]), grey.split("val")[1]
    before, after = (run_bundle(b, rows)[0] for b in (looks, small))
    told = small.manifest["compression"]["agreement"]
    assert (told["split"], told["rows"], told["holds"]) == ("val", 150, True)
    assert told["accuracy"] == {
        "before": (before.argmax(1) == labels).mean(),
        "after": (after.argmax(1) == labels).mean(),
    }
    assert told["same_class"] == (before.argmax(1) == after.argmax(1)).mean() > 0.95
    assert told["largest_difference"] == pytest.approx(np.abs(before - after).max(), abs=1e-4)
    assert 0 < told["largest_difference"] < 0.2  # something was rounded
    assert small.manifest["parity"]["rows"] == 150
    test, expected = run_bundle(small, np.array(grey.split("test")[0]))[0], grey.split("test")[1]
    assert small.metrics["test/acc"] == (test.argmax(1) == expected).mean() != 0.9  # its own, not its parent's
    assert (small.metrics["test/n"], small.metrics["train/seconds"]) == (100, 3.0)


def test_calibration_rows_are_training_rows(looks, grey):
    chosen = c._calibration(looks, grey, 64, 0)
    again, other = c._calibration(looks, grey, 64, 0), c._calibration(looks, grey, 64, 1)
    assert chosen[1] == again[1] and chosen[1]["sha256"] != other[1]["sha256"]
    training = {row.tobytes() for row in grey.split("train")[0]}
    given = np.concatenate(chosen[0])
    assert len(given) == 64 and all(row.tobytes() in training for row in given)
    assert c._calibration(looks, grey, 10_000, 0)[1]["rows"] == 350


def test_same_bundle_same_graph(looks, grey, small, tmp_path):
    code = """
import sys
from pathlib import Path
import onnx
from project.bundle.compress import int8_graph
import numpy as np
model, _ = int8_graph(onnx.load(sys.argv[1]), [np.load(sys.argv[2])])
Path(sys.argv[3]).write_bytes(model.SerializeToString(deterministic=True))
"""
    np.save(tmp_path / "x.npy", np.array(grey.split("train")[0][:20]))
    for seed in "12":
        command = [sys.executable, "-c", code, str(looks.onnx), str(tmp_path / "x.npy"), str(tmp_path / seed)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    assert sha256(tmp_path / "1") == sha256(tmp_path / "2")


def test_it_serves(small, short):
    image = np.full((28, 28), 90, np.uint8)
    assert Predictor(small).predict([image])[0].sum() == pytest.approx(1, abs=1e-5)
    predictor = Predictor(short)
    rows = [predictor.read_text({"title": title}) for title in ("word1 word2", "word3", "nothing known")]
    p, e = predictor.predict(rows)
    assert p.shape == (3, 2) and np.isfinite(e).all()


def test_the_registry_takes_it(small, tmp_path):
    registry = Registry(tmp_path / "registry")
    version = registry.add(small)
    registry.alias("fashion_mnist", "production", version.name)
    found = registry.get("fashion_mnist")
    assert found.hash == small.hash
    states = {row["what"]: row["state"] for row in verify_bundle(found)}
    assert states["files"] == states["graph"] == states["answers"] == "ok"


def test_as_trained(small, looks):
    m, told = small.manifest, small.manifest["compression"]
    assert as_trained(m) == looks.manifest and as_trained(looks.manifest) is looks.manifest
    lies = [None, [], {}, {"parent": None}, {"parent": 1}, {"parent": {"files": []}, "parent_hash": "0" * 64}]
    lies += [told | {"parent_hash": "0" * 64}, told | {"parent": told["parent"] | {"files": {}}}]
    for lie in lies:
        manifest = m | {"compression": lie}
        assert as_trained(manifest) is manifest
    for name in ("task", "run", "commit", "data_hash"):
        manifest = m | {name: "another"}
        assert as_trained(manifest) is manifest


# --- what is refused


WRONG = [
    ({"calibration": 0}, "calibration: expected a number of training rows, 1 or more, found 0"),
    ({"calibration": True}, "calibration: expected"),
    ({"calibration": 2.5}, "calibration: expected"),
    ({"loss": -0.1}, "loss: expected a share"),
    ({"loss": math.nan}, "loss: expected a share"),
]


@pytest.mark.parametrize(("asked", "message"), WRONG)
def test_wrong_wishes(looks, grey, tmp_path, asked, message):
    with pytest.raises(CompressError, match=message):
        quantize(looks, tmp_path / "new", grey, **FAST | asked)
    assert left(tmp_path) == []


def test_wrong_rows(looks, reads, grey, words, tmp_path):
    def but(**changes):
        return replace(grey, manifest=grey.manifest | changes)

    some = {**grey.splits, "val": grey.splits["val"][:99]}
    for bundle, data, message in (
        (looks, words, "expected 'fashion_mnist', the task of the bundle, found 'fake_titles'"),
        (reads, grey, "expected 'fake_titles', the task of the bundle"),
        (looks, but(classes=grey.classes[::-1]), "the classes of the bundle"),
        (looks, but(hash="0" * 64), "found 000000000000, of which it may have learned any row"),
        (looks, replace(grey, splits={"val": grey.splits["val"]}), "found no train"),
        (looks, replace(grey, splits=grey.splits | {"train": np.zeros(0, int)}), "found no train"),
        (looks, replace(grey, splits=some), "expected 100 held-out rows or more, found 99"),
    ):
        with pytest.raises(CompressError, match=message):
            quantize(bundle, tmp_path / "new", data, **FAST)
        assert left(tmp_path) == []


def test_other_data_if_somebody_says_so(looks, grey, tmp_path):
    other = replace(grey, manifest=grey.manifest | {"hash": "0" * 64})
    made = quantize(looks, tmp_path / "new", other, other_data=True, **FAST)
    assert (
        made.manifest["data_hash"] == grey.hash and made.manifest["compression"]["calibration"]["data_hash"] == "0" * 64
    )


def test_no_bundle_no_place(looks, small, grey, tmp_path):
    with pytest.raises(BundleError, match="no such folder"):
        quantize(tmp_path / "nothing", tmp_path / "new", grey, **FAST)
    with pytest.raises(BundleError, match="expected a new place"):
        quantize(looks, small.path, grey, **FAST)
    with pytest.raises(CompressError, match="expected a bundle in 32 bits, found one compressed before"):
        quantize(small, tmp_path / "new", grey, **FAST)
    broken = shutil.copytree(looks.path, tmp_path / "broken")
    (broken / "model.onnx").write_bytes((broken / "model.onnx").read_bytes()[:-9])
    with pytest.raises(BundleError, match=r"model\.onnx: expected \d+ bytes"):
        quantize(broken, tmp_path / "new", grey, **FAST)
    assert left(tmp_path) == ["broken"]


def test_a_graph_that_was_compressed_elsewhere(looks, small, grey, tmp_path):
    odd = shutil.copytree(small.path, tmp_path / "odd")
    fields = {k: v for k, v in small.manifest.items() if k != "compression"}
    with pytest.raises(CompressError, match="found QuantizeLinear: it was compressed before"):
        quantize(write_manifest(odd, **fields), tmp_path / "new", grey, **FAST)
    assert left(tmp_path) == ["odd"]


def test_a_service_without_onnx_says_what_is_missing(looks, grey, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(CompressError, match="needs the package onnx"):
        quantize(looks, tmp_path / "new", grey, **FAST)
    assert left(tmp_path) == []


def test_nothing_to_compress(grey, tmp_path):
    from served import shades

    toy = shades(tmp_path / "toy", task="fashion_mnist", classes=grey.classes)
    with pytest.raises(CompressError, match="expected convolutions, products with fixed weights or a large table"):
        int8_graph(onnx.load(toy.onnx), [np.zeros((1, 8, 8), np.uint8)])


def test_worse_is_refused_or_said(looks, grey, tmp_path):
    dark = np.array(grey.images)
    dark[grey.splits["train"]] = 0  # ranges of nothing
    blind = replace(grey, images=dark, labels=run_bundle(looks, np.array(grey.images))[0].argmax(1))
    with pytest.raises(CompressError, match=r"worse: accuracy 100\.00% before, \d+\.\d\d% after, on 150 held-out rows"):
        quantize(looks, tmp_path / "new", blind, **FAST)
    assert left(tmp_path) == []
    made = quantize(looks, tmp_path / "new", blind, anyway=True, **FAST)
    assert made.manifest["compression"]["agreement"]["holds"] is False


def test_answers_that_depend_on_others_are_refused(looks, grey, tmp_path, monkeypatch):
    monkeypatch.setattr(c, "_beside", lambda *_: 0.2)
    with pytest.raises(CompressError, match="changes by 0.2 with the rows beside it"):
        quantize(looks, tmp_path / "new", grey, **FAST)
    assert left(tmp_path) == []


# --- all or nothing


@pytest.mark.parametrize("missing", ["model.onnx", "manifest.json"])  # what there is no room for
def test_a_full_disk(looks, small, grey, small_disk, missing):
    pages = sum(-(-p.stat().st_size // 4096) for p in small.path.iterdir() if p.name != "manifest.json")
    (small_disk / "ballast").write_bytes(bytes(2**20 - 4096 * (pages - (missing == "model.onnx"))))
    with pytest.raises(OSError, match="No space"):
        quantize(looks, small_disk / "new", grey, **FAST)
    assert left(small_disk) == ["ballast"]


def test_a_kill_leaves_nothing_that_looks_like_a_bundle(looks, grey, tmp_path):
    code = """
import sys, time
from dataclasses import replace
import numpy as np
from project.bundle import compress as c
from project.data.store import open_data
data = open_data("fashion_mnist", sys.argv[3])
parts = {"train": np.arange(350), "val": np.arange(350, 500), "test": data.splits["test"]}
def wait(*_):
    print("measuring", flush=True)
    time.sleep(60)
c._speed = wait
c.quantize(sys.argv[1], sys.argv[2], replace(data, splits=parts), calibration=8)
"""
    command = [sys.executable, "-c", code, str(looks.path), str(tmp_path / "new"), str(grey.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "measuring"
        process.send_signal(signal.SIGKILL)
    with pytest.raises(BundleError, match="no such folder"):
        open_bundle(tmp_path / "new")
    (litter,) = tmp_path.iterdir()
    assert litter.name.startswith(".new.") and litter.name.endswith(".tmp")
    hour_ago = time.time() - 3700
    os.utime(litter, (hour_ago, hour_ago))
    quantize(looks, tmp_path / "new", grey, **FAST)
    assert left(tmp_path) == ["new"]


# --- graphs and numbers


def test_codes():
    rng = np.random.default_rng(0)
    for shape, axis in (((8, 4, 3, 3), 0), ((20, 30), 1), ((20, 30), 0)):
        weights = rng.normal(0, 1, shape).astype(np.float32)
        codes, scale = c._codes(weights, axis, 63)
        around = scale.reshape([-1 if k == axis else 1 for k in range(len(shape))])
        assert np.abs(codes * around - weights).max() <= scale.max() / 2 * 1.001 and codes.dtype == np.int8
    codes, scale = c._codes(np.float32([[0, 0], [1e-45, 0], [1, -1]]), 0, 63)
    assert codes.tolist() == [[0, 0], [0, 0], [63, -63]] and np.isfinite(scale).all()


@pytest.mark.parametrize(("gain", "moved"), [(0.5, 2), (-0.5, 0)])
def test_what_turns_the_order_round_stays_behind_the_pooling(gain, moved):
    """A normalisation with a gain below 0 makes a minimum of a maximum."""
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("MaxPool", ["x"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("BatchNormalization", ["m", "gain", "shift", "mean", "var"], ["b"]),
        node("Relu", ["b"], ["y"]),
    ]
    ends = [value("x", TensorProto.FLOAT, [1, 2, 8, 8])], [value("y", TensorProto.FLOAT, None)]
    given = {"gain": [1.5, gain], "shift": [0.1, 0.2], "mean": [0.3, -0.3], "var": [1.0, 2.0]}
    parts = [numpy_helper.from_array(np.float32(v), k) for k, v in given.items()]
    graph = helper.make_graph(nodes, "g", *ends, parts)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    x = np.random.default_rng(0).normal(0, 1, (1, 2, 8, 8)).astype(np.float32)
    before = InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    assert c._before_pooling(model) == moved
    assert [n.op_type for n in model.graph.node][-1] == ("MaxPool" if moved else "Relu")
    after = InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(before, after, atol=1e-6)


def test_a_pooling_that_others_read_stays_where_it_is():
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("MaxPool", ["x"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Relu", ["m"], ["r"]),
        node("Sub", ["r", "m"], ["y"]),
    ]
    ends = [value("x", TensorProto.FLOAT, [1, 1, 4, 4])], [value("y", TensorProto.FLOAT, None)]
    model = helper.make_model(helper.make_graph(nodes, "g", *ends))
    assert c._before_pooling(model) == 0


class Attends(nn.Module):
    """Attention as the library's transformer has it: a token may always look at the first one."""

    def __init__(self):
        super().__init__()
        self.three = nn.Linear(16, 48)

    def forward(self, x, there):
        q, k, v = self.three(x).view(2, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])


def test_the_guard_of_attention_is_gone():
    from project.bundle.export import _quiet

    torch.manual_seed(0)
    x, there = torch.randn(2, 4, 16), torch.tensor([[True] * 4, [True, False, False, False]])
    with _quiet():
        model = torch.onnx.export(Attends().eval(), (x, there), dynamo=True, verbose=False).model_proto
    feeds = {v.name: t.numpy() for v, t in zip(model.graph.input, (x, there), strict=True)}
    before = InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    assert "IsNaN" in {n.op_type for n in model.graph.node}  # else torch has learned it, and this can go
    assert c._without_guard(model) == 1
    assert not {"IsNaN"} & {n.op_type for n in model.graph.node}
    np.testing.assert_allclose(InferenceSession(model.SerializeToString()).run(None, feeds)[0], before, atol=1e-6)
    assert c._without_guard(model) == 0


def test_nan_elsewhere_stays_guarded():
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [node("Log", ["x"], ["l"]), node("IsNaN", ["l"], ["bad"]), node("Where", ["bad", "zero", "l"], ["y"])]
    ends = [value("x", TensorProto.FLOAT, ["n"])], [value("y", TensorProto.FLOAT, ["n"])]
    graph = helper.make_graph(nodes, "g", *ends, [numpy_helper.from_array(np.float32(0), "zero")])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    assert c._without_guard(model) == 0 and len(model.graph.node) == 3


def test_a_table_alone_is_something():
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [node("Gather", ["table", "ids"], ["each"]), node("ReduceMean", ["each", "axis"], ["y"], keepdims=0)]
    table = np.random.default_rng(0).normal(0, 1, (5000, 16)).astype(np.float32)
    table[0] = 0
    parts = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axis")]
    ends = [value("ids", TensorProto.INT64, ["n", "l"])], [value("y", TensorProto.FLOAT, ["n", 16])]
    graph = helper.make_graph(nodes, "g", *ends, parts)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    new, kinds = int8_graph(model, [])
    assert kinds == {"Gather": 1} and new.ByteSize() < 0.4 * model.ByteSize()
    ids = np.array([[0, 1, 2], [4999, 7, 7]])
    found = InferenceSession(new.SerializeToString()).run(None, {"ids": ids})[0]
    np.testing.assert_allclose(found, table[ids].mean(1), atol=0.02)
    assert len(model.graph.node) == 2  # the given one stays as it is


def test_numbers_that_are_none_are_refused():
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [node("Log", ["x"], ["l"]), node("MatMul", ["l", "w"], ["y"])]
    ends = [value("x", TensorProto.FLOAT, ["n", 2])], [value("y", TensorProto.FLOAT, None)]
    weights = [numpy_helper.from_array(np.ones((2, 2), np.float32), "w")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *ends, weights), ir_version=10, opset_imports=[helper.make_opsetid("", 20)]
    )
    with pytest.raises(CompressError, match="NaN or infinite"):
        int8_graph(model, [np.zeros((1, 2), np.float32)])


# --- agreement


def two(right):
    """Probabilities of two classes; the rows that are right (class 0) are given."""
    p = np.tile(np.float32([0.1, 0.9]), (1000, 1))
    p[right] = [0.9, 0.1]
    return p


@pytest.mark.parametrize(
    ("lost", "won", "holds"),
    [(0, 0, True), (6, 0, True), (7, 0, False), (9, 4, True), (30, 20, True), (60, 20, False), (0, 50, True)],
)
def test_agreement(lost, won, holds):
    before = np.arange(1000) < 900
    after = before.copy()
    after[:lost], after[900 : 900 + won] = False, True
    found = agreement(two(before), two(after), np.zeros(1000, int))
    assert (found["lost"], found["won"], found["holds"]) == (lost, won, holds)
    assert found["loss"] == pytest.approx((lost - won) / 1000)
    assert found["same_class"] == pytest.approx(1 - (lost + won) / 1000)


def test_a_model_as_good_is_seldom_refused_and_a_worse_one_mostly():
    rng, n = np.random.default_rng(0), 2591

    def refused(loses, wins):
        found = rng.multinomial(n, [loses, wins, 1 - loses - wins], 4000)
        net, margin = found[:, 0] - found[:, 1], 1.645 * np.sqrt(found[:, 0] + found[:, 1])
        return (net > n * 0.002 + margin).mean()

    assert refused(0.003, 0.003) < 0.01  # as good
    assert refused(0.005, 0.003) < 0.08  # loses what is allowed
    assert refused(0.014, 0.004) > 0.9  # loses a point


@pytest.mark.parametrize("wrong", [np.full((5, 2), np.nan), np.ones((4, 2)), np.ones(5)])
def test_agreement_of_nothing(wrong):
    with pytest.raises(ValueError, match="expected|NaN"):
        agreement(np.full((5, 2), 0.5), wrong, np.zeros(5, int))


def test_the_command(looks, grey, tmp_path, monkeypatch):
    monkeypatch.setattr("project.data.store.open_data", lambda task: grey)  # the sample's own split holds out too few
    out = tmp_path / "int8"
    done = CliRunner().invoke(app, ["models", "compress", str(looks.path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "validation accuracy" in done.stdout and "times as fast" in done.stdout
    assert open_bundle(out).manifest["compression"]["parent_hash"] == looks.hash
    again = CliRunner().invoke(app, ["models", "compress", str(out)])
    assert again.exit_code == 1 and "compressed before" in again.output
