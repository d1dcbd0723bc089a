"""A training that is killed again and again ends with the same bits as one that is not."""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback

from project.data.store import build
from project.train.fit import Recipe, _AtomicIO, fit, load_net
from project.train.module import Classifier

KILLS = 10
RECIPE = Recipe(
    model="cnn-xs", epochs=16, batch_size=50, flip="random", shift=1, cutout=4, small=20, small_share=0.4, tta=False
)
OPTIONS = {"seed": 3, "accelerator": "cpu", "precision": "fp32", "checkpoint_every": 0.05}
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


class Started(Callback):
    """Writes a byte to a pipe when the first step is about to be taken."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_start(self, *_):
        os.write(self.pipe, b"x")


def sitting(folder, data):
    """Train in `folder` from where it stands, in a process of its own: the process and the pipe's end."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        return pid, reading
    status = 1
    try:  # nothing of pytest's may run in here
        last = folder / "checkpoints" / "last.ckpt"
        fit(RECIPE, data, folder, resume_from=last if last.exists() else None, callbacks=[Started(writing)], **OPTIONS)
        status = 0
    finally:
        os._exit(status)


def content(folder, name):
    """A checkpoint without what differs between two runs of the same: times, folders, whole callbacks of Lightning."""
    state = torch.load(folder / "checkpoints" / name, weights_only=True)
    callbacks = state.pop("callbacks")
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in callbacks["_History"]["rows"]
    ]
    return {**state, "rows": rows}


def differences(a, b, where=""):
    """The places where two nests of dicts, lists and tensors differ by a bit."""
    if type(a) is not type(b):
        return [where]
    if isinstance(a, dict):
        return [f"{where} keys"] * (a.keys() != b.keys()) + [
            d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{where}/{k}")
        ]
    if isinstance(a, list | tuple):
        return [f"{where} length"] * (len(a) != len(b)) + [
            d for i, (x, y) in enumerate(zip(a, b, strict=False)) for d in differences(x, y, f"{where}/{i}")
        ]
    return [] if (torch.equal(a, b) if torch.is_tensor(a) else a == b) else [where]


