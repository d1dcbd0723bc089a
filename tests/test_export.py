"""project.bundle.export: grey and colour, batches of any length, and the networks that must not become bundles."""

import copy
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn

from project.bundle import export as ex
from project.bundle.export import ExportError, export_bundle, load_weights
from project.bundle.manifest import BundleError, bundle_tokenizer, onnx_session, open_bundle, run_bundle

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
    (TwoRows, r"batch of 60: .*expected one answer a row, shape \(60, 3\), found shape \(2, 3\)"),
    (FixedBatch, "torch could not export FixedBatch|batch of 60: .*onnxruntime cannot run"),
    (Branching, "torch could not export Branching"),
    (Secretive, r"at row \d+, where torch says class \d with"),
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
        ExportError, match=r"0 of 3 rows; probabilities differ by up to 0\.1 \(allowed 0\.0001\), at row 2"
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
    ({"images": None}, "expected images, or tokens"),
    ({"tokens": [[1, 2]]}, "found both or neither"),
    ({"extra_files": ["no-such-file.json"]}, r"no-such-file\.json: expected a file"),
]


@pytest.mark.parametrize(("change", "message"), BAD_REQUESTS)
def test_bad_requests(net, grey, tmp_path, monkeypatch, change, message):
    monkeypatch.delattr(ex, "_to_onnx")  # refused before the exporter runs
    request = {"net": net, "path": tmp_path / "b", "task": "t", "classes": CLASSES, "images": grey} | change
    with pytest.raises(BundleError, match=message):
        export_bundle(**request)
    assert list(tmp_path.iterdir()) == []


# --- texts

SENTENCES = [
    "the vote will be held on monday",
    "shocking: you will not believe this vote",
    "no",
    "the committee said that the minister said that the vote will be held on monday or on tuesday",
    "believe this",
    "a minister resigned",
]


@pytest.fixture(scope="module")
def words():
    """A tokenizer trained on the sentences, that marks both ends."""
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=marks, show_progress=False))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


@pytest.fixture(scope="module")
def tokens(words):
    """The sentences as rows of ids."""
    return [np.array(e.ids, np.int32) for e in words.encode_batch(SENTENCES)]


class Bag(nn.Module):
    """The mean of a text's words; id 0 is padding."""

    def __init__(self, vocabulary, classes=2):
        super().__init__()
        self.words = nn.Embedding(vocabulary, 8, padding_idx=0)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)
        with torch.no_grad():
            self.head.weight.mul_(9)

    def embed(self, ids):
        return self.drop(self.words(ids).sum(1) / (ids != 0).sum(1, keepdim=True).clamp(min=1))

    def forward(self, ids):
        return self.head(self.embed(ids))


