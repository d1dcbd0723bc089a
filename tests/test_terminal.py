"""What a person at a terminal sees: progress inside a cell, the result at the end, and a Ctrl-C that names the run."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

pytestmark = pytest.mark.usefixtures("no_buckets")

BIN = Path(sys.executable).parent
PYTHON = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
OPEN = (
    "from project.runs.record import start_run\nrun = start_run('t', {'resume': RESUME}, 'nbs/x.ipynb', resume=RESUME)"
)
WORK = """import os, sys, time
for i in range(40):
    print(f'train: {i}/40 steps, {i}s, loss 0.5', file=sys.stderr, flush=True)
    time.sleep(WAIT)"""
RESULT = "run.finish(metrics={'test/acc': 0.5})\nprint('t: 50.00% on the test set\\n\\nnext:  project runs')"

pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")


def notebook(folder: Path, *cells: str, wait: float = 0.1, resume: bool = True) -> None:
    """A notebook that opens a run, works below a heading, and says what came out."""
    cells = cells or (OPEN, WORK, RESULT)
    code = [new_code_cell(c.replace("RESUME", str(resume)).replace("WAIT", str(wait))) for c in cells]
    book = new_notebook(cells=[code[0], new_markdown_cell("## Training"), *code[1:]], metadata=PYTHON)
    nbformat.write(book, folder / "in.ipynb")


def terminal(folder: Path, *command: str, interrupt_at: str = "", timeout: float = 120) -> tuple[str, int]:
    """What a command shows in a terminal of 100 columns, and its exit status; Ctrl-C once it has shown something."""
    import fcntl
    import struct
    import termios

    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execve(BIN / command[0], [*command], {**os.environ, "PROJECT_RUNS": str(folder / "runs")})
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    shown, end = "", time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            if not select.select([fd], [], [], 1.0)[0]:
                continue
            try:
                piece = os.read(fd, 65536)
            except OSError:  # Linux's way of saying that the other side is gone
                break
            if not piece:
                break
            shown += piece.decode(errors="replace")
            if interrupt_at and interrupt_at in shown:
                os.write(fd, b"\x03")
                interrupt_at = ""
    finally:
        if time.monotonic() >= end:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(fd)
    return shown, os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("command", [("papermill",), ("project", "run")])
def test_progress_inside_a_cell_and_the_result_at_the_end(tmp_path, command):
    notebook(tmp_path)
    shown, status = terminal(tmp_path, *command, "in.ipynb", "out.ipynb")
    lines = [line.strip() for line in shown.replace("\r", "\n").splitlines() if line.strip()]
    assert status == 0, shown
    assert any(line.startswith("Training: 2 of 4 cells") and "/40 steps" in line for line in lines), shown
    said = [line for line in lines if not line.startswith("executed")]
    assert said[-2:] == ["t: 50.00% on the test set", "next:  project runs"], shown


@pytest.mark.parametrize("command", [("papermill",), ("project", "run")])
def test_no_warning_about_tcp_as_what_is_said_is_encrypted(tmp_path, command):
    notebook(tmp_path, OPEN, "import zmq\nassert zmq.has('curve')", RESULT)
    shown, status = terminal(tmp_path, *command, "in.ipynb", "out.ipynb")
    assert status == 0 and "TCP" not in shown and "WARNING" not in shown, shown


@pytest.mark.parametrize(("command", "exit_status"), [(("papermill",), 1), (("project", "run"), 130)])
def test_ctrl_c_names_the_run_and_says_that_the_same_command_goes_on(tmp_path, command, exit_status):
    notebook(tmp_path, wait=1)
    shown, status = terminal(tmp_path, *command, "in.ipynb", "out.ipynb", interrupt_at="/40 steps")
    (run,) = (p.name for p in (tmp_path / "runs").iterdir())
    assert status == exit_status and f"run {run} interrupted: cell 2: by Ctrl-C" in shown.replace("\r", "")
    assert "the same command goes on with it" in shown and "Traceback" not in shown and "never retrieved" not in shown


def test_ctrl_c_in_a_notebook_whose_runs_are_not_gone_on_with_says_so(tmp_path):
    notebook(tmp_path, wait=1, resume=False)
    shown, _ = terminal(tmp_path, "papermill", "in.ipynb", "out.ipynb", interrupt_at="/40 steps")
    assert "the same command starts anew" in shown and "goes on" not in shown and "Traceback" not in shown


def test_sigterm_and_a_killed_kernel_name_the_run(tmp_path):
    notebook(tmp_path, OPEN, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", RESULT)
    env = {**os.environ, "PROJECT_RUNS": str(tmp_path / "runs")}
    command = [BIN / "project", "run", "in.ipynb", "out.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    (run,) = (p.name for p in (tmp_path / "runs").iterdir())
    assert done.returncode == 1 and f"run {run} kernel died: cell 2: the kernel was killed by SIGKILL" in done.stderr
    assert "the same command goes on with it" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [("papermill",), ("project", "run")])
def test_in_a_log_there_is_no_bar_and_the_result_is_the_end(tmp_path, command):
    notebook(tmp_path)
    env = {**os.environ, "PROJECT_RUNS": str(tmp_path / "runs")}
    call = [BIN / command[0], *command[1:], "in.ipynb", "out.ipynb"]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "\r" not in done.stderr and "of 4 cells" not in done.stderr
    assert done.stderr.rstrip().endswith("t: 50.00% on the test set\n\nnext:  project runs"), done.stderr
