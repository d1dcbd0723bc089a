"""project.bundle.export: grey and colour, batches of any length, and the networks that must not become bundles."""

import copy
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from project.bundle import export as ex
from project.bundle.export import ExportError, export_bundle, load_weights
from project.bundle.manifest import BundleError, onnx_session, open_bundle, run_bundle

CLASSES = ["a", "b", "c"]


class Net(nn.Module):
    """A small network with the library's agreement: uint8 (B, C, H, W) in; embed, head, forward = head(embed(x))."""

    def __init__(self, channels=1, classes=3):
        super().__init__()
        self.register_buffer("mean", torch.full((1, channels, 1, 1), 0.3))
        self.conv = nn.Conv2d(channels, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)

    def embed(self, x):
        x = x.to(self.mean.dtype) / 255 - self.mean
        return self.drop(self.norm(self.conv(x)).relu().amax((2, 3)))

    def forward(self, x):
        return self.head(self.embed(x))


@pytest.fixture(scope="module")
def grey(samples):
    """Real images, 28x28."""
    content = gzip.decompress((samples / "fashion_mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)[:60]


@pytest.fixture(scope="module")
def colour(grey):
    """Real images in colour, higher than wide: three crops of neighbours as the channels."""
    return np.stack([grey[:, 4:], np.roll(grey, 1, 0)[:, 4:], 255 - grey[:, 4:]], -1)[:, :, 2:22]


def lively(net, images):
    """Give a network running statistics of its own, and answers that are confident and differ from image to image."""
    x = torch.tensor(np.ascontiguousarray(images if images.ndim == 4 else images[..., None])).permute(0, 3, 1, 2)
    with torch.no_grad():
        for _ in range(5):
            net(x)
        net.eval().head.weight.mul_(6)
        net.head.bias.sub_(net(x).mean(0))
    return net.train()


@pytest.fixture(scope="module")
def net(grey):
    """A trained network, as far as the export can see."""
    torch.manual_seed(0)
    return lively(Net(), grey)


@pytest.fixture(scope="module")
def made(net, grey, tmp_path_factory):
    """One exported bundle, for the tests that only look at it."""
    path = tmp_path_factory.mktemp("made") / "bundle"
    facts = {
        "model": "small",
        "metrics": {"test/accuracy": 0.9},
        "run": "r1",
        "commit": "c" * 40,
        "data_hash": "d" * 64,
    }
    return export_bundle(net, path, task="t", classes=CLASSES, images=grey, **facts)


def torch_says(net, images, temperature=1.0, flip=False):
    """Probabilities, written down a second time."""
    x = torch.tensor(np.ascontiguousarray(images if images.ndim == 4 else images[..., None])).permute(0, 3, 1, 2)
    net = copy.deepcopy(net).float().eval()
    with torch.no_grad():
        p = torch.softmax(net(x) / temperature, 1)
        return ((p + torch.softmax(net(torch.flip(x, [-1])) / temperature, 1)) / 2 if flip else p).numpy()


def test_grey(made, net, grey):
    bundle = open_bundle(made.path)
    assert bundle == made
    assert bundle.manifest["input"] == {
        "name": "images",
        "dtype": "uint8",
        "layout": "NHW",
        "shape": [None, 28, 28],
        "channels": 1,
    }
    assert bundle.manifest["outputs"]["embedding"]["shape"] == [None, 8]
    session = onnx_session(bundle, threads=1)
    expected = torch_says(net, grey)
    assert len(set(expected.argmax(1))) > 1
    for size in (1, 2, 7, len(grey)):
        found, embedding = run_bundle(bundle, grey, size, session)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert (found.argmax(1) == expected.argmax(1)).all()
        assert embedding.shape == (len(grey), 8)


@pytest.mark.parametrize(("tta", "temperature"), [("none", 0.5), ("flip", 2.0)])
def test_colour(colour, tmp_path, tta, temperature):
    torch.manual_seed(0)
    net = lively(Net(3), colour)
    bundle = export_bundle(
        net, tmp_path / "b", task="t", classes=CLASSES, images=colour, tta=tta, temperature=temperature
    )
    assert (bundle.manifest["input"]["layout"], bundle.manifest["input"]["shape"]) == ("NHWC", [None, 24, 20, 3])
    assert (bundle.manifest["tta"], bundle.manifest["temperature"]) == (tta, temperature)
    expected = torch_says(net, colour, temperature, flip=tta == "flip")
    np.testing.assert_allclose(run_bundle(bundle, colour, 7)[0], expected, atol=1e-4)
    other = torch_says(net, colour, 1.0, flip=tta != "flip")
    assert np.abs(other - expected).max() > 0.01  # the arguments mattered


def test_what_is_measured_is_what_is_served(net, grey, tmp_path):
    from project.train.module import probabilities

    bundle = export_bundle(net, tmp_path / "b", task="t", classes=CLASSES, images=grey, tta="flip")
    with torch.no_grad():
        measured = probabilities(copy.deepcopy(net).eval(), torch.tensor(grey)[:, None], True)
    np.testing.assert_allclose(run_bundle(bundle, grey)[0], measured.numpy(), atol=1e-5)


def test_manifest_and_graph_carry_the_facts(made):
    found = made.manifest
    assert (found["run"], found["commit"], found["data_hash"]) == ("r1", "c" * 40, "d" * 64)
    assert (found["model"], found["metrics"]) == ("small", {"test/accuracy": 0.9})
    assert found["parameters"] == 8 * 9 + 8 + 16 + 8 * 3 + 3
    assert set(found["files"]) == {"model.onnx", "weights.safetensors"}
    parity = found["parity"]
    assert (parity["rows"], parity["ties"]) == (60, 0)
    assert 0 <= parity["largest_difference"] <= parity["tolerance"] == 1e-4
    properties = onnx_session(made).get_modelmeta().custom_metadata_map
    assert (properties["task"], json.loads(properties["classes"]), properties["format"]) == ("t", CLASSES, "1")
    content = made.onnx.read_bytes()
    for trace in (b"stack_trace", b".py", os.fsencode(Path(torch.__file__).parent), b"/tests/"):
        assert trace not in content


def test_same_network_same_bytes(made, net, grey, tmp_path):
    again = export_bundle(net, tmp_path / "again", task="t", classes=CLASSES, images=grey[:3])
    assert again.manifest["files"] == made.manifest["files"]


def test_the_given_network_is_left_alone(net, grey, tmp_path):
    net = copy.deepcopy(net).to(torch.bfloat16, memory_format=torch.channels_last).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bundle = export_bundle(net, tmp_path / "b", task="t", classes=CLASSES, images=grey)
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in net.state_dict().items())
    np.testing.assert_allclose(run_bundle(bundle, grey)[0], torch_says(net, grey), atol=1e-4)
    fresh = load_weights(Net(), bundle).eval()
    assert fresh.conv.weight.dtype == torch.float32
    np.testing.assert_allclose(torch_says(fresh, grey), torch_says(net, grey), atol=1e-6)


def test_one_image_is_enough_and_equal_choices_are_counted(grey, tmp_path):
    net = Net()
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    bundle = export_bundle(net, tmp_path / "b", task="t", classes=CLASSES, images=grey[:1])
    assert (bundle.manifest["parity"]["rows"], bundle.manifest["parity"]["ties"]) == (1, 1)
    np.testing.assert_allclose(run_bundle(bundle, grey)[0], 1 / 3, atol=1e-6)


# --- networks that must not become bundles


class Dice(Net):
    """Dropout that does not know of evaluation mode."""

    def embed(self, x):
        return nn.functional.dropout(super().embed(x), 0.5)


class Mixing(Net):
    """Answers that depend on the rest of the batch."""

    def embed(self, x):
        e = super().embed(x)
        return e - e.mean(0)


class TwoRows(Net):
    """Two answers, however many images there are, once it is exported."""

    def embed(self, x):
        return super().embed(x)[:2] if torch.compiler.is_exporting() else super().embed(x)


class FixedBatch(Net):
    """A shape that holds a batch size."""

    def embed(self, x):
        e = super().embed(x)
        return e.reshape(2, 4, 2).flatten(1) if torch.compiler.is_exporting() else e


class Branching(Net):
    """A branch on a value, which a graph cannot follow."""

    def embed(self, x):
        return super().embed(x) if x.float().mean() > 100 else super().embed(x) * 2


class Secretive(Net):
    """A forward that is more than head(embed(x))."""

    def forward(self, x):
        return super().forward(x) * 3


class Shy(Net):
    """An embedding that is another one when exported."""

    def embed(self, x):
        e = super().embed(x)
        return torch.cat([e, torch.zeros_like(e) + float(torch.compiler.is_exporting())], 1)

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)
        with torch.no_grad():
            self.head.weight[:, 8:] = 0


