"""Receipts: every edit by hand is found, and nothing else is taken for one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from project.runs.receipt import KEY, STATES, hash_code, package_hashes, used_modules, verify

pytestmark = pytest.mark.usefixtures("no_buckets")

CELLS = [
    "lr: float = 0.1  # rate",
    "from project.runs.record import parameters, start_run\nasked = parameters(globals())",
    "run = start_run('t', asked, 'nbs/one.ipynb', data={'task': 't', 'hash': 'abc'})\nrun.log({'loss': 0.5})",
    "print('accuracy', 0.91)",
    "run.finish(metrics={'test/acc': 0.91})",
]
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkout with one notebook, executed by papermill."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "nbs").mkdir()
    (root / "data/t").mkdir(parents=True)
    (root / "data/t/manifest.json").write_text('{"hash": "abc"}')
    code = [new_code_cell(c) for c in CELLS]
    code[0].metadata["tags"] = ["parameters"]
    nbformat.write(
        new_notebook(cells=[new_markdown_cell("# One\n\ntext"), *code], metadata=KERNEL), root / "nbs/one.ipynb"
    )
    folders = {"PROJECT_ROOT": root, "PROJECT_RUNS": root / "runs", "PROJECT_DATA": root / "data"}
    env = {**os.environ, **{k: str(v) for k, v in folders.items()}}
    command = [BIN / "papermill", root / "nbs/one.ipynb", root / "out.ipynb", "-p", "lr", "0.2", "--no-progress-bar"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of it for one test, and the functions that change it."""
    root = tmp_path / "copy"
    shutil.copytree(made, root)
    for name, folder in (("ROOT", "."), ("RUNS", "runs"), ("DATA", "data")):
        monkeypatch.setenv(f"PROJECT_{name}", str(root / folder))
    return root


def edit(path: Path, change) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def run_json(root: Path) -> Path:
    """The record of the only run."""
    return next(root.glob("runs/*/run.json"))


def test_fresh_and_indifferent_to_what_does_not_matter(here):
    assert verify(here / "out.ipynb").state == "FRESH" and verify(run_json(here).parent).state == "FRESH"
    nb = nbformat.read(here / "out.ipynb", 4)
    for cell in nb.cells:
        cell.id = cell.id[::-1]
        cell.execution_count = 1 if cell.cell_type == "code" else None
        cell.source = cell.source + "  # a remark" if cell.cell_type == "code" else cell.source.replace("\n\n", "\n")
    nbformat.write(nb, here / "out.ipynb")
    assert verify(here / "out.ipynb").state == "FRESH"


def cell_of(text):
    """Change the source of the cell that holds a text."""

    def change(nb):
        cell = next(c for c in nb["cells"] if text in "".join(c["source"]))
        cell["source"] = "".join(cell["source"]).replace(text, text + " + 0")

    return change


