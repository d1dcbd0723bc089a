"""project.serve.predictor: the same rows, the same answers as in training; strangers' bytes, the right refusal."""

import asyncio
import contextlib
import gzip
import io
import random
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from serve_process import image_bundle
from torch import nn

from project.bundle.export import export_bundle
from project.bundle.manifest import BundleError, open_bundle, run_bundle, write_manifest
from project.data.readers import Texts, decode_image
from project.data.tokens import encode, train_tokenizer
from project.serve import predictor as module
from project.serve.batching import Batcher
from project.serve.predictor import Heavy, InputError, Predictor, image_pixels, length_groups, not_probabilities


class Looks(nn.Module):
    """A small network for images: uint8 (B, C, H, W) in."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, stride=2)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.head.weight.mul_(8)

    def embed(self, x):
        return self.conv(x / 255).relu().amax((2, 3))

    def forward(self, x):
        return self.head(self.embed(x))


class Reads(nn.Module):
    """A small network for ids; 0 is padding, and the order of words matters."""

    def __init__(self, vocabulary):
        super().__init__()
        self.words = nn.Embedding(vocabulary, 8, padding_idx=0)
        self.places = nn.Embedding(512, 8)
        self.head = nn.Linear(8, 2)
        with torch.no_grad():
            self.head.weight.mul_(8)

    def embed(self, ids):
        x = (self.words(ids) * self.places(torch.arange(ids.shape[1]))) * (ids != 0)[..., None]
        return x.sum(1) / (ids != 0).sum(1, keepdim=True)

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.fixture(scope="module")
def images(samples):
    """Real images: grey, and a colour made of three neighbours."""
    content = gzip.decompress((samples / "fashion_mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    grey = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)[:64]
    return {1: grey, 3: np.stack([grey, np.roll(grey, 1, 0), 255 - grey], -1)}


@pytest.fixture(scope="module")
def looks(images, tmp_path_factory):
    """Channels -> the network and its bundle."""
    torch.manual_seed(0)
    nets = {channels: Looks(channels) for channels in (1, 3)}
    place, classes = tmp_path_factory.mktemp("looks"), ["bag", "coat", "shirt"]
    made = {c: export_bundle(nets[c], place / str(c), task="looks", classes=classes, images=images[c]) for c in nets}
    return {c: (nets[c], made[c]) for c in nets}


NEWS = [
    ("Trump, Clinton, and others", "The vote, he said, will be held on Monday.\nMore, later."),
    ("SHOCKING: you won't believe this", 'He said "no, no, no", and left; again\r\n'),
    ("", "only a text, without a title"),
    ("only a title", ""),
    ("a,b,c,d", ",,,"),
    ("Ünïcödé — “quotes”, ‘marks’ 你好 🙂", "tab\tnul\0 and\u200b nothing"),
    ("unheard-of syllables", "zyx wvu " * 300),
]


@pytest.fixture(scope="module")
def texts():
    """Rows as training has them."""
    return Texts.from_rows(NEWS, ("title", "text"))


@pytest.fixture(scope="module")
def reads(texts, tmp_path_factory):
    """The network, its tokenizer and its bundle."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts.joined(), least=1)
    net = Reads(tokenizer.get_vocab_size())
    about = {"task": "news", "classes": ["fake", "real"], "fields": ["title", "text"], "max_length": 512}
    tokens = encode(tokenizer, texts.joined())
    place = tmp_path_factory.mktemp("reads") / "bundle"
    return net, tokenizer, export_bundle(net, place, tokens=tokens, tokenizer=tokenizer, **about)


