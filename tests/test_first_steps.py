"""The first steps with the command: what is not installed, not there, completed by a shell, and served."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_notebook
from pytest_notebooks import ROOT

from project.cli import _extras, app
from project.core import write_json
from project.runs.receipt import not_exported, verify
from project.runs.record import best_run, start_run

BIN = Path(sys.executable).parent


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call the command in a place of its own."""
    for name in ("runs", "data", "registry"):
        monkeypatch.setenv(f"PROJECT_{name.upper()}", str(tmp_path / name))
    return lambda *args: CliRunner().invoke(app, list(args))


# --- packages that are not there


def without(tmp_path, *packages):
    """The environment of a process for which some packages were never installed: no module, no metadata."""
    code = f"""
import importlib.abc, importlib.metadata, sys
GONE = {set(packages)!r}
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Gone())
known = importlib.metadata.version
def version(name):
    if name.replace("-", "_") in GONE:
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
"""
    (tmp_path / "sitecustomize.py").write_text(code, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}


BASE_ONLY = ("fastapi", "starlette", "uvicorn", "sqlalchemy", "pyarrow", "mistune", "fastapi_offline")


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (("serve",), "fastapi"),
        (("predictions", "list", "--log", "sqlite:///x.db"), "sqlalchemy"),
        (("predictions", "purge", "--days", "1", "--log", "sqlite:///x.db"), "sqlalchemy"),
    ],
)
def test_a_command_whose_package_is_missing_says_what_to_type(tmp_path, command, module):
    (tmp_path / "x.db").touch()
    env = without(tmp_path, *BASE_ONLY)
    call = [BIN / "project", *command]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"`project {command[0]}" in done.stderr and "the extra 'serve' brings" in done.stderr
    assert "-m pip install -e" in done.stderr and "[serve]'" in done.stderr


def test_doctor_knows_what_is_missing(tmp_path):
    env = without(tmp_path, *BASE_ONLY, "kagglehub")
    done = subprocess.run([BIN / "project", "doctor"], env=env, capture_output=True, text=True, timeout=120)
    (line,) = (line for line in done.stdout.splitlines() if "extras" in line)
    assert line.startswith("note") and "serve (`project serve`, `predictions`)" in line and "kaggle" in line
    assert "pretrained" not in line and "[serve,kaggle]'" in line


def test_the_extras_of_the_settings_are_known():
    assert {"serve", "cloud", "pretrained", "kaggle", "frontend"} <= set(_extras())


# --- names that do not exist


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("runs", "--task", "fashion_mist"), ("no task 'fashion_mist'", "of dog_breeds", "'fashion_mnist'")),
        (("runs", "--sort", "foo"), ("has 'foo'", "metrics test/acc", "parameters seed", "fields")),
        (("runs", "--sort=-sed"), ("has 'sed'", "Did you mean 'seed'")),
        (("runs", "--where", "foo=1"), ("has 'foo'", "metrics test/acc")),
        (("runs", "--metric", "foo"), ("has 'foo'", "metrics test/acc")),
        (("runs", "--status", "finishd"), ("expected one of running, finished", "Did you mean 'finished'")),
        (("results", "--task", "nosuch"), ("no task 'nosuch'", "of dog_breeds")),
        (("models", "list", "nosuch"), ("no task 'nosuch'", "there are no versions")),
        (("models", "gc", "nosuch"), ("no task 'nosuch'",)),
        (("models", "best", "fake_news"), ("no finished run to serve of fake_news", "of dog_breeds")),
    ],
)
def test_a_name_that_nothing_has_is_answered_with_what_there_is(call, args, says):
    start_run("dog_breeds", {"seed": 1}, notebook="nbs/x.ipynb").finish(metrics={"test/acc": 0.5})
    done = call(*args)
    assert done.exit_code == 1 and all(s in done.output for s in says), done.output


def test_a_known_task_without_runs_is_no_error(call):
    start_run("dog_breeds", {}, notebook="nbs/x.ipynb").finish()
    done = call("runs", "--task", "fake_news", "--json")
    assert (
        done.exit_code == 0
        and json.loads(done.stdout) == []
        and "runs of dog_breeds"
        in done.output.replace(str(os.environ["PROJECT_RUNS"]), "").replace("runs in  of", "runs of")
    )


# --- what a shell completes


def completed(line):
    """What is offered for the last word of a line."""
    *words, last = line.split(" ")
    found = ShellComplete(app, {}, "project", "_PROJECT_COMPLETE").get_completions(words, last)
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in found]


def test_names_are_completed(call, tmp_path):
    run = start_run("dog_breeds", {"seed": 1}, notebook="nbs/x.ipynb")
    run.finish(metrics={"test/acc": 0.5})
    assert completed("run tr") == ["<file>", "train"] and completed("params ev") == ["<file>", "evaluate"]
    assert completed("run train -p rec") == ["recipe"] and completed("promote -p slo") == ["slower"]
    assert completed("run train -p precision bf") == ["bf16-mixed", "bf16"][::-1]
    assert completed("runs --task do") == ["dog_breeds"] and completed("runs --sort -te") == []
    assert completed("runs --sort te") == ["test/acc"] and completed("runs --status fin") == ["finished"]
    for line in ("show ", "reproduce ", f"compare {run.id} "):
        assert completed(line) == ["last", run.id]
    assert completed("verify ")[0] == "<file>" and completed("models add la") == ["<dir>", "last"]
    assert completed("scan ") == ["<file>"] and completed("predict a") == ["<file>"]


