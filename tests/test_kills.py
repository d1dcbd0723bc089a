"""Runs that are broken off in every way there is, and what is left of them: real kernels, real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from project.locks import is_alive, process_mark
from project.runs.receipt import verify
from project.runs.record import list_runs

pytestmark = pytest.mark.usefixtures("no_buckets")

OPEN = """import os, sys, time
from project.runs.record import start_run
run = start_run("t", {"lr": 0.1}, "nbs/none.ipynb")
open("kernel.pid", "w").write(str(os.getpid()))"""
# lines in the notebook and, at the same moments, in a file beside it
COUNT = """for i in range(600):
    print(i, flush=True)
    open("lines.txt", "a").write(f"{i} {time.time()}\\n")
    time.sleep(0.1)"""


class Execution:
    """A papermill that runs in a folder of its own."""

    def __init__(self, folder: Path, *cells: str, options: tuple[str, ...] = (), out: Path | None = None):
        self.folder, self.out, self.runs = folder, out or folder / "out.ipynb", folder / "runs"
        kernel = {"kernelspec": {"name": "python3", "display_name": "python3"}}
        nb = new_notebook(cells=[new_code_cell(c) for c in (OPEN, *cells)], metadata=kernel)
        nbformat.write(nb, folder / "in.ipynb")
        command = [sys.executable, "-m", "papermill", "in.ipynb", str(self.out), "--no-progress-bar", *options]
        env = os.environ | {"PROJECT_RUNS": str(self.runs)}
        self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def lines(self) -> list[list[str]]:
        """What was printed, with the times."""
        file = self.folder / "lines.txt"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for_lines(self, n: int) -> None:
        """Until so many lines were printed."""
        wait(lambda: len(self.lines()) >= n, 60)

    def end(self, seconds: float = 60) -> int:
        """Wait for papermill; its exit status."""
        try:
            self.said = self.process.communicate(timeout=seconds)[0].decode()
        finally:
            self.process.kill()
        return self.process.returncode

    def kernel_is_gone(self, seconds: float = 15) -> bool:
        """Whether the kernel leaves."""
        pid = int((self.folder / "kernel.pid").read_text())
        return wait(lambda: not is_alive({**process_mark(), "pid": pid, "start": ""}), seconds)

    def notebook(self):
        """The executed notebook."""
        return nbformat.read(self.out, 4)

    def record(self) -> dict:
        """The only run."""
        (record,) = list_runs(self.runs)
        return record


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Until a condition holds; whether it did in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def statuses(nb) -> list[str]:
    """How each code cell of the notebook itself ended."""
    return [c.metadata.papermill["status"] for c in nb.cells if c.cell_type == "code"]


def check_end(e: Execution, status: str, reason: str) -> None:
    """The end as notebook, record and `verify` tell it; the cells that never ran; no kernel."""
    nb, record = e.notebook(), e.record()
    receipt = nb.metadata.project.receipt
    assert (receipt["status"], record["status"]) == (status, status)
    assert reason in receipt["reason"] and reason in record["reason"]
    assert receipt["cell"] == 1 and "cell 1" in receipt["reason"]
    assert statuses(nb) == ["completed", "failed", "pending"]
    verdict = verify(e.out)
    assert verdict.state == "HOLLOW" and status in verdict.reasons[0]
    assert e.kernel_is_gone()
    assert json.loads((e.runs / record["id"] / "run.json").read_text())["receipt"] == receipt


def printed(nb, cell: int = 1) -> list[str]:
    """The lines of a cell's standard output."""
    return "".join(o.text for o in nb.cells[cell].outputs if o.get("name") == "stdout").split()


@pytest.mark.parametrize(
    ("number", "status", "reason", "code"),
    [
        (signal.SIGINT, "interrupted", "by Ctrl-C", 1),
        (signal.SIGTERM, "terminated", "by SIGTERM", 143),
    ],
)
def test_a_signal_to_papermill(tmp_path, number, status, reason, code):
    e = Execution(tmp_path, COUNT, "print('never')")
    e.wait_for_lines(5)
    e.process.send_signal(number)
    assert e.end() == code, e.said
    check_end(e, status, reason)
    assert len(printed(e.notebook())) >= len(e.lines()) - 1  # what the interrupted cell said up to the end
    assert e.notebook().cells[1].outputs[-1].ename == "KeyboardInterrupt"


def test_a_kernel_that_is_killed(tmp_path):
    e = Execution(tmp_path, COUNT, "print('never')")
    e.wait_for_lines(5)
    os.kill(int((tmp_path / "kernel.pid").read_text()), signal.SIGKILL)
    assert e.end() == 138, e.said
    check_end(e, "kernel died", "killed by SIGKILL, which is what the system does when memory runs out")
    assert "4" in printed(e.notebook())


def test_papermill_itself_is_killed(tmp_path):
    e = Execution(tmp_path, COUNT, "print('never')")
    e.wait_for_lines(50)
    killed = time.time()
    e.process.kill()
    e.end()
    assert e.kernel_is_gone()
    nb = e.notebook()
    assert "receipt" not in nb.metadata.project and statuses(nb) == ["completed", "running", "pending"]
    last = [n for n, at in e.lines() if float(at) < killed - 3][-1]  # a second, and two for a busy machine
    assert last in printed(nb)
    verdict = verify(e.out)
    assert verdict.state == "HOLLOW" and "its papermill is gone and has not written the end" in verdict.reasons[0]
    record = e.record()
    assert record["status"] == "killed" and "no sign of life since" in record["reason"]
    assert is_alive(record["process"]) is False
    assert json.loads((e.runs / record["id"] / "run.json").read_text())["status"] == "running"  # left as it was


