"""Several processes that train one network: what each reads, and what comes back."""

import os
import signal

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback
from torch import nn

from project.data.loader import Batches
from project.data.store import build
from project.train.fit import Recipe, fit, predict

RECIPE = Recipe(model="cnn-xs", epochs=2, batch_size=50, flip="random", shift=1, cutout=4)
CPU = {"seed": 3, "accelerator": "cpu", "precision": "fp32"}
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def data():
    return build("fashion_mnist")


@pytest.fixture(autouse=True)
def patience():
    """A process that waits for ever for another one fails, and does not hang."""
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the processes wait for each other"))
        signal.alarm(120)
    yield
    if hasattr(signal, "alarm"):
        signal.alarm(0)


def batches(rank=0, world=1, n=23, **options):
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8), np.uint8)
    made = Batches(images, np.arange(n), 5, seed=1, **options)
    made.shard(rank, world)
    return made


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": True, "drop_last": True},
        {"shuffle": True, "flip": "alternate", "limit": 3},
        {"shuffle": True, "flip": "random", "shift": 2, "cutout": 3},
        {"flip": "random", "small": 6, "small_batches": 3},
    ],
)
def test_the_parts_are_the_whole(world, options):
    alone, parts = batches(**options), [batches(rank, world, **options) for rank in range(world)]
    for _ in range(2):  # epochs
        for (x, y), *shards in zip(alone, *parts, strict=True):
            assert torch.equal(torch.cat([s[0] for s in shards]), x)
            assert torch.equal(torch.cat([s[1] for s in shards]), y)
            assert max(len(s[1]) for s in shards) - min(len(s[1]) for s in shards) <= 1


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_parts_that_are_not_there(rank, world):
    with pytest.raises(ValueError, match="rank: expected 0 to"):
        batches(rank, world)


class Log:
    """What a Lightning logger is asked for here."""

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


@forks
def test_two_devices_train(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PROJECT_PROGRESS", "on")
    monkeypatch.setattr("project.train.fit._Display.__init__.__defaults__", (0.0,))
    monkeypatch.setattr("project.core.progress.__defaults__", (None, "", "", 0, None))
    told, log = [], Log()
    before = dict(os.environ)
    result = fit(
        RECIPE, data, tmp_path, devices=2, on_metrics=lambda r: told.append((os.getpid(), r)), loggers=[log], **CPU
    )
    assert dict(os.environ) == before and result.device == "2 x cpu"
    steps = 2 * (len(data.splits["train"]) // 50)
    assert len(result.losses) == steps and np.isfinite(result.losses).all()
    assert [r["epoch"] for r in result.history] == [1, 2] and [r["step"] for r in result.history] == [steps // 2, steps]
    assert told == [(os.getpid(), row) for row in result.history]
    assert [step for step, _ in log.rows] == [steps // 2 - 1, steps - 1]
    assert log.rows[1][1] == {k: v for k, v in result.history[1].items() if "/" in k} | {"epoch": 1}
    assert result.history[1]["train/loss"] == pytest.approx(result.losses[steps // 2 :].mean())
    images, labels = data.split("val")
    accuracy = (predict(result.net, images, tta=True).argmax(1) == labels).mean()
    assert accuracy == pytest.approx(max(r["val/acc"] for r in result.history)) and accuracy > 0.4
    lines = [line.split(",")[0] for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "train:" in line]
    assert lines and len(set(lines)) == len(lines), "two processes show their progress"


class Plain(nn.Module):
    """A network without batch normalisation: its gradient on a batch is the mean of those on the parts."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(28 * 28, 10)

    def forward(self, x):
        return self.head(x.flatten(1).float() / 255)


@forks
@pytest.mark.parametrize(("devices", "optimizer"), [(2, "sgd"), (3, "adam")])
def test_steps_are_those_of_one_device(devices, optimizer, data, tmp_path, monkeypatch):
    torch.manual_seed(0)
    start = Plain().state_dict()

    def init(*_, **__):
        net = Plain()
        net.load_state_dict(start)
        return net

    monkeypatch.setattr("project.train.prepare.init_net", init)
    recipe = Recipe(epochs=2, batch_size=48, optimizer=optimizer, lr=0.01, flip="random", shift=1, tta=False)
    one = fit(recipe, data, tmp_path / "one", **CPU)
    many = fit(recipe, data, tmp_path / "many", devices=devices, **CPU)
    assert np.allclose(one.losses, many.losses, atol=1e-5)
    assert torch.allclose(one.net.head.weight, many.net.head.weight, atol=1e-5)
    assert not torch.allclose(one.net.head.weight, start["head.weight"], atol=1e-3)
    for a, b in zip(one.history, many.history, strict=True):
        assert all(a[k] == pytest.approx(b[k], abs=1e-5) for k in ("train/loss", "val/loss", "val/acc"))


class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 12:
            raise KeyError("stopped")


@forks
def test_a_failure_comes_back_and_the_run_goes_on(data, tmp_path):
    options = {"devices": 2, "checkpoint_every": 1e-9, **CPU}
    whole = fit(RECIPE, data, tmp_path / "whole", **options)
    with pytest.raises(Exception, match="KeyError: 'stopped'"):
        fit(RECIPE, data, tmp_path / "cut", callbacks=[Stop()], **options)
    told = []
    last = tmp_path / "cut/checkpoints/last.ckpt"
    resumed = fit(RECIPE, data, tmp_path / "cut", resume_from=last, on_metrics=told.append, **options)
    assert np.array_equal(whole.losses, resumed.losses)
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), resumed.net.parameters(), strict=True))
    assert [r["val/acc"] for r in whole.history] == [r["val/acc"] for r in resumed.history]
    assert told == resumed.history[1:], "the first epoch was told by the first sitting"


@forks
def test_threads_that_worked_before_the_fork(data, tmp_path):
    torch.set_num_threads(2)  # as many are used in each of the forks
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    result = fit(Recipe(model="cnn-xs", epochs=1, batch_size=50), data, tmp_path, devices=2, limit_batches=2, **CPU)
    assert len(result.losses) == 2


def test_devices_that_are_refused(data, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3, the number of devices, got 50"):
        fit(RECIPE, data, tmp_path, devices=3, **CPU)
    with pytest.raises(ValueError, match="devices: expected 1 where the device is mps"):
        fit(RECIPE, data, tmp_path, devices=2, accelerator="mps")
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(ValueError, match="devices: expected 1 in a process that has used CUDA, got 2"):
        fit(RECIPE, data, tmp_path, devices=2, accelerator="cuda")
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ValueError, match="devices: expected 1 where the device is cpu and the system"):
        fit(RECIPE, data, tmp_path, devices=2, **CPU)
