"""W&B: offline for real, online with a stand-in for the server, and a server that is not there."""

import base64
import json
import os
import signal
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import wandb
from click.testing import CliRunner
from wandb_server import WandbServer

from project.cli import app
from project.data.store import build
from project.runs.record import list_runs, start_run
from project.train.fit import Recipe, fit
from project.train.tracking import _PATIENCE, choose_mode, finish_wandb, upload_artifacts, wandb_logger


@pytest.fixture
def run(tmp_path):
    run = start_run("fashion_mnist", {"lr": 0.1}, "nbs/train.ipynb", data={"hash": "abc"}, root=tmp_path)
    yield run
    run.finish()


@pytest.fixture(autouse=True)
def _no_wandb_settings(monkeypatch, tmp_path_factory):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_PROJECT", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path_factory.mktemp("login")
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))


def records(folder: Path) -> list:
    """What the offline file holds: protobuf in LevelDB's log framing (blocks of 32 KiB, headers of 7 bytes)."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + 10
    while file.stat().st_size <= 7 and time.monotonic() < end:  # wandb-core closes it a moment after `finish` is over
        time.sleep(0.05)
    raw, at, piece, found = file.read_bytes(), 7, b"", []  # the file's own header is 7 bytes as well
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:  # what is left of a block cannot hold a header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", raw, at + 4)
        piece = (b"" if kind in (1, 2) else piece) + raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            found.append(wandb_internal_pb2.Record.FromString(piece))
    return found


def test_offline_holds_the_configuration_the_metrics_and_the_end(run):
    logger = wandb_logger(run, "offline", verbose=False)
    logger.log_metrics({"val/acc": 0.93}, step=3)
    finish_wandb(run, logger, {"test/acc": 0.91})
    found = records(run.path)
    config = {u.key: u.value_json for r in found for u in r.run.config.update} | {
        u.key: u.value_json for r in found for u in r.config.update
    }
    assert config["lr"] == "0.1" and config["data_hash"] == '"abc"' and config["notebook"] == '"nbs/train.ipynb"'
    assert {"commit", "dirty", "run_id"} <= config.keys()
    history = [{i.key or i.nested_key[0]: i.value_json for i in r.history.item} for r in found if r.HasField("history")]
    assert any(row.get("val/acc") == "0.93" for row in history)
    assert any(r.HasField("exit") and r.exit.exit_code == 0 for r in found)


def test_a_server_that_is_not_there_costs_no_time(run, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    logger = wandb_logger(run)
    finish_wandb(run, logger)
    assert time.monotonic() - started < 15
    assert "offline" in capsys.readouterr().out and run.record["wandb"]["mode"] == "offline"


def test_disabled_makes_nothing(run):
    logger = wandb_logger(run, "disabled", verbose=False)
    finish_wandb(run, logger)
    assert logger is None and not (run.path / "wandb").exists()


def test_the_mode_of_the_environment_wins_over_auto_only(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("auto")[0] == "disabled" and choose_mode("offline")[0] == "offline"
    with pytest.raises(ValueError, match="wandb must be one of"):
        choose_mode("onlin")


def test_wandb_is_finished_when_the_process_fails(tmp_path):
    script = f"""
