"""Every network through the same contract."""

import pytest
import torch
from torch import nn

from project.models.vision import MODELS, FastCNN, ImageClassifier, build_model, set_normalization_, summarize, whiten_


def bytes_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28), (3, 32, 40)], ids=str)
@pytest.mark.parametrize("name", MODELS)
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
