"""What run notebooks are committed with: judged by its receipt, executed again and compared, by the real engine."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pytest_notebooks import ROOT
from test_repository import RUNS

from project.cli import app
from project.core import read_json, write_json
from project.runs.fresh import judge, rerun, run_notebooks, write
from project.runs.receipt import verify

CELLS = [
    "import json\nfrom pathlib import Path\nfrom project.core import data_dir, root, show_path\n"
    "from project.figures import Table, show_history\nfrom project.runs.record import parameters, start_run",
    'task: str = "toy"\nseed: int = 0',
    "asked = parameters(globals())\nhash = json.loads((data_dir() / task / 'manifest.json').read_text())['hash']\n"
    "run = start_run(task, asked, 'nbs/toy.ipynb', data={'hash': hash, 'task': task})",
    "told = json.loads((root() / 'told.json').read_text())\nprint('accuracy', told['accuracy'])",
    "Table([{'setting': k, 'value': v} for k, v in told['plan'].items()])",
    "Table([{'class': 'Bag', 'f1': told['accuracy'], 'p50 ms': told['ms']}])",
    "show_history([{'epoch': i, 'loss': told['accuracy'] / i} for i in (1, 2)], [('loss',)] * told['curves'])",
    "import sys\nprint('a worry', file=sys.stderr)\nrun.finish(metrics={'test/acc': told['accuracy']})\n"
    "print(show_path(run.path / 'run.json'))",
]
TOLD = {"accuracy": 0.93, "ms": 3.5, "plan": {"lr": 0.1, "epochs": 4}, "curves": 1}


def tell(folder, **changes):
    """What the notebook of CELLS will show."""
    write_json(folder / "told.json", TOLD | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkout with one run notebook, written by `project fresh --write`."""
    folder = (tmp_path_factory.mktemp("fresh") / "checkout").resolve()
    (folder / "nbs").mkdir(parents=True)
    shutil.copyfile(ROOT / "settings.ini", folder / "settings.ini")
    write_json(folder / "data" / "toy" / "manifest.json", {"hash": "d" * 64, "published": True})
    cells = [new_markdown_cell("# Toy\n\n> A run"), *map(new_code_cell, CELLS)]
    cells[2].metadata["tags"] = ["parameters"]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "nbs" / "toy.ipynb")
    tell(folder)
    with pytest.MonkeyPatch.context() as patch:
        settle(patch, folder)
        first = judge(folder / "nbs" / "toy.ipynb")
        assert write(progress=False) == [folder / "nbs" / "toy.ipynb"]
    assert not first.fresh and "no receipt" in first.reasons[0]
    return folder


def settle(patch, folder):
    """Work in that checkout."""
    patch.chdir(folder)
    for name in ("ROOT", "DATA"):
        patch.setenv(f"PROJECT_{name}", str(folder if name == "ROOT" else folder / "data"))


@pytest.fixture
def toy(made, tmp_path, monkeypatch):
    """A copy of it to change: the notebook's path."""
    folder = shutil.copytree(made, (tmp_path / "copy").resolve())
    settle(monkeypatch, folder)
    return folder / "nbs" / "toy.ipynb"


def change(path, cell, old, new):
    """Replace a text in the source of a cell."""
    nb = read_json(path)
    source = "".join(nb["cells"][cell]["source"])
    assert old in source
    nb["cells"][cell]["source"] = source.replace(old, new)
    write_json(path, nb)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_what_is_committed_is_fresh(path):
    found = judge(path)
    assert found.fresh, str(found)
    assert verify(path).state in ("FRESH", "PROSE-ONLY", "STALE")  # a module below it may have changed


def test_all_run_notebooks_are_known():
    assert {p.name for p in run_notebooks()} == {p.name for p in RUNS}
    assert not [p for p in run_notebooks() if "receipt" not in read_json(p)["metadata"].get("project", {})]


def test_written_notebook_is_fresh_and_of_no_machine(toy):
    assert judge(toy).reasons == []
    assert verify(toy).state == "FRESH"
    text, nb = toy.read_text(encoding="utf-8"), read_json(toy)
    assert "project-fresh-" not in text and 'stderr"' not in text
    shown = "".join(nb["cells"][-1]["outputs"][0]["text"])
    assert re.fullmatch(r"runs/\d{8}-\d{6}-toy-[0-9a-f]{4}/run\.json\n", shown)
    receipt = nb["metadata"]["project"]["receipt"]
    assert receipt["status"] == "finished" and receipt["data"] == {"toy": "d" * 64}
    assert receipt["runs"][0]["metrics"] == {"test/acc": 0.93}
    assert not (toy.parent.parent / "runs").exists(), "the runs of the user are left alone"


