"""Recipes, the optimizer, and fits that are broken off, repeated, resumed."""

import dataclasses
import math
import os
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from project.data.store import Data, build
from project.train.fit import (
    RECIPES,
    Recipe,
    choose_precision,
    fit,
    get_recipe,
    init_net,
    load_net,
    make_loaders,
    predict,
)
from project.train.module import RuleOptimizer, lr_schedule, make_optimizer
from project.train.recipe import check_train

TINY = {"model": "cnn-xs", "epochs": 2, "batch_size": 50}
CPU = {"accelerator": "cpu", "precision": "fp32"}


@pytest.fixture
def data():
    return build("fashion_mnist")


def weights(result):
    return list(result.net.state_dict().values())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize("task", RECIPES)
def test_every_recipe_is_valid_and_starts(task):
    for name in RECIPES[task]:
        assert get_recipe(task, name) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "1e-3"}, r"lr: expected a number above 0 .*'1e-3' \(str\)"),
        ({"lr": -1}, "lr"),
        ({"lr": 0}, "lr"),
        ({"lr": math.nan}, "lr: .*nan"),
        ({"lr": True}, "lr"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs: expected a whole number"),
        ({"batch_size": 0}, "batch_size"),
        ({"optimizer": "adamw"}, "optimizer: .*Did you mean 'adam'"),
        ({"schedule": "linear"}, "schedule"),
        ({"train_on": "test"}, "train_on"),
        ({"warmup": 2}, "warmup"),
        ({"label_smoothing": 1}, "label_smoothing"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"tta": 1}, "tta"),
        ({"small": 7}, "small: expected 0 .off. or an edge of at least 8 pixels, got 7"),
        ({"small": -1}, "small"),
        ({"small": 20.0}, "small"),
        ({"small_share": 1.5}, "small_share"),
        ({"lr": 10**400}, "lr"),
        ({"learning_rate": 1}, "a field of the recipe"),
    ],
)
def test_recipes_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        get_recipe(**change)


def test_unknown_tasks_and_recipes():
    with pytest.raises(ValueError, match="Did you mean 'fashion_mnist'"):
        get_recipe("fashion-mnist")
    with pytest.raises(ValueError, match="recipe: expected one of"):
        get_recipe(name="huge")


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({}, []),
        ({"task": "fashion_mnist", "recipe": "best", "epochs": 0.5, "wandb": "offline", "devices": 2}, []),
        ({"task": "fashion-mnist", "lr": 0}, ["task: .*Did you mean 'fashion_mnist'", "lr: expected a number above 0"]),
        ({"recipe": "bset"}, ["recipe: .*Did you mean 'best'"]),
        ({"epochs": 1.5, "batch_size": 0, "model": "cnn-xxl"}, ["model", "epochs: expected a whole", "batch_size"]),
        ({"epochs": math.nan, "lr": math.inf}, ["epochs: .*nan", "lr: .*inf"]),
        ({"seed": -1, "devices": 0, "limit_batches": -5}, ["seed", "limit_batches", "devices"]),
        ({"precision": "fp8", "accelerator": "tpu"}, ["precision", "accelerator"]),
        ({"profile": "full", "wandb": "onlin"}, ["profile", "wandb: .*Did you mean 'online'"]),
        ({"early_stopping": 2, "train_on": "train+val"}, ["early_stopping: expected 0 where train_on is 'train.val'"]),
        ({"early_stopping": 2}, []),
        ({"weight_decay": 0.1}, ["weight_decay: expected 0 with the optimizer muon"]),
        ({"weight_decay": 0.1, "recipe": "plain"}, []),
        ({"weight_decay": 0.1, "optimizer": "sgd"}, []),
        ({"weight_decay": 0.0}, []),
        ({"devices": 3}, ["batch_size: expected a multiple of 3, the number of devices, got 250"]),
        ({"devices": 3, "batch_size": 300}, []),
        ({"devices": 2, "accelerator": "mps"}, ["devices: expected 1 with the accelerator mps"]),
    ],
)
def test_everything_that_is_wrong_is_said_at_once(values, messages):
    found = check_train(values)
    assert len(found) == len(messages), found
    for text, message in zip(found, messages, strict=True):
        assert re.match(message, text) and "\n" not in text


ODD = [None, True, 5, -1.5, math.nan, 10**5000, "", "x", b"x", [], [1], {}, {"a": 1}, (), object(), float]


