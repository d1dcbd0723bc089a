"""The tools that run notebooks and write the README and the site: what must fail fails, and says why."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pytest_notebooks import ROOT, Forks

RUNNER = ROOT / "tests" / "run_notebook.py"
SETTINGS = """[DEFAULT]
lib_name = toy
lib_path = toy
nbs_path = nbs
repo = toy
branch = main
user = a
author = a
author_email = a
description = a
tst_flags = slow
"""


def load(path):
    """A script of .ci/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    """Write a notebook and the module it should have been exported to; run it as a test would be."""

    def run(*sources, module=""):
        (tmp_path / "settings.ini").write_text(SETTINGS, encoding="utf-8")
        (tmp_path / "nbs" / "a").mkdir(parents=True)
        (tmp_path / "toy").mkdir()
        (tmp_path / "toy" / "a.py").write_text(module, encoding="utf-8")
        code = [new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
        nbformat.write(new_notebook(cells=[new_markdown_cell("# A"), *code]), tmp_path / "nbs" / "a" / "00_a.ipynb")
        path = tmp_path / "nbs" / "a" / "00_a.ipynb"
        filters = json.dumps(["error", "ignore:known:UserWarning"])
        command = [sys.executable, RUNNER, path, filters, "60"]
        return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, encoding="utf-8")

    return run


def test_a_cell_that_fails_is_shown_with_what_it_printed(run):
    done = run("x = 1", "print('so far')\nassert x == 2, 'not two'")
    assert done.returncode == 1
    assert all(said in done.stdout for said in ("00_a.ipynb, cell 2 (id c1)", "so far", "AssertionError: not two"))


def test_warnings_are_errors_but_for_those_listed(run):
    done = run("import warnings", "warnings.warn('known one')", "warnings.warn('old', DeprecationWarning)")
    assert done.returncode == 1 and "DeprecationWarning: old" in done.stdout and "(id c2)" in done.stdout


def test_cells_that_nbdev_test_passes_over_are_not_run(run):
    assert run("#| eval: false\n1 / 0", "#| slow\n1 / 0", "x = 1").returncode == 0


MODULE = "# %% auto #0\n__all__ = ['f']\n\n# %% ../nbs/a/00_a.ipynb #c0\ndef f():\n    return 1 / 0\n"


def test_an_exported_cell_has_the_lines_of_its_module(run):
    done = run(
        "#| export\ndef f():\n    return 1 / 0",
        "print(f.__code__.co_filename, f.__code__.co_firstlineno)\nf()",
        module=MODULE,
    )
    shown = done.stdout.replace("\\", "/")
    assert done.returncode == 1 and "toy/a.py 5" in shown and "ZeroDivisionError" in shown


def test_a_module_that_is_not_exported_is_found_out(run):
    done = run("#| export\ndef f():\n    return 2 / 0", module=MODULE)
    assert done.returncode == 1 and "make notebooks" in done.stdout and "return 2 / 0" in done.stdout


def test_an_exported_cell_without_a_module_is_found_out(run):
    done = run("#| export\ndef g():\n    return 1", "g()")
    assert done.returncode == 1 and "no module holds it" in done.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](train.ipynb#x)", "[a](nbs/train.ipynb#x)"),
        ("![p](images/a.png)", "![p](nbs/images/a.png)"),
        ("[c](../CHANGELOG.md)", "[c](CHANGELOG.md)"),
        ("[w](https://example.org/a) [h](#here)", "[w](https://example.org/a) [h](#here)"),
        ('<img src="images/a.png" width="3">', '<img src="nbs/images/a.png" width="3">'),
        ("```\n[a](b.md)\n```", "```\n[a](b.md)\n```"),
    ],
)
def test_readme_links_hold_at_the_top(text, expected):
    assert load(ROOT / ".ci" / "readme.py").relink(text) == expected


def test_readme_shows_what_the_front_page_shows():
    readme = load(ROOT / ".ci" / "readme.py")
    table = nbformat.v4.new_output("display_data", data={"text/markdown": "| a |\n|---|", "text/plain": "x"})
    printed = nbformat.v4.new_output("stream", name="stdout", text="two\nlines\n")
    assert readme.cell_markdown(new_code_cell("#| echo: false\nf()", outputs=[table])) == "| a |\n|---|"
    assert (
        readme.cell_markdown(new_code_cell("f()", outputs=[printed]))
        == "```python\nf()\n```\n\n```text\ntwo\nlines\n```"
    )
    assert readme.cell_markdown(new_code_cell("#| hide\nf()", outputs=[printed])) == ""


