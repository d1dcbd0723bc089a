"""Recipes, the optimizer, and fits that are broken off, repeated, resumed."""

import csv
import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from project.core import cache_dir, read_json, root
from project.data.readers import Texts
from project.data.store import Data, build
from project.train.fit import (
    RECIPES,
    Recipe,
    _waited,
    choose_epoch,
    choose_precision,
    fit,
    get_recipe,
    init_net,
    load_net,
    make_loaders,
    predict,
)
from project.train.module import Classifier, RuleOptimizer, lr_schedule, make_optimizer
from project.train.prepare import left_out, prepare
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


@pytest.mark.trained
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


@pytest.mark.trained
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


@pytest.mark.trained
def test_train_on_everything(data, tmp_path):
    recipe = Recipe(**TINY, train_on="train+val")
    train, val = make_loaders(recipe, data)
    assert val is None and len(train.rows) == len(data.splits["train"]) + len(data.splits["val"])
    result = fit(recipe, data, tmp_path, limit_batches=2, **CPU)
    assert "val/acc" not in result.history[-1] and result.best_ckpt.is_file() and result.last_ckpt.is_file()
    assert (result.epoch, result.epoch_reason) == (2, "the last epoch: there was no validation")
    assert torch.load(result.best_ckpt, weights_only=True)["global_step"] == 4


def test_part_of_an_epoch(data, tmp_path):
    result = fit(Recipe(**TINY | {"epochs": 0.5}), data, tmp_path, **CPU)
    assert len(result.losses) == round(0.5 * len(data.splits["train"]) / 50)


@pytest.mark.trained
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


@pytest.mark.trained
def test_early_stopping(data, tmp_path):
    recipe = Recipe(**TINY | {"epochs": 50, "lr": 1e-9})
    result = fit(recipe, data, tmp_path, early_stopping=2, limit_batches=1, **CPU)
    assert len(result.history) < 10
    step = torch.load(result.last_ckpt, weights_only=True)["global_step"]
    assert step == len(result.history), "last.ckpt is of the last epoch, whichever was the best"


def past(accuracies, losses=None):
    """A history."""
    pairs = zip(accuracies, losses or [1 - acc for acc in accuracies], strict=True)
    return [{"epoch": i, "step": 9 * i, "val/acc": acc, "val/loss": loss} for i, (acc, loss) in enumerate(pairs, 1)]


@pytest.mark.parametrize(
    ("accuracies", "n", "epoch", "reason"),
    [
        # photographs of dogs: as accurate as 150 rows can show after one epoch of twenty, at the peak of the rate
        ([149 / 150, *[148 / 150] * 19], 150, 20, r"the last epoch: 98.67% .*highest .*, 99.33% in epoch 1$"),
        ([1.0] * 5, 40, 5, "the last epoch: 100.00% is within one standard error"),  # ties go to the later one
        ([1.0, 0.99], 100, 2, "the last epoch"),  # all right is no certainty
        (
            [0.5, 0.7, 0.9, 0.6, 0.4],
            150,
            3,
            r"the latest epoch .*: has the highest validation accuracy, 90.00% in epoch 3$",
        ),
        ([0.5, 0.9, 0.89, 0.6], 150, 3, "the latest epoch that validation does not find worse: 89.00% is within"),
        ([0.93, 0.925], 200, 2, "the last epoch"),
        ([0.93, 0.925], 5000, 1, "the latest epoch"),  # the same difference, and rows enough to tell
        ([0.1, 0.2, 0.3], 1000, 3, "the last epoch: has the highest"),
        ([0.4], 42, 1, "the only epoch: has the highest"),
        ([0.0, 0.0], 42, 2, "the last epoch"),
    ],
)
def test_the_epoch_that_is_served(accuracies, n, epoch, reason):
    found, why = choose_epoch(past(accuracies), n)
    assert found == epoch and re.match(reason, why), why


def test_an_epoch_that_diverged_is_not_served():
    nan, inf = math.nan, math.inf
    assert choose_epoch(past([0.8, 0.81, 0.81], [1, 2, nan]), 50)[0] == 2
    assert choose_epoch(past([0.8, 0.9, 0.9], [1, inf, nan]), 50)[0] == 1
    assert choose_epoch(past([0.1, 0.1], [nan, nan]), 50) == (2, "the last epoch: validation was not finite in any")
    assert choose_epoch([{"epoch": 1}, {"epoch": 2}], 0) == (2, "the last epoch: there was no validation")


def test_the_choice_can_be_made_as_the_epochs_come():
    chance = np.random.default_rng(0)
    for _ in range(300):
        n = int(chance.integers(1, 300))
        losses = chance.choice([0.5, math.nan], 12, p=[0.9, 0.1]).tolist()
        rows = past((chance.integers(0, n + 1, 12) / n).tolist(), losses)
        kept = [i for i in range(1, 13) if choose_epoch(rows[:i], n)[0] == i]
        assert choose_epoch(rows, n)[0] == kept[-1], "best.ckpt would hold another epoch"


