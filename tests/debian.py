"""Programs of Debian's packages: those on the PATH, else fetched without root and unpacked, once for all sessions."""

import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from project.locks import locked

SBIN = os.pathsep.join(["/usr/sbin", "/usr/local/sbin"])


def unpack(package, folder):
    """Download a package and unpack it; nothing is installed and no service is started."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for command in (["apt-get", "-q", "download", package], ["sh", "-c", "dpkg-deb -x ./*.deb unpacked"]):
            subprocess.run(command, cwd=scratch, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True)
        shutil.move(Path(scratch, "unpacked"), folder)


@cache
def find_program(name, package):
    """The path of a program, or why there is none."""
    if there := shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), SBIN])):
        return there, ""
    place = Path(tempfile.gettempdir(), f"project-tests-{os.getuid()}")
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        return "", f"{place} is somebody else's"
    folder = place / package
    try:
        with locked(place / f"{package}.lock", wait=300):
            if not folder.is_dir():
                unpack(package, folder)
    except (OSError, subprocess.SubprocessError) as e:
        return "", f"{name} is not installed, and Debian's package {package} cannot be fetched: {e}"
    paths = os.pathsep.join(str(folder / part) for part in ("usr/bin", "usr/sbin"))
    return shutil.which(name, path=paths) or "", f"{package} has no program {name}"


def program(name, package):
    """The path of a program; a test that needs it is skipped where it cannot be had, and says why."""
    found, why = find_program(name, package)
    return found or pytest.skip(why)