def test_site_sidebar_has_every_notebook():
    docs = load(ROOT / ".ci" / "docs.py")
    nbs = ROOT / "nbs"
    contents = docs.sidebar(nbs)["website"]["sidebar"]["contents"]
    listed = [contents[0], *(name for section in contents[1:] for name in section["contents"])]
    there = [p.relative_to(nbs).as_posix() for p in nbs.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert sorted(listed) == sorted(there)
    assert [section["section"] for section in contents[1:]][0] == "Run notebooks"


def test_stand_in_pages_take_the_names_that_links_use(tmp_path):
    docs = load(ROOT / ".ci" / "docs.py")
    (tmp_path / "00_core.html").write_text('<a href="20_data.store.html#x">', encoding="utf-8")
    (tmp_path / "20_data.store.html").write_text('<a href="00_core.html">', encoding="utf-8")
    docs.rename_pages(tmp_path, {"00_core.html": "core.html", "20_data.store.html": "data.store.html"})
    assert (tmp_path / "core.html").read_text(encoding="utf-8") == '<a href="data.store.html#x">'
    assert (tmp_path / "data.store.html").read_text(encoding="utf-8") == '<a href="core.html">'


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is found on PATH by its first line")
def test_stand_in_for_quarto_says_what_it_cannot_do():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "quarto", "preview"], capture_output=True, text=True)
    assert done.returncode == 1 and "install Quarto" in done.stderr


def test_make_serve_asks_the_gate_about_the_best_run_and_trains_only_where_there_is_none():
    venv = Path(sys.executable).parent.parent
    command = ["make", "-n", "-o", f"{venv}/serve.stamp", "serve", f"VENV={venv}"]
    if not shutil.which("make"):
        pytest.skip("no make here")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    order = ["exported.py", "models show fashion_mnist", "models best fashion_mnist", "nbs/train.ipynb", "promote best"]
    places = [done.stdout.index(word) for word in [*order, '/project" serve']]
    assert places == sorted(places) and "models add" not in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_a_forked_notebook_fails_as_one_that_was_started(tmp_path):
    """Its report, its status, a process group of its own, and warnings as errors; then the next one."""
    (tmp_path / "settings.ini").write_text(SETTINGS, encoding="utf-8")
    (tmp_path / "nbs").mkdir()
    (tmp_path / "toy").mkdir()
    cells = {
        "good": ["import os\nassert os.getpgid(0) == os.getpid()\nprint('fine')"],
        "bad": ["print('so far')\nassert 1 == 2, 'not two'"],
        "warns": ["import warnings\nwarnings.warn('old', DeprecationWarning)"],
        "killed": ["import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"],
    }
    for name, sources in cells.items():
        code = [new_code_cell(source) for source in sources]
        nbformat.write(new_notebook(cells=[new_markdown_cell("# A"), *code]), tmp_path / "nbs" / f"{name}.ipynb")
    forks = Forks("numpy", json.dumps(["error"]), tmp_path / "forks.log")
    try:
        ends = {name: forks.run(tmp_path / "nbs" / f"{name}.ipynb") for name in [*cells, "good"]}
    finally:
        forks.close()
    assert {name: status for name, (status, _) in ends.items()} == {"good": 0, "bad": 1, "warns": 1, "killed": -9}
    assert all(said in ends["bad"][1] for said in ("bad.ipynb, cell 1", "so far", "AssertionError: not two"))
    assert "DeprecationWarning: old" in ends["warns"][1]


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_a_forked_notebook_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text(SETTINGS, encoding="utf-8")
    (tmp_path / "nbs").mkdir()
    (tmp_path / "toy").mkdir()
    cells = [new_markdown_cell("# A"), new_code_cell("import time\ntime.sleep(600)")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "nbs" / "a.ipynb")
    monkeypatch.setattr("pytest_notebooks.SECONDS", 1)
    forks = Forks("numpy", json.dumps(["error"]), tmp_path / "forks.log")
    try:
        assert forks.run(tmp_path / "nbs" / "a.ipynb")[0] is None
    finally:
        forks.close()
