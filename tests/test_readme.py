"""What the README tells a program to do, done against a real server: every curl, the Python, every client command."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_notebooks import ROOT
from serve_process import Server, image_bundle, png, text_bundle

from project.bundle.registry import Registry

SECTION = re.search(r"^## For a program\n(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
SHELL = [line for block in re.findall(r"^```bash\n(.*?)^```", SECTION, re.M | re.S) for line in block.splitlines()]
CURLS = [line for line in SHELL if line.startswith("curl ")]
CLIENT = [line for line in SHELL if line.startswith(("project predict ", "project predictions "))]
PYTHON = next(b for b in re.findall(r"^```python\n(.*?)^```", SECTION, re.M | re.S) if "httpx" in b)
WRITTEN = "http://127.0.0.1:8000"  # where the README's server is


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
    (folder / "boot.png").write_bytes(png(250))
    (folder / "shirt.png").write_bytes(png(5))
    (folder / "titles.csv").write_text('title\nGood news\n"Bad, bad news"\n', encoding="utf-8")
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
    assert lines[0].startswith("Ankle boot 0.9") and lines[1:] == ["0 real", "1 fake"]
    served.wait_for(lambda: '"label": "Ankle boot"' in run(served, ["project", "predictions", "list", "--json"]).stdout)


@pytest.mark.parametrize("line", CLIENT)
def test_client(served, line):
    answer = run(served, shlex.split(line.replace(WRITTEN, served.url)))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    if "titles.csv" in line:
        assert (served.folder / "answers.csv").read_text(encoding="utf-8").count("\n") == 3
    if line.endswith(".parquet"):
        assert (served.folder / "log.parquet").read_bytes()[:4] == b"PAR1"
