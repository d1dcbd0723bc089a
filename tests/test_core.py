"""Atomic writes where files are linked, mounted, or not files at all."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from project import core
from project.core import atomic_path, is_stream, read_json, write_json, write_text


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "one").symlink_to("a/two")
    (tmp_path / "a" / "two").symlink_to("three")
    write_text(tmp_path / "one", "first")  # the target is not there yet
    write_text(tmp_path / "one", "second")
    assert (tmp_path / "one").is_symlink() and (tmp_path / "a" / "two").is_symlink()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["three", "two"]
    assert (tmp_path / "a" / "three").read_text() == "second"
    (tmp_path / "lost").symlink_to("nowhere/at/all")
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "lost", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "lost", "one"]


@pytest.mark.skipif(os.name != "posix", reason="modes and owners")
def test_mode_and_owner_stay(tmp_path):
    file = write_text(tmp_path / "file", "old")
    file.chmod(0o2640)
    owner = (1234, 1234) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(file, *owner)
    file.chmod(0o640)
    write_json(file, {})
    found = file.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, *owner)
    (tmp_path / "new").touch()
    assert stat.S_IMODE(write_text(tmp_path / "mine", "").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "new").stat().st_mode
    )


def test_who_may_not_keep_the_owner_writes_into_the_file(tmp_path, monkeypatch):
    file = write_text(tmp_path / "file", "old and longer")
    inode = file.stat().st_ino

    def refuse(*args):
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(core, "_make_twin", refuse)
    write_text(file, "new")
    assert file.read_text() == "new" and file.stat().st_ino == inode


@pytest.fixture
def mounted(tmp_path):
    """A file that is mounted by itself, as a container's volume may be; what it is mounted from."""
    (source := tmp_path / "source").write_text("a long content of before")
    (target := tmp_path / "target").touch()
    try:
        made = subprocess.run(["mount", "--bind", source, target], capture_output=True, check=False).returncode == 0
    except OSError:
        made = False
    if not made:
        pytest.skip("nothing can be mounted here (it needs root)")
    yield target, source
    subprocess.run(["umount", "-l", target], check=True)


def test_a_mounted_file(mounted):
    target, source = mounted
    write_text(target, "new")
    assert source.read_text() == target.read_text() == "new"
    with pytest.raises(RuntimeError), atomic_path(target) as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert target.read_text() == "new" and sorted(p.name for p in target.parent.iterdir()) == ["source", "target"]


def test_a_full_disk_is_told_of_before_a_file_is_written_over(tmp_path, small_disk, monkeypatch):
    file = write_text(small_disk / "file", "whole")
    monkeypatch.setattr(core, "_make_twin", lambda *a: (_ for _ in ()).throw(PermissionError(errno.EPERM, "")))
    monkeypatch.setattr(core.os, "access", lambda path, how: Path(path) != small_disk)  # the new one is made elsewhere
    with pytest.raises(OSError, match="are needed"):
        write_text(file, "x" * 3_000_000)
    assert file.read_text() == "whole"


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    read: list[str] = []
    thread = threading.Thread(target=lambda: read.append(pipe.read_text()))
    thread.start()
    write_text(pipe, "content")
    thread.join(20)
    assert read == ["content"] and is_stream(pipe) and [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_what_a_process_has_open_is_written_to(tmp_path):
    with (tmp_path / "file").open("w+") as file:
        write_text(f"/proc/self/fd/{file.fileno()}", "content")
        assert file.read() == "content"
    assert is_stream("/dev/stdout") and is_stream("/dev/null") and not is_stream("/dev/shm/new")
    write_text(os.devnull, "content")
    assert Path(os.devnull).is_char_device()


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_rights_that_a_user_has_not(tmp_path):
    """As a user without root's rights: a file in a folder that is read-only, and a link to a file that is."""
    script = f"""
import os, sys
from pathlib import Path
from project.core import write_text
os.geteuid() or os.setuid(12345)
write_text({str(tmp_path / "folder" / "file")!r}, "new")
try:
    write_text({str(tmp_path / "link")!r}, "new")
except PermissionError as e:
    print(e)
"""
    (folder := tmp_path / "folder").mkdir()
    (folder / "file").write_text("the old content")
    (folder / "file").chmod(0o666)
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "kept").chmod(0o444)
    (tmp_path / "link").symlink_to("kept")
    folder.chmod(0o555)
    top = Path(tempfile.gettempdir())
    for parent in (p for p in (tmp_path, *tmp_path.parents) if p.is_relative_to(top) and p != top):
        parent.chmod(parent.stat().st_mode | 0o055)  # pytest's own folders are closed to others
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd="/")
    folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert (folder / "file").read_text() == "new" and [p.name for p in folder.iterdir()] == ["file"]
    assert "link to a read-only file" in done.stdout and (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize("content", [b"\xff{}", b"{", b""])
def test_what_is_no_json_is_said_with_its_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
