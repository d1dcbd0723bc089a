"""What the README tells a program to do, done in a fresh checkout against a real server, with the checkout's files."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_notebooks import ROOT
from serve_process import Server, image_bundle, text_bundle

from project.bundle.registry import Registry

SECTION = re.search(r"^## For a program\n(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
SHELL = [line for block in re.findall(r"^```bash\n(.*?)^```", SECTION, re.M | re.S) for line in block.splitlines()]
CURLS = [line for line in SHELL if line.startswith("curl ")]
CLIENT = [line for line in SHELL if line.startswith(("project predict ", "project predictions "))]
PYTHON = "\n".join(b for b in re.findall(r"^```python\n(.*?)^```", SECTION, re.M | re.S) if "api" in b)
WRITTEN = "http://127.0.0.1:8000"  # where the README's server is


def git(folder, *args):
    """What git says in a folder."""
    own = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *own, *args], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def checkout(folder):
    """What of this repository somebody has who cloned it and ran `make serve`: its files, and `out/`."""
    kept = git(ROOT, "ls-files", "-co", "--exclude-standard", ".gitignore", "README.md", "examples").split()
    for name in kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "out").mkdir()
    (folder / ".git" / "info").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / ".git" / "info" / "exclude").write_text("/boots/\n/titles/\n", encoding="utf-8")  # of this test
    git(folder, "add", *kept)
    git(folder, "commit", "-qm", "as cloned")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with the README's tasks, beside the README's files."""
    folder = tmp_path_factory.mktemp("readme")
    registry = Registry(folder / "registry")
    for bundle in (
        image_bundle(folder / "boots", task="fashion_mnist", classes=["Ankle boot", "Shirt"]),
        text_bundle(folder / "titles", task="fake_titles", fields=("title",)),
    ):
        registry.alias(bundle.task, "production", registry.add(bundle).name)
    checkout(folder)
    with Server(folder) as server:
        yield server


def run(server, command, **env):
    """A command beside the files, against this server."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"PROJECT_SERVE_LOG": server.settings["log"], "PROJECT_REGISTRY": str(server.folder / "registry")}
    return subprocess.run(
        command,
        cwd=server.folder,
        env={**os.environ, "PATH": path, "NO_COLOR": "1", **settings, **env},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )


@pytest.mark.parametrize("line", CURLS)
def test_curl(served, line):
    words = shlex.split(line.replace("$URL", served.url))
    answer = run(served, [words[0], "--fail-with-body", "--silent", "--show-error", *words[1:]])
    assert answer.returncode == 0, answer.stdout + answer.stderr
    body = answer.stdout
    if "-o" in words:
        body = (served.folder / words[words.index("-o") + 1]).read_bytes()
        assert body.startswith((b"\x89PNG", b"<!doctype html>"))
    elif words[-1].endswith("/metrics"):
        assert "project_" in body or "# TYPE" in body
    else:
        found = json.loads(body)
        if "/predict/" in words[-1]:
            rows = [row["prediction"] for row in found["rows"]] if words[-1].endswith("/batch") else [found]
            assert rows and all(row["class"] in row["probabilities"] and row["id"] for row in rows)


def test_every_route_has_a_curl_or_a_line_of_python(served):
    paths = served.client.get("/openapi.json").json()["paths"]
    shown = "\n".join([*CURLS, PYTHON])
    used = re.findall(r"(?:\$URL|\(f?\")(/[\w/{}\[\]'.-]*)", shown)
    patterns = {path: re.sub(r"\{\w+\}", r"[^/]+", path) for path in paths}
    assert [p for p, like in patterns.items() if not any(re.fullmatch(like, u) for u in used)] == []


def test_python(served):
    answer = run(served, [sys.executable, "-W", "error", "-c", PYTHON.replace(WRITTEN, served.url)])
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0].split(" 0.")[0] in ("Ankle boot", "Shirt") and [line.split()[0] for line in lines[1:]] == ["0", "1"]
    served.wait_for(lambda: '"label": "Ankle boot"' in run(served, ["project", "predictions", "list", "--json"]).stdout)


@pytest.mark.parametrize("line", CLIENT)
def test_client(served, line):
    answer = run(served, shlex.split(line.replace(WRITTEN, served.url)))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    if "titles.csv" in line:
        assert (served.folder / "out" / "answers.csv").read_text(encoding="utf-8").count("\n") == 3
    if line.endswith(".parquet"):
        assert (served.folder / "out" / "log.parquet").read_bytes()[:4] == b"PAR1"


def test_what_the_readme_does_leaves_the_checkout_clean(served):
    """Runs last: what the commands above have written is in folders that git ignores."""
    assert (served.folder / "out" / "sample.png").exists() and (served.folder / "out" / "card.html").exists()
    left = git(served.folder, "status", "--porcelain", "--untracked-files=all").splitlines()
    own = ("?? registry/", "?? cache/", "?? log", "?? out-", "?? data/", "?? runs/")
    assert [line for line in left if not line.startswith(own)] == []


def outputs():
    """Every file that a command of the README, or of a run notebook's head, writes."""
    books = (ROOT / "nbs").glob("[a-z]*.ipynb")
    texts = ["".join(c["source"]) for p in books for c in json.loads(p.read_text(encoding="utf-8"))["cells"]]
    text = "\n".join(["\n".join(SHELL), (ROOT / "README.md").read_text(encoding="utf-8"), *texts])
    found = re.findall(r"^ *papermill \S+ (\S+\.ipynb)", text, re.M)
    return sorted({*found, *re.findall(r"(?: -o| --out| --html|predictions export) (\S+\.\w+)", text)})


@pytest.mark.parametrize("file", outputs())
def test_git_ignores_what_the_commands_write(file):
    done = subprocess.run(["git", "check-ignore", "-q", file], cwd=ROOT, timeout=60)
    assert done.returncode == 0, f"{file} makes the checkout dirty"