from project.runs.record import start_run
from project.train.tracking import wandb_logger
run = start_run('t', root={str(tmp_path)!r})
wandb_logger(run, 'offline')
raise RuntimeError('boom')
"""
    subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    (record,) = list_runs(tmp_path)
    assert record["status"] == "failed"
    ends = [r.exit.exit_code for r in records(record["path"]) if r.HasField("exit")]
    assert ends and ends[-1] != 0


@pytest.fixture
def server(monkeypatch):
    """A server that keeps what it is sent; W&B in this process is told of it, and forgets it afterwards."""
    wandb.teardown()  # it reads its environment once a process
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield server
        wandb.teardown()
    assert server.failures == []


def leave_files(run):
    """What a training leaves in its folder."""
    (run.path / "bundle").mkdir()
    (run.path / "bundle" / "model.onnx").write_bytes(bytes(range(256)) * 40)
    (run.path / "bundle" / "manifest.json").write_text('{"task": "t"}', encoding="utf-8")
    (run.path / "notebook.ipynb").write_text('{"cells": []}', encoding="utf-8")


def test_online_everything_arrives(run, server, tmp_path):
    logger = wandb_logger(run, verbose=False)
    told = run.record["wandb"]
    assert told["mode"] == "online" and told["url"].startswith(server.url)
    recipe = Recipe(model="cnn-xs", epochs=2, batch_size=50)
    where = {"accelerator": "cpu", "precision": "fp32"}
    result = fit(recipe, build("fashion_mnist"), tmp_path / "fit", loggers=[logger], limit_batches=3, **where)
    leave_files(run)
    finish_wandb(run, logger, {"test/acc": 0.91, "val/acc": 0.5})  # of the epoch that is served
    (name,) = server.runs
    config, code = server.config(name), run.record["code"]
    assert name == told["id"] and server.runs[name]["project"] == "fashion_mnist"
    assert server.runs[name]["displayName"] == run.id and server.runs[name]["jobType"] == "train"
    expected = {"lr": 0.1, "run_id": run.id, "task": "fashion_mnist", "notebook": "nbs/train.ipynb", "data_hash": "abc"}
    assert expected.items() <= config.items()
    assert config["commit"] == code["commit"] and config["dirty"] == code["dirty"]
    rows = [row for row in server.rows[name] if "val/acc" in row]
    for row, mine in zip(rows, result.history, strict=True):
        assert row["val/acc"] == pytest.approx(mine["val/acc"]) and row["trainer/global_step"] == mine["step"] - 1
    summary = server.runs[name]["summary"]
    assert (summary["test/acc"], summary["val/acc"], server.ends[name]) == (0.91, 0.5, 0)
    assert server.keys - {None} == {"Basic " + base64.b64encode(b"api:" + b"0123456789" * 4).decode()}
    artifacts = {a["artifactCollectionName"]: a for a in server.artifacts.values()}
    kinds = {name: (a["artifactTypeName"], a["state"]) for name, a in artifacts.items()}
    assert kinds == {
        "fashion_mnist-bundle": ("model", "COMMITTED"),
        "fashion_mnist-notebook": ("notebook", "COMMITTED"),
    }
    for artifact in artifacts.values():
        files = {k: v for k, v in artifact["files"].items() if k != "wandb_manifest.json"}
        folder = run.path if "notebook.ipynb" in files else run.path / "bundle"
        assert files == {k: (folder / k).read_bytes() for k in files}
        assert json.loads(artifact["metadata"]) == {"run_id": run.id}
    assert sorted(artifacts["fashion_mnist-bundle"]["files"]) == ["manifest.json", "model.onnx", "wandb_manifest.json"]
    assert set(server.unknown) <= {"OrganizationCoreWeaveOrganizationID", "ServerFeaturesQuery"}


def test_under_papermill_the_artifacts_wait_for_the_notebook(run, server, monkeypatch):
    monkeypatch.setattr("project.train.tracking.leave_note", lambda *_: True)
    logger = wandb_logger(run, verbose=False)
    leave_files(run)
    finish_wandb(run, logger)
    assert server.artifacts == {} and list(server.ends.values()) == [0]
    assert upload_artifacts(run.path) == ["bundle", "notebook"] and len(server.artifacts) == 2


def test_artifacts_that_are_refused_leave_the_run_a_success(run, server, capsys):
    server.ArtifactType = lambda **_: {}  # an answer that wandb cannot read
    logger = wandb_logger(run, verbose=False)
    leave_files(run)
    finish_wandb(run, logger)
    said = capsys.readouterr().out
    assert "bundle and notebook not uploaded" in said and "they are in" in said
    assert list(server.ends.values()) == [0] and server.artifacts == {}
    server.runs.clear()  # and now the run itself is gone
    assert upload_artifacts(run.path) == [] and "not uploaded" in capsys.readouterr().out


def test_a_server_that_refuses_the_run(run, server, capsys):
    server.refused.add("UpsertBucket")
    logger = wandb_logger(run, verbose=False)
    finish_wandb(run, logger)
    assert "offline after all" in capsys.readouterr().out and run.record["wandb"]["mode"] == "offline"


def test_a_server_that_goes_away_is_not_waited_for(run, server, monkeypatch, capsys):
    monkeypatch.setitem(_PATIENCE, "run", 3.0)
    logger = wandb_logger(run, verbose=False)
    logger.log_metrics({"val/acc": 0.93}, step=3)
    server.refused.add("everything")
    started = time.monotonic()
    finish_wandb(run, logger, {"test/acc": 0.91})
    assert time.monotonic() - started < 20
    assert "not all was sent in time" in capsys.readouterr().out and server.artifacts == {}
    assert list(run.path.glob("wandb/run-*/*.wandb")), "what `wandb sync` sends later"


# --- a run that is gone on with

SITTING = """
import os, signal, sys
from pytorch_lightning import Callback
from project.data.store import build
from project.runs.record import start_run
from project.train.fit import Recipe, fit
from project.train.tracking import finish_wandb, wandb_logger

