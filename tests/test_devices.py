"""Several processes that train one network: what each reads, what comes back, and what a record says of the device."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn

from project import core
from project.core import environment
from project.data.loader import Batches
from project.data.store import build
from project.runs.compare import compare, show_run
from project.runs.receipt import make_receipt
from project.runs.record import find_run, start_run
from project.train.fit import Recipe, fit, predict
from project.train.module import Classifier
from project.train.prepare import describe_device

pytestmark = pytest.mark.trained
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
    assert result.environment == {"device": "2 x cpu"}
    steps = 2 * (len(data.splits["train"]) // 50)
    assert len(result.losses) == steps and np.isfinite(result.losses).all()
    assert [r["epoch"] for r in result.history] == [1, 2] and [r["step"] for r in result.history] == [steps // 2, steps]
    assert told == [(os.getpid(), row) for row in result.history]
    assert [step for step, _ in log.rows] == [steps // 2 - 1, steps - 1]
    assert log.rows[1][1] == {k: v for k, v in result.history[1].items() if "/" in k} | {"epoch": 1}
    assert result.history[1]["train/loss"] == pytest.approx(result.losses[steps // 2 :].mean())
    images, labels = data.split("val")
    accuracy = (predict(result.net, images, tta=True).argmax(1) == labels).mean()
    assert accuracy == pytest.approx(result.checkpoint["val/acc"]) and accuracy > 0.4
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
    assert told == resumed.history, "the sitting that failed could not tell of its epoch"


@forks
def test_two_devices_serve_the_epoch_of_one(data, tmp_path, monkeypatch):
    def say(module):
        epoch = module.trainer.current_epoch
        module._log({"val/acc": (0.95, 0.93, 0.4)[epoch], "val/loss": (0.2, 0.3, 2.0)[epoch]})

    monkeypatch.setattr(Classifier, "on_validation_epoch_end", say)
    recipe = dataclasses.replace(RECIPE, epochs=3)
    one, two = (fit(recipe, data, tmp_path / f"{n}", devices=n, limit_batches=2, **CPU) for n in (1, 2))
    assert (one.epoch, one.epoch_reason) == (two.epoch, two.epoch_reason) == (2, one.epoch_reason)
    assert torch.load(two.best_ckpt, weights_only=True)["global_step"] == 4
    again = fit(
        recipe, data, tmp_path / "2", devices=2, limit_batches=2, early_stopping=2, resume_from=two.last_ckpt, **CPU
    )
    assert again.epoch == 2 and len(again.history) == 3


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


# --- what a record says of the device. There is no GPU here: a device of another name stands in for it.


def test_the_device_is_that_of_the_training(data, tmp_path, monkeypatch):
    """Lightning moves the network back to the CPU at the end; `cpu:7` is the CPU under another name."""
    monkeypatch.setattr("project.train.fit._strategy", lambda *_: SingleDeviceStrategy(torch.device("cpu", 7)))
    result = fit(Recipe(model="cnn-xs", epochs=1, batch_size=50), data, tmp_path, limit_batches=2, **CPU)
    assert result.device == "cpu:7" and result.environment == {"device": "cpu:7"}
    assert repr(result).endswith("on cpu:7)") and next(result.net.parameters()).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_named_with_its_memory(data, tmp_path):
    result = fit(Recipe(model="cnn-xs", epochs=1, batch_size=50), data, tmp_path, limit_batches=2, accelerator="cuda")
    found = result.environment
    assert result.device == found["device"] == "cuda:0" and found["gpu"] == torch.cuda.get_device_name(0)
    assert 0 < found["gpu_memory_used"] < found["gpu_memory"] and found["cuda"] == torch.version.cuda
    assert environment()["driver"] and found["gpu"] in environment()["gpus"][0]


@pytest.mark.parametrize("device", ["cpu", "mps:0", "meta"])
def test_other_devices_have_a_name_only(device):
    assert describe_device(torch.device(device)) == {"device": device}


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A program in the place of the driver's tool: the text and the status it answers with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def answer(text, status=0):
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n", encoding="utf-8")
        program.chmod(0o755)
        core._gpus.cache_clear()

    yield answer
    core._gpus.cache_clear()


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for nvidia-smi")
def test_the_driver_is_asked_without_torch(smi):
    smi("570.124.06, NVIDIA H100 80GB HBM3, 81559 MiB\n570.124.06, NVIDIA H100 80GB HBM3, 81559 MiB")
    code = (
        "import json, sys; from project.core import environment as e; print(json.dumps([e(), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    found, torch_there = json.loads(done.stdout)
    assert found["driver"] == "570.124.06" and found["gpus"] == ["NVIDIA H100 80GB HBM3, 81559 MiB"] * 2
    assert not torch_there


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for nvidia-smi")
@pytest.mark.parametrize(
    ("text", "status"), [("NVIDIA-SMI has failed, as it says, always", 9), ("", 0), ("No devices", 0)]
)
def test_a_driver_that_does_not_answer_is_none(smi, text, status):
    smi(text, status)
    if not Path("/proc/driver/nvidia").exists():
        assert not {"gpus", "driver"} & environment().keys()


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for nvidia-smi")
def test_record_receipt_and_compare_show_the_device(smi, tmp_path):
    used = {
        "device": "cuda:0",
        "gpu": "NVIDIA H100 80GB HBM3",
        "gpu_memory": 85_520_809_984,
        "gpu_memory_used": 3 * 10**9,
    }
    runs = []
    for driver in ("570.1", "580.2"):
        smi(f"{driver}, NVIDIA H100 80GB HBM3, 81559 MiB")
        run = start_run("t", {"lr": 0.1}, root=tmp_path / "runs")
        run.update(environment=run.record["environment"] | used | {"cuda": "13.0"})
        run.finish()
        used = {"device": "cpu"}
        runs.append(find_run(run.id, tmp_path / "runs"))
    text = show_run(runs[0])
    for words in ("570.1", "cuda:0", "85.5 GB", "3 GB", "13.0"):
        assert words in text
    receipt = make_receipt({"cells": [], "metadata": {}}, "finished", runs=[r["path"] for r in runs])
    assert [r["environment"]["device"] for r in receipt["runs"]] == ["cuda:0", "cpu"]
    differ = compare(runs).environment
    assert differ["device"] == ["cuda:0", "cpu"] and differ["driver"] == ["570.1", "580.2"]


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for nvidia-smi")
def test_a_run_that_goes_on_elsewhere_keeps_both_machines(smi, tmp_path):
    smi("", 9)
    first = start_run("t", {"lr": 0.1}, root=tmp_path, resume=True)
    first.finish("interrupted")
    smi("580.2, NVIDIA L4, 23034 MiB")
    record = start_run("t", {"lr": 0.1}, root=tmp_path, resume=True).record
    assert record["id"] == first.id and record["environment"]["driver"] == "580.2"
    assert "driver" not in record["sittings"][0]["environment"] and "environment" not in record["sittings"][1]