def packed(image, kind="PNG", **options):
    """The bytes of an image file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def torch_says(net, inputs):
    """Probabilities, from the network itself."""
    with torch.no_grad():
        return net.eval()(torch.tensor(inputs)).softmax(1).numpy()


# --- the same rows, the same answers


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_answered_as_torch_answers(looks, images, channels):
    net, bundle = looks[channels]
    predictor, rows = Predictor(bundle), images[channels]
    x = rows[:, None] if channels == 1 else rows.transpose(0, 3, 1, 2)
    expected = torch_says(net, np.ascontiguousarray(x))
    assert np.ptp(expected, 0).max() > 0.1  # the images differ to the network
    uploaded = [predictor.read_image(packed(row)) for row in rows]
    found, embedding = predictor.predict(uploaded)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found, run_bundle(bundle, rows)[0], atol=1e-5)
    np.testing.assert_array_equal(uploaded, rows)
    assert embedding.shape == (64, 8)
    assert found.dtype == embedding.dtype == np.float32


def test_texts_are_answered_as_torch_answers(reads, texts):
    net, tokenizer, bundle = reads
    predictor = Predictor(bundle)
    rows = [predictor.read_text(texts[i]) for i in range(len(texts))]
    for row, ids in zip(rows, encode(tokenizer, texts.joined()), strict=True):
        np.testing.assert_array_equal(row, ids)
    expected = np.concatenate([torch_says(net, row[None]) for row in rows])
    found, _ = predictor.predict(rows)
    assert np.ptp(expected, 0).max() > 0.2
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found, run_bundle(bundle, texts)[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["grey", "colour", "text"])
def test_batch_mates_do_not_matter(looks, images, reads, texts, kind):
    if kind == "text":
        predictor = Predictor(reads[2])
        rows = [predictor.read_text(texts[i]) for i in range(len(texts))] * 5
    else:
        channels = {"grey": 1, "colour": 3}[kind]
        predictor, rows = Predictor(looks[channels][1]), list(images[channels])
    alone = [predictor.predict([row]) for row in rows]
    order = list(range(len(rows)))
    for seed, size in ((1, 2), (2, 7), (3, 32)):
        random.Random(seed).shuffle(order)
        for i in range(0, len(order), size):
            which = order[i : i + size]
            p, e = predictor.predict([rows[k] for k in which])
            np.testing.assert_allclose(p, np.concatenate([alone[k][0] for k in which]), atol=1e-5)
            np.testing.assert_allclose(e, np.concatenate([alone[k][1] for k in which]), atol=1e-4)


def test_no_rows_no_answers(looks, reads):
    for bundle, width in ((looks[1][1], 3), (reads[2], 2)):
        p, e = Predictor(bundle).predict([])
        assert p.shape == (0, width) and e.shape == (0, 8)


def test_from_many_threads_and_through_the_batcher(looks, images, reads, texts):
    jobs = []
    for predictor in (Predictor(looks[1][1]), Predictor(looks[3][1])):
        rows = images[1 if predictor.bundle.manifest["input"]["channels"] == 1 else 3]
        jobs += [(predictor, predictor.read_image, packed(row)) for row in rows]
    reader = Predictor(reads[2])
    jobs += [(reader, reader.read_text, texts[i]) for i in range(len(texts))] * 5
    alone = [predictor.predict([read(content)])[0][0] for predictor, read, content in jobs]

    def work(i):
        predictor, read, content = jobs[i]
        return predictor.predict([read(content)])[0][0]

    order = random.Random(0).sample(range(len(jobs)), len(jobs))
    with ThreadPoolExecutor(8) as pool:
        for i, found in zip(order, pool.map(work, order), strict=True):
            np.testing.assert_allclose(found, alone[i], atol=1e-5)

    async def served():
        async with Batcher(reader.predict, max_queue=1000) as batcher:
            senders = [batcher.submit(jobs[i][1](jobs[i][2]), jobs[i][0].predict) for i in order]
            return await asyncio.wait_for(asyncio.gather(*senders), 30)

    for i, (found, _, _) in zip(order, asyncio.run(served()), strict=True):
        np.testing.assert_allclose(found, alone[i], atol=1e-5)


def test_the_model_is_loaded_once(looks, reads, images, texts, tmp_path):
    for made, read, content in (
        (looks[1][1], "read_image", packed(images[1][0])),
        (reads[2], "read_text", texts[0]),
    ):
        copy = shutil.copytree(made.path, tmp_path / made.task)
        predictor = Predictor(open_bundle(copy))
        first = predictor.predict([getattr(predictor, read)(content)])
        shutil.rmtree(copy)  # whatever would be read again is gone
        again = predictor.predict([getattr(predictor, read)(content)])
        np.testing.assert_array_equal(first[0], again[0])


# --- images


def test_uploads_are_read_as_training_reads(looks, images):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (90, 60, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(rng.integers(0, 255, (90, 60), np.uint8)))
    deep = Image.fromarray(rng.integers(0, 65535, (40, 40), np.uint16))
    files = [
        packed(photo),
        packed(photo, "JPEG"),
        packed(photo, "JPEG", exif=turned),
        packed(photo.convert("CMYK"), "JPEG"),
        packed(clear),
        packed(clear, "WEBP"),
        packed(photo.quantize(16), "GIF", transparency=3),
        packed(photo.convert("1"), "BMP"),
        packed(photo.convert("LA")),
        packed(deep),
        packed(photo.resize((3000, 1000)), "JPEG"),
        packed(photo.resize((1, 1))),
    ]
    for channels in (1, 3):
        predictor = Predictor(looks[channels][1])
        for content in files:
            found = predictor.read_image(content)
            np.testing.assert_array_equal(found, decode_image(content, 28, channels))
            assert found.dtype == np.uint8


def test_pixels_are_never_scaled_outside_the_model(looks, images):
    net, bundle = looks[1]
    predictor, image = Predictor(bundle), images[1][0]
    assert predictor.read_image(packed(image)).max() > 1
    skewed = torch_says(net, (image[None, None] / 255).astype(np.float32))
    assert np.abs(skewed - torch_says(net, image[None, None])).max() > 0.05  # it would matter, and nobody would notice
    for scaled in (image / 255, (image / 255).astype(np.float32), image.astype(np.float32), image.astype(np.int64)):
        with pytest.raises(InputError, match="give the raw pixels, 0 to 255") as told:
            predictor.predict([image, scaled])
        assert told.value.status == 422


@pytest.mark.parametrize(
    "wrong", [np.zeros((27, 28), np.uint8), np.zeros((28, 28, 1), np.uint8), np.zeros((1, 28, 28), np.uint8)]
)
def test_rows_of_another_shape(looks, wrong):
    with pytest.raises(InputError, match="expected images of dtype uint8 and shape"):
        Predictor(looks[1][1]).predict([wrong])


def chunk(kind, content):
    """A part of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) & 0xFFFFFFFF)