root, mode, hook, epoch = sys.argv[1:]
run = start_run("fashion_mnist", {"lr": 0.1}, data={"hash": "abc"}, root=root, resume=True)
logger = wandb_logger(run, mode)

class Kill(Callback):
    def on_train_batch_end(self, trainer, *_):
        if hook == "batch" and trainer.current_epoch == int(epoch) and trainer.global_step % 4 == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_epoch_end(self, trainer, *_):  # it is validated, and not in a checkpoint yet
        if hook == "epoch" and trainer.current_epoch == int(epoch):
            os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe(model="cnn-xs", epochs=4, batch_size=50)
result = fit(recipe, build("fashion_mnist"), run.path, limit_batches=4, accelerator="cpu", precision="fp32",
             loggers=[logger], callbacks=[Kill()], on_metrics=run.log, resume_from=run.checkpoint)
finish_wandb(run, logger, {"test/acc": 0.9})
run.finish()
"""


def sit(root, mode, hook, epoch):
    """One sitting of the same training, killed at a place or not: how it ended, and what it printed.

    Its process is forked from this one, which has imported torch, Lightning and W&B already.
    """
    wandb.teardown()  # the service of this process is none of the other's
    torch.set_num_threads(1)  # a fork has none of the threads that worked before it
    log = root / f"sitting-{time.monotonic_ns()}.log"
    if (pid := os.fork()) == 0:
        status = 1
        try:  # nothing of pytest's may run in here
            file = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            signal.alarm(200)
            sys.argv[1:] = [str(root), mode, hook, str(epoch)]
            exec(compile(SITTING, "sitting", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = log.read_text(encoding="utf-8")
    assert status in (0, -signal.SIGKILL), said
    return status, said


def is_whole(server, record):
    """One run on the server, which has every epoch once, in order, and its end."""
    (name,) = server.runs
    rows = server.rows[name]
    steps = {key: [r["trainer/global_step"] for r in rows if key in r] for key in ("val/acc", "train/loss")}
    assert name == record["wandb"]["id"] and steps == {"val/acc": [3, 7, 11, 15], "train/loss": [3, 7, 11, 15]}
    assert [r["_step"] for r in rows] == list(range(len(rows)))
    assert server.ends[name] == 0 and server.runs[name]["summary"]["test/acc"] == 0.9
    times = [r["_timestamp"] for r in rows]
    assert times == sorted(times) and times[-1] - times[0] > 0.5, "the time at which it was measured, not sent"


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("modes", [("offline",) * 3, ("online", "offline", "online")])
def test_a_training_that_was_killed_twice_is_one_run(tmp_path, server, modes):
    said = [sit(tmp_path, m, *where) for m, where in zip(modes, (("epoch", 1), ("batch", 3), ("", 0)), strict=True)]
    (record,) = list_runs(tmp_path)
    assert [status for status, _ in said] == [-9, -9, 0] and len(record["sittings"]) == 3
    assert f"run {record['wandb']['id']} goes on" in said[2][1]
    if modes[-1] == "offline":
        assert len(list(record["path"].glob("wandb/offline-run-*/*.wandb"))) == 1, "what a kill cut is in the way"
        sync = [str(Path(sys.executable).parent / "wandb"), "sync", "--yes", str(record["path"] / "wandb")]
        subprocess.run(sync, capture_output=True, timeout=100, check=True)
    is_whole(server, record)


def test_a_run_that_ended_badly_offline_and_goes_on_is_whole(tmp_path, server):
    for last in (False, True):
        run = start_run("t", {"lr": 0.1}, data={"hash": "abc"}, root=tmp_path, resume=True)
        logger = wandb_logger(run, "offline", verbose=False)
        for step in (1, 2) if not last else (2, 3):  # the second is done again
            logger.log_metrics({"val/acc": step / 10, "epoch": step}, step)
        if last:
            finish_wandb(run, logger, {"test/acc": 0.9})
        else:
            logger.experiment.finish(exit_code=1)
            run.finish("interrupted")
    (folder,) = run.path.glob("wandb/offline-run-*/*.wandb")
    history = [
        {i.key or i.nested_key[0]: i.value_json for i in r.history.item}
        for r in records(run.path)
        if r.HasField("history")
    ]
    assert [row["val/acc"] for row in history] == ["0.1", "0.2", "0.3"] and run.record["wandb"]["id"] in folder.name
    run.finish()


def test_what_waits_offline_replaces_what_the_server_has(tmp_path, server):
    """Online first, then the network is gone: what is sent later does not stand beside what was sent."""
    for mode in ("online", "offline"):
        run = start_run("t", {"lr": 0.1}, data={"hash": "abc"}, root=tmp_path, resume=True)
        logger = wandb_logger(run, mode, verbose=False)
        logger.log_metrics({"val/acc": 0.1}, 1)
        if mode == "online":
            logger.experiment.finish(exit_code=1)
            run.finish("interrupted")
    logger.log_metrics({"val/acc": 0.2}, 2)
    finish_wandb(run, logger)
    sync = [str(Path(sys.executable).parent / "wandb"), "sync", "--yes", str(run.path / "wandb")]
    subprocess.run(sync, capture_output=True, timeout=100, check=True)
    assert [r["val/acc"] for r in server.rows[run.record["wandb"]["id"]]] == [0.1, 0.2]
    run.finish()


# --- where a key is


def log_in(url, monkeypatch, key="0123456789" * 4):
    """What `wandb login` leaves behind."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    machine = url.partition("//")[2]
    Path(os.environ["NETRC"]).write_text(f"machine {machine}\n  login user\n  password {key}\n", encoding="utf-8")


