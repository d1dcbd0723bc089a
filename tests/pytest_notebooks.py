"""Pytest plugin: each notebook of nbs/ is a test, run in a process of its own, away from the user's data, runs and W&B.

A library notebook runs the way nbdev_test runs it (run_notebook.py); a run notebook, one with a `parameters` cell, runs
through papermill on the committed sample.
"""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [ROOT / "nbs" / name for name in tomllib.loads((ROOT / ".ci" / "floors.toml").read_text(encoding="utf-8"))]
SECONDS = 600  # for one notebook; far above what any takes, so that only a hang meets it
OWN_GROUP = {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x200}  # a new process group
SMOKE = {"limit_batches": "5", "folds": "2"}  # parameters that make a run small, given to notebooks that have them
RUNNER = ROOT / "tests" / "run_notebook.py"
LIGHT = "numpy"  # what library notebooks import, from elsewhere
HEAVY = "numpy matplotlib.pyplot PIL.Image torch pytorch_lightning"  # none that starts a thread: onnxruntime does
# with one of these it imports torch; `bundle.export` and the loader do so too
TORCH = re.compile(
    r"\"(?:from|import) (?:torch|pytorch_lightning|project\.(?:models|train\.(?:module|prepare|fit|tracking)))\b"
)
TRAINS = re.compile(r"\bfit\(|optimizer\.step\(")  # in a notebook that trains a network
NEEDS = {
    "evaluate.ipynb": "train.ipynb",
    "loadtest.ipynb": "train.ipynb",
    "promote.ipynb": "train.ipynb",
}  # a notebook that works on what another one leaves
JUDGE = ("train.ipynb", "evaluate.ipynb")  # run notebooks that say what a network has learned
# what takes longest, so that no worker has it left when the others are done
LONGEST = [
    "nbs/train.ipynb",
    "tests/test_engine.py",
    "tests/test_kills.py",
    "tests/test_recipes.py",
    "tests/test_tracking.py",
    "tests/test_terminal.py",
    "tests/test_docs.py",
    "tests/test_receipt.py",
    "tests/test_store.py",
    "nbs/tutorial.ipynb",
    "tests/test_compare.py",
    "tests/test_resume_fit.py",
    "tests/test_load.py",
    "tests/test_first_steps.py",
]


def isolated_environment(folder):
    """Environment variables that keep everything a test writes in `folder`, and the network out of it."""
    folders = {
        "PROJECT_DATA": "data",
        "PROJECT_RUNS": "runs",
        "PROJECT_CACHE": "cache",
        "PROJECT_REGISTRY": "registry",
        "WANDB_DIR": "wandb",
        "WANDB_CACHE_DIR": "wandb",
        "WANDB_CONFIG_DIR": "wandb",
        "WANDB_DATA_DIR": "wandb",
        "NETRC": "netrc",
        "XDG_CONFIG_HOME": "config",
        "IPYTHONDIR": "ipython",
        "JUPYTER_CONFIG_DIR": "jupyter",
        "JUPYTER_DATA_DIR": "jupyter",
        "JUPYTER_RUNTIME_DIR": "jupyter",
    }
    paths = {name: str(folder / sub) for name, sub in folders.items()}
    fixed = {
        "PYTHONPATH": str(ROOT / "tests" / "site"),
        "PROJECT_SOURCE": str(ROOT / "tests" / "samples"),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": os.environ.get("PROJECT_TEST_THREADS", "1"),
        "OMP_WAIT_POLICY": "passive",
    }
    return paths | fixed


def pytest_configure(config):
    """One scratch folder a session; kernels and commands inherit it through the environment."""
    config.scratch = Path(tempfile.mkdtemp(prefix="project-tests-"))
    config.environment_before = dict(os.environ)
    for name in ("WANDB_API_KEY", "PROJECT_ROOT"):
        os.environ.pop(name, None)
    os.environ.update(isolated_environment(config.scratch))
    config.executed = {}  # run notebooks already run in this session: some need what another leaves
    config.forks = {}  # by the modules that they have imported: processes that fork one for each notebook