@pytest.mark.parametrize("odd", ODD, ids=lambda v: type(v).__name__)
def test_odd_values_are_no_reason_to_raise(odd):
    names = ["task", "recipe", "seed", "devices", "early_stopping", "precision", "wandb", "source", "unknown"]
    names += [field.name for field in dataclasses.fields(Recipe)]
    for name in names:
        assert all(isinstance(text, str) for text in check_train({name: odd}))
    assert isinstance(check_train(dict.fromkeys(names, odd)), list)


def test_what_is_refused_is_what_the_recipe_refuses():
    for values in ({"lr": -1.0}, {"epochs": 1.5}, {"model": "cnn"}, {"small": 3}, {"label_smoothing": 1.0}):
        with pytest.raises(ValueError) as error:
            Recipe(**values)
        assert check_train(values) == [str(error.value)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": "two"}, "devices"),
        ({"devices": 0}, "devices"),
        ({"checkpoint_every": -1}, "checkpoint_every"),
        ({"checkpoint_every": True}, "checkpoint_every"),
        ({"devices": True}, "devices"),
        ({"accelerator": "tpu"}, "accelerator: expected one of"),
        ({"precision": "16"}, "precision: expected one of"),
        ({"profile": "full"}, "profile: expected one of"),
        ({"limit_batches": -1}, "limit_batches"),
        ({"early_stopping": -1}, "early_stopping"),
        ({"seed": -1}, "seed"),
    ],
)
def test_arguments_that_are_refused(arguments, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(Recipe(**TINY), data, tmp_path / "run", **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(data, tmp_path):
    with pytest.raises(ValueError, match="accelerator='cuda'.*cannot be used on this machine"):
        fit(Recipe(**TINY), data, tmp_path, accelerator="cuda", precision="fp32")


def test_data_that_does_not_fit(data, tmp_path):
    words = Data(data.path, data.manifest | {"kind": "text"}, data.images, data.labels, data.splits)
    with pytest.raises(ValueError, match="model: expected one for texts"):
        fit(Recipe(**TINY), words, tmp_path)
    two = Data(data.path, data.manifest | {"classes": ["a", "b"]}, data.images, data.labels, data.splits)
    with pytest.raises(ValueError, match="expected labels below 2"):
        fit(Recipe(**TINY), two, tmp_path)


def test_a_folder_that_cannot_be_made(data, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OSError):
        fit(Recipe(**TINY), data, tmp_path / "file" / "run")


def test_no_space(data, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="are free"):
        fit(Recipe(**TINY), data, tmp_path)


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adam"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_bits_and_resumed_at_an_epoch(optimizer, precision, data, tmp_path):
    recipe = Recipe(**TINY, optimizer=optimizer, lr=0.01, flip="random", shift=1, cutout=4)
    options = {"seed": 3, "accelerator": "cpu", "precision": precision, "limit_batches": 4}
    whole = fit(recipe, data, tmp_path / "a", **options)

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 6:
                raise KeyboardInterrupt("killed")

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(recipe, data, tmp_path / "b", callbacks=[Kill()], **options)
    resumed = fit(recipe, data, tmp_path / "b", resume_from=tmp_path / "b/checkpoints/last.ckpt", **options)
    assert same(whole, resumed) and np.array_equal(whole.losses, resumed.losses)
    assert [r["val/acc"] for r in whole.history] == [r["val/acc"] for r in resumed.history]
    assert same(whole, fit(recipe, data, tmp_path / "c", **options))
    assert not same(whole, fit(recipe, data, tmp_path / "d", **options | {"seed": 4}))


def test_the_net_that_comes_out(data, tmp_path):
    rows = []
    result = fit(Recipe(**TINY), data, tmp_path, on_metrics=rows.append, accelerator="cpu", precision="bf16")
    assert rows == result.history and [r["epoch"] for r in rows] == [1, 2]
    assert not result.net.training and all(
        p.dtype == torch.float32 and p.device.type == "cpu" for p in result.net.parameters()
    )
    again = load_net(init_net(Recipe(**TINY), data), result.best_ckpt)
    images = data.split("test")[0][:30]
    assert np.array_equal(predict(result.net, images), predict(again, images))
    assert predict(result.net, images).dtype == np.float32
    assert np.abs(predict(result.net, images) - predict(result.net, images, precision="bf16")).max() < 0.05
    assert predict(result.net, images[:0]).shape[0] == 0
    assert "2 epochs" in repr(result) and result.device == "cpu"


def test_train_on_everything(data, tmp_path):
    recipe = Recipe(**TINY, train_on="train+val")
    train, val = make_loaders(recipe, data)
    assert val is None and len(train.rows) == len(data.splits["train"]) + len(data.splits["val"])
    result = fit(recipe, data, tmp_path, limit_batches=2, **CPU)
    assert "val/acc" not in result.history[-1] and result.best_ckpt.is_file() and result.last_ckpt.is_file()


def test_part_of_an_epoch(data, tmp_path):
    result = fit(Recipe(**TINY | {"epochs": 0.5}), data, tmp_path, **CPU)
    assert len(result.losses) == round(0.5 * len(data.splits["train"]) / 50)


def test_small_images_early_on(data, tmp_path):
    recipe = Recipe(**TINY, small=20, small_share=0.5)
    train, val = make_loaders(recipe, data)
    assert train.small_batches == len(train) and val.small == 0
    assert [train.batch(e, 0)[0].shape[-1] for e in (0, 1)] == [20, 28] and val.batch(0, 0)[0].shape[-1] == 28
    result = fit(recipe, data, tmp_path / "a", limit_batches=2, **CPU)
    assert np.isfinite(result.losses).all() and len(result.losses) == 4
    for off in ({"small": 20}, {"small_share": 0.5}):
        assert make_loaders(Recipe(**TINY, **off), data)[0].batch(0, 0)[0].shape[-1] == 28
    with pytest.raises(ValueError, match="small: 8 pixels are too few for cnn-m: .*at least 10 pixels"):
        fit(Recipe(model="cnn-m", small=8, small_share=0.5), data, tmp_path / "b", **CPU)
    with pytest.raises(ValueError, match="small: expected at most 28, the edge of the images, got 40"):
        fit(Recipe(**TINY, small=40, small_share=0.5), data, tmp_path / "b", **CPU)
    assert not (tmp_path / "b").exists()


def test_early_stopping(data, tmp_path):
    recipe = Recipe(**TINY | {"epochs": 50, "lr": 1e-9})
    result = fit(recipe, data, tmp_path, early_stopping=2, limit_batches=1, **CPU)
    assert len(result.history) < 10
    step = torch.load(result.last_ckpt, weights_only=True)["global_step"]
    assert step == len(result.history), "last.ckpt is of the last epoch, whichever was the best"


@pytest.mark.parametrize("profile", ["simple", "pytorch"])
def test_profiles_are_kept(profile, data, tmp_path):
    fit(Recipe(**TINY | {"epochs": 1}), data, tmp_path, profile=profile, limit_batches=3, **CPU)
    assert any(p.stat().st_size > 100 for p in (tmp_path / "profile").iterdir())


def test_progress_says_how_it_goes(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROJECT_PROGRESS", "on")
    monkeypatch.setattr("project.train.fit._Display.__init__.__defaults__", (0.0,))
    monkeypatch.setattr("project.core.progress.__defaults__", (None, "", "", 0, None))
    fit(Recipe(**TINY), data, tmp_path, limit_batches=3, **CPU)
    text = capsys.readouterr().err
    assert "loss" in text and "val acc" in text and "images/s" in text


def test_precision_follows_the_device(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    assert choose_precision()[0] == "bf16" and "AMX" in choose_precision()[1]
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    assert choose_precision()[0] == "bf16" and "AVX-512" in choose_precision()[1]
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert choose_precision()[0] == "fp32"
    assert choose_precision("auto", "mps")[0] == "fp32"
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: not including_emulation)
    assert choose_precision("auto", "cuda")[0] == "bf16-mixed"


def test_schedules_stay_between_nothing_and_the_peak():
    for name in ("triangular", "cosine", "constant"):
        for steps in (1, 2, 3, 100):
            for warmup in (0, 0.2, 1):
                share = lr_schedule(name, steps, warmup)
                assert all(0 <= share(i) <= 1 for i in range(steps + 2)), (name, steps, warmup)
    with pytest.raises(ValueError, match="schedule"):
        lr_schedule("step", 3)


def test_optimizers_know_their_rules():
    net = init = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Did you mean 'muon'"):
        make_optimizer(net, "moun")
    with pytest.raises(ValueError, match="rule: expected one of"):
        RuleOptimizer([{"params": init.parameters(), "rule": "rmsprop", "lr": 1}])
