"""The run record: what a notebook would tell badly."""

import json
import subprocess
import sys

import pytest

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
