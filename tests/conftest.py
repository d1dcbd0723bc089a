"""Fixtures for every test: folders of its own, and the process's global state as it was before."""

import os
import random
import signal
import subprocess
import sys

import pytest
from pytest_notebooks import ROOT, isolated_environment


def pytest_configure():
    """A job that a script puts in the background ignores Ctrl-C, and so would every process that a test starts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    """Data, runs, cache and W&B in a folder of this test's own; the committed sample as the source."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name, value in isolated_environment(tmp_path_factory.mktemp("home")).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def restored():
    """Give back what a test may have changed for all: random state, torch's defaults, matplotlib's figures."""
    state = random.getstate()
    torch = sys.modules.get("torch")
    if torch:
        dtype, threads, strict = (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        )
    yield
    random.setstate(state)
    if torch:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture(scope="session")
def seed():
    """Of networks that tests train: their verdicts must not hang on it, so `PROJECT_TEST_SEED` may be any."""
    return int(os.environ.get("PROJECT_TEST_SEED", "0"))


@pytest.fixture(scope="session")
def root():
    """Top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def samples():
    """The folder of committed samples: `<task>/<published file>`."""
    return ROOT / "tests" / "samples"


@pytest.fixture
def small_disk(request, tmp_path):
    """A file system of a megabyte, or of the size that a test names by `parametrize(..., indirect=True)`."""
    folder, size = tmp_path / "small", getattr(request, "param", "1m")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    try:
        made = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        made = False
    if not made:
        pytest.skip("no small file system can be mounted here (it needs root)")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def without_locks(tmp_path, monkeypatch):
    """Processes that a test starts find that no folder has file locks, as on a bucket that is mounted as one."""
    (tmp_path / "site").mkdir()
    script = (
        "import errno, fcntl\ndef flock(file, how):\n    raise OSError(errno.EOPNOTSUPP, 'Operation not supported')\n"
    )
    (tmp_path / "site" / "sitecustomize.py").write_text(f"{script}fcntl.flock = flock\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


@pytest.fixture
def no_buckets(monkeypatch):
    """Papermill that a test starts has no libraries for buckets: a third of what it takes to start."""
    monkeypatch.setenv("PROJECT_TEST_WITHOUT", "gcsfs pyarrow")