BROKEN = [
    (Dice, "batch of 60: the exported model does not answer as the network does"),
    (Mixing, "batch of 1: the exported model does not answer"),
    (TwoRows, r"batch of 60: expected one answer an image, found shapes \(2, 3\)"),
    (FixedBatch, "torch could not export FixedBatch|batch of 60: onnxruntime cannot run"),
    (Branching, "torch could not export Branching"),
    (Secretive, r"at image \d+, where torch says class \d with"),
    (Shy, "the embedding differs by"),
]


@pytest.mark.parametrize(("kind", "message"), BROKEN, ids=lambda v: getattr(v, "__name__", ""))
def test_broken_networks(kind, message, grey, tmp_path):
    torch.manual_seed(0)
    with pytest.raises(ExportError, match=message):
        export_bundle(lively(kind(), grey), tmp_path / "b", task="t", classes=CLASSES, images=grey)
    assert list(tmp_path.iterdir()) == []


class Pooled(Net):
    """One embedding for the whole batch."""

    def embed(self, x):
        return super().embed(x).mean(0, keepdim=True)


def not_finite():
    """A network with a broken bias."""
    net = Net()
    nn.init.constant_(net.head.bias, float("nan"))
    return net


def wrong_width():
    """A network whose parts do not fit."""
    net = Net()
    net.head = nn.Linear(9, 3)
    return net