def pytest_unconfigure(config):
    """Leave the environment as it was, no scratch folder, and no process."""
    for fork in getattr(config, "forks", {}).values():
        fork.close()
    if hasattr(config, "scratch"):
        os.environ.clear()
        os.environ.update(config.environment_before)
        shutil.rmtree(config.scratch, ignore_errors=True)


def pytest_collect_file(file_path, parent):
    """A notebook of nbs/ is a test file."""
    if file_path.suffix == ".ipynb" and file_path.parent in (ROOT / "nbs", *FLOORS):
        return NotebookFile.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(optionalhook=True)  # unknown where pytest-xdist is not loaded
def pytest_xdist_make_scheduler(config, log):
    """A file at a time, as `--dist loadfile`; run notebooks that need one another are one file."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadGroups(LoadFileScheduling):
        def _split_scope(self, nodeid):
            folder, _, name = (file := super()._split_scope(nodeid)).rpartition("/")
            return f"{folder}/{NEEDS[name]}" if name in NEEDS and folder == "nbs" else file

    config.option.loadscopereorder = False  # by the number of tests, which says nothing of their length
    return LoadGroups(config, log)


def pytest_collection_modifyitems(items):
    """What takes longest comes first, and of run notebooks that need one another the first; else as it was."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


def parameters_cell(path):
    """The source of the cell tagged `parameters`, or None."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = (c for c in cells if "parameters" in c["metadata"].get("tags", []))
    return next(("".join(c["source"]) for c in tagged), None)


SAME_FORM = ("train.ipynb",)  # others show what there is in the data, and of that a sample has less
PARTLY = ("**trained in part**",)  # what a smoke test shows besides


class NotebookError(Exception):
    """A notebook that did not run as it should; the message is the whole report."""


class NotebookFile(pytest.File):
    """One notebook, one test."""

    def collect(self):
        """Yield the notebook as a run or as a lesson."""
        kind = LessonItem if parameters_cell(self.path) is None else RunItem
        item = kind.from_parent(self, name="run")
        if self.path.name in JUDGE if kind is RunItem else TRAINS.search(self.path.read_text(encoding="utf-8")):
            item.add_marker("trained")
        yield item


class NotebookItem(pytest.Item):
    """A notebook; runs a command in a process group of its own and ends the whole group when time is up."""

    def reportinfo(self):
        """Where the test is, in pytest's words."""
        return self.path, None, self.path.name

    def repr_failure(self, excinfo):
        """The notebook's own report instead of this file's traceback."""
        return str(excinfo.value) if isinstance(excinfo.value, NotebookError) else super().repr_failure(excinfo)

    def execute(self, command, cwd):
        """The output of `command`; NotebookError when it fails or takes too long."""
        started = time.monotonic()
        # a file, not a pipe: a kernel left behind would keep a pipe open, and reading it would wait for ever
        with tempfile.TemporaryFile(dir=self.config.scratch) as log:
            process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **OWN_GROUP)
            try:
                status = process.wait(SECONDS)
            except BaseException:  # also Ctrl-C: nothing of ours may outlive the test
                status = None
                raise
            finally:
                if status is None:
                    end_group(process)
                log.seek(0)
                self.output = log.read().decode("utf-8", "replace").replace("\r\n", "\n")
        if status:
            raise NotebookError(f"{self.path.name} failed after {time.monotonic() - started:.0f} s\n\n{self.output}")
        return self.output


