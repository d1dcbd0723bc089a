"""The `project` command, as somebody at a shell meets it."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from project.cli import app


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
    shown = call("data", "show")
    assert "Sneaker" in shown.output and "train" in shown.output
    assert json.loads(call("data", "show", "--json").output)["task"] == "fashion_mnist"


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


def test_doctor_looks_at_everything(call):
    done = call("doctor", "--json")
    found = {c["what"]: c for c in json.loads(done.output)}
    assert {"python", "kernel", "torch", "data", "dvc", "wandb", "disk", "git"} == set(found)
    assert found["torch"]["state"] == "ok" and "project data build" in found["data"]["found"]
    assert done.exit_code == int(any(c["state"] == "fix" for c in found.values()))


def test_completion_answers():
    env = {**os.environ, "COMP_WORDS": "project da", "COMP_CWORD": "1", "_PROJECT_COMPLETE": "bash_complete"}
    code = "import sys; sys.argv = ['project']; from project.cli import app; app(prog_name='project')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "plain,data" in done.stdout