class Script:
    """Validation that says what it is told to, and the weights of each epoch."""

    def __init__(self, monkeypatch, accuracies, losses=None):
        self.rows, self.weights = past(accuracies, losses), {}

        def say(module):
            row = self.rows[module.trainer.current_epoch]
            module._log({k: v for k, v in row.items() if "/" in k})

        monkeypatch.setattr(Classifier, "on_validation_epoch_end", say)

    def fit(self, data, folder, **more):
        script = self

        class Keep(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                state = pl_module.net.state_dict()
                script.weights[trainer.current_epoch + 1] = {k: v.clone() for k, v in state.items()}

        recipe = Recipe(**TINY | {"epochs": len(self.rows)}, tta=False)
        options = {"limit_batches": 1, "callbacks": [Keep(), *more.pop("callbacks", [])]}
        return fit(recipe, data, folder, **options | more, **CPU)

    def served(self, result):
        """Whether the network is that of the epoch which the result names, in memory and in its file."""
        own, (row,) = self.weights[result.epoch], [r for r in result.history if r["epoch"] == result.epoch]
        kept = torch.load(result.best_ckpt, weights_only=True)
        net = result.net.state_dict()
        assert kept["global_step"] == row["step"] == result.checkpoint["step"]
        assert result.checkpoint["val/acc"] == row["val/acc"] and f"{row['val/acc']:.4f}".rstrip("0") in repr(result)
        assert f"epoch {result.epoch} of {len(result.history)} epochs" in repr(result)
        return all(torch.equal(v, own[k]) and torch.equal(v, kept["state_dict"][f"net.{k}"]) for k, v in net.items())


@pytest.mark.trained
@pytest.mark.parametrize(
    ("accuracies", "epoch"), [((0.95, 0.93, 0.93, 0.93), 4), ((0.2, 0.95, 0.93, 0.4), 3), ((0.9, 0.3, 0.2, 0.1), 1)]
)
def test_the_weights_are_those_of_the_epoch_that_is_said(accuracies, epoch, data, tmp_path, monkeypatch):
    script = Script(monkeypatch, accuracies)
    result = script.fit(data, tmp_path)
    assert result.epoch == epoch and script.served(result)
    last = torch.load(result.last_ckpt, weights_only=True)
    assert last["global_step"] == 4, "a run goes on from where it stands, whichever epoch is served"


@pytest.mark.trained
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resumed_run_serves_the_same_epoch(step, data, tmp_path, monkeypatch):
    class Cut(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == step:
                raise KeyError("cut")

    whole = Script(monkeypatch, (0.2, 0.95, 0.93, 0.4))
    expected = whole.fit(data, tmp_path / "whole")
    script = Script(monkeypatch, (0.2, 0.95, 0.93, 0.4))
    with pytest.raises(KeyError, match="cut"):
        script.fit(data, tmp_path / "cut", callbacks=[Cut()])
    last = tmp_path / "cut/checkpoints/last.ckpt"
    resumed = script.fit(data, tmp_path / "cut", resume_from=last if last.exists() else None)
    assert (resumed.epoch, resumed.epoch_reason) == (expected.epoch, expected.epoch_reason) == (3, resumed.epoch_reason)
    assert script.served(resumed) and same(expected, resumed)
    elsewhere = script.fit(data, tmp_path / "elsewhere", resume_from=last)  # finished: nothing is left to train
    assert elsewhere.best_ckpt == resumed.best_ckpt and same(expected, elsewhere)


def test_a_checkpoint_that_was_taken_away_or_is_of_another_run(data, tmp_path, monkeypatch):
    script = Script(monkeypatch, (0.2, 0.95, 0.93, 0.4))
    script.fit(data, tmp_path / "other", seed=1)
    result = script.fit(data, tmp_path / "run")
    result.best_ckpt.write_bytes((tmp_path / "other/checkpoints/best.ckpt").read_bytes())
    again = script.fit(data, tmp_path / "run", resume_from=result.last_ckpt)
    assert again.epoch == 4 and again.best_ckpt == again.last_ckpt and script.served(again)
    assert again.epoch_reason == "the last epoch: the checkpoint of epoch 3, which would be served, is no longer there"


@pytest.mark.trained
def test_early_stopping_waits_as_long_as_validation_gets_better(data, tmp_path, monkeypatch):
    saturated = [0.98] * 9  # after one epoch; the loss goes on falling to the sixth
    script = Script(monkeypatch, saturated, [0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.1, 0.12, 0.11])
    result = script.fit(data, tmp_path / "a", early_stopping=2)
    assert len(result.history) == 8 and result.epoch == 8 and script.served(result)
    script = Script(monkeypatch, [0.5, 0.9, 0.3, 0.2, 0.95], [1, 0.5, 2, 3, 0.1])
    result = script.fit(data, tmp_path / "b", early_stopping=2)
    assert len(result.history) == 4 and result.epoch == 2 and script.served(result)
    again = script.fit(data, tmp_path / "b", early_stopping=2, resume_from=result.last_ckpt)
    assert again.history == result.history and again.epoch == 2


def test_what_counts_as_better():
    assert _waited([]) == 0 and _waited(past([0.5])) == 0
    assert _waited(past([0.5, 0.5, 0.5], [1, 1, 1])) == 2, "as good as before is no better"
    assert _waited(past([0.5, 0.6, 0.6], [1, 2, 1.5])) == 1
    assert _waited(past([0.5, 0.9, 0.9], [1, math.nan, math.inf])) == 2, "what diverged is no better"


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


@pytest.mark.trained
def test_optimizers_know_their_rules():
    net = init = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Did you mean 'muon'"):
        make_optimizer(net, "moun")
    with pytest.raises(ValueError, match="rule: expected one of"):
        RuleOptimizer([{"params": init.parameters(), "rule": "rmsprop", "lr": 1}])


# --- what a cache had costs what it cost

FROZEN = {"model": "efficientnet-lite0", "frozen": 1.0, "epochs": 2, "batch_size": 50, "optimizer": "adam", "lr": 1e-3}


def kept(kind):
    """The one note of what lies in the cache took."""
    (note,) = (cache_dir() / kind).glob("*.json")
    return note


def test_a_training_that_finds_its_features_is_not_cheaper(data, tmp_path):
    recipe = Recipe(**FROZEN)
    first = fit(recipe, data, tmp_path / "first", **CPU)
    took = json.loads(kept("features").read_text())["seconds"]
    assert first.cached == {} and first.seconds > took > 0
    kept("features").write_text('{"seconds": 500}')
    again = fit(recipe, data, tmp_path / "again", **CPU)
    assert again.cached == {"features": 500.0} and again.seconds > 500 and same(first, again)
    read = len(again.losses) * recipe.batch_size
    assert again.images_per_s < read / 500, "the images were read, too"


@pytest.mark.parametrize("note", [None, "", "{}", '{"seconds": null}', "[1]"])
def test_a_cache_that_does_not_know_what_it_cost_is_made_anew(data, note):
    recipe = Recipe(**FROZEN)
    before = prepare(recipe, data).inputs.copy()
    kept("features").unlink() if note is None else kept("features").write_text(note)
    p = prepare(recipe, data)
    assert p.cached == {} and np.array_equal(p.inputs, before) and prepare(recipe, data).cached.keys() == {"features"}


def test_tokens_that_were_there_are_counted_too(tmp_path):
    rows = Texts.from_rows([[f"{word} number {i}"] for i in range(60) for word in ("good", "bad")], ("text",))
    splits = {"train": np.arange(80), "val": np.arange(80, 100), "test": np.arange(100, 120)}
    manifest = {"task": "words", "kind": "text", "classes": ["good", "bad"], "hash": "f" * 64}
    texts = Data(tmp_path, manifest, None, np.tile([0, 1], 60), splits, texts=rows)
    recipe = Recipe(model="ngrams")
    assert prepare(recipe, texts).cached == {}
    kept("tokens").write_text('{"seconds": 70}')
    p = prepare(recipe, texts)
    assert p.cached == {"tokens": 70.0} and 70 < p.seconds < 140


@pytest.mark.parametrize(
    ("own", "done", "options", "expected"),
    [
        ({}, 4, {}, []),
        ({"epochs": 8}, 8, {}, []),
        ({}, 4, {"limit_batches": 5}, ["5 batches an epoch"]),
        ({"epochs": 0.5}, 1, {}, ["0.5 epochs, where the recipe has 4"]),
        ({}, 2, {}, ["2 epochs, where 4 were asked for"]),
        ({}, 2, {"early_stopping": 1}, []),
        (
            {"epochs": 2},
            1,
            {"limit_batches": 1},
            ["1 batches", "2 epochs, where the recipe has 4", "1 epochs, where 2"],
        ),
    ],
)
def test_what_a_training_left_out(own, done, options, expected):
    found = left_out(get_recipe(**own), get_recipe(), done, **options)
    assert len(found) == len(expected) and all(a.startswith(b) for a, b in zip(found, expected, strict=True))


def test_notebook_record_and_bundle_name_the_epoch_that_was_tested(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_RUNS", str(tmp_path / "runs"))
    own = ["recipe", "tiny", "epochs", "3", "limit_batches", "2", "accelerator", "cpu", "precision", "fp32"]
    options = [word for pair in zip(own[::2], own[1::2], strict=True) for word in ("-p", *pair)]
    command = [sys.executable, "-m", "papermill", "nbs/train.ipynb", str(tmp_path / "out.ipynb"), *options]
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").glob("*/")
    record, manifest = read_json(run / "run.json"), read_json(run / "bundle/manifest.json")
    chosen = record["checkpoint"]
    assert chosen == manifest["checkpoint"] and chosen["epochs"] == 3
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as f:
        row = {int(r["epoch"]): r for r in csv.DictReader(f)}[chosen["epoch"]]
    for metrics in (record["metrics"], manifest["metrics"]):
        assert metrics["train/epoch"] == chosen["epoch"]
        for name in ("train/loss", "val/loss", "val/acc"):
            assert metrics[name] == chosen[name] == pytest.approx(float(row[name]))
    assert torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"] == chosen["step"]
    shown = json.dumps(read_json(tmp_path / "out.ipynb"))
    assert f"epoch {chosen['epoch']} is served, {chosen['reason']}" in shown