def test_memory_runs_out_in_a_cell(tmp_path):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
    eat = f"{limit}x = [bytearray(2**28) for _ in range(64)]"
    e = Execution(tmp_path, eat, "print('never')")
    assert e.end() == 1
    check_end(e, "failed", "MemoryError")


def test_a_cell_takes_too_long(tmp_path):
    e = Execution(tmp_path, COUNT, "print('never')", options=("--execution-timeout", "2"))
    assert e.end() == 1, e.said
    check_end(e, "timed out", "A cell timed out")
    assert "3" in printed(e.notebook())


def test_an_error_in_a_cell(tmp_path):
    e = Execution(tmp_path, "1 / 0", "print('never')")
    assert e.end() == 1
    check_end(e, "failed", "ZeroDivisionError: division by zero")


def test_the_disk_is_full(tmp_path, small_disk):
    # the executed notebook and the run's folder are on the same full disk
    (tmp_path / "runs").symlink_to(small_disk / "runs")
    (small_disk / "runs").mkdir()
    noise = "import base64\nprint(base64.b64encode(os.urandom(3_000_000)).decode())"
    e = Execution(tmp_path, noise, "time.sleep(1)", out=small_disk / "out.ipynb")
    assert e.end() != 0
    assert "No space left" in e.said
    record = e.record()
    assert record["status"] == "failed" and "no space left on the disk" in record["reason"]
    assert verify(e.out).state == "HOLLOW"  # the version before, whole
    assert e.kernel_is_gone() and not list(small_disk.glob(".*.tmp"))


def test_the_runs_folder_is_deleted_under_it(tmp_path):
    e = Execution(tmp_path, "import shutil\nshutil.rmtree(run.path)", "run.finish()")
    assert e.end() == 1
    assert "was deleted while it ran" in e.said
    assert e.notebook().metadata.project.receipt["status"] == "failed" and not list(e.runs.iterdir())


def test_a_second_papermill_is_told_who_has_the_run(tmp_path):
    (tmp_path / "none.ipynb").write_text("{}")
    resume = COUNT.replace("range(600)", "range(int(os.environ['LINES']))")
    again = OPEN.replace('"nbs/none.ipynb")', '"none.ipynb", resume=True)\nprint(run.id)')
    cells = [new_code_cell(c) for c in (again, resume, "run.log({'a': 1})\nrun.finish()")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "in.ipynb")

    def start(out: str, lines: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "papermill", "in.ipynb", out, "--no-progress-bar"]
        env = os.environ | {"PROJECT_RUNS": str(tmp_path / "runs"), "LINES": str(lines)}
        with (tmp_path / f"{out}.log").open("wb") as log:
            return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)

    first = start("a.ipynb", 10_000)
    assert wait(lambda: (tmp_path / "lines.txt").exists(), 60)
    (owner,) = list_runs(tmp_path / "runs")
    second = start("b.ipynb", 1)
    second.wait(60)
    said = (tmp_path / "b.ipynb.log").read_text()
    assert second.returncode == 1 and f"process {owner['process']['pid']} on" in said and "resume false" in said
    assert first.poll() is None and list_runs(tmp_path / "runs")[0]["status"] == "running"
    first.kill()  # and its kernel notices; then the same command goes on
    first.wait()
    assert wait(lambda: list_runs(tmp_path / "runs")[0]["status"] == "killed", 30)
    third = start("c.ipynb", 1)
    assert third.wait(60) == 0, (tmp_path / "c.ipynb.log").read_text()
    (record,) = list_runs(tmp_path / "runs")
    assert record["id"] == owner["id"] and record["status"] == "finished" and len(record["sittings"]) == 2
    assert start("d.ipynb", 1).wait(60) == 0  # a finished run is not gone on with
    assert len(list_runs(tmp_path / "runs")) == 2


ALARM = """
import signal, sys
from project.runs.client import catch_signals
heard = []
signal.signal(signal.SIGALRM, lambda *_: heard.append("mine"))
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    with catch_signals() as caught:
        signal.raise_signal(signal.SIGTERM)
except SystemExit:
    left = signal.getitimer(signal.ITIMER_REAL)[0]
    print(0 < left <= 0.2, end=" ")
signal.pause() if not heard else None
print(heard)
"""


def test_a_program_keeps_its_own_alarm():
    done = subprocess.run([sys.executable, "-c", ALARM], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True ['mine']\n", done.stderr


def test_a_run_on_a_folder_without_locks_is_gone_on_with(tmp_path, without_locks):
    """Cut off, it can be taken up at once; while its process lives it cannot, whatever another asks."""
    script = "import os, sys, time\nfrom project.runs.record import start_run\n"
    script += "run = start_run('t', {}, root='runs', resume=True)\nprint(run.id, flush=True)\n"
    command = [sys.executable, "-c", f"{script}input()\nrun.finish()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as first:
        name = first.stdout.readline().strip()
        second = subprocess.run(command, cwd=tmp_path, input="", capture_output=True, text=True, timeout=60)
        assert f"is being executed by process {first.pid} on" in second.stderr, second.stderr
        assert "no file locks" in second.stderr
        first.kill()
        first.wait()
    third = subprocess.run(command, cwd=tmp_path, input="\n", capture_output=True, text=True, timeout=60)
    words = third.stdout.split()
    assert words[:7] == ["going", "on", "with", f"{name},", "which", "was", "killed"], third.stderr
    assert words[-1] == name
    (record,) = list_runs(tmp_path / "runs")
    assert record["status"] == "finished" and not list(record["path"].glob("*.claim"))