def test_cleaning_keeps_the_receipt(toy):
    before = toy.read_bytes()
    subprocess.run([Path(sys.executable).parent / "nbdev_clean", "--fname", toy], cwd=toy.parent.parent, check=True)
    assert toy.read_bytes() == before


@pytest.mark.parametrize(
    ("cell", "old", "new", "state"),
    [
        (4, "'accuracy'", "'precision'", "STALE"),
        (2, "seed: int = 0", "seed: int = 1", "STALE"),
        (5, "setting", "name", "STALE"),
        (0, "A run", "One run", "PROSE-ONLY"),
        (4, "print(", "# in words\nprint(", "FRESH"),
    ],
)
def test_an_edit_is_stale_where_it_is_code(toy, cell, old, new, state):
    change(toy, cell, old, new)
    assert judge(toy).fresh == (state != "STALE"), str(judge(toy))
    assert verify(toy).state == state


def test_a_cell_more_is_stale(toy):
    nb = read_json(toy)
    nb["cells"].append(new_code_cell("1 + 1", id="more"))
    write_json(toy, nb)
    assert "9 code cells now, 8 were run" in judge(toy).reasons[0]
    assert verify(toy).state == "STALE"


@pytest.mark.parametrize("kind", ["output", "receipt", "parameters", "failed"])
def test_what_was_not_so_is_no_fresh_notebook(toy, kind):
    nb = read_json(toy)
    receipt = nb["metadata"]["project"]["receipt"]
    if kind == "output":
        nb["cells"][4]["outputs"][0]["text"] = ["accuracy 0.99\n"]
    elif kind == "receipt":
        receipt["runs"][0]["metrics"]["test/acc"] = 0.99
    elif kind == "parameters":
        receipt["parameters"] = {"seed": 3}
    else:
        receipt["status"] = "failed"
    write_json(toy, nb)
    assert not judge(toy).fresh
    assert verify(toy).state == "FORGED"


def test_other_data_is_stale_where_it_is_the_published(toy):
    manifest = toy.parent.parent / "data" / "toy" / "manifest.json"
    write_json(manifest, {"hash": "e" * 64, "published": True})
    assert "the data of toy was changed" in judge(toy).reasons[0]
    write_json(manifest, {"hash": "e" * 64, "published": False})
    assert judge(toy).fresh and "not compared" in judge(toy).notes[0]
    manifest.unlink()
    assert judge(toy).fresh and "not compared" in judge(toy).notes[0]


def test_only_published_data_is_written(toy):
    before = toy.read_bytes()
    write_json(toy.parent.parent / "data" / "toy" / "manifest.json", {"hash": "e" * 64, "published": False})
    with pytest.raises(ValueError, match="not the published"):
        write(progress=False)
    assert toy.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accuracy": 0.935, "ms": 99.0}, None),  # within the tolerance, and what a clock says
        ({"accuracy": 0.5}, "was 0.9300, is 0.5000"),
        ({"plan": {"lr": 0.1, "epochs": 4, "cutout": 0}}, "rows that are new: cutout"),
        ({"plan": {"lr": 0.1}}, "rows that are gone: epochs"),
        ({"curves": 2}, "the figure was"),
    ],
)
def test_executed_again_and_compared(toy, changes, said):
    before = toy.read_bytes()
    tell(toy.parent.parent, **changes)
    (found,) = rerun(progress=False)
    assert found.fresh == (said is None), str(found)
    assert said is None or said in str(found)
    assert toy.read_bytes() == before


def test_command(toy):
    ask = CliRunner().invoke
    fine = ask(app, ["fresh"])
    assert fine.exit_code == 0 and fine.output.startswith("fresh  nbs/toy.ipynb")
    change(toy, 5, "setting", "name")
    stale = ask(app, ["fresh", "nbs/toy.ipynb", "--json"])
    assert stale.exit_code == 1 and json.loads(stale.output)[0]["fresh"] is False
    assert ask(app, ["fresh", "--run", "--write"]).exit_code == 2
    unknown = ask(app, ["fresh", "tyo"])
    assert unknown.exit_code == 2 and "Did you mean 'toy'?" in unknown.output