def png(width, height, rows=b"", bits=8, colour=0):
    """A PNG that says it is of some size, whatever it holds."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


WHOLE = packed(np.arange(784, dtype=np.uint8).reshape(28, 28))
PHOTO = packed(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8), "JPEG")
HOSTILE = {
    "empty": (b"", 400),
    "one byte": (b"\x89", 415),
    "text": (b"file,label\n1,2\n", 415),
    "page": (b"<html><script>alert(1)</script></html>", 415),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415),
    "PDF": (b"%PDF-1.7\n" + b"0" * 1000, 415),
    "zip": (b"PK\x03\x04" + WHOLE, 415),
    "TIFF": (packed(Image.new("L", (9, 9)), "TIFF"), 415),
    "ICO": (packed(Image.new("L", (16, 16)), "ICO"), 415),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
    "noise": (random.Random(0).randbytes(5000), 415),
    "sound": (b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(50), 415),
    "only a signature": (b"\x89PNG\r\n\x1a\n", 400),
    "cut in the head": (WHOLE[:20], 400),
    "cut in the pixels": (WHOLE[: len(WHOLE) // 2], 400),
    "cut photo": (PHOTO[: len(PHOTO) // 2], 400),
    "cut GIF": (b"GIF89a\x10\x00\x10\x00", 400),
    "cut BMP": (b"BM" + bytes(20), 400),
    "no pixels": (png(0, 10), 400),
    "no rows": (png(40, 40), 400),
    "bomb by claim": (png(60_000, 60_000), 413),
    "bomb of zeros": (png(20_000, 20_000, bytes(2501 * 20_000), bits=1), 413),
    "bomb in a GIF": (b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x00;", 413),
    "just too large": (png(50_001, 1000), 413),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_uploads(looks, name):
    content, status = HOSTILE[name]
    predictor = Predictor(looks[3][1])
    with pytest.raises(InputError, match="expected") as told:
        predictor.read_image(content)
    assert told.value.status == status
    assert "/" not in str(told.value) and "0x" not in str(told.value) and len(str(told.value)) < 300
    predictor.read_image(WHOLE)


def test_a_polyglot_is_only_its_image(looks):
    predictor = Predictor(looks[1][1])
    after = WHOLE + b"<script>alert(1)</script>PK\x03\x04"
    np.testing.assert_array_equal(predictor.read_image(after), predictor.read_image(WHOLE))


def test_less_pixels_may_be_allowed(looks):
    predictor = Predictor(looks[1][1], max_pixels=1000)
    assert predictor.read_image(WHOLE).shape == (28, 28)
    with pytest.raises(InputError, match="expected 1 to 1,000 pixels, found 50 x 50") as told:
        predictor.read_image(PHOTO)
    assert told.value.status == 413


def test_very_large_images_are_decoded_one_at_a_time(looks, monkeypatch):
    inside, most, lock = 0, 0, threading.Lock()

    @contextlib.contextmanager
    def counted(room):
        nonlocal inside, most
        with room:
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1
            yield

    def decode(*args, room, **options):
        return decode_image(*args, room=lambda held: counted(room(held)), **options)

    monkeypatch.setattr(module, "decode_image", decode)
    predictor = Predictor(looks[1][1])
    large = packed(Image.new("1", (4100, 4100)), "PNG")
    with ThreadPoolExecutor(4) as pool:
        assert {x.shape for x in pool.map(predictor.read_image, [large] * 4)} == {(28, 28)}
        assert most == 1
        list(pool.map(predictor.read_image, [WHOLE] * 8))
    assert most > 1


def test_an_image_that_takes_too_much_memory_is_refused_whatever_its_size(looks):
    predictor = Predictor(looks[1][1], max_decoded=5_000_000)
    for large in (packed(Image.new("RGBA", (1500, 1500)), "WEBP", lossless=True), packed(Image.new("RGB", (900, 900)))):
        assert len(large) < 5000
        with pytest.raises(InputError, match="at most 5 MB while it is decoded, found one that takes") as told:
            predictor.read_image(large)
        assert told.value.status == 413
    assert predictor.read_image(packed(Image.new("RGB", (3000, 3000)), "JPEG")).shape == (28, 28)
    with pytest.raises(Heavy):
        Predictor(looks[1][1]).read_image(packed(Image.new("1", (4100, 4100))), wait=False)


def test_pixels_from_the_head():
    for content, pixels in [
        (WHOLE, 784),
        (PHOTO, 2500),
        (packed(Image.new("L", (7, 5)), "WEBP"), 35),
        (packed(Image.new("L", (7, 5)), "BMP"), 35),
        (png(60_000, 60_000), 3_600_000_000),
        (b"", 0),
        (b"GIF89a", 0),
        (b"\x89PNG\r\n\x1a\n", 0),
    ]:
        assert image_pixels(content) == pixels


def test_quick_is_what_may_be_read_where_the_server_stands(looks):
    predictor = Predictor(looks[1][1])
    assert predictor.quick(WHOLE) and predictor.quick(b"") and predictor.quick({"title": "a", "text": "b"})
    for slow in (png(60_000, 60_000), packed(Image.new("1", (3000, 3000))), bytes(100_000), {"text": "x " * 2000}):
        assert not predictor.quick(slow)


# --- texts


def test_no_comma_is_a_column(reads):
    predictor = Predictor(reads[2])
    title = "Trump, Clinton, and others"
    whole, last = (predictor.read_text({"title": t}) for t in (title, title.rpartition(",")[2]))
    assert len(whole) > len(last)
    for field in ("a\nb", 'a"b', "a,b", "a;b", "a\tb"):
        pair = [predictor.read_text({"title": field, "text": "x"}), predictor.read_text({"title": "a", "text": "x"})]
        assert len(pair[0]) > len(pair[1])


def test_each_field_is_read_in_its_order(reads):
    predictor = Predictor(reads[2])
    one, other = predictor.read_text({"title": "a", "text": "b"}), predictor.read_text({"text": "b", "title": "a"})
    np.testing.assert_array_equal(one, other)
    swapped = predictor.read_text({"title": "b", "text": "a"})
    assert not np.array_equal(one, swapped)
    assert len(predictor.read_text({"title": "a"})) < len(one)
    np.testing.assert_array_equal(
        predictor.read_text({"title": "a"}), predictor.read_text({"title": "a", "text": "", "subject": ""})
    )


@pytest.mark.parametrize(
    ("fields", "message", "status"),
    [
        ({}, "title or text: expected some text, found none", 422),
        ({"title": " \n", "text": ""}, "title or text: expected some text, found none", 422),
        ({"titel": "a"}, r"expected the fields title, text, found 'titel'\. Did you mean", 422),
        ({"title": "a", "subject": "b"}, "found 'subject'", 422),
        ({"title": "a", "x" * 500: "b"}, "found 'x{59}", 422),
        ({"title": 3}, "title: expected text, found int", 422),
        ({"title": None, "text": "a"}, "title: expected text, found NoneType", 422),
        ({"title": ["a"]}, "title: expected text, found list", 422),
        ({"title": "a", "text": b"b"}, "text: expected text, found bytes", 422),
        ({"text": "abc\udc80"}, "text: expected text, found half of a character at position 3", 422),
        ({"text": "x" * 101}, r"text: expected at most 100 characters, found 101\. Shorten it", 413),
        ({"title": "x" * 101, "text": "y"}, "title: expected at most 100", 413),
    ],
)
def test_texts_that_do_not_fit(reads, fields, message, status):
    with pytest.raises(InputError, match=message) as told:
        Predictor(reads[2]).read_text(fields, max_chars=100)
    assert told.value.status == status
    assert len(str(told.value)) < 200


def test_odd_texts_have_an_answer(reads):
    predictor = Predictor(reads[2])
    odd = ["\0", "\u200b", "🙂" * 1000, "x" * 100_000, "\n, " * 33_000, "\u202eabc", "é" * 9, "[PAD]", "[BOS] [UNK]"]
    rows = [predictor.read_text({"text": text}) for text in odd]
    assert all(0 < len(row) <= 512 and row.dtype == np.int64 and row.any() for row in rows)
    p, _ = predictor.predict(rows)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)


def test_a_bundle_without_names_reads_text(reads, tmp_path):
    folder, fields = shutil.copytree(reads[2].path, tmp_path / "b"), reads[2].manifest
    predictor = Predictor(write_manifest(folder, **fields | {"input": fields["input"] | {"fields": []}}))
    np.testing.assert_array_equal(predictor.read_text({"text": "a, b"}), encode(reads[1], ["a, b"])[0])
    with pytest.raises(InputError, match="expected the field text, found 'title'"):
        predictor.read_text({"title": "a", "text": "b"})


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros(0, np.int64),
        np.full(513, 5),
        np.full((1, 5), 5),
        np.array([-1]),
        np.array([10_000_000]),
        np.array([5], np.int32),
        np.array([0.5]),
    ],
)
def test_ids_that_no_text_has(reads, wrong):
    with pytest.raises(InputError, match="expected 1 to 512 ids from 0 to"):
        Predictor(reads[2]).predict([wrong])


def test_images_are_no_texts(looks, reads, images):
    look, read = Predictor(looks[1][1]), Predictor(reads[2])
    for wrong in (lambda: look.read_text({"text": "a"}), lambda: read.read_image(WHOLE)):
        with pytest.raises(InputError, match="expected an? .*, found an? ") as told:
            wrong()
        assert told.value.status == 415
    with pytest.raises(InputError):
        look.predict([np.array([5])])
    with pytest.raises(InputError):
        read.predict([images[1][0]])


def test_groups_of_like_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 513, 300).tolist() + [1, 1, 2, 512]
    groups = length_groups([np.zeros(n) for n in lengths])
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        found = [lengths[i] for i in group]
        assert max(found) <= 2 * min(found)


# --- models that should not answer


def graph(folder, nodes, outputs, input_type, input_shape, constants=()):
    """A bundle's model written by hand."""
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "made",
        [value("x", input_type, input_shape)],
        [value(name, TensorProto.FLOAT, ["batch", n]) for name, n in outputs.items()],
        [helper.make_tensor(name, kind, [len(v)], v) for name, kind, v in constants],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def by_hand(folder, last, shape=(4, 4)):
    """A bundle that calls an image bright or dark; `last` makes the probabilities of logits and brightness."""
    nodes = [
        helper.make_node("Cast", ["x"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["rows"]),
        helper.make_node("ReduceMean", ["rows", "axis"], ["embedding"], keepdims=1),
        helper.make_node("Concat", ["embedding", "embedding"], ["logits"], axis=1),
        *last,
    ]
    constants = [("axis", TensorProto.INT64, [1]), ("white", TensorProto.FLOAT, [255.0])]
    graph(folder, nodes, {"probabilities": 2, "embedding": 1}, TensorProto.UINT8, ["batch", *shape], constants)
    spec = {"name": "x", "dtype": "uint8", "layout": "NHW", "shape": [None, *shape], "channels": 1}
    outputs = {name: {"dtype": "float32", "shape": [None, n]} for name, n in (("probabilities", 2), ("embedding", 1))}
    return write_manifest(folder, task="t", kind="image", classes=["a", "b"], input=spec, outputs=outputs)


SOFTMAX = helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)