class Attention(Bag):
    """As transformers do it: positions up to a limit, attention that leaves padding out, the first mark's answer."""

    def __init__(self, vocabulary, limit):
        super().__init__(vocabulary)
        self.places = nn.Embedding(limit, 8)
        self.three = nn.Linear(8, 24)

    def embed(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        mask = torch.zeros_like(x[..., 0]).masked_fill(ids == 0, float("-inf"))[:, None, None]
        q, k, v = self.three(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return x[:, 0]


@pytest.fixture(scope="module")
def bag(words):
    """A network that reads the words."""
    torch.manual_seed(0)
    return Bag(words.get_vocab_size())


@pytest.fixture(scope="module")
def request_texts(words, tokens):
    """What every export of texts has to say."""
    about = {"task": "news", "classes": ["fake", "real"], "fields": ["title", "text"]}
    return about | {"tokens": tokens, "tokenizer": words, "max_length": 12}


def torch_reads(net, rows, temperature=1.0, length=12):
    """Probabilities of rows of ids, each alone, written down a second time."""
    net = copy.deepcopy(net).eval()
    with torch.no_grad():
        alone = [net(torch.tensor(np.asarray(row)[None, :length].astype(np.int64))) for row in rows]
    return torch.softmax(torch.cat(alone) / temperature, 1).numpy()


@pytest.fixture(scope="module")
def read(bag, request_texts, tmp_path_factory):
    """One exported text bundle, for the tests that only look at it."""
    place = tmp_path_factory.mktemp("read") / "bundle"
    return export_bundle(bag, place, **request_texts, temperature=0.5, calibration={"ece": 0.01})


def cut(row, length=12):
    """A row as the bundle's tokenizer cuts it: the mark at the end stays."""
    return row if len(row) <= length else np.append(row[: length - 1], row[-1])


def test_texts_are_answered_as_torch_answers(read, bag, tokens):
    bundle = open_bundle(read.path)
    session, tokenizer = onnx_session(bundle, threads=1), bundle_tokenizer(bundle)
    expected = torch_reads(bag, [cut(row) for row in tokens], 0.5)
    assert np.abs(expected - torch_reads(bag, [cut(row) for row in tokens], 1.0)).max() > 0.01
    for size in (1, 2, 7):
        found, embedding = run_bundle(bundle, SENTENCES, size, session, tokenizer)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert embedding.shape == (6, 8)
    rows = [{"title": "no", "text": ""}, {"title": "the vote", "text": "will be held on monday"}]
    as_dicts, as_texts = (
        run_bundle(bundle, x, session=session)[0] for x in (rows, ["no", "the vote\nwill be held on monday"])
    )
    np.testing.assert_array_equal(as_dicts, as_texts)
    assert np.isfinite(run_bundle(bundle, ["", "x " * 1000], session=session)[0]).all()


def test_text_manifest(read, words):
    found = read.manifest
    ids = {"name": "ids", "dtype": "int64", "layout": "NL", "shape": [None, None], "max_length": 12}
    assert found["input"] == ids | {"vocabulary": words.get_vocab_size(), "fields": ["title", "text"]}
    assert (found["kind"], found["tta"], found["temperature"]) == ("text", "none", 0.5)
    assert found["calibration"] == {"ece": 0.01}
    assert set(found["files"]) == {"model.onnx", "weights.safetensors", "tokenizer.json"}
    parity = found["parity"]
    assert parity["rows"] == 6 and 0 <= parity["largest_difference_by_padding"] <= 1e-5
    assert 0 <= parity["largest_difference"] <= parity["tolerance"] == 1e-4
    (ids,) = onnx_session(read).get_inputs()
    assert (ids.name, ids.type, ids.shape) == ("ids", "tensor(int64)", ["batch", "length"])


def test_same_texts_same_bytes(read, bag, request_texts, words, tmp_path):
    set_for_training = Tokenizer.from_str(words.to_str())
    set_for_training.enable_truncation(3)
    set_for_training.enable_padding(length=9)
    some = request_texts | {"tokens": request_texts["tokens"][:2], "tokenizer": set_for_training}
    again = export_bundle(bag, tmp_path / "again", **some, temperature=0.5)
    assert again.manifest["files"] == read.manifest["files"]
    assert set_for_training.truncation and set_for_training.padding  # the given one is left as it was


def test_tokens_of_the_library(words, tokens):
    class Flat:
        ids, offsets = np.concatenate(tokens), np.cumsum([0, *map(len, tokens)])

        def __len__(self):
            return len(self.offsets) - 1

        def __getitem__(self, i):
            return self.ids[self.offsets[i] : self.offsets[i + 1]]

    given = ex._given_ids(Flat(), words, 12, [])
    assert [row.tolist() for row in given.rows] == [row[:12].tolist() for row in tokens]
    assert all(row.dtype == np.int64 for row in given.rows)


def test_positions_up_to_a_limit(words, request_texts, tokens, tmp_path):
    torch.manual_seed(0)
    net = Attention(words.get_vocab_size(), 12)
    bundle = export_bundle(net, tmp_path / "b", **request_texts)
    found = run_bundle(bundle, SENTENCES, session=onnx_session(bundle, threads=1))[0]
    np.testing.assert_allclose(found, torch_reads(net, [cut(row) for row in tokens]), atol=1e-5)
    with pytest.raises(ExportError, match="found that it fails on a row of 13 ids: IndexError"):
        export_bundle(net, tmp_path / "c", **request_texts | {"max_length": 13, "tokens": tokens[:3]})


class Diluted(Bag):
    """A mean over the padding as well."""

    def embed(self, ids):
        return self.words(ids).mean(1)


class Gossip(Bag):
    """Rows that hear each other."""

    def embed(self, ids):
        e = super().embed(ids)
        return e - e.mean(0)


class Hollow(Bag):
    """A mean that leaves the mark at the beginning out, and has nothing left of a row of one."""

    def embed(self, ids):
        return self.words(ids)[:, 1:].mean(1)


class FixedLength(Bag):
    """A shape that holds a length."""

    def embed(self, ids):
        if torch.compiler.is_exporting():
            ids = nn.functional.pad(ids, (0, 12))[:, :6]
        return super().embed(ids)


BROKEN_READERS = [
    (Diluted, r"row 0: the network answers otherwise when a longer row stands beside it: .*\n.*padding"),
    (Gossip, "row 0: the network answers otherwise when a longer row"),
    (Hollow, "expected finite answers to rows cut to 1, found NaN"),
]


@pytest.mark.parametrize(("kind", "message"), BROKEN_READERS, ids=lambda v: getattr(v, "__name__", ""))
def test_networks_that_cannot_read(kind, message, words, request_texts, tmp_path, monkeypatch):
    monkeypatch.delattr(ex, "_to_onnx")  # refused before the exporter runs
    torch.manual_seed(0)
    with pytest.raises(ExportError, match=message):
        export_bundle(kind(words.get_vocab_size()), tmp_path / "b", **request_texts)
    assert list(tmp_path.iterdir()) == []


def test_exported_length_that_is_fixed(words, request_texts, tmp_path):
    torch.manual_seed(0)
    with pytest.raises(ExportError, match="exported model (does not answer|answers otherwise)"):
        export_bundle(FixedLength(words.get_vocab_size()), tmp_path / "b", **request_texts)
    assert list(tmp_path.iterdir()) == []


class Wrapped:
    """As transformers gives its tokenizers."""


BAD_TEXT_REQUESTS = [
    ({"tta": "flip"}, "expected 'none' for texts, found 'flip'. A text has no mirror image"),
    ({"tokenizer": None}, "expected the tokenizers.Tokenizer that made the ids, found NoneType"),
    ({"tokenizer": Wrapped()}, r"found Wrapped\. .*backend_tokenizer"),
    ({"max_length": 0}, "max_length: expected how many ids"),
    ({"max_length": None}, "max_length: expected how many ids"),
    ({"tokens": []}, "expected real rows of ids .* found none"),
    ({"tokens": "text"}, "expected real rows of ids .* found none"),
    ({"tokens": SENTENCES}, "row 0: expected ids of this tokenizer"),
    ({"tokens": [[4, 5], [0.5]]}, "row 1: expected ids of this tokenizer, whole numbers"),
    ({"tokens": [[4], [-1]]}, "row 1: expected ids of this tokenizer"),
    ({"tokens": [[4], [9999]]}, r"row 1: .* from 0 to \d+, found int64 of shape \(1,\), \[9999\]"),
    ({"tokens": [[[4, 5]]]}, r"row 0: .* of shape \(1, 2\)"),
    ({"images": np.zeros((1, 4, 4), np.uint8)}, "found both or neither"),
    ({"fields": ["title", "title"]}, "expected fields, a list of names, each once"),
    ({"classes": ["a", "b", "c"]}, "found 3 names and 2 outputs"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TEXT_REQUESTS)
def test_bad_text_requests(bag, request_texts, tmp_path, monkeypatch, change, message):
    monkeypatch.delattr(ex, "_to_onnx")  # refused before the exporter runs
    with pytest.raises(BundleError, match=message):
        export_bundle(bag, tmp_path / "b", **request_texts | change)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_with_more_words_than_the_network(words, request_texts, tmp_path, monkeypatch):
    monkeypatch.delattr(ex, "_to_onnx")
    small = Bag(words.get_vocab_size() - 1)
    last = words.get_vocab_size() - 1
    some = [row for row in request_texts["tokens"] if last not in row]
    with pytest.raises(ExportError, match=f"found that it fails on the highest id, {last}: IndexError"):
        export_bundle(small, tmp_path / "b", **request_texts | {"tokens": some})


def test_the_tokenizers_name_is_taken(bag, request_texts, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json: expected a name of its own"):
        export_bundle(bag, tmp_path / "b", **request_texts, extra_files=[tmp_path / "tokenizer.json"])


# --- all or nothing


@pytest.fixture
def same_graph(made, monkeypatch):
    """Exporting the same network again gives the same graph: not waited for where folders are the subject."""
    monkeypatch.setattr(ex, "_to_onnx", lambda *args: onnx.load(made.onnx))


def test_what_is_there_stays(made, same_graph, net, grey, monkeypatch):
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


def test_replace_and_extra_files(same_graph, net, grey, tmp_path):
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
