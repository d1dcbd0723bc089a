"""A run that is gone on with: said where one looks, this sitting counted apart, no bar where nothing is left."""

import json
import os
import re
from datetime import UTC, datetime, timedelta

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from project.core import read_json, write_json
from project.data.store import build
from project.runs.compare import show_run
from project.runs.record import find_run, start_run
from project.train.fit import Recipe, fit

RECIPE = Recipe(model="cnn-xs", epochs=2, batch_size=100, tta=False)
OPTIONS = {"seed": 3, "accelerator": "cpu", "precision": "fp32", "limit_batches": 2}


def interrupted(tmp_path, minutes=31, epochs=2, status="interrupted"):
    """A run that was broken off so many minutes ago."""
    run = start_run("t", {"lr": 1, "resume": True}, root=tmp_path, resume=True)
    for epoch in range(1, epochs + 1):
        run.log({"epoch": epoch, "loss": 1.0}, step=epoch)
    run.finish(status)
    then = (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat(timespec="seconds")
    write_json(run.path / "run.json", read_json(run.path / "run.json") | {"ended": then})
    return run


@pytest.mark.parametrize(("minutes", "ago"), [(31, r"3\d:\d\d"), (0, r"\d+s"), (125, r"2:\d\d:\d\d")])
def test_a_run_that_is_gone_on_with_says_since_when_how_far_and_how_to_start_anew(tmp_path, capsys, minutes, ago):
    first = interrupted(tmp_path, minutes)
    assert first.taken_up == ""
    run = start_run("t", {"lr": 1, "resume": True}, root=tmp_path, resume=True)
    said = capsys.readouterr().out.strip()
    assert run.id == first.id and said == run.taken_up
    assert re.search(f"which was interrupted {ago} ago after 2 finished epochs", said), said
    assert "resume = False among the parameters, or -p resume False" in said
    run.finish()


def test_before_the_first_epoch_that_is_said(tmp_path):
    interrupted(tmp_path, epochs=0, status="terminated")
    run = start_run("t", {"lr": 1, "resume": True}, root=tmp_path, resume=True)
    assert "which was terminated" in run.taken_up and "before its first epoch was finished" in run.taken_up
    run.finish()


def test_each_sitting_has_its_own_seconds(tmp_path):
    interrupted(tmp_path)
    run = start_run("t", {"lr": 1, "resume": True}, root=tmp_path, resume=True)
    run.began -= 75
    run.finish()
    record = find_run("last", tmp_path)
    assert record["sittings"][0]["seconds"] < 60 and 75 <= record["sittings"][1]["seconds"] < 135
    assert re.search(
        r"2 sittings: \S+, \d+s; \S+ \(after interrupted\), 1:\d\d; the last took 1:\d\d", show_run(record)
    )


def test_the_seconds_of_earlier_sittings_are_counted_apart(tmp_path):
    data = build("fashion_mnist")
    whole = fit(RECIPE, data, tmp_path / "a", **OPTIONS)
    assert whole.earlier == 0 and whole.seconds > 0
    again = fit(RECIPE, data, tmp_path / "a", resume_from=whole.last_ckpt, **OPTIONS)
    assert again.earlier == whole.history[-1]["seconds"]  # all was trained before, nothing in this sitting
    longer = fit(
        Recipe(model="cnn-xs", epochs=4, batch_size=100, tta=False),
        data,
        tmp_path / "b",
        resume_from=whole.last_ckpt,
        **OPTIONS,
    )
    assert 0 < longer.earlier < longer.seconds and longer.earlier == pytest.approx(whole.seconds, rel=0.5)


CELLS = {
    "work": """with progress(10, 'train', 'steps') as bar:
    for n in (3, 3, 3, 1):
        time.sleep(0.6)
        bar.update(n)""",
    "going on": "with progress(10, 'train', 'steps', done=5) as bar:\n    time.sleep(0.6); bar.update(5)",
    "nothing left": "with progress(10, 'train', 'steps', done=10):\n    pass",
}


def test_in_jupyterlab_progress_is_a_line_that_stays_and_never_red(tmp_path):
    code = ["import time\nfrom project.core import progress", *CELLS.values()]
    book = new_notebook(cells=[new_code_cell(c) for c in code])
    env = {**os.environ, "JPY_SESSION_NAME": str(tmp_path / "x.ipynb")}
    NotebookClient(book, timeout=120, kernel_name="python3").execute(env=env)
    work, going_on, nothing = (cell.outputs for cell in book.cells[1:])
    assert not [o for cell in book.cells for o in cell.outputs if o.output_type == "stream"], book.cells
    assert len(work) == 1 and work[0].data["text/plain"].startswith("train: 10/10 steps")
    assert len(going_on) == 1 and going_on[0].data["text/plain"].startswith("train: 10/10 steps")
    assert nothing == [] and json.loads(nbformat.writes(book))
