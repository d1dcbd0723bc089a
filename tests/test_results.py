"""The table of results: which runs count, how they are put together, and the file that the front page shows."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from project.cli import app
from project.core import runs_dir
from project.metrics import wilson_interval
from project.runs.record import find_run, list_runs, start_run
from project.runs.results import (
    collect_results,
    read_results,
    result_texts,
    results_file,
    results_table,
    write_results,
)


def train(task="dog_breeds", acc=0.9, status="finished", data="d" * 64, dirty=False, metrics=None, plan=None, **asked):
    """A run as the training notebook records it; its id."""
    asked = {"task": task, "recipe": "fast", "seed": 0, "model": None, "lr": None, "early_stopping": 0} | asked
    run = start_run(task, asked, "nbs/train.ipynb", {"hash": data, "task": task})
    run.update(code={"commit": "c" * 40, "branch": "main", "dirty": dirty}, plan=plan)
    found = {"test/acc": acc, "test/n": 100, "train/seconds": 60.0, "train/images_per_s": 900.0}
    run.finish(status, found | {"model/parameters": 3_400_000} | (metrics or {}))
    return run.id


def rows():
    """What the recorded runs give."""
    return collect_results(list_runs())


def test_seeds_are_put_together():
    for seed, acc in enumerate((0.90, 0.92, 0.97)):
        train(seed=seed, acc=acc, metrics={"ood/balanced_acc": acc / 2, "train/seconds": 50.0 + seed**2})
    (row,) = rows()
    assert row["test_acc"]["mean"] == pytest.approx(0.93) and row["test_acc"]["n"] == 3
    assert row["ood_balanced_acc"]["mean"] == pytest.approx(0.465) and row["seconds"] == 51.0
    assert row["parameters"] == 3_400_000 and row["per_second"] == 900 and row["test_n"] == 100
    (text,) = result_texts([row])
    assert text["test accuracy, %"] == "93.00 ± 3.61 (3)" and text["parameters"] == "3,400,000"
    assert len(text["runs"].split()) == 3 and "*" not in text["runs"]


def test_the_interval_is_that_of_the_rows_and_not_of_the_seeds():
    """Three seeds with the same result on 199 rows spread by nothing, and leave a point in either direction."""
    for seed in range(3):
        train(seed=seed, acc=198 / 199, metrics={"test/n": 199})
    train("fake_news", seed=0, acc=198 / 199, metrics={"test/n": 199})
    few, one = rows()[0], rows()[1]
    low, high = wilson_interval(198, 199)
    for row in (few, one):  # more seeds on the same rows make it no narrower
        assert (row["test_low"], row["test_high"]) == pytest.approx((low, high)) and row["test_n"] == 199
    (text, _) = result_texts(rows())
    assert text["test accuracy, %"] == "99.50 ± 0.00 (3)" and text["95 % interval"] == "97.2 to 99.9"


@pytest.mark.parametrize(
    ("data", "metrics", "n", "of"),
    [
        ({"test_part": "published test set"}, {"test/n": 10_000}, 10_000, "10,000, published test set"),
        ({"splits": {"test": 250}}, {"test/n": None}, 250, "250"),  # of an older run: as recorded with its data
        ({}, {"test/n": None}, None, "unknown"),
    ],
)
def test_what_accuracy_is_of(data, metrics, n, of):
    run = train(metrics=metrics)
    file = runs_dir() / run / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"data": record["data"] | data}))
    (row,) = rows()
    (text,) = result_texts([row])
    assert row["test_n"] == n and text["of"] == of and bool(text["95 % interval"]) == (n is not None)


def test_a_row_of_an_older_file_has_its_interval_from_its_rows():
    train(acc=0.94)
    (row,) = rows()
    old = {k: v for k, v in row.items() if k not in ("test_low", "test_high", "test_part")}
    assert result_texts([old])[0]["95 % interval"] == "87.5 to 97.2" and result_texts([old])[0]["of"] == "100"
    del old["test_n"]
    assert result_texts([old])[0]["95 % interval"] == "" and result_texts([old])[0]["of"] == "unknown"


@pytest.mark.parametrize(
    "given",
    [
        {"status": "failed"},
        {"status": "interrupted"},
        {"limit_batches": 5},
        {"limit_rows": 100},
        {"metrics": {"test/acc": None}},
        {"metrics": {"test/acc": "0.9"}},
        {"metrics": {"train/seconds": None}},
    ],
)
def test_runs_that_do_not_count(given):
    train(**given)
    assert rows() == []
    train(seed=1)
    assert rows()[0]["test_acc"]["n"] == 1


def test_an_evaluation_and_a_run_in_progress_do_not_count():
    start_run("dog_breeds", {"bundle": ""}, "nbs/evaluate.ipynb").finish(metrics={"test/acc": 0.99})
    open_run = start_run("dog_breeds", {"recipe": "fast", "seed": 1})
    open_run.update(metrics={"test/acc": 0.99, "train/seconds": 1.0})
    assert rows() == []
    open_run.finish()


def test_a_recipe_with_a_value_replaced_is_another():
    train()
    train(lr=0.1)
    train(lr=0.0)
    train(label_smoothing=0)
    train(recipe="best", early_stopping=2)
    train(accelerator="auto", precision="auto", devices=1, profile="simple", wandb="offline", resume=False, source="x")
    names = sorted(row["recipe"] for row in rows())
    assert names == ["best early_stopping=2", "fast", "fast label_smoothing=0", "fast lr=0", "fast lr=0.1"]


def test_another_device_is_another_row():
    train()
    train(accelerator="cuda")
    train(precision="fp32")
    assert sorted(row["recipe"] for row in rows()) == ["fast", "fast accelerator=cuda", "fast precision=fp32"]


def test_the_newest_of_one_seed_and_the_newest_data():
    train(acc=0.1, data="a" * 64)
    train(acc=0.2, data="a" * 64, seed=5)
    train(acc=0.8)
    newest = train(acc=0.9)
    (row,) = rows()
    assert row["runs"] == [newest] and row["test_acc"]["mean"] == 0.9
    assert row["older"] == 2 and row["repeated_seeds"] == 1 and row["data"] == "d" * 64


def test_a_recipe_that_was_changed_is_another_one():
    train(acc=0.1, seed=5)
    for seed, lr in enumerate((0.1, 0.2, 0.2)):
        train(seed=seed, plan={"lr": lr})
    (row,) = rows()
    assert row["seeds"] == [1, 2] and row["older"] == 2  # one said nothing of its recipe, one had another


def test_an_asterisk_at_the_runs_that_cannot_be_checked_out():
    clean, dirty = train(seed=0), train(seed=1, dirty=True)
    (text,) = result_texts(rows())
    assert text["runs"] == f"{clean.rsplit('-', 1)[1]} {dirty.rsplit('-', 1)[1]}*"
    assert "\\*" in repr(results_table(rows()))  # and Markdown shows it as one


def test_short_ids_find_their_runs():
    for seed in range(6):
        train(seed=seed)
    (row,) = rows()
    assert [find_run(s)["id"] for s in row["short"]] == row["runs"]


def test_tasks_in_the_order_given_and_quickest_first():
    train("fake_news", recipe="minilm", metrics={"train/seconds": 300.0})
    train("fake_news", metrics={"train/seconds": 9.5})
    train("fashion_mnist")
    train("another")
    found = collect_results(list_runs(), ["fashion_mnist", "fake_news"])
    names = [(row["task"], row["recipe"]) for row in found]
    assert names == [("fashion_mnist", "fast"), ("fake_news", "fast"), ("fake_news", "minilm"), ("another", "fast")]
    assert result_texts(found)[1]["training, s"] == "9.5"


def test_old_records_and_broken_ones():
    run = train(metrics={"model/parameters": None, "train/images_per_s": None})
    record = json.loads((runs_dir() / run / "run.json").read_text())
    for key in ("code", "environment", "data", "notebook"):
        record.pop(key)
    (runs_dir() / run / "run.json").write_text(json.dumps(record))
    (runs_dir() / "20261121-000000-x-0000").mkdir()
    (runs_dir() / "20261121-000000-x-0000" / "run.json").write_text("{")
    (text,) = result_texts(rows())
    assert text["parameters"] == text["a second"] == "" and text["test accuracy, %"] == "90.00 (1)"


def test_the_file_is_what_was_collected(tmp_path):
    train()
    path = write_results(rows(), tmp_path / "new" / "tasks.json")
    assert read_results(path) == rows() and "NaN" not in path.read_text()
    before = path.read_bytes()
    write_results(rows(), path)
    assert path.read_bytes() == before  # nothing of the moment is in it
    with pytest.raises(ValueError, match="nothing was written"):
        write_results([], tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"format": 2, "rows": []}', '{"format": 1, "rows": 3}'])
def test_a_file_that_is_something_else(tmp_path, text):
    (tmp_path / "tasks.json").write_text(text)
    with pytest.raises(ValueError, match=r"tasks\.json: expected"):
        read_results(tmp_path / "tasks.json")


def test_what_the_front_page_shows_is_readable():
    assert results_file().name == "tasks.json"
    assert len(result_texts(read_results())) == len(read_results())


# The command


def call(*args):
    """Run `project results`."""
    return CliRunner().invoke(app, ["results", *args])


def test_the_command_shows_and_writes(tmp_path):
    assert "make train" in call().output
    train(acc=0.91, metrics={"ood/balanced_acc": 0.6})
    shown = call()
    assert "dog_breeds" in shown.output and "91.00 (1)" in shown.output and "60.00 (1)" in shown.output
    assert json.loads(call("--json").output) == rows()
    unknown = call("--json", "--task", "x")
    assert unknown.exit_code and "no task 'x'" in unknown.output and "dog_breeds" in unknown.output
    path = tmp_path / "tasks.json"
    done = call("--write", str(path))
    assert done.exit_code == 0 and read_results(path) == rows() and "written" in done.output


def test_the_command_says_what_a_file_loses(tmp_path):
    path = tmp_path / "tasks.json"
    train()
    old = [{**rows()[0], "task": "gone"}]
    write_results(old, path)
    assert "no longer in it: gone fast" in call("--write", str(path)).output
    path.write_text("damaged")
    assert call("--write", str(path)).exit_code == 0 and read_results(path) == rows()


def test_the_command_keeps_what_was_measured_elsewhere(tmp_path):
    path = tmp_path / "tasks.json"
    train(acc=0.5)
    write_results([{**rows()[0], "task": "elsewhere"}, *rows()], path)
    train(acc=0.9)
    done = call("--write", str(path), "--keep")
    assert done.exit_code == 0 and "no longer" not in done.output and "elsewhere" in done.output
    found = {row["task"]: row["test_acc"]["mean"] for row in read_results(path)}
    assert found == {"dog_breeds": 0.9, "elsewhere": 0.5}
    path.write_text("damaged")
    done = call("--write", str(path), "--keep")
    assert done.exit_code == 1 and path.read_text() == "damaged"
    assert call("--keep").exit_code == 2


def test_the_command_writes_the_file_of_the_checkout_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_ROOT", str(tmp_path))
    train()
    done = call("--write")
    assert done.exit_code == 0, done.output
    assert read_results(tmp_path / "benchmarks" / "results" / "tasks.json")[0]["task"] == "dog_breeds"


def test_the_command_refuses(tmp_path):
    done = call("--write", str(tmp_path / "tasks.json"))
    assert done.exit_code == 1 and "nothing was written" in done.output and not list(tmp_path.iterdir())
    assert call("--task", "dog_breeds", "--write").exit_code == 2


def test_it_needs_no_torch():
    code = "import sys, project.runs.results\nprint(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"'torch'", "'matplotlib'", "'pandas'", "'PIL'"} & set(done.stdout.strip("[]\n").split(", "))


def cross(task="dog_breeds", acc=0.98, data="d" * 64, status="finished", **asked):
    """A run as the notebook of cross-validation records it; its id."""
    asked = {"task": task, "recipe": "fast", "folds": 5, "seed": 0, "limit_batches": 0} | asked
    run = start_run(task, asked, "nbs/crossval.ipynb", {"hash": data, "task": task})
    run.finish(status, {"cv/acc": acc, "cv/n": 1789, "cv/folds": asked["folds"], "train/seconds": 99.0})
    return run.id


def test_a_cross_validated_figure_stands_beside_the_test_set():
    """That of the same recipe on the same data, whole and finished; the newest."""
    train()
    train("fake_news")
    cross(acc=0.5)
    run = cross(acc=0.98, folds=10)
    for other in ({"data": "e" * 64}, {"recipe": "minilm"}, {"limit_batches": 5}, {"status": "failed"}):
        cross(acc=0.1, **other)
    found = {row["task"]: row for row in rows()}
    assert found["dog_breeds"]["cross"]["run"] == run and found["fake_news"]["cross"] is None
    low, high = wilson_interval(0.98 * 1789, 1789)
    shown = f"98.00, {100 * low:.1f} to {100 * high:.1f} (1,789)"
    assert result_texts(rows())[0]["cross-validated, %"] == shown


def test_a_cross_validated_figure_is_kept_with_the_file(tmp_path):
    """`--keep`: where neither runs are here, nor where only the trainings are."""
    train()
    cross()
    before = read_results(write_results(rows(), tmp_path / "r.json"))
    kept = collect_results([], before=before)
    assert kept[0]["cross"]["acc"] == 0.98
    only = [r for r in list_runs() if "cv/acc" not in r["metrics"]]
    assert collect_results(only, before=before)[0]["cross"]["acc"] == 0.98