@pytest.mark.parametrize("asked", ["online", "auto"])
def test_wandb_login_is_enough(run, server, monkeypatch, capsys, asked):
    log_in(server.url, monkeypatch)
    logger = wandb_logger(run, asked)
    logger.log_metrics({"val/acc": 0.5}, 1)
    finish_wandb(run, logger)
    assert f"online ({os.environ['NETRC']} has a key for {server.url} and" in capsys.readouterr().out
    assert run.record["wandb"]["mode"] == "online" and len(server.rows[run.record["wandb"]["id"]]) == 1
    assert server.keys - {None} == {"Basic " + base64.b64encode(b"api:" + b"0123456789" * 4).decode()}


def test_the_server_of_the_settings_file(run, server, monkeypatch):
    """`wandb login --host` writes the server there, and the key for it to netrc."""
    log_in(server.url, monkeypatch)
    monkeypatch.delenv("WANDB_BASE_URL")
    settings = Path(os.environ["WANDB_CONFIG_DIR"]) / "settings"
    assert choose_mode()[0] == "offline", "a key for another server"
    settings.write_text(f"[default]\nbase_url = {server.url}\n", encoding="utf-8")
    wandb.teardown()
    assert choose_mode() == ("online", f"{os.environ['NETRC']} has a key for {server.url} and {server.url} answers")
    finish_wandb(run, wandb_logger(run, "online", verbose=False))
    assert list(server.runs) == [run.record["wandb"]["id"]]
    settings.write_text(f"[default]\nbase_url = {server.url}\nmode = offline\n", encoding="utf-8")
    assert choose_mode() == ("offline", "W&B's settings file says so") and choose_mode("online")[0] == "online"


def test_doctor_says_what_a_training_does(server, monkeypatch):
    log_in(server.url, monkeypatch)
    said = CliRunner().invoke(app, ["doctor", "--json"])
    (found,) = [c for c in json.loads(said.output) if c["what"] == "wandb"]
    assert (found["state"], found["found"]) == ("ok", "{} ({})".format(*choose_mode()))
    assert choose_mode()[0] == "online"


@pytest.mark.parametrize("content", [b"machine api.wandb.ai login", b"\xff\xfe\x00", b"machine", b""])
def test_a_broken_netrc_is_no_key(content):
    Path(os.environ["NETRC"]).write_bytes(content)
    mode, why = choose_mode()
    assert mode == "offline" and ("cannot be read" in why or "has left no key for https://api.wandb.ai" in why)