@posix
def test_killed_ten_times(tmp_path):
    torch.set_num_threads(1)  # a fork has none of the threads that worked before it
    data = build("fashion_mnist")
    pid, _ = sitting(tmp_path / "whole", data)
    assert os.waitpid(pid, 0)[1] == 0
    chance, killed, steps = random.Random(0), 0, set()
    per_epoch = len(data.splits["train"]) // RECIPE.batch_size
    for _ in range(5 * KILLS):
        pid, pipe = sitting(tmp_path / "killed", data)
        if killed < KILLS or not any(step % per_epoch for step in steps):  # a busy machine gets no further in a moment
            os.read(pipe, 1)
            time.sleep(chance.uniform(0.05, 0.25) * (1 + killed / KILLS))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        os.close(pipe)
        if not os.WIFSIGNALED(status):
            break
        killed += 1
        if (last := tmp_path / "killed/checkpoints/last.ckpt").exists():
            steps.add(torch.load(last, weights_only=True)["global_step"])
    assert status == 0 and killed >= 5, "the training was over before it could be killed"
    assert any(step % per_epoch for step in steps), "no kill left a checkpoint inside an epoch"
    for name in ("last.ckpt", "best.ckpt"):
        assert differences(content(tmp_path / "whole", name), content(tmp_path / "killed", name)) == []
    assert sorted(p.name for p in (tmp_path / "killed/checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


class Stop(Callback):
    """Fails at a step, as a bug in a notebook would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyError("stopped")


def fitted(folder, **more):
    """A short training with a checkpoint after every step."""
    recipe = Recipe(model="cnn-xs", epochs=2, batch_size=50, tta=False)
    return fit(
        recipe, build("fashion_mnist"), folder, **{**OPTIONS, "checkpoint_every": 1e-9, "limit_batches": 4} | more
    )


@pytest.mark.trained
@pytest.mark.parametrize("step", [1, 2, 4, 5, 7, 8])
def test_resumed_at_every_step(step, tmp_path):
    whole = fitted(tmp_path / "whole", checkpoint_every=0)
    with pytest.raises(KeyError, match="stopped"):
        fitted(tmp_path / "cut", callbacks=[Stop(step)])
    last = tmp_path / "cut/checkpoints/last.ckpt"
    if step == 1:  # the error comes before the first checkpoint
        assert not last.exists()
        return
    resumed = fitted(tmp_path / "cut", resume_from=last)
    assert differences(whole.net.state_dict(), resumed.net.state_dict()) == []
    assert np.array_equal(whole.losses, resumed.losses) and len(resumed.history) == 2
    for name in ("epoch", "step", "train/loss", "val/loss", "val/acc"):
        assert [row[name] for row in whole.history] == [row[name] for row in resumed.history]


def test_only_at_the_ends_of_epochs_where_asked(tmp_path):
    with pytest.raises(KeyError, match="stopped"):
        fitted(tmp_path, checkpoint_every=0, callbacks=[Stop(6)])
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_a_finished_run_is_finished(tmp_path):
    whole = fitted(tmp_path)
    rows = []
    again = fitted(tmp_path, resume_from=whole.last_ckpt, on_metrics=rows.append)
    assert rows == [] and again.history == whole.history and again.best_ckpt == whole.best_ckpt


@pytest.mark.trained
def test_early_stopping_stands_by_its_decision(tmp_path):
    options = {"early_stopping": 1, "limit_batches": 1}
    recipe = Recipe(model="cnn-xs", epochs=9, batch_size=50, lr=1e-9, tta=False)
    data = build("fashion_mnist")
    whole = fit(recipe, data, tmp_path, **OPTIONS | options)
    again = fit(recipe, data, tmp_path, resume_from=whole.last_ckpt, **OPTIONS | options)
    assert len(whole.history) < 9 and again.history == whole.history


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_checkpoint_that_was_cut_off(share, tmp_path):
    whole = fitted(tmp_path).last_ckpt
    raw = whole.read_bytes()
    whole.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(ValueError, match="resume_from: expected a whole checkpoint of `fit`.*last.ckpt"):
        fitted(tmp_path, resume_from=whole)


def test_a_checkpoint_with_a_wrong_byte_and_a_foreign_one(tmp_path):
    whole = fitted(tmp_path).last_ckpt
    raw = bytearray(whole.read_bytes())
    raw[len(raw) // 2] ^= 1
    whole.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged or foreign"):
        fitted(tmp_path, resume_from=whole)
    torch.save({"weights": torch.zeros(2)}, whole)
    with pytest.raises(ValueError, match="damaged or foreign"):
        fitted(tmp_path, resume_from=whole)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    io, path = _AtomicIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {"net.a": torch.ones(2)}}, path)
    with pytest.raises(Exception, match="pickle"):
        io.save_checkpoint({"state_dict": lambda: None}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    net = torch.nn.Module()
    net.a = torch.nn.Parameter(torch.zeros(2))
    assert load_net(net, path).a.tolist() == [1, 1]


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".last.ckpt.123-0000abcd.tmp").write_bytes(b"half")
    (folder / "mine.txt").write_text("kept", encoding="utf-8")
    fitted(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt", "mine.txt"]


@pytest.mark.trained
def test_chance_goes_on_where_it_stood(tmp_path, monkeypatch):
    step = Classifier.training_step
    monkeypatch.setattr(Classifier, "training_step", lambda *args: step(*args) * (1 + 0.1 * torch.rand(())))
    whole = fitted(tmp_path / "whole")
    with pytest.raises(KeyError, match="stopped"):
        fitted(tmp_path / "cut", callbacks=[Stop(6)])
    torch.manual_seed(99)
    resumed = fitted(tmp_path / "cut", resume_from=tmp_path / "cut/checkpoints/last.ckpt")
    assert differences(whole.net.state_dict(), resumed.net.state_dict()) == []
