"""Runs compared and reproduced: real ones, executed by papermill."""

import json
import os
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from project.core import read_json, write_json
from project.runs.compare import compare, reproduce, run_as_json, seed_runs, show_run
from project.runs.record import find_run, list_runs, start_run

MARKUP = "<script>alert(1)</script> & <b>"
DRAW = "show_history([{'epoch': i, 'loss': v} for i, v in enumerate(values)], [('loss',)])"
CELLS = [
    "import random, time\nfrom project.figures import show_history\n"
    "from project.runs.record import parameters, start_run",
    "seed: int = 0\nnoise: float = 0.1\ntitle: str = ''\nresume: bool = True",
    "run = start_run('t', parameters(globals()), data={'hash': 'd', 'task': 't'})",
    "random.seed(seed)\nvalues = [1 / (i + 1) + noise * random.random() for i in range(4)]\nvalues[-1]",
    "for step, value in enumerate(values):\n    run.log({'loss': value, 'epoch_seconds': time.time()}, step=step)",
    DRAW,
    "print('0')",
    "run.finish(metrics={'test/loss': values[-1], 'seconds': time.time()})\nprint(run.path, 'after', time.time(), 's')",
]


def execute(folder: Path, changes: dict[int, str] | None = None, **values) -> dict:
    """Execute the notebook of CELLS, some of them replaced, and give back the record of its run."""
    cells = [new_code_cell((changes or {}).get(i, source)) for i, source in enumerate(CELLS)]
    cells[1].metadata["tags"] = ["parameters"]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "t.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROJECT_RUNS", str(folder / "runs"))
        nb = papermill.execute_notebook(folder / "t.ipynb", folder / "out.ipynb", values, progress_bar=False)
    return find_run(nb.metadata.project.receipt["runs"][0]["id"], folder / "runs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two seeds, and one with other code and markup in a parameter."""
    folder = tmp_path_factory.mktemp("compare")
    edited = {3: CELLS[3].replace("1 / (i + 1)", "9 / (i + 1)"), 6: "print('one')"}
    return [execute(folder, seed=0), execute(folder, seed=1), execute(folder, edited, title=MARKUP)]


@pytest.fixture
def one(made, tmp_path):
    """A copy of the first run, to be changed."""
    path = tmp_path / "runs" / made[0]["id"]
    for file in made[0]["path"].glob("*.*"):
        path.mkdir(parents=True, exist_ok=True)
        (path / file.name).write_bytes(file.read_bytes())
    return find_run(path.name, tmp_path / "runs")


class Page(HTMLParser):
    """What elements and sources of images a page has, and what was left open."""

    def __init__(self, page: str):
        super().__init__()
        self.seen, self.open, self.sources, self.text = [], [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_run_is_shown_with_the_verdict_on_its_receipt(made, one):
    text = show_run(made[1])
    assert "receipt   FRESH" in text and "  seed    1" in text and "test/loss" in text and "title" not in text
    data = json.loads(json.dumps(run_as_json(made[1])))
    assert data["verdict"]["state"] == "FRESH" and data["parameters"]["seed"] == 1
    (one["path"] / "notebook.ipynb").unlink()
    assert "receipt   none: no executed notebook in its folder" in show_run(one)
    assert run_as_json(one)["verdict"] is None


def test_a_run_that_cannot_be_read_is_shown_as_that(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text("{half")
    text = show_run(find_run("x", tmp_path))
    assert "unreadable: " in text and "receipt   none" in text


def test_two_seeds_are_judged_once_there_are_three(made):
    a, b, _ = made
    found = compare([a, b])
    assert found.parameters == {"seed": [0, 1]} and not found.code and not found.notes
    assert found.metrics["test/loss"]["verdicts"][1] == "not judged (2 seeds, 3 are needed)"
    assert found.metrics["test/loss"]["sd"] is None
    execute(a["path"].parent.parent, seed=2)
    found = compare([a, b])
    assert len(seed_runs(a)) == 3 == found.metrics["test/loss"]["seeds"]
    assert found.metrics["test/loss"]["verdicts"][1].startswith("within seed noise (")
    assert "within seed noise (" in found.text() and "sqrt(2)" in found.text()


def test_only_what_a_cell_shows_is_an_output_that_differs(made):
    found = compare(made[:2])
    assert [(c.here, c.figure) for c in found.outputs] == [(3, False), (5, True)]
    assert found.outputs[0].diff.startswith("-0.") and "\n+0." in found.outputs[0].diff


def test_code_that_differs_is_shown_cell_by_cell(made):
    found = compare([made[0], made[2]])
    assert [(c.here, c.there) for c in found.code] == [(3, 3), (6, 6)]
    assert "-values = [1 / (i + 1)" in found.code[0].diff and "+values = [9 / (i + 1)" in found.code[0].diff
    assert {c.here for c in found.outputs} == {3, 5, 6}
    assert found.parameters == {"title": ["", MARKUP]}
    assert json.loads(json.dumps(found.json()))["parameters"]["title"] == ["", MARKUP]


def test_the_page_parses_is_escaped_and_holds_the_figures(made):
    page = compare(made).html()
    parsed = Page(page)
    assert not parsed.open and "script" not in parsed.seen and "b" not in parsed.seen
    assert MARKUP in parsed.text  # as text
    figures = [c for c in nbformat.read(made[0]["path"] / "notebook.ipynb", 4).cells if DRAW in c.source]
    png = "data:image/png;base64," + figures[0].outputs[0].data["image/png"].replace("\n", "")
    assert len(parsed.sources) == 3 and parsed.sources[0] == png and len(set(parsed.sources)) == 3
    assert all(s.startswith("data:image/png;base64,") for s in parsed.sources)
    assert parsed.seen.count("svg") == 2 and parsed.text.count("step") >= 2 and "differs" in parsed.text
    if where := os.environ.get("COMPARE_PAGE"):  # to look at
        Path(where).write_text(page)


def test_what_recipes_say_is_compared_where_it_is_known(tmp_path):
    runs = [start_run("t", {"recipe": name, "lr": None}, root=tmp_path) for name in ("small", "fast")]
    assert compare(list_runs(tmp_path)).parameters == {"recipe": ["small", "fast"]}
    for run, epochs in zip(runs, (3, 4), strict=True):
        run.update(plan={"epochs": epochs, "lr": 0.15})
    assert compare(list_runs(tmp_path)).parameters == {"recipe": ["small", "fast"], "epochs": [3, 4]}
    runs[0].update(plan={})
    assert compare(list_runs(tmp_path)).parameters == {"recipe": ["small", "fast"]}
    for run in runs:
        run.finish()


def test_a_run_in_jupyter_has_only_its_record_to_be_compared(tmp_path):
    runs = [start_run("t", {"seed": i}, root=tmp_path) for i in range(2)]
    for i, run in enumerate(runs):
        run.finish(metrics={"acc": float(i), "name": "x"})
    found = compare(list_runs(tmp_path))
    assert len(found.notes) == 2 and abs(found.metrics["acc"]["differences"][1]) == 1
    assert found.metrics["name"]["differences"] == [None, None] and "where they were compared" in found.text()
    assert not Page(found.html()).open


@pytest.mark.parametrize("kind", ["lines", "one line", "times", "numbers"])
def test_a_large_output_is_compared_quickly_and_shown_briefly(tmp_path, kind):
    records = []
    for n in range(2):
        text = {
            "lines": "".join(f"step {i}: {i * 3 + n}\n" for i in range(300_000)),
            "one line": "x" * 2_500_000 + str(n) + "x" * 2_500_000,
            "times": "".join(f"{i / 7:.3f} s, 2026-11-21T07:25:0{n}, 12:0{n}\n" for i in range(150_000)),
            "numbers": "1,2,3," * 800_000 + "9" * 200_000 + f" {n}",
        }[kind]
        run = start_run("t", {"seed": n}, root=tmp_path)
        run.finish()
        cells = [new_code_cell("print(x)", outputs=[new_output("stream", text=text)])]
        nbformat.write(new_notebook(cells=cells), run.path / "notebook.ipynb")
        records.append(find_run(run.id, tmp_path))
    began = time.process_time()
    found = compare(records)
    assert time.process_time() - began < 15  # 2 s at most on an idle core
    assert len(found.outputs) == (kind != "times")
    assert len(found.text()) < 10_000 and len(found.html()) < 20_000


def test_a_deterministic_run_is_reproduced(made, tmp_path):
    found = reproduce(made[0], progress=False, keep=tmp_path / "kept")
    assert found.same and found.first is None and found.text().startswith(f"{made[0]['id']}: reproduced"), found
    assert [p.name for p in (tmp_path / "kept").iterdir()] == [found.again]
    assert found.path == tmp_path / "kept" / found.again and found.again != made[0]["id"]
    assert find_run(found.again, tmp_path / "kept")["parameters"]["resume"] is False
    assert any("the data is not here" in note for note in found.notes)
    assert "PROJECT_RUNS" in os.environ and not os.environ["PROJECT_RUNS"].startswith(str(tmp_path / "kept"))


def test_the_first_cell_that_differs_is_named(tmp_path):
    record = execute(tmp_path, {6: "print('drawn:', random.SystemRandom().random())", 5: "print(1 - values[0])"})
    found = reproduce(record, progress=False)
    assert not found.same and found.first == (6, "print('drawn:', random.SystemRandom().random())")
    assert len(found.differences) == 1 and "showed 'drawn: 0." in found.differences[0]
    assert "NOT reproduced" in found.text() and json.loads(json.dumps(found.json()))["first"][0] == 6


def test_numbers_may_be_off_by_the_tolerance(tmp_path):
    shaken = "random.seed(seed)\nvalues = [1 + 1e-6 * random.SystemRandom().random() for i in range(4)]\nvalues[-1]"
    record = execute(tmp_path, {3: shaken, 6: "values = [v + random.SystemRandom().random() / 1e6 for v in values]"})
    found = reproduce(record, tolerance=1e-3, progress=False)
    assert found.same, found.differences
    assert all("figure" in note or "not here" in note for note in found.notes)


def test_a_run_that_fails_this_time_is_not_reproduced(tmp_path):
    flag = tmp_path / "flag"
    once = f"from pathlib import Path\nassert not Path({str(flag)!r}).exists()\nPath({str(flag)!r}).touch()"
    record = execute(tmp_path, {6: once})
    found = reproduce(record, progress=False)
    assert not found.same and "cell failed with AssertionError" in found.differences[0]
    assert found.first == (6, "from pathlib import Path")


def test_the_notebook_of_another_run_is_refused(made, one):
    (one["path"] / "notebook.ipynb").write_bytes((made[1]["path"] / "notebook.ipynb").read_bytes())
    with pytest.raises(ValueError, match="is that of another run"):
        reproduce(one)


@pytest.mark.parametrize("what", ["record", "output", "metrics"])
def test_a_forged_run_is_refused(one, what):
    path = one["path"]
    if what == "record":
        write_json(path / "run.json", {**read_json(path / "run.json"), "metrics": {"test/loss": 0.0}})
    elif what == "metrics":
        (path / "metrics.csv").write_text("step,loss\n0,0.0\n")
    else:
        nb = nbformat.read(path / "notebook.ipynb", 4)
        next(c for c in nb.cells if c.source == CELLS[6]).outputs[0].text = "99 %\n"
        nbformat.write(nb, path / "notebook.ipynb")
    with pytest.raises(ValueError, match="it is FORGED: "):
        reproduce(one)


def test_a_stale_run_is_refused(one):
    folder = Path(os.environ["PROJECT_DATA"]) / "t"
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", {"hash": "another"})
    with pytest.raises(ValueError, match="it is STALE: the data was changed: another now, d then"):
        reproduce(one)


def test_what_papermill_did_not_finish_is_refused(one, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError):
        execute(tmp_path, {6: "1 / 0"})
    failed = list_runs(tmp_path / "runs", status="failed")[0]
    with pytest.raises(ValueError, match="it is HOLLOW: failed: cell "):
        reproduce(failed)
    (one["path"] / "notebook.ipynb").unlink()
    with pytest.raises(ValueError, match="has no executed notebook"):
        reproduce(one)


def test_the_module_imports_little():
    heavy = "torch papermill nbformat nbclient matplotlib pandas numpy"
    code = (
        f"import sys, project.runs.compare; sys.exit(' '.join(m for m in {heavy!r}.split() if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
