"""The run record: what a notebook would tell badly."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

from project.core import read_json
from project.runs import record
from project.runs.record import find_run, latest_bundle, list_runs, parameters, run_table, start_run


def test_two_runs_of_one_second_have_their_own_folders(tmp_path):
    runs = [start_run("t", root=tmp_path) for _ in range(20)]
    assert len({run.path for run in runs}) == 20
    for run in runs:
        run.finish()


def test_metrics_csv_is_rewritten_only_for_a_new_column(tmp_path):
    run = start_run("t", root=tmp_path)
    run.log({"a": 1.0}, step=1)
    inode = (run.path / "metrics.csv").stat().st_ino
    run.log({"a": 2.0}, step=2)
    assert (run.path / "metrics.csv").stat().st_ino == inode
    run.log({"b": 3.0, "a": 0.1 + 0.2}, step=3)
    assert (run.path / "metrics.csv").read_text() == "step,a,b\n1,1.0,\n2,2.0,\n3,0.30000000000000004,3.0\n"
    run.finish()


def test_a_log_after_the_file_was_lost_writes_all_rows_again(tmp_path):
    run = start_run("t", root=tmp_path)
    run.log({"a": 1})
    (run.path / "metrics.csv").unlink()
    run.log({"a": 2})
    assert (run.path / "metrics.csv").read_text() == "step,a\n0,1\n1,2\n"
    run.finish()


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("raise ValueError('lr')", "failed", "ValueError: lr"),
        ("", "failed", "the process ended before the run did"),
        ("run.finish()", "finished", ""),
    ],
)
def test_a_process_that_ends_closes_its_run(tmp_path, code, status, reason):
    script = f"from project.runs.record import start_run\nrun = start_run('t', root={str(tmp_path)!r})\n{code}"
    subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    (record,) = list_runs(tmp_path)
    assert (record["status"], record["reason"]) == (status, reason)


@pytest.mark.parametrize("content", ["{half", "[]", "{}", json.dumps({"schema": 99, "id": "x", "status": "finished"})])
def test_a_broken_record_is_listed_and_left_as_it_is(tmp_path, content):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text(content)
    (record,) = list_runs(tmp_path)
    assert record["status"] == "unreadable" and "run.json" in record["reason"]
    assert run_table([record])[0]["run"] == "x"
    assert (tmp_path / "x" / "run.json").read_text() == content


def test_filters_and_names(tmp_path):
    a, b = start_run("faces", root=tmp_path), start_run("dogs", root=tmp_path)
    a.finish()
    assert [r["id"] for r in list_runs(tmp_path, task="dogs")] == [b.id]
    assert [r["id"] for r in list_runs(tmp_path, status="finished")] == [a.id]
    with pytest.raises(ValueError, match="may be any of"):
        find_run("2", tmp_path)
    (a.path / "bundle").mkdir()
    (a.path / "bundle" / "manifest.json").write_text("{}")
    assert latest_bundle(root=tmp_path) == a.path / "bundle"
    b.finish()


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError, match="PROJECT_RUNS"):
        start_run("t", root=tmp_path / "runs")


def test_parameters_are_the_json_values():
    namespace = {
        "lr": 0.1,
        "names": ["a"],
        "nested": {"a": [1, None]},
        "bad": {1: 2},
        "f": print,
        "_private": 1,
        "Out": {},
    }
    assert parameters(namespace) == {"lr": 0.1, "names": ["a"], "nested": {"a": [1, None]}}


def test_a_finished_run_keeps_what_was_measured_before(tmp_path):
    run = start_run("t", root=tmp_path)
    run.update(metrics={"val/acc": 0.9})
    run.finish(metrics={"test/acc": 0.8})
    assert read_json(run.path / "run.json")["metrics"] == {"val/acc": 0.9, "test/acc": 0.8}


def test_runs_of_one_second_may_draw_the_same_id(tmp_path, monkeypatch):
    drawn = iter(["20261121-000000-t-aaaa"] * 3 + ["20261121-000000-t-bbbb"])
    monkeypatch.setattr(record, "new_run_id", lambda task: next(drawn))
    ids = [start_run("t", {"seed": seed}, root=tmp_path).id for seed in (0, 1)]
    assert [i[-4:] for i in ids] == ["aaaa", "bbbb"]
    monkeypatch.setattr(record, "new_run_id", lambda task: ids[0])
    with pytest.raises(FileExistsError, match="the run's folder cannot be made"):
        start_run("t", {"seed": 2}, root=tmp_path)


def dated(folder: Path, date: str, **fields) -> str:
    """Give the last run of a folder another date (and other fields), as a wrong clock would have."""
    old = max(folder.glob("*/run.json"), key=lambda p: p.stat().st_mtime_ns).parent
    record = json.loads((old / "run.json").read_text())
    name = date + record["id"][15:]
    started = datetime.strptime(date, "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
    record |= {"id": name, "started": started.isoformat(), "opened_ns": int(started.timestamp() * 1e9), **fields}
    (old / "run.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
    old.rename(folder / name)
    return name


def make(folder: Path, bundle: bool = True) -> str:
    """A finished run, with a file that makes it one with a bundle."""
    run = start_run("t", root=folder)
    run.finish()
    if bundle:
        (run.path / "bundle").mkdir()
        (run.path / "bundle" / "manifest.json").write_text("{}")
    return run.id


@pytest.mark.parametrize("number", ["kept", "none", "huge", "text"])
def test_a_run_of_a_wrong_clock_is_not_the_last_one_for_ever(tmp_path, capsys, number):
    first = make(tmp_path)
    fields = {"kept": {}, "none": {"number": None}, "huge": {"number": 10**9}, "text": {"number": "7"}}[number]
    make(tmp_path)
    ahead = dated(tmp_path, "20990101-000000", **fields)
    capsys.readouterr()
    assert find_run("last", tmp_path)["id"] == first and latest_bundle("t", tmp_path).parent.name == first
    if number in ("kept", "huge"):  # it was opened after the first
        assert f"{ahead}: dated after this machine's clock" in capsys.readouterr().err
    last = make(tmp_path)
    capsys.readouterr()
    assert find_run("last", tmp_path)["id"] == last and list_runs(tmp_path)[-1]["id"] == last
    assert latest_bundle("t", tmp_path).parent.name == last and not capsys.readouterr().err
    assert [r["status"] for r in run_table(list_runs(tmp_path)) if r["run"] == ahead] == ["finished (dated ahead)"]


def test_a_clock_that_is_behind_makes_the_last_run_all_the_same(tmp_path):
    make(tmp_path)
    make(tmp_path)
    behind = dated(tmp_path, "19700102-000000")
    assert find_run("last", tmp_path)["id"] == behind  # opened last, whatever its date
    last = make(tmp_path)
    assert find_run("last", tmp_path)["id"] == last


def test_the_only_run_is_the_last_one_whatever_its_date(tmp_path):
    make(tmp_path)
    only = dated(tmp_path, "20990101-000000")
    assert find_run("last", tmp_path)["id"] == only


def test_an_unfinished_run_of_a_wrong_clock_does_not_stand_before_later_ones(tmp_path):
    start_run("t", {"lr": 1}, root=tmp_path).finish("failed")
    ahead = dated(tmp_path, "20990101-000000")
    start_run("t", {"lr": 1}, root=tmp_path).finish()  # so there is nothing to go on with
    run = start_run("t", {"lr": 1}, root=tmp_path, resume=True)
    run.finish()
    assert run.id != ahead and len(list_runs(tmp_path)) == 3


def test_the_seconds_of_a_run_do_not_come_from_a_clock_that_can_be_set(tmp_path):
    run = start_run("t", root=tmp_path)
    run.record["sittings"][-1]["started"] = "2099-01-01T00:00:00+00:00"  # the clock was put back meanwhile
    run.finish()
    assert 0 <= run.record["seconds"] < 60


def test_a_sign_of_life_from_the_future_proves_nothing(tmp_path):
    run = start_run("t", root=tmp_path)
    run.update(process={"pid": 1, "host": "elsewhere", "start": ""})
    run.lock.release()
    time.sleep(0.1)
    os.utime(run.path / ".alive", (4_000_000_000, 4_000_000_000))
    (record,) = list_runs(tmp_path)
    assert record["status"] == "running" and "after this machine's clock" in record["reason"]
    os.utime(run.path / ".alive", (1_000_000_000, 1_000_000_000))
    assert list_runs(tmp_path)[0]["status"] == "killed"
    run.finish()


def test_a_link_that_leads_nowhere_is_named_as_that(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="is a link to .*gone, which is not there.*PROJECT_RUNS"):
        start_run("t", root=tmp_path / "runs")
    run = start_run("t", root=tmp_path / "real")
    run.path.rename(tmp_path / "moved")
    run.path.symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="is a link to .*gone, which is not there"):
        run.save()
    run.path.unlink()
    with pytest.raises(FileNotFoundError, match="deleted while it ran, or moved"):
        run.save()
    run.record["status"] = "failed"  # nothing to close at the end


@contextlib.contextmanager
def start_kernel(folder: Path):
    """A session, shut down as JupyterLab does it."""
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder))
    try:
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def test_an_error_of_hours_ago_is_not_the_reason_of_a_sessions_end(tmp_path):
    """A session in JupyterLab shows an error and goes on; then its kernel is shut down."""
    with start_kernel(tmp_path) as client:
        code = f"from project.runs.record import start_run\nrun = start_run('t', root={str(tmp_path)!r})"
        client.execute_interactive(code)
        client.execute_interactive("1 / 0", output_hook=lambda _: None)
    (record,) = list_runs(tmp_path)
    said = "the kernel ended before the run did; the last error that it showed was ZeroDivisionError: division by zero"
    assert (record["status"], record["reason"]) == ("failed", said)


def test_modules_that_were_changed_since_they_were_imported_are_refused(tmp_path, root):
    """A session in which a library notebook is exported anew, without a restart of the kernel."""
    shutil.copytree(root / "project", tmp_path / "project", ignore=shutil.ignore_patterns("__pycache__"))
    module = tmp_path / "project" / "core.py"
    code = f"""