FORGERIES = {
    "an output": lambda nb: nb["cells"][5]["outputs"][0].update(text="accuracy 0.99\n"),
    "an output taken away": lambda nb: nb["cells"][5]["outputs"].clear(),
    "an output put in": lambda nb: nb["cells"][6]["outputs"].append(
        {"output_type": "stream", "name": "stdout", "text": "x"}
    ),
    "a code cell": cell_of("0.91"),
    "a code cell taken away": lambda nb: nb["cells"].pop(5),
    "the parameter given": lambda nb: nb["metadata"]["papermill"]["parameters"].update(lr=0.3),
    "the injected cell": cell_of("lr = 0.2"),
    "the injected cell taken away": lambda nb: nb["cells"].pop(2),
    "a cell's status": lambda nb: nb["cells"][5]["metadata"]["papermill"].update(status="failed"),
    "the receipt's status": lambda nb: nb["metadata"]["project"]["receipt"].update(status="failed"),
    "the receipt's commit": lambda nb: nb["metadata"]["project"]["receipt"]["commit"].update(commit="0" * 40),
    "the receipt's metric": lambda nb: nb["metadata"]["project"]["receipt"]["runs"][0]["metrics"].update(
        {"test/acc": 1}
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_every_edit_of_the_notebook_is_found(here, name):
    edit(here / "out.ipynb", FORGERIES[name])
    assert verify(here / "out.ipynb").state == "FORGED"


RECORD_FORGERIES = {
    "metric": lambda r: r["metrics"].update({"test/acc": 0.99}),
    "parameter": lambda r: r["parameters"].update(lr=0.3),
    "status": lambda r: r.update(status="failed"),
    "data": lambda r: r["data"].update(hash="abd"),
    "receipt": lambda r: r["receipt"].update(reason="x"),
}


@pytest.mark.parametrize("name", RECORD_FORGERIES)
def test_every_edit_of_the_record_is_found(here, name):
    edit(run_json(here), RECORD_FORGERIES[name])
    found = verify(here / "out.ipynb")
    assert found.state == "FORGED" and "run.json" in found.reasons[0]


def test_an_edit_of_the_metrics_file_is_found(here):
    metrics = run_json(here).with_name("metrics.csv")
    metrics.write_text(metrics.read_text().replace("0.5", "0.1"))
    assert verify(here / "out.ipynb").reasons == [f"runs/{metrics.parent.name}/metrics.csv was changed after the run"]


def test_stale_and_prose_only(here):
    source = here / "nbs/one.ipynb"
    good = source.read_text()
    edit(source, lambda nb: nb["cells"][0].update(source="# One\n\nother words"))
    assert verify(here / "out.ipynb").state == "PROSE-ONLY"
    source.write_text(good)
    edit(source, cell_of("0.91"))
    found = verify(here / "out.ipynb")
    assert found.state == "STALE" and found.reasons[0].startswith("code cell 3 was changed: print(")
    source.write_text(good)
    edit(here / "data/t/manifest.json", lambda m: m.update(hash="def"))
    assert verify(here / "out.ipynb").reasons == ["the data was changed: def now, abc then"]
    shutil.rmtree(here / "data")
    found = verify(here / "out.ipynb")
    assert found.state == "FRESH" and "the data is not here" in found.notes[0]
    source.unlink()
    assert "not here" in verify(here / "out.ipynb").notes[0]


def test_a_module_that_was_changed(here, monkeypatch):
    copy = here / "package" / "project"
    shutil.copytree(Path(sys.modules["project"].__file__).parent, copy)
    monkeypatch.setattr("project.runs.receipt.package_dir", lambda: copy)
    assert verify(here / "out.ipynb").state == "FRESH"
    module = copy / "runs" / "record.py"
    module.write_text(module.read_text().replace("# %% ", "# %% other ") + "\n# only a comment\n")
    assert verify(here / "out.ipynb").state == "FRESH"
    module.write_text(module.read_text() + "\nx = 1\n")
    assert verify(here / "out.ipynb").reasons == ["module project.runs.record was changed"]
    (copy / "train" / "fit.py").write_text("x = 1\n")  # which this notebook does not use
    module.unlink()
    assert verify(here / "out.ipynb").reasons == ["module project.runs.record is gone"]


@pytest.fixture
def worktree(tmp_path, root, monkeypatch):
    """A second checkout beside the one that is installed, with a commit of its own and a notebook that opens a run."""
    top = tmp_path / "worktree"
    shutil.copytree(root / "project", top / "project", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "settings.ini", top)
    (top / "nbs").mkdir()
    cells = [
        "from project.runs.record import start_run\nrun = start_run('t', notebook='nbs/one.ipynb')",
        "run.finish()",
    ]
    nb = new_notebook(cells=[new_code_cell(c) for c in cells], metadata=KERNEL)
    nbformat.write(nb, top / "nbs/one.ipynb")
    for name in ("ROOT", "RUNS", "DATA", "COMMIT"):
        monkeypatch.delenv(f"PROJECT_{name}", raising=False)
    git = ["git", "-C", str(top), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return top


def execute(folder: Path, *command: str | Path) -> subprocess.CompletedProcess:
    """A command of this environment in a folder."""
    return subprocess.run([BIN / command[0], *command[1:]], cwd=folder, capture_output=True, text=True, timeout=120)


def change(top: Path) -> None:
    """Give a checkout a module that differs."""
    module = top / "project" / "runs" / "record.py"
    module.write_text(module.read_text() + f"\nx = {module.stat().st_size}\n")


def test_a_receipt_names_the_modules_that_the_kernel_imported(worktree):
    change(worktree)  # a kernel that starts at the top of the worktree imports from there, papermill does not
    done = execute(worktree, "papermill", "nbs/one.ipynb", "out.ipynb", "--no-progress-bar")
    assert done.returncode == 0, done.stderr
    receipt = nbformat.read(worktree / "out.ipynb", 4).metadata.project.receipt
    used = {"project.runs.record", "project.core"}
    assert {n: receipt.modules[n] for n in used} == {
        n: h for n, h in package_hashes(used, worktree / "project").items() if n in used
    }
    assert receipt.modules["project.runs.record"] != package_hashes(["project.runs.record"])["project.runs.record"]
    assert execute(worktree, "project", "verify", "out.ipynb").returncode == STATES["FRESH"]
    change(worktree)
    done = execute(worktree, "project", "verify", "out.ipynb")
    assert done.returncode == STATES["STALE"] and "module project.runs.record was changed" in done.stdout


def test_a_kernel_with_the_code_of_another_checkout_is_refused(worktree):
    same = execute(worktree / "nbs", "papermill", "one.ipynb", "../out.ipynb", "--no-progress-bar")
    assert same.returncode == 0, same.stderr  # the code is the same, wherever it lies
    shutil.rmtree(worktree / "runs")
    change(worktree)
    done = execute(worktree / "nbs", "papermill", "one.ipynb", "../out.ipynb", "--no-progress-bar")
    assert done.returncode != 0 and "project.runs.record there differ from this checkout" in done.stderr
    assert "Traceback" not in done.stderr and not (worktree / "runs").exists()
    assert verify(worktree / "out.ipynb").state == "HOLLOW"
    away = execute(worktree.parent, "papermill", worktree / "nbs/one.ipynb", "out.ipynb", "--no-progress-bar")
    assert away.returncode != 0 and "lies in the checkout" in away.stderr
    doctor = execute(worktree, "project", "doctor")
    assert doctor.returncode == 1 and "differ from this checkout" in doctor.stdout


def test_a_run_by_hand_with_the_code_of_another_checkout_is_refused(worktree):
    change(worktree)
    code = "from project.runs.record import start_run; start_run('t', notebook='nbs/one.ipynb')"
    for folder, refused in ((worktree, False), (worktree / "nbs", True)):  # as in JupyterLab: there the notebook's own
        done = execute(folder, "python", "-c", code)
        assert bool(done.returncode) is refused, done.stderr
    assert "there differ from this checkout" in done.stderr and len(list((worktree / "runs").iterdir())) == 1


def test_a_notebook_that_changes_where_it_imports_from_is_held_against_that(worktree):
    change(worktree)
    nb = nbformat.read(worktree / "nbs/one.ipynb", 4)
    nb.cells.insert(0, new_code_cell(f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})"))
    nb.cells[1:] = [new_code_cell("import project.runs.record")]
    nbformat.write(nb, worktree / "nbs/one.ipynb")
    done = execute(worktree, "papermill", "nbs/one.ipynb", "out.ipynb", "--no-progress-bar")
    assert done.returncode != 0 and "project.runs.record there differ from this checkout" in done.stderr
    assert verify(worktree / "out.ipynb").state == "HOLLOW"


@pytest.mark.parametrize(("before", "state"), [(True, "STALE"), (False, "FRESH")])
def test_a_module_that_is_edited_while_the_notebook_runs(worktree, before, state):
    """Only what a run has told it had imported is known to be what it was."""
    nb = nbformat.read(worktree / "nbs/one.ipynb", 4)
    module = worktree / "project" / "runs" / "record.py"
    edit = f"p = __import__('pathlib').Path({str(module)!r}); old = p.read_text(); p.write_text(old + '\\nx = 1\\n')"
    nb.cells.insert(0 if before else 1, new_code_cell(edit))
    nbformat.write(nb, worktree / "nbs/one.ipynb")
    done = execute(worktree, "papermill", "nbs/one.ipynb", "out.ipynb", "--no-progress-bar")
    assert done.returncode == 0, done.stderr
    found = execute(worktree, "project", "verify", "out.ipynb")
    assert found.returncode == STATES["STALE"]  # the file is not what ran, or nobody knows
    module.write_text(module.read_text().removesuffix("\nx = 1\n"))
    assert execute(worktree, "project", "verify", "out.ipynb").returncode == STATES[state]


def test_signed(here, monkeypatch):
    monkeypatch.setenv(KEY, "team")
    assert verify(here / "out.ipynb").reasons == [f"the receipt is not signed, and {KEY} asks for a signature"]


@pytest.mark.parametrize("content", ["", "[]", "{}", "{half", '{"cells": [], "metadata": {}}'])
def test_files_without_a_receipt(here, content):
    (here / "out.ipynb").write_text(content)
    done = subprocess.run(
        [BIN / "project", "verify", "out.ipynb"], cwd=here, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "out.ipynb" in done.stderr and "Traceback" not in done.stderr
    assert (here / "out.ipynb").read_text() == content


def test_a_newer_receipt(here):
    edit(here / "out.ipynb", lambda nb: nb["metadata"]["project"]["receipt"].update(format=99))
    with pytest.raises(ValueError, match="upgrade `project`"):
        verify(here / "out.ipynb")


def test_the_worst_decides_the_exit_status(here):
    shutil.copy(here / "out.ipynb", here / "forged.ipynb")
    edit(here / "forged.ipynb", FORGERIES["an output"])
    call = [BIN / "project", "verify", "--json", "out.ipynb", "forged.ipynb"]
    done = subprocess.run(call, cwd=here, capture_output=True, text=True, timeout=60)
    assert [v["state"] for v in json.loads(done.stdout)] == ["FRESH", "FORGED"] and done.returncode == STATES["FORGED"]
    assert len(set(STATES.values())) == len(STATES)


def test_only_modules_that_are_used_count():
    nb = {"cells": [{"cell_type": "code", "metadata": {}, "source": ["import project.runs.secrets\n"]}]}
    assert set(used_modules(nb)) == {"project.runs.secrets", "project.core"}
    assert hash_code("f(1,  2)") == hash_code("f(1, 2)") != hash_code("f(2, 1)")
