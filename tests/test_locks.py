"""Locks and their claims on folders without locks: real processes, killed ones among them."""

import json
import os
import subprocess
import sys
import time

import pytest

from project import locks
from project.locks import Lock, is_alive, process_mark

COUNT = """
import sys, time
from pathlib import Path
from project.locks import locked
file = Path(sys.argv[1], "count")
for _ in range(int(sys.argv[2])):
    with locked(Path(sys.argv[1], ".lock")):
        n = int(file.read_text())
        time.sleep(0.002)
        file.write_text(str(n + 1))
"""


@pytest.mark.parametrize("locking", ["locks", "claims"])
def test_nobody_counts_at_the_same_time(tmp_path, request, locking):
    if locking == "claims":
        request.getfixturevalue("without_locks")
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path), "8"]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [p.communicate(timeout=100)[1] for p in started]
    assert [p.returncode for p in started] == [0, 0, 0], said
    assert (tmp_path / "count").read_text() == "24" and not list(tmp_path.glob("*.claim"))
    assert all(("no file locks" in text) == (locking == "claims") for text in said)


@pytest.fixture
def no_flock(monkeypatch):
    def flock(file, how):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.parametrize(
    ("mark", "age", "free"),
    [
        ({"host": "elsewhere"}, 0, False),
        ({"host": "elsewhere"}, 1000, True),  # it was killed, and nobody renews it
        ({"machine": "of before"}, 0, False),
        ({"start": "0"}, 0, True),  # another process has its number
        ({}, 1000, False),  # it lives, whatever the clock says
    ],
)
def test_whose_claim_counts(tmp_path, no_flock, mark, age, free):
    claim = tmp_path / ".lock.0.claim"
    claim.write_text(json.dumps(process_mark() | mark))
    os.utime(claim, (time.time() - age,) * 2)
    lock = Lock(tmp_path / ".lock")
    assert lock.take() is free and lock.held is free and claim.exists() is not free
    lock.release()
    assert len(list(tmp_path.glob("*.claim"))) == (0 if free else 1)


@pytest.mark.parametrize("content", ["", '{"pid": 1, "ho', "[]", '{"pid": "x"}'])
def test_a_claim_that_is_cut_off_counts_for_a_while(tmp_path, no_flock, content):
    (tmp_path / ".lock.0.claim").write_text(content)
    assert not Lock(tmp_path / ".lock").take()
    os.utime(tmp_path / ".lock.0.claim", (0, 0))
    assert (lock := Lock(tmp_path / ".lock")).take()
    lock.release()


def test_a_claim_is_renewed_while_it_is_held(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(locks, "_BEAT", 0.05)
    lock = Lock(tmp_path / ".lock")
    assert lock.take()
    os.utime(lock.claim, (0, 0))
    end = time.monotonic() + 20
    while lock.claim.stat().st_mtime == 0 and time.monotonic() < end:
        time.sleep(0.02)
    assert time.time() - lock.claim.stat().st_mtime < 20
    lock.release()


def test_other_errors_of_a_lock_are_said(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        Lock(tmp_path / ".lock").take()


def test_who_lives():
    assert is_alive(process_mark()) and is_alive({"host": process_mark()["host"]}) is False
    old = {k: v for k, v in process_mark().items() if k != "machine"}  # written by an earlier version
    assert is_alive(old) and is_alive(old | {"start": "0"}) is False


def test_a_process_that_has_ended_does_not_live():
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        mark = process_mark(ended.pid)
    assert is_alive(mark) is False and is_alive(mark | {"start": ""}) is False
