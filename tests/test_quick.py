"""`make quick`: what is chosen for a change, on a small tree with a history of its own."""

import json
import subprocess

import pytest
from pytest_notebooks import ROOT
from test_tooling import load

QUICK = load(ROOT / ".ci" / "quick.py")
MODULES = {  # name -> what it imports
    "core": "",
    "runs/record": "from ..core import a\n",
    "serve/page": "from ..core import a\n",
    "serve/api": "from .page import a\n\ndef late():\n    from ..runs.record import a\n",
}
TESTS = {
    "test_page": "from project.serve.page import a\n",
    "test_record": "def test():\n    import project.runs.record\n",
    "test_slow": "from toys import b\n",
    "test_far": "import inner\n",
    "inner": "from toys import b\n",
    "toys": "b = 1\n",
}


def notebook(path, *cells):
    """A notebook of code cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"cell_type": "code", "source": source, "metadata": {}, "outputs": []} for source in cells]
    path.write_text(json.dumps({"cells": rows}), encoding="utf-8")


def git(tree, *words):
    """Do it as somebody who has a name."""
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], cwd=tree, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path):
    """Four modules with their notebooks, a run notebook, tests and helpers of tests; committed on main."""
    for name, source in MODULES.items():
        path = tmp_path / "project" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{source}a = 1\n", encoding="utf-8")
        exported = f"#| export\n{source}a = 1"
        notebook(tmp_path / "nbs" / f"{name}.ipynb", f"#| default_exp {name.replace('/', '.')}", exported)
    notebook(tmp_path / "nbs" / "train.ipynb", "from project.runs.record import a")
    (tmp_path / "tests").mkdir()
    for name, source in TESTS.items():
        (tmp_path / "tests" / f"{name}.py").write_text(source, encoding="utf-8")
    git(tmp_path, "init", "-b", "main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "chosen"),
    [
        ("nbs/serve/page.ipynb", {"nbs/serve/page.ipynb", "nbs/serve/api.ipynb", "tests/test_page.py"}),
        ("project/serve/page.py", {"nbs/serve/page.ipynb", "nbs/serve/api.ipynb", "tests/test_page.py"}),
        ("project/serve/api.py", {"nbs/serve/api.ipynb"}),
        ("nbs/runs/record.ipynb", {"nbs/runs/record.ipynb", "nbs/serve/api.ipynb", "tests/test_record.py"}),
        ("project/core.py", {"nbs/core.ipynb", "nbs/runs/record.ipynb", "nbs/serve/page.ipynb"}),
        ("nbs/train.ipynb", {"nbs/train.ipynb"}),
        ("tests/test_page.py", {"tests/test_page.py"}),
        ("tests/toys.py", {"tests/test_slow.py", "tests/test_far.py"}),
        ("README.md", set()),
        ("nbs/gone.ipynb", set()),
    ],
)
def test_what_a_change_chooses(tree, changed, chosen):
    assert set(QUICK.choose(tree, [changed])) == chosen


def test_why_it_was_chosen(tree):
    assert QUICK.choose(tree, ["project/serve/page.py"]) == {
        "nbs/serve/page.ipynb": "exports project.serve.page",
        "nbs/serve/api.ipynb": "project.serve.api imports project.serve.page",
        "tests/test_page.py": "imports project.serve.page",
    }


def test_changed_is_staged_or_not_or_new_since_the_branch_left_main(tree):
    assert QUICK.changed_files(tree) == []
    git(tree, "checkout", "-b", "mine")
    (tree / "committed.py").write_text("a\n", encoding="utf-8")
    git(tree, "add", ".")
    git(tree, "commit", "-m", "b")
    (tree / "staged.py").write_text("a\n", encoding="utf-8")
    git(tree, "add", "staged.py")
    (tree / "project/core.py").write_text("a = 2\n", encoding="utf-8")
    (tree / "new.py").write_text("a\n", encoding="utf-8")
    assert QUICK.changed_files(tree) == ["committed.py", "new.py", "project/core.py", "staged.py"]
    assert QUICK.changed_files(tree, "HEAD") == ["new.py", "project/core.py", "staged.py"]
    git(tree, "checkout", "--detach")
    git(tree, "branch", "-D", "main")  # as in a clone of one branch
    assert QUICK.changed_files(tree) == ["new.py", "project/core.py", "staged.py"]


def test_a_revision_that_is_not_there_is_said(tree):
    with pytest.raises(SystemExit, match="--since: expected a revision, found 'nowhere'"):
        QUICK.changed_files(tree, "nowhere")


def test_in_this_tree_the_page_chooses_its_own(monkeypatch, capsys):
    monkeypatch.setattr(QUICK, "changed_files", lambda *_: ["nbs/serve/50_page.ipynb"])
    monkeypatch.setattr("sys.argv", ["quick.py", "--list"])
    assert QUICK.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert "nbs/serve/50_page.ipynb: changed" in said and "tests/test_page.py: imports project.serve.page" in said
    assert said[-1].startswith("tests/test_repository.py: always") and len(said) < 10