def end_group(process):
    """End a process and everything it started."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
    process.wait()


class Forks:
    """A process that has imported what notebooks of a kind import, and forks one for each notebook."""

    def __init__(self, modules, filters, log):
        self.log = log
        command = [sys.executable, RUNNER, "--serve", modules, filters, str(SECONDS)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        with log.open("w") as errors:
            self.process = subprocess.Popen(command, stderr=errors, bufsize=1, **pipes)

    def run(self, path):
        """The exit status of a notebook, None when it takes too long, and what it printed."""
        log = self.log.with_name(f"{path.stem}-{time.monotonic_ns()}.log")
        log.touch()
        try:
            self.process.stdin.write(json.dumps([str(path), str(log)]) + "\n")
            pid = int(self.process.stdout.readline())
        except (OSError, ValueError):  # it has not even imported them
            return self.process.wait(), self.log.read_text(encoding="utf-8", errors="replace")
        status = ended = None
        try:
            ended = select.select([self.process.stdout], [], [], SECONDS)[0]
        finally:  # also Ctrl-C: nothing of ours may outlive the test
            if not ended:
                os.killpg(pid, signal.SIGKILL)
            status = int(self.process.stdout.readline())
        return status if ended else None, log.read_text(encoding="utf-8", errors="replace")

    def close(self):
        """Let it end."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class LessonItem(NotebookItem):
    """A library notebook, or the front page: run as nbdev_test runs it, its exported cells measured as the module's."""

    def runtest(self):
        """Run it in its folder, with pytest's own list of warnings that are no errors."""
        filters = json.dumps(self.config.getini("filterwarnings"))
        measured = any(name.startswith("COVERAGE_PROCESS") for name in os.environ)  # from the start of a process
        if hasattr(os, "fork") and not measured:
            return self.fork(filters)
        try:
            self.execute([sys.executable, RUNNER, self.path, filters, str(SECONDS)], cwd=self.path.parent)
        except subprocess.TimeoutExpired:
            raise NotebookError(f"{self.path.name} was ended after {SECONDS} s\n\n{self.output}") from None

    def fork(self, filters):
        """The same in a process that has the imports behind it."""
        forks, modules = self.config.forks, HEAVY if TORCH.search(self.path.read_text(encoding="utf-8")) else LIGHT
        if modules not in forks or forks[modules].process.poll() is not None:
            forks[modules] = Forks(modules, filters, self.config.scratch / f"forks-{len(modules)}.log")
        started = time.monotonic()
        status, output = forks[modules].run(self.path)
        if status is None:
            raise NotebookError(f"{self.path.name} was ended after {SECONDS} s\n\n{output}")
        if status:
            raise NotebookError(f"{self.path.name} failed after {time.monotonic() - started:.0f} s\n\n{output}")


class RunItem(NotebookItem):
    """A run notebook: papermill on the sample, from a folder that is not the checkout."""

    def runtest(self):
        """Run what it needs, then itself; a warning that it shows is an error, and so are committed outputs of old."""
        for name in (NEEDS.get(self.path.name), self.path.name):
            if name and name not in self.config.executed:
                self.config.executed[name] = self.papermill(self.path.with_name(name))
        cells = json.loads(self.config.executed[self.path.name].read_text(encoding="utf-8"))["cells"]
        outputs = [(cell, output) for cell in cells for output in cell.get("outputs", [])]
        for cell, output in outputs:
            text = "".join(output.get("text", ""))
            if output.get("name") == "stderr" and re.search(r"\b\w*Warning: ", text):
                raise NotebookError(f"{self.path.name} shows a warning\n\n{''.join(cell['source'])}\n\n{text}")
        if self.path.name in SAME_FORM:
            self.compare(cells)

    def compare(self, cells):
        """Hold what is committed against this run: other numbers, but the same tables, settings, figures."""
        from project.runs.fresh import form_differences

        committed = json.loads(self.path.read_text(encoding="utf-8"))
        if differ := list(form_differences(committed, {"cells": cells}, PARTLY)):
            hint = f"make it anew with `project fresh --write {self.path.stem}`"
            raise NotebookError("\n".join([f"{self.path.name} is committed with outputs of before:", *differ, hint]))

    def papermill(self, path):
        """Execute one run notebook; the path of the result."""
        elsewhere = self.config.scratch / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        out = elsewhere / path.name
        known = parameters_cell(path) or ""
        small = {name: value for name, value in SMOKE.items() if re.search(rf"^{name}\b", known, re.M)}
        smoke = [word for name, value in small.items() for word in ("-p", name, value)]
        command = [sys.executable, "-m", "papermill", path, out, "--no-progress-bar", "--kernel", "python3", *smoke]
        try:
            self.execute(command, cwd=elsewhere)
        except subprocess.TimeoutExpired:
            cells = json.loads(out.read_text(encoding="utf-8"))["cells"] if out.exists() else []
            running = [c for c in cells if c["metadata"].get("papermill", {}).get("status") == "running"]
            source = "".join("".join(cell["source"]) for cell in running)
            raise NotebookError(f"{path.name} was ended after {SECONDS} s in this cell:\n\n{source}") from None
        return out