def test_logits_are_not_called_probabilities(tmp_path):
    bundle = by_hand(tmp_path / "b", [helper.make_node("Identity", ["logits"], ["probabilities"])])
    with pytest.raises(BundleError, match=r"expected probabilities that add up to 1, found 0, 0 …: logits"):
        Predictor(bundle)
    assert not_probabilities(np.array([[0.5, 0.5], [1.5, -0.5], [np.inf, 0], [0.9, 0.0]])).tolist() == [1, 2, 3]


def test_an_input_that_breaks_the_model_fails_alone(tmp_path):
    last = [
        helper.make_node("Softmax", ["logits"], ["soft"], axis=1),
        helper.make_node("Sub", ["white", "embedding"], ["distance"]),
        helper.make_node("Div", ["distance", "distance"], ["one"]),  # NaN for a white image
        helper.make_node("Mul", ["soft", "one"], ["probabilities"]),
    ]
    predictor = Predictor(by_hand(tmp_path / "b", last))
    grey, white = np.full((4, 4), 7, np.uint8), np.full((4, 4), 255, np.uint8)
    with pytest.raises(InputError, match="found no answer to row 1") as told:
        predictor.predict([grey, white])
    assert told.value.status == 422

    async def served():
        async with Batcher(predictor.predict) as batcher:
            senders = [batcher.submit(x) for x in (grey, white, grey, grey)]
            return await asyncio.wait_for(asyncio.gather(*senders, return_exceptions=True), 20)

    found = asyncio.run(served())
    assert isinstance(found[1], InputError)
    assert [x[0].tolist() for i, x in enumerate(found) if i != 1] == [[0.5, 0.5]] * 3