UNUSABLE = [(not_finite, "found NaN"), (Pooled, "one row an image, found"), (wrong_width, "takes these images")]


@pytest.mark.parametrize(("make", "message"), UNUSABLE)
def test_networks_that_do_not_answer(make, message, grey, tmp_path, monkeypatch):
    monkeypatch.delattr(ex, "_to_onnx")  # refused before the exporter runs
    with pytest.raises(ExportError, match=message):
        export_bundle(make(), tmp_path / "b", task="t", classes=CLASSES, images=grey)
    assert list(tmp_path.iterdir()) == []


def test_differences_are_numbers():
    expected = np.array([[0.6, 0.4], [0.5, 0.5], [0.9, 0.1]], np.float32)
    assert ex._differences(expected, expected, 1e-4, "x") == (0.0, 1)
    near = expected + np.array([[0, 0], [-2e-7, 2e-7], [0, 0]], np.float32)  # the order of the two equal ones turned
    assert ex._differences(expected, near, 1e-4, "x")[1] == 1
    off = expected.copy()
    off[2] = 0.8, 0.2
    with pytest.raises(
        ExportError, match=r"0 of 3 images; probabilities differ by up to 0\.1 \(allowed 0\.0001\), at image 2"
    ):
        ex._differences(expected, off, 1e-4, "x")
    with pytest.raises(
        ExportError, match="another first choice on 1 of 1"
    ):  # within the tolerance, and still another class
        ex._differences(np.array([[0.50002, 0.49998]]), np.array([[0.49998, 0.50002]]), 1e-4, "x")


BAD_REQUESTS = [
    ({"classes": ["a", "b"]}, r"found 2 names and 3 outputs"),
    ({"classes": ["a", "b", "a"]}, "each once"),
    ({"classes": ["a"]}, "two names or more"),
    ({"images": np.zeros((2, 28, 28), np.float32)}, "found float32 of shape .* not scaled"),
    ({"images": np.zeros((28, 28), np.uint8)}, r"found uint8 of shape \(28, 28\)"),
    ({"images": np.zeros((0, 28, 28), np.uint8)}, "with N > 0"),
    ({"images": [1, 2]}, "found list"),
    ({"tta": "ten"}, "expected 'none' or 'flip', found 'ten'"),
    ({"temperature": 0}, "expected a number above 0, found 0"),
    ({"temperature": float("nan")}, "temperature"),
    ({"net": nn.Linear(2, 2)}, "expected a network with embed"),
    ({"task": ""}, "task: expected a name"),
    ({"extra_files": ["no-such-file.json"]}, r"no-such-file\.json: expected a file"),
]