def test_a_completion_never_fails(call, tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_REGISTRY", "nosuch://place")
    assert completed("models show fashion_mnist ") == [] and completed("run nosuch -p ") == []


def test_the_shell_is_told_the_names(tmp_path):
    env = {**os.environ, "_PROJECT_COMPLETE": "bash_complete", "COMP_WORDS": "project run tra", "COMP_CWORD": "2"}
    done = subprocess.run([BIN / "project"], env=env, capture_output=True, text=True, timeout=60)
    assert "plain,train" in done.stdout.splitlines(), done.stdout + done.stderr


# --- which run is served


def finished(task, acc, dirty=False, limit=0, bundle="{}"):
    """A finished run."""
    run = start_run(task, {"limit_batches": limit}, notebook="nbs/train.ipynb")
    if bundle is not None:
        write_json(run.path / "bundle" / "manifest.json", json.loads(bundle))
    run.record["code"] = {"dirty": dirty, "commit": "abc"}
    run.finish(metrics={"val/acc": acc, "test/acc": acc})
    return run.id


def test_the_best_whole_clean_run_is_served_and_why_is_said(call):
    good = finished("t", 0.93)
    finished("t", 0.92)
    finished("t", 0.99, limit=5)
    finished("t", 0.98, bundle='{"partial": ["1 of 4 epochs"]}')
    finished("t", 0.97, dirty=True)
    finished("t", 0.96, bundle=None)
    finished("other", 0.999)
    start_run("t", {}, notebook="nbs/train.ipynb").finish("failed", metrics={"val/acc": 1.0})
    record, why = best_run("t")
    assert record["id"] == good and f"{good}: val/acc 0.9300, the highest of 2 clean, whole runs" in why
    assert "2 trained in part" in why and "1 with uncommitted changes" in why and "1 without a bundle" in why
    assert call("models", "best", "t").output.strip() == why


def test_a_dirty_run_is_served_only_where_there_is_no_clean_one(call):
    finished("t", 0.18, limit=1)
    with pytest.raises(ValueError, match=r"no finished run to serve.*1 trained in part; `make train`"):
        best_run("t")
    dirty = finished("t", 0.9, dirty=True)
    record, why = best_run("t")
    assert record["id"] == dirty and "all with uncommitted changes" in why


def test_a_run_on_other_data_than_is_here_is_passed_over(call, tmp_path):
    finished("t", 0.93)
    write_json(tmp_path / "data" / "t" / "manifest.json", {"hash": "f" * 64})
    with pytest.raises(ValueError, match="1 on other data"):
        best_run("t")


# --- notebooks that were changed and not exported


def test_every_notebook_is_exported():
    assert not_exported() == []


@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_a_notebook_that_was_not_exported_is_found(tmp_path, monkeypatch, change):
    for name in ("project", "nbs", "settings.ini"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    monkeypatch.setenv("PROJECT_ROOT", str(tmp_path))
    file = tmp_path / "nbs" / "core" / "20_metrics.ipynb"
    book = json.loads(file.read_text(encoding="utf-8"))
    exported = [c for c in book["cells"] if "".join(c["source"]).startswith("#| export\n")]
    if change == "edit":
        exported[-1]["source"] = [*exported[-1]["source"], "\n    # another line"]
    elif change == "add":
        book["cells"].append({**exported[-1], "id": "ffffffff"})
    else:
        book["cells"].remove(exported[-1])
    file.write_text(json.dumps(book), encoding="utf-8")
    assert not_exported() == ["nbs/core/20_metrics.ipynb"]
    assert not_exported(["project.core"]) == []
    code = "from project.cli import _check_exported; print(*_check_exported(), sep='|')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("fix|export|changed and not exported: nbs/core/20_metrics.ipynb"), done.stderr
    script = [sys.executable, ROOT / ".ci" / "exported.py"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "nbs/core/20_metrics.ipynb" in done.stderr


def test_the_engine_warns_and_the_receipt_says_so(tmp_path):
    for name in ("project", "nbs", "settings.ini"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    file = tmp_path / "nbs" / "core" / "10_locks.ipynb"
    file.write_text(file.read_text(encoding="utf-8").replace("def is_alive(", "def is_living("), encoding="utf-8")
    cells = ["from project.runs.record import start_run\nrun = start_run('t')", "run.finish()\nprint('done')"]
    python = {"kernelspec": {"name": "python3", "display_name": "python3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells], metadata=python), tmp_path / "in.ipynb")
    env = {**os.environ, "PROJECT_RUNS": str(tmp_path / "runs")}
    call = [BIN / "papermill", "in.ipynb", "out.ipynb"]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "changed and not exported: nbs/core/10_locks.ipynb; what runs is the package" in done.stderr
    receipt = nbformat.read(tmp_path / "out.ipynb", 4).metadata.project.receipt
    assert receipt.not_exported == ["nbs/core/10_locks.ipynb"]
    notes = verify(tmp_path / "out.ipynb", tmp_path / "runs").notes
    assert "nbs/core/10_locks.ipynb was changed and not exported when it ran, so it is not what ran" in notes