def test_images_that_are_not_square(tmp_path):
    with pytest.raises(BundleError, match=r"expected square images, .* found shape \[4, 6\]"):
        Predictor(by_hand(tmp_path / "b", [SOFTMAX], (4, 6)))


def test_a_long_text_does_not_widen_short_ones(reads, tmp_path):
    """A model whose embedding is the width of the batch it was run in."""
    nodes = [
        helper.make_node("Shape", ["x"], ["width"], start=1),
        helper.make_node("Cast", ["width"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["ids", "axis"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "wide"], ["embedding"]),
        helper.make_node("Concat", ["nothing", "nothing"], ["logits"], axis=1),
        SOFTMAX,
    ]
    constants = [("axis", TensorProto.INT64, [1]), ("zero", TensorProto.FLOAT, [0.0])]
    folder = shutil.copytree(reads[2].path, tmp_path / "b")
    graph(folder, nodes, {"probabilities": 2, "embedding": 1}, TensorProto.INT64, ["batch", "length"], constants)
    fields = reads[2].manifest
    outputs = {name: {"dtype": "float32", "shape": [None, n]} for name, n in (("probabilities", 2), ("embedding", 1))}
    bundle = write_manifest(folder, **fields | {"input": fields["input"] | {"name": "x"}, "outputs": outputs})
    rows = [np.full(n, 2) for n in (5, 512, 7, 8, 6, 300, 1)]
    widths = Predictor(bundle).predict(rows)[1][:, 0].tolist()
    assert widths == [8, 512, 8, 8, 8, 512, 1]


def test_import_is_light():
    code = (
        "import sys, threading, project.serve.predictor\n"
        "heavy = 'torch', 'pytorch_lightning', 'transformers', 'pandas', 'onnxruntime', 'tokenizers', 'fastapi'\n"
        "print(threading.active_count(), [m for m in heavy if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert found.split() == ["1", "[]"]


# A file of a large form is a view of the request's body


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "progressive JPEG"])
def test_a_view_is_read_as_bytes_are(tmp_path, kind):
    predictor = Predictor(image_bundle(tmp_path / "image"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    noise.save(out := io.BytesIO(), kind.split()[-1], **({"progressive": True} if " " in kind else {}))
    view = memoryview(b"--b" + out.getvalue() + b"--b")[3:-3]
    np.testing.assert_array_equal(predictor.read_image(view), predictor.read_image(out.getvalue()))
    assert predictor.quick(view) == predictor.quick(out.getvalue())


@pytest.mark.parametrize("content", [b"", b"%PDF-1.7", b"\x89PNG\r\n\x1a\n" + bytes(99), b"\0\0\0\x1cftypheic"])
def test_a_view_is_refused_as_bytes_are(tmp_path, content):
    predictor = Predictor(image_bundle(tmp_path / "image"))
    told = []
    for given in (content, memoryview(content)):
        with pytest.raises(InputError) as e:
            predictor.read_image(given)
        told.append((e.value.status, str(e.value)))
    assert told[0] == told[1]
