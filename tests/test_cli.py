"""The `project` command, as somebody at a shell meets it."""

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from project.cli import _check_git, app
from project.core import git_state


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call the command in a place of its own."""
    monkeypatch.setenv("PROJECT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PROJECT_DATA", str(tmp_path / "data"))
    return lambda *args: CliRunner().invoke(app, list(args))


def test_every_verb_has_help(call):
    for name, command in app.commands.items():
        done = call(name, "--help")
        assert done.exit_code == 0 and command.help and command.help.splitlines()[0] in done.output


def test_no_runs_says_how_to_make_one(call):
    assert "make train" in call("runs").output


def test_data_is_built_and_shown(call):
    done = call("data", "build")
    assert done.exit_code == 0, done.output
    assert "0 rows left out" in done.output
    shown = call("data", "show")
    assert "Sneaker" in shown.output and "train" in shown.output
    assert json.loads(call("data", "show", "--json").output)["task"] == "fashion_mnist"


def test_what_is_left_out_is_counted_by_reason(call, tmp_path):
    from PIL import Image

    for i in range(60):
        part, face = ("train", "test")[i % 5 == 0], ("angry", "happy")[i % 2]
        (tmp_path / "faces" / part / face).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (48, 48), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "faces" / part / face / f"{i}.png")
    (tmp_path / "faces" / "train" / "angry" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    (tmp_path / "faces" / "train" / "happy" / "y.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off too")
    done = call("data", "build", "face_emotion", "--source", str(tmp_path / "faces"))
    assert done.exit_code == 0, done.output
    assert "2 rows left out; `project data show face_emotion --json` lists them" in done.output
    counted = [line.split()[0] for line in done.output.splitlines() if line.startswith("  ")]
    assert sum(map(int, counted)) == 2
    manifest = json.loads(call("data", "show", "face_emotion", "--json").output)
    assert sorted(r["file"] for r in manifest["rejects"]) == ["train/angry/x.png", "train/happy/y.png"]


def test_texts_are_built_and_shown(call, tmp_path):
    lines = [
        f"{'officials say plan' if i % 2 else 'you wont believe'} {i * 7919 % 1000} {i},{i % 2}" for i in range(200)
    ]
    (tmp_path / "real_and_fake_news.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    done = call("data", "build", "fake_titles", "--source", str(tmp_path))
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in call("data", "show", "fake_titles").output.splitlines()[1:]]
    assert rows[0] == ["split", "rows", "fake", "real"] and {"train", "val", "test"} <= {row[0] for row in rows}


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("data", "build", "fashion_mist"), "Did you mean 'fashion_mnist'"),
        (("data", "show"), "project data build"),
        (("data", "build", "--source", "/nowhere"), "/nowhere"),
        (("run", "trian"), "no notebook 'trian'"),
        (("run", "train", "-f", "/nowhere.yaml"), "does not exist"),
    ],
)
def test_errors_are_one_message_and_a_status(call, args, text):
    done = call(*args)
    assert done.exit_code != 0 and text in done.output and "Traceback" not in done.output


def test_a_parameter_file_that_is_not_yaml(call, tmp_path):
    (tmp_path / "p.yaml").write_text("a: [1")
    assert "expected YAML" in call("run", "train", "-f", str(tmp_path / "p.yaml")).output
    (tmp_path / "p.yaml").write_text("- 1")
    assert "`name: value`" in call("run", "train", "-f", str(tmp_path / "p.yaml")).output


def test_a_kernel_that_is_not_there(call, tmp_path):
    done = call("run", "train", str(tmp_path / "out.ipynb"), "-k", "cobol")
    assert done.exit_code == 1 and "no Jupyter kernel named 'cobol'" in done.output


def test_a_notebook_that_fails_names_its_cell(call, tmp_path):
    done = call("run", "train", str(tmp_path / "out.ipynb"), "-p", "recipe", "fsat")
    assert done.exit_code == 1 and "Did you mean 'fast'" in done.output and "Traceback" not in done.output
    assert not (tmp_path / "runs").exists()


def refused_owner(folder: Path, monkeypatch) -> None:
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its tests


def without_git(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(folder))


def without_commit(folder: Path, monkeypatch) -> None:
    subprocess.run(["git", "init", "-q", str(folder)], check=True)


def damaged(folder: Path, monkeypatch) -> None:
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / ".git" / "config").write_text("[core")


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (refused_owner, "belongs to another user; `git config --global --add safe.directory"),
        (without_git, "git cannot be started (No such file or directory); install it"),
        (without_commit, "the repository has no commit yet; `git commit` makes one"),
        (damaged, "fatal: bad config line"),
        (lambda folder, _: None, "this is no git repository; `git init` makes one"),
        (lambda folder, _: folder.rmdir(), "the folder is not there"),
    ],
)
def test_why_there_is_no_commit_is_what_git_says(tmp_path, monkeypatch, prepare, said):
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.setenv("PROJECT_ROOT", str(folder))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.delenv("PROJECT_COMMIT", raising=False)
    prepare(folder, monkeypatch)
    state, what, found = _check_git()
    assert (state, what) == ("note", "git") and said in found
    assert ("git init" in found) is ("no git repository" in found)
    assert git_state()["commit"] is None and said in git_state()["problem"]


def test_doctor_looks_at_everything(call):
    done = call("doctor", "--json")
    found = {c["what"]: c for c in json.loads(done.output)}
    names = {"python", "kernel", "package", "export", "torch", "extras", "data", "dvc", "wandb", "disk", "git"}
    assert names == set(found)
    assert found["torch"]["state"] == "ok" and "project data build" in found["data"]["found"]
    assert done.exit_code == int(any(c["state"] == "fix" for c in found.values()))


def test_completion_answers():
    env = {**os.environ, "COMP_WORDS": "project da", "COMP_CWORD": "1", "_PROJECT_COMPLETE": "bash_complete"}
    code = "import sys; sys.argv = ['project']; from project.cli import app; app(prog_name='project')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "plain,data" in done.stdout


@pytest.mark.parametrize(
    "text", ["1", "1e-3", "abc", "True", "true", "None", "007", "-1", "1_0", "nan", "", "1.", "0x10"]
)
def test_values_are_read_as_papermill_reads_them(text):
    from papermill.cli import _resolve_type

    from project.cli import _resolve

    theirs, ours = _resolve_type(text), _resolve(text)
    assert repr(theirs) == repr(ours) and type(theirs) is type(ours)


def test_parameters_are_refused_before_papermill_is_loaded(call, tmp_path):
    code = "import sys; sys.argv = ['project', 'run', 'train', '-p', 'lr', 'abc']\nfrom project.cli import app\n"
    code += "try: app(prog_name='project')\nfinally: print('papermill' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n" and "lr: expected a number above 0" in done.stderr
    assert not list(tmp_path.iterdir())


def test_params_as_a_table_and_as_a_schema(call):
    assert "a number above 0 and at most 10, or None" in call("params", "train").output
    assert json.loads(call("params", "evaluate", "--json").output)["properties"]["batch_size"]["minimum"] == 1
    assert "Parameters of train" in call("run", "train", "--help").output


def test_runs_are_chosen_and_put_in_order(call):
    from project.runs.record import start_run

    for seed in (1, 2, 3):
        start_run("t", {"seed": seed}, notebook="nbs/x.ipynb").finish(metrics={"test/acc": seed / 10})
    rows = call("runs", "--sort=-test/acc", "--where", "seed>1").output.splitlines()
    assert [r.split()[4] for r in rows[1:]] == ["0.3000", "0.2000"]
    assert len(json.loads(call("runs", "-n", "1", "--json").output)) == 1
    done = call("runs", "--sort", "test/ac")
    assert done.exit_code == 1 and "Did you mean 'test/acc'" in done.output
    assert call("runs", "--where", "seed").exit_code == 1


def test_show_compare_and_scan(call, tmp_path):
    from project.runs.record import start_run

    names = []
    for seed in (1, 2):
        run = start_run("t", {"seed": seed}, notebook="nbs/x.ipynb")
        run.log({"loss": 1 / seed})
        run.finish(metrics={"test/acc": seed / 10})
        names.append(run.id)
    assert names[1] in call("show", "last").output and json.loads(call("show", "--json").output)["id"] == names[1]
    assert "seed" in call("compare", *names).output
    assert call("compare", *names, "--html", str(tmp_path / "page.html")).exit_code == 0
    assert "<svg" in (tmp_path / "page.html").read_text() and json.loads(call("compare", "--json", *names).output)
    assert call("compare", names[0]).exit_code == 2
    key = "".join(random.Random(0).choices(string.ascii_letters + string.digits, k=36))
    (tmp_path / "key.txt").write_text("token = " + "ghp_" + key)
    done = call("scan", str(tmp_path / "key.txt"))
    assert done.exit_code == 1 and key not in done.output and "1 found in 1 files" in done.output
    assert call("scan", str(tmp_path / "page.html")).exit_code == 0


def test_the_life_of_a_model(call, tmp_path, monkeypatch):
    """Added, listed, made production, asked, replaced, rolled back, traced, cleared away."""
    served = pytest.importorskip("serve_process")
    monkeypatch.setenv("PROJECT_REGISTRY", str(tmp_path / "registry"))
    for sharpness in (4.0, 2.0):
        added = call("models", "add", str(served.image_bundle(tmp_path / f"b{sharpness}", sharpness).path))
        assert added.exit_code == 0, added.output
    assert call("models", "list", "brightness").output.count("brightness") == 2
    assert "there are latest, v1-" in call("models", "show", "brightness").output  # no production yet
    assert call("models", "alias", "brightness", "v1", "--yes").exit_code == 0
    assert call("models", "alias", "brightness", "v2", "--yes", "--expected", "none").exit_code == 1  # it is v1 now
    assert call("models", "alias", "brightness", "v2", "--yes", "--reason", "softer").exit_code == 0
    assert "softer" in call("models", "show", "brightness").output
    picture = tmp_path / "bright.png"
    picture.write_bytes(served.png(250))
    said = call("predict", str(picture), "--json")
    assert said.exit_code == 0 and json.loads(said.output)["prediction"]["class"] == "bright", said.output
    assert call("predict", str(tmp_path / "none.png")).exit_code == 1
    back = call("models", "rollback", "brightness")
    assert back.exit_code == 0 and "production is v1-" in back.output
    assert "v1-" in call("models", "lineage", "brightness").output
    assert "ok    files" in call("models", "verify", "brightness").output
    assert "--yes does it" in call("models", "gc", "brightness", "--keep", "1").output


def test_predictions_are_listed_exported_and_expired(call, tmp_path):
    log = pytest.importorskip("project.serve.log")
    url = f"sqlite:///{tmp_path / 'log.db'}"
    with_thread = log.PredictionLog(url)
    with_thread.start()
    row = {"id": log.new_id(), "task": "shades", "version": "v1", "predicted": "dark", "confidence": 0.75}
    assert with_thread.put(row)
    with_thread.close()
    listed = call("predictions", "list", "--log", url)
    assert listed.exit_code == 0 and row["id"] in listed.output and "0.750" in listed.output
    assert call("predictions", "export", str(tmp_path / "log.parquet"), "--log", url).output.startswith("1 ")
    assert call("predictions", "purge", "--days", "0", "--yes", "--log", url).output.startswith("1 ")
    assert "no such" in call("predictions", "list", "--log", url).output


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("lr=0.1",), "`-p lr 0.1`"),
        (("--lr", "0.1"), "`-p lr 0.1`"),
        (("-lr", "0.1"), "`-p lr 0.1`"),
        (("-p", "lr=0.1"), "`-p lr 0.1`"),
        (("--label-smoothing=0",), "`-p label_smoothing 0`"),
        (("--epoch", "3"), "`-p epochs 3`"),
        (("out.ipynb", "lr=0.1"), "`-p lr 0.1`"),
        (("out",), "expected a file that ends in .ipynb"),
        (("gs://b/out.ipynb",), "`papermill` writes to a URL"),
        (("--kernal", "x"), "--kernel"),
    ],
)
def test_a_parameter_in_the_wrong_place_is_answered_and_makes_no_file(call, tmp_path, monkeypatch, args, text):
    monkeypatch.chdir(tmp_path)
    done = call("run", "train", *args)
    assert done.exit_code == 2 and text in done.output and not list(tmp_path.iterdir()), done.output


@pytest.mark.parametrize(
    "args",
    [
        ("predict", "a.csv", "--out", "photo.png"),
        ("results", "--write", "fashion_mnist"),
        ("compare", "a", "b", "--html", "c"),
        ("predictions", "export", "fashion_mnist"),
    ],
)
def test_a_word_in_the_wrong_place_is_not_written_over(call, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    (tmp_path / args[-1]).write_text("mine")
    done = call(*args)
    assert done.exit_code == 2 and "expected a file that ends in" in done.output
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


def test_what_would_be_ignored_is_refused(call, tmp_path):
    (tmp_path / "d.json").write_text("{}")
    done = call("promote", "--decision", str(tmp_path / "d.json"), "-p", "alpha", "0.1")
    assert done.exit_code == 2 and "alpha: the comparison" in done.output
    assert "which has no versions" in call("models", "verify", str(tmp_path), "v1").output
    assert "leave out --json" in call("predict", "a.csv", "--out", "b.csv", "--json").output
    assert "`-p alpha 0.1`" in call("promote", "--alpha", "0.1").output


def test_an_unknown_command_is_answered_with_the_nearest(call):
    assert "Did you mean 'results'?" in call("result").output
    assert "Did you mean 'rollback'?" in call("models", "rolback").output
    assert "`project run evaluate` executes the notebook" in call("evaluate").output


@pytest.mark.parametrize("module", ["project", "project.cli"])
def test_the_modules_are_the_command(module, tmp_path):
    env = os.environ | {"PROJECT_RUNS": str(tmp_path)}
    command = [sys.executable, "-m", module, "runs"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "make train" in done.stdout, done.stderr
    assert subprocess.run([*command, "--nope"], env=env, capture_output=True, timeout=120).returncode == 2


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("seed: 1\nseed: 2", "seed stands in it more than once"),
        ("1: 2", "expected text as names, found 1"),
        ("yes: true", "expected text as names, found True"),
        ("seed: .nan", "seed: expected a whole number"),
        ("lr: .inf", "it is not finite"),
        ("lr: " + "9" * 400, "lr: expected a number"),
        ("lr: " + "9" * 5000, "expected YAML"),
        ("task: 2026-01-02", "got '2026-01-02'"),
        ("task: 94", "write it in quotation marks"),
        ("task: &a [*a]", "task: expected text"),
        ("task: !!binary aGVsbG8=", "task: expected text, got b'hello'"),
        ('task: "\\ud800"', "half a character"),
        ("task: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("&a task: x\n*a : y", "expected YAML"),
        ("lr: 0.1\n---\nlr: 0.2", "expected YAML"),
    ],
)
def test_a_file_of_odd_parameters_is_refused_in_a_sentence(call, tmp_path, content, text):
    (tmp_path / "p.yaml").write_text(content)
    done = call("run", "train", str(tmp_path / "out.ipynb"), "-f", str(tmp_path / "p.yaml"))
    assert done.exit_code == 1 and text in done.output and not (tmp_path / "out.ipynb").exists(), done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_a_name_that_reads_as_a_number_reaches_the_recipes(call):
    assert "94 is called 'better' now" in call("run", "train", "-p", "recipe", "94").output
