"""Make the environment and install the project into it: `install.py VENV base|serve|dev`. Standard library only.

pip alone is enough. uv is faster, and is used when it is there, finds the pinned torch, and pip has no index settings
of its own (uv does not read them). Nothing is installed again while settings.ini and setup.py say the same.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

INPUTS = ("settings.ini", "setup.py")
NEWEST_TOO_OLD = (3, 10)
TARGETS = {"base": ".", "serve": ".[serve]", "dev": ".[dev]"}


def run(*command, quiet=False):
    """The exit status of a command; its output is shown unless `quiet`."""
    sink = subprocess.DEVNULL if quiet else None
    try:
        return subprocess.run([str(c) for c in command], stdout=sink, stderr=sink).returncode
    except OSError:
        return 127


def make_venv(venv, python):
    """An environment with a working pip: by ensurepip (which Debian leaves out), uv, virtualenv or the pip there is."""
    if run(python, "-m", "pip", "--version", quiet=True) == 0:
        return
    me = sys.executable
    ways = (
        [[me, "-m", "venv", "--clear", venv]],
        [["uv", "venv", "--quiet", "--clear", "--seed", "--python", me, venv]],
        [[me, "-m", "virtualenv", "--quiet", "--clear", venv]],
        [
            [me, "-m", "venv", "--clear", "--without-pip", venv],
            [me, "-m", "pip", "--python", python, "install", "--quiet", "pip"],
        ],
    )
    print(f"making {venv} with Python {sys.version.split()[0]}", flush=True)
    for way in ways:
        if all(run(*command, quiet=True) == 0 for command in [*way, [python, "-m", "pip", "--version"]]):
            return
    raise SystemExit(
        f"{me} cannot make an environment: it lacks ensurepip, and neither uv nor virtualenv nor pip is there.\n"
        "Install one of them (on Debian and Ubuntu: apt install python3-venv) and try again."
    )


def pip_has_an_index(python):
    """Whether pip was told where to look for packages: a mirror, an extra index, a folder of wheels."""
    command = [str(python), "-m", "pip", "config", "list"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return re.search(r"index-url|find-links|no-index", listed) is not None


def installer(python):
    """The command that installs packages: uv's where it can, else pip's."""
    torch = re.search(r"^\s*(torch==\S+)", Path("settings.ini").read_text(encoding="utf-8"), re.M).group(1)
    dry_run = ("uv", "pip", "install", "--dry-run", "--quiet", "--python", python, torch)
    if shutil.which("uv") and not pip_has_an_index(python) and run(*dry_run, quiet=True) == 0:
        return ["uv", "pip", "install", "--python", python, "--compile-bytecode"]
    return [
        python,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        *([] if sys.stdout.isatty() else ["--quiet"]),
    ]


def main(venv, target):
    """Install `target` unless its stamp says that these very inputs are installed already."""
    if sys.version_info[:2] <= NEWEST_TOO_OLD:
        found = f"{sys.executable} is {sys.version.split()[0]}"
        raise SystemExit(f"Python 3.11 or later is needed; {found}. Name another: make PYTHON=python3.12")
    python = Path(venv, "Scripts" if os.name == "nt" else "bin", "python")
    stamp = Path(venv, f"{target}.stamp")
    digest = hashlib.sha256(b"".join(Path(name).read_bytes() for name in INPUTS)).hexdigest()
    if not (stamp.exists() and stamp.read_text() == digest and run(python, "-c", "import papermill", quiet=True) == 0):
        make_venv(venv, python)
        command = installer(python)
        tool = "uv" if command[0] == "uv" else "pip"
        print(f"installing {TARGETS[target]} into {venv} with {tool} (the first time takes minutes)", flush=True)
        status = run(*command, "-e", TARGETS[target])
        if status:
            raise SystemExit(status)
    for name in ("base", target):  # dev holds base
        Path(venv, f"{name}.stamp").write_text(digest)


if __name__ == "__main__":
    main(*sys.argv[1:])
