"""The papermill engine, through the plain `papermill` command and real kernels."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from project.runs.record import list_runs

OPEN = "from project.runs.record import start_run\nrun = start_run('t', notebook='nbs/x.ipynb')"


def papermill(tmp_path: Path, *cells: str, code: str = "") -> subprocess.CompletedProcess:
    """Write a notebook of these cells and run it with the papermill command (or with `code` before it)."""
    nb = new_notebook(
        cells=[new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3"}}
    )
    nbformat.write(nb, tmp_path / "in.ipynb")
    call = f"{code}\nimport sys; from papermill.__main__ import papermill; sys.argv[0] = 'papermill'; papermill()"
    env = {**os.environ, "PROJECT_RUNS": str(tmp_path / "runs")}
    command = [sys.executable, "-c", call, "in.ipynb", "out.ipynb", "--no-progress-bar"]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


def test_a_finished_run_keeps_its_executed_notebook(tmp_path):
    done = papermill(tmp_path, OPEN, "run.finish(metrics={'test/acc': 0.5})", "print('after')")
    assert done.returncode == 0, done.stderr
    (record,) = list_runs(tmp_path / "runs")
    assert record["status"] == "finished" and record["paths"]["notebook"] == "notebook.ipynb"
    kept = nbformat.read(record["path"] / "notebook.ipynb", 4)
    assert kept.cells[-1].outputs[0].text == "after\n"
    assert not [k for k in os.environ if k.startswith("PROJECT_PAPERMILL")]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (("1 / 0",), "cell 1: ZeroDivisionError: division by zero"),
        (("run.finish()", "int('x')"), "cell 2: ValueError: invalid literal"),
        (("import os, signal; os.kill(os.getpid(), signal.SIGKILL)",), "kernel died"),
    ],
)
def test_a_run_that_did_not_end_well_says_so(tmp_path, cells, reason):
    done = papermill(tmp_path, OPEN, *cells)
    assert done.returncode != 0
    (record,) = list_runs(tmp_path / "runs")
    assert record["status"] == "failed" and reason in record["reason"]
    assert (record["path"] / "notebook.ipynb").exists()


def test_other_notebooks_are_papermills_own_business(tmp_path):
    done = papermill(tmp_path, "import os\nprint(os.environ.get('PROJECT_PAPERMILL_NOTE'))")
    assert done.returncode == 0, done.stderr
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text == "None\n"


def test_the_engine_is_the_default_whichever_is_imported_first(tmp_path):
    done = papermill(tmp_path, OPEN, "run.finish()", code="import project.runs.engine")
    assert done.returncode == 0, done.stderr
    assert (list_runs(tmp_path / "runs")[0]["path"] / "notebook.ipynb").exists()


def test_what_is_to_be_done_then_is_done_once_the_notebook_is_whole(tmp_path):
    there = "str(Path(run, 'notebook.ipynb').exists())"
    (tmp_path / "later.py").write_text(
        f"from pathlib import Path\ndef note(run): Path(run, 'then').write_text({there})"
    )
    then = "from project.runs.engine import leave_note; leave_note(run.path, 'later:note')"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    done = papermill(tmp_path, OPEN, then, "run.finish()", code=code)
    assert done.returncode == 0, done.stderr
    assert (list_runs(tmp_path / "runs")[0]["path"] / "then").read_text() == "True"
