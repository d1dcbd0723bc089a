"""W&B: offline for real, and a server that is not there."""

import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from project.runs.record import list_runs, start_run
from project.train.tracking import choose_mode, finish_wandb, wandb_logger


@pytest.fixture
def run(tmp_path):
    run = start_run("fashion_mnist", {"lr": 0.1}, "nbs/train.ipynb", data={"hash": "abc"}, root=tmp_path)
    yield run
    run.finish()


@pytest.fixture(autouse=True)
def _no_wandb_settings(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def records(folder: Path) -> list:
    """What the offline file holds: protobuf in LevelDB's log framing (blocks of 32 KiB, headers of 7 bytes)."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
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