import importlib, pathlib
import project.core
from project.runs.record import start_run
start_run('t', root={str(tmp_path / "runs")!r}).finish()
module = pathlib.Path({str(module)!r})
module.write_text(module.read_text() + '\\nx = 1\\n')
try:
    start_run('t', root={str(tmp_path / "runs")!r})
except ValueError as e:
    print(e)
importlib.reload(project.core)
start_run('t', root={str(tmp_path / "runs")!r}).finish()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "project.core changed since this kernel imported them; restart the kernel"
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_records_of_one_value_in_two_spellings_are_one_setting(tmp_path):
    from project.runs.record import run_table, select_runs

    for epochs in (2, 2.0):
        start_run("t", {"epochs": epochs, "lr": epochs / 4}, "nbs/x.ipynb", root=tmp_path).finish()
    found = list_runs(tmp_path)
    assert len({r["identity"] for r in found}) == 1
    assert [row["parameters"] for row in run_table(found)] == ["", ""]
    assert len(select_runs(found, ["epochs=2.0", "epochs=2", "lr=5e-1"])) == 2
    other = start_run("t", {"epochs": "2", "lr": 0.5}, "nbs/x.ipynb", root=tmp_path)
    other.finish()
    assert other.record["identity"] != found[0]["identity"]


def test_a_metric_is_shown_with_its_interval(tmp_path):
    """Where the run has measured one; a metric without one is a number, and one that is missing nothing."""
    start_run("t", {}, "nbs/x.ipynb", root=tmp_path).finish(
        metrics={"test/acc": 0.93, "test/acc_low": 0.925, "test/acc_high": 0.9349, "loss": 0.5}
    )
    records = list_runs(tmp_path)
    assert run_table(records)[0]["test/acc"] == "0.9300 (0.925 to 0.935)"
    assert run_table(records, "loss")[0]["loss"] == "0.5000" and run_table(records, "other")[0]["other"] == ""