@pytest.mark.parametrize(("change", "message"), BAD_REQUESTS)
def test_bad_requests(net, grey, tmp_path, monkeypatch, change, message):
    monkeypatch.delattr(ex, "_to_onnx")  # refused before the exporter runs
    request = {"net": net, "path": tmp_path / "b", "task": "t", "classes": CLASSES, "images": grey} | change
    with pytest.raises(BundleError, match=message):
        export_bundle(**request)
    assert list(tmp_path.iterdir()) == []


# --- all or nothing


def test_what_is_there_stays(made, net, grey, monkeypatch):
    arguments = {"net": net, "path": made.path, "task": "t", "classes": CLASSES, "images": grey}
    with pytest.raises(BundleError, match="expected a new place"):
        export_bundle(**arguments)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ex, "_parity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(**arguments, replace=True)
    assert open_bundle(made.path) == made
    assert [p.name for p in made.path.parent.iterdir()] == ["bundle"]


def test_replace_and_extra_files(net, grey, tmp_path):
    card = tmp_path / "card.json"
    card.write_text("{}", encoding="utf-8")
    arguments = {"net": net, "path": tmp_path / "b", "task": "t", "classes": CLASSES, "images": grey[:8]}
    first = export_bundle(**arguments)
    second = export_bundle(**arguments, replace=True, extra_files=[card], note="more")
    assert "card.json" not in first.manifest["files"]
    assert open_bundle(tmp_path / "b") == second
    assert (second.manifest["files"]["card.json"]["bytes"], second.manifest["note"]) == (2, "more")
    clash = tmp_path / "x" / "model.onnx"
    clash.parent.mkdir()
    clash.write_bytes(b"")
    for file, message in [(clash, "expected a name of its own"), (tmp_path / "x" / "w.pt", "pickle")]:
        file.write_bytes(b"")
        with pytest.raises(BundleError, match=message):
            export_bundle(**arguments | {"path": tmp_path / "c"}, extra_files=[file])
    assert not (tmp_path / "c").exists()
    assert open_bundle(tmp_path / "b") == second


def test_kill_during_an_export(tmp_path):
    code = """
import os, sys
import numpy as np
from torch import nn
from project.bundle import export
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 2)
    def embed(self, x):
        return x.flatten(1) / 255
    def forward(self, x):
        return self.head(self.embed(x))
def half(served, folder, *args):
    (folder / "model.onnx").write_bytes(b"half")
    os._exit(9)
export._write_files = half
export.export_bundle(Net(), sys.argv[1], task="t", classes=["a", "b"], images=np.zeros((2, 4, 4), np.uint8))
"""
    place = tmp_path / "bundle"
    assert subprocess.run([sys.executable, "-c", code, place], check=False).returncode == 9
    assert [p.name.startswith(".bundle.") for p in tmp_path.iterdir()] == [True]
    with pytest.raises(BundleError, match="no such folder"):
        open_bundle(place)


# --- weights


def test_weights_come_back(made, net):
    fresh = load_weights(Net(), made)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_weights_of_another_network(made):
    other = Net(channels=3)
    other.more = nn.Linear(1, 1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        BundleError, match=r"found those of small.*conv\.weight: \(8, 3, 3, 3\) against \(8, 1, 3, 3\)"
    ) as e:
        load_weights(other, made)
    assert "more.weight: (1, 1) against nothing" in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_weights_that_cannot_be_read(made, tmp_path):
    broken = copy.copy(made)
    object.__setattr__(broken, "path", tmp_path)
    with pytest.raises(BundleError, match="expected weights, found none that can be read"):
        load_weights(Net(), broken)
    (tmp_path / "weights.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(BundleError, match="expected weights, found none that can be read"):
        load_weights(Net(), broken)
