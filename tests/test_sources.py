"""Where published files are found: real folders, a real web server, real apt; nothing stands in for them."""

import contextlib
import dataclasses
import functools
import gzip
import http.server
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from archives import tarred

from project.data.sources import (
    Published,
    PublishedFile,
    SourceError,
    _cache,
    _from_kaggle,
    _NotHere,
    _run,
    archive_kind,
    find,
    folder_files,
    hash_folder,
    published,
    read_content,
    read_idx,
)
from project.data.tasks import get_task
from project.locks import locked

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture
def sample(samples):
    """The folder with the four files of the sample."""
    return samples / "fashion_mnist"


@pytest.fixture
def small(sample):
    """The sample as if it were what is published: its hashes, no mirrors, no package."""
    contents = {name: read_content(sample / f"{name}.gz") for name in NAMES}
    files = tuple(PublishedFile(n, _sha(c), len(c)) for n, c in contents.items())
    return Published("fashion_mnist", files)


def _sha(content):
    import hashlib

    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def serving(folder, handler=http.server.SimpleHTTPRequestHandler):
    """A web server for a folder, on this machine only; gives its address and the paths it was asked for."""
    asked = []

    class Handler(handler):
        def log_message(self, *args):
            """Keep the error stream clean."""

        def log_request(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def idx(path, head, body, pack=False):
    """Write an IDX file with any head."""
    content = struct.pack(f">{len(head)}I", *head) + body
    path.write_bytes(gzip.compress(content) if pack else content)
    return path


# ---- IDX


@pytest.mark.parametrize("pack", [False, True])
def test_idx_reads_both_kinds(tmp_path, pack):
    images = read_idx(idx(tmp_path / "i", (0x803, 2, 2, 3), bytes(range(12)), pack), "images")
    assert images.tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    assert read_idx(idx(tmp_path / "l", (0x801, 3), b"\x00\x09\x05", pack), "labels", classes=10).tolist() == [0, 9, 5]


@pytest.mark.parametrize(
    ("head", "body", "kind", "expected", "found"),
    [
        ((0x803, 2, 28, 28), bytes(1567), "images", "2 x 28 x 28 values", "1,567"),  # cut
        ((0x803, 2, 28, 28), bytes(1569), "images", "2 x 28 x 28 values", "1,569"),  # more than it says
        ((0x803, 0, 28, 28), b"", "images", "0 x 28 x 28 values", "found 0"),  # empty
        ((0x801, 3), bytes(3), "images", "3 dimensions", "one with 1"),
        ((0x803, 1, 2, 2), bytes(4), "labels", "1 dimension,", "one with 3"),
        ((0x803, 1), b"", "images", "a head of 16 bytes", "a file of 8"),
        ((0xD03, 1, 2, 2), bytes(16), "images", "unsigned bytes", "bytes starting 00 00 0d 03"),  # floats
        ((0x801, 3), b"\x00\x0a\xff", "labels", "labels from 0 to 9", "10 in row 1 (and 1 more)"),
        ((), b"", "images", "an IDX file", "an empty file"),
        ((), b"\x89PNG\r\n\x1a\n", "images", "an IDX file", "a PNG image"),
        ((), b"\xff\xd8\xff\xe0", "images", "an IDX file", "a JPEG image"),
        ((), b"<!DOCTYPE html>", "labels", "an IDX file", "a web page"),
    ],
)
def test_idx_refuses(tmp_path, head, body, kind, expected, found):
    path = idx(tmp_path / "some-file", head, body)
    with pytest.raises(ValueError) as told:
        read_idx(path, kind, classes=10 if kind == "labels" else None)
    assert all(text in str(told.value) for text in (str(path), expected, found, "Fetch"))


def test_idx_refuses_a_cut_archive_and_an_unknown_kind(sample, tmp_path):
    whole = (sample / "t10k-images-idx3-ubyte.gz").read_bytes()
    for name, content in {
        "cut": whole[:-20_000],
        "crc": whole[:-8] + bytes(8),
        "bits": whole[:300] + bytes(99) + whole[399:],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: expected a whole gzip file, found a damaged one"):
            read_idx(tmp_path / name, "images")
    with pytest.raises(ValueError, match="expected 'images', 'labels' or None, got 'pictures'"):
        read_idx(sample / "t10k-images-idx3-ubyte.gz", "pictures")


# ---- what somebody names


def test_named_folder_in_each_layout(sample, tmp_path, monkeypatch):
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for name in NAMES:
        (unpacked / name).write_bytes(read_content(sample / f"{name}.gz"))
    hashes = find("fashion_mnist", source=sample).sha256
    for source in (sample.parent, unpacked, unpacked.as_uri(), str(sample)):
        found = find("fashion_mnist", source=source)
        assert (found.sha256, found.origin, found.published) == (hashes, "PROJECT_SOURCE", False)
    monkeypatch.setenv("PROJECT_SOURCE", str(unpacked))
    assert find("fashion_mnist").files[NAMES[0]] == unpacked / NAMES[0]


def test_named_folder_that_is_wrong_is_an_error_and_not_other_data(sample, tmp_path):
    with pytest.raises(SourceError, match="expected a folder with train-images-idx3-ubyte.gz"):
        find("fashion_mnist", source=tmp_path / "nowhere")
    shutil.copy(sample / f"{NAMES[0]}.gz", tmp_path)
    with pytest.raises(SourceError, match="found no train-labels-idx1-ubyte, t10k-images"):
        find("fashion_mnist", source=tmp_path)
    for name in NAMES[1:]:
        (tmp_path / f"{name}.gz").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(SourceError, match=r"train-labels-idx1-ubyte\.gz: expected a whole gzip file"):
        find("fashion_mnist", source=tmp_path)


def test_named_folder_without_this_task_sends_the_search_on(small, sample, tmp_path):
    small = dataclasses.replace(small, folder=str(sample))
    found = find(small, source=tmp_path, places=("package",))
    assert found.published and found.origin == "the installed Debian package"
    assert found.tried == (
        f"PROJECT_SOURCE: {tmp_path} has neither train-images-idx3-ubyte nor a folder fashion_mnist",
    )


def test_named_url(sample, tmp_path):
    hashes = find("fashion_mnist", source=sample).sha256
    with serving(sample.parent) as (address, _):
        for url in (address, f"{address}/", f"{address}/fashion_mnist"):
            assert find("fashion_mnist", source=url).sha256 == hashes
        with pytest.raises(SourceError, match=r"nowhere gave neither fer|nowhere gave neither train"):
            find("fashion_mnist", source=f"{address}/nowhere", places=())
    with pytest.raises(SourceError, match="PROJECT_SOURCE is 'http://127.0.0.1:.*unset it"):
        find("fashion_mnist", source=address)  # nobody answers any more
    with serving(tmp_path) as (address, _):
        shutil.copy(sample / f"{NAMES[1]}.gz", tmp_path)
        with pytest.raises(SourceError, match="found only train-labels-idx1-ubyte"):
            find("fashion_mnist", source=address)


def test_named_url_of_another_kind_of_store(sample):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for name in NAMES:
        store.pipe_file(f"/bucket/fashion_mnist/{name}.gz", (sample / f"{name}.gz").read_bytes())
    assert find("fashion_mnist", source="memory://bucket").sha256 == find("fashion_mnist", source=sample).sha256
    store.rm("/bucket", recursive=True)
    with pytest.raises(SourceError, match="bucket gave neither"):
        find("fashion_mnist", source="memory://bucket", places=())
    with pytest.raises(SourceError, match="PROJECT_SOURCE is 'nosuch://bucket'"):
        find("fashion_mnist", source="nosuch://bucket")


# ---- the publisher and its mirrors


def test_mirrors_are_tried_in_order_and_content_decides(small, sample, tmp_path):
    wrong, repacked = tmp_path / "wrong", tmp_path / "repacked"
    wrong.mkdir()
    repacked.mkdir()
    for name in NAMES:
        content = read_content(sample / f"{name}.gz")
        (repacked / f"{name}.gz").write_bytes(gzip.compress(content, 1))  # other bytes, same content
        (wrong / f"{name}.gz").write_bytes(gzip.compress(content[:-1] + b"\x07"))
    (wrong / f"{NAMES[1]}.gz").write_bytes(b"<html>Moved</html>")
    (wrong / f"{NAMES[2]}.gz").unlink()
    with socket.socket() as free:  # an address where nobody answers
        free.bind(("127.0.0.1", 0))
        silent = f"http://127.0.0.1:{free.getsockname()[1]}"
    with serving(wrong) as (bad, asked_bad), serving(repacked) as (good, asked_good):
        found = find(dataclasses.replace(small, mirrors=(silent, bad, good)), source="", places=("cache", "mirrors"))
        assert found.published and found.origin == "the publisher"
        assert "none of the files are there" in found.tried[1]
        assert len(asked_bad) == len(asked_good) == 4  # each file once
        again = find(dataclasses.replace(small, mirrors=(good,)), source="", places=("cache", "mirrors"))
        assert again.origin == "the cache of earlier downloads" and len(asked_good) == 4
    with serving(wrong) as (bad, _):
        shutil.rmtree(found.files[NAMES[0]].parent)
        with pytest.raises(SourceError) as told:
            find(dataclasses.replace(small, mirrors=(silent, bad)), source="", places=("cache", "mirrors"))
    assert "refused, expected 392,016 bytes with sha256" in str(told.value)
    assert silent in str(told.value) and "set PROJECT_SOURCE" in str(told.value)
    assert not list(found.files[NAMES[0]].parent.glob("*.gz")) and not list(found.files[NAMES[0]].parent.glob(".*.tmp"))


def test_mirror_that_cuts_or_floods_is_refused(small, sample):
    class Cutting(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            outputfile.write(source.read()[:-100])

    class Flooding(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 16))

    for handler, reason in (
        (Cutting, "the connection broke"),
        (Flooding, "expected at most 1,392,016 bytes, found more"),
    ):
        with serving(sample, handler) as (address, _), pytest.raises(SourceError, match=reason):
            find(dataclasses.replace(small, mirrors=(address,)), source="", places=("mirrors",))


def test_archive_that_unpacks_to_more_than_published_is_refused(tmp_path):
    (tmp_path / "bomb").write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(ValueError, match="expected 1,000 bytes, found more"):
        read_content(tmp_path / "bomb", limit=1000)


def test_a_damaged_cache_is_fetched_again(small, sample):
    with serving(sample) as (address, asked):
        known = dataclasses.replace(small, mirrors=(address,))
        first = find(known, source="", places=("cache", "mirrors"))
        first.files[NAMES[2]].write_bytes(b"damaged")
        second = find(known, source="", places=("cache", "mirrors"))
        assert second.origin == "the publisher" and len(asked) == 5  # only the damaged one
        assert read_idx(second.files[NAMES[2]], "images").shape == (100, 28, 28)


@pytest.mark.parametrize("locking", ["locks", "claims"])
def test_a_lock_lets_one_in_and_ends_with_its_process(tmp_path, request, monkeypatch, locking):
    if locking == "claims":
        request.getfixturevalue("without_locks")
        monkeypatch.setattr("project.locks._lock_file", lambda file: None)
    script = (
        "import sys; from project.locks import locked\nwith locked(sys.argv[1]): print('held', flush=True), input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / "lock"], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        entered = threading.Event()

        def enter():
            with locked(tmp_path / "lock"):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.3)
        process.kill()  # it can't unlock any more: the system must
        assert entered.wait(20)
        thread.join()


# ---- apt


@pytest.mark.skipif(not shutil.which("apt-get"), reason="there is no apt-get here")
def test_without_a_package_of_that_name_apt_says_so(small, tmp_path, monkeypatch):
    # an empty list of sources: nothing is asked of any network
    config = tmp_path / "apt.conf"
    config.write_text('Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "/dev/null";\n', encoding="utf-8")
    monkeypatch.setenv("APT_CONFIG", str(config))
    with pytest.raises(SourceError, match="by apt-get download: E: Unable to locate package no-such-package"):
        find(dataclasses.replace(small, package="no-such-package", folder="/x"), source="", places=("apt",))


@pytest.mark.skipif(not shutil.which("apt-get") or os.name != "posix", reason="there is no apt-get here")
def test_apt_as_an_ordinary_user_without_package_lists(tmp_path):
    """The real package, as a user who may write nothing of the system's, where `apt-get update` never ran."""
    home = tmp_path / "home"
    (home / "empty" / "partial").mkdir(parents=True)
    (home / "apt.conf").write_text(f'Dir::State::lists "{home}/empty";\n', encoding="utf-8")
    code = (
        "import os; from project.data.sources import find; places = ('cache', 'apt')\n"
        "a, b = (find('fashion_mnist', '', places) for _ in range(2))\n"
        "print(os.geteuid(), a.origin, b.origin, a.published, sep='|')"
    )
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PROJECT_CACHE": str(home / "cache"),
        "APT_CONFIG": str(home / "apt.conf"),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("running as root, and there is no setpriv to become an ordinary user with")
        for path in (home, *home.rglob("*")):
            os.chown(path, 65534, 65534)
        for parent in home.parents:  # pytest makes its folders for root alone
            if parent.owner() == "root" and "pytest" in str(parent):
                parent.chmod(0o755)
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, check=False, timeout=240)
    unreached = ("Temporary failure resolving", "Could not resolve", "Could not connect", "Unable to locate package")
    if done.returncode and any(text in done.stderr for text in unreached):
        pytest.skip(f"apt reaches no package of that name here: {done.stderr.strip().splitlines()[-2]}")
    assert done.returncode == 0, done.stderr
    uid, first, second, is_published = done.stdout.strip().split("|")
    assert int(uid) != 0
    assert (first, second) == ("the Debian package, by apt-get download", "the cache of earlier downloads")
    assert is_published == "True"
    assert not any((home / "empty").glob("*Packages*"))  # apt's own lists were left as they were


# ---- the sample


def test_the_sample_is_small_and_says_whose_it_is(sample):
    assert sum(f.stat().st_size for f in sample.iterdir()) <= 300_000
    assert "Zalando SE" in (sample / "LICENSE").read_text(encoding="utf-8")
    assert "20170828" in (sample / "README.md").read_text(encoding="utf-8")
    assert [f.name for f in published("fashion_mnist").files] == list(NAMES)


# ---- Kaggle

ARTICLES = {
    "News/Fake.csv": "title,text,subject,date\nA,a,b,c\nB,b,b,c\n",
    "News/True.csv": "title,text,subject,date\nC,c,b,c\nD,d,b,c\n",
}


@contextlib.contextmanager
def kaggle(monkeypatch, answer):
    """A stand-in for Kaggle, to which the real kagglehub talks; `answer(request, name)` gives status, type, content."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            """Keep the error stream clean."""

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(self.path.rpartition("/")[2])
            status, kind, content = answer(asked[-1], body.get("datasetSlug") or body.get("competitionName"))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")  # http://localhost, reached through this "proxy"
    monkeypatch.setenv("HOME", os.environ["PROJECT_CACHE"])  # nobody's credentials
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def zipped(files):
    """The bytes of an archive."""
    with zipfile.ZipFile(content := io.BytesIO(), "w") as z:
        for name, text in files.items():
            z.writestr(name, text)
    return content.getvalue()


def test_kaggle_gives_a_data_set_and_the_cache_keeps_it(monkeypatch):
    pytest.importorskip("kagglehub")

    def answer(request, name):
        if request == "GetDataset":
            return 200, "application/json", b'{"currentVersionNumber": 1}'
        return 200, "application/zip", zipped(ARTICLES)

    with kaggle(monkeypatch, answer) as asked:
        found = find("fake_news", source="", places=("cache", "kaggle"))
        assert found.origin == "Kaggle" and not found.published and asked == ["GetDataset", "DownloadDataset"]
        assert read_content(found.files["True.csv"]).decode() == ARTICLES["News/True.csv"]
    again = find("fake_news", source="", places=("cache", "kaggle"))  # nobody answers any more
    assert again.origin == "the cache of earlier downloads" and again.sha256 == found.sha256


def test_kaggle_says_why_not(monkeypatch):
    pytest.importorskip("kagglehub")

    def answer(request, name):
        if name == "fer2013":
            return 403, "application/json", b'{"code": 403, "message": "Permission denied"}'
        return 404, "application/json", b'{"code": 404, "message": "Not found"}'

    with kaggle(monkeypatch, answer), pytest.raises(SourceError) as told:
        find("face_emotion", source="", places=("kaggle",))
    assert "msambare/fer2013: Kaggle wants to know who asks: make a token" in str(told.value)
    assert "samithsachidanandan/human-face-emotions: there is nothing of that name" in str(told.value)
    assert "Put fer2013.zip or class folders of images into a folder and set PROJECT_SOURCE to it." in str(told.value)
    with kaggle(monkeypatch, answer), pytest.raises(SourceError) as told:
        find("dog_breeds", source="", places=("kaggle",))
    assert "accept the conditions at https://www.kaggle.com/competitions/dog-breed-identification" in str(told.value)

    def other(request, name):
        if request == "GetDataset":
            return 200, "application/json", b'{"currentVersionNumber": 1}'
        return 200, "application/zip", zipped({"readme.txt": "nothing here"})

    with kaggle(monkeypatch, other), pytest.raises(SourceError, match="expected Fake.csv, True.csv, found other files"):
        find("fake_news", source="", places=("kaggle",))


def test_kaggle_without_a_network_or_without_an_answer(monkeypatch):
    pytest.importorskip("kagglehub")
    with kaggle(monkeypatch, None), socket.socket() as taken, monkeypatch.context() as patch:
        taken.bind(("127.0.0.1", 0))  # taken, so that no other server gets it, and nobody listens there
        for name in ("http_proxy", "HTTP_PROXY"):
            patch.setenv(name, f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(SourceError, match=r"fer2013: Kaggle does not answer; is there a network") as told:
            find("face_emotion", source="", places=("kaggle",))
    assert "human-face-emotions" not in str(told.value)  # it would not answer either
    silent = threading.Event()
    with kaggle(monkeypatch, lambda *_: (200, "text/plain", b"" if silent.wait(30) else b"")):
        started = time.monotonic()
        with pytest.raises(_NotHere, match="took more than 2 s"):
            _from_kaggle(published("fake_news"), stall=2)
        silent.set()
        assert time.monotonic() - started < 20


def test_without_kagglehub_there_is_a_line_to_type(monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    monkeypatch.delitem(sys.modules, "kagglehub", raising=False)
    with pytest.raises(SourceError, match=r"msambare/fer2013, is not installed: pip install 'project\[kaggle\]'"):
        find("face_emotion", source="", places=("kaggle",))
    with pytest.raises(SourceError, match="Kaggle: it is not there"):
        find(dataclasses.replace(published("fashion_mnist"), package=""), source="", places=("kaggle",))


# ---- layouts at an address


def test_named_url_of_tables_and_of_an_archive(tmp_path):
    for name, text in ARTICLES.items():
        path = tmp_path / "fake_news" / f"{Path(name).name}.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))
    other = "dataset,title,text,label\nCelebrity,E,e,fake\n"
    (tmp_path / "fake_news" / "ood_articles.csv").write_text(other, encoding="utf-8")
    (tmp_path / "fake_titles").mkdir()
    (tmp_path / "fake_titles" / "WELFake_Dataset.csv").write_text("title,label\nA,1\n", encoding="utf-8")
    (tmp_path / "fer2013.zip").write_bytes(zipped({"train/a/1.jpg": "x"}))
    with serving(tmp_path) as (address, _):
        for task in ("fake_news", "fake_titles", "face_emotion"):
            assert find(task, source=address).sha256 == find(task, source=tmp_path).sha256
        assert set(find("fake_titles", source=address).files) == {"titles.csv", "ood_articles.csv"}
        (tmp_path / "fake_news" / "True.csv.gz").unlink()
        with pytest.raises(SourceError, match=r"expected Fake.csv, True.csv, found only Fake.csv. Add what is missing"):
            find("fake_news", source=address)


# ---- names in any case, in any folder


def put(folder, files):
    """Write name -> content below a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


FAKE, TRUE = ARTICLES.values()


@pytest.mark.parametrize(
    ("fake", "true"),
    [
        ("News _dataset/Fake.csv", "News _dataset/True.csv"),  # as Kaggle's zip unpacks
        ("fake.csv", "TRUE.CSV"),
        ("Fake_News/FAKE.csv.gz", "Fake_News/true.csv"),
        ("fake_news/News _dataset/fake.CSV", "fake_news/News _dataset/true.csv"),
    ],
)
def test_files_are_found_in_any_case_and_a_folder_deeper(tmp_path, fake, true):
    put(tmp_path, {fake: gzip.compress(FAKE.encode()) if fake.endswith("gz") else FAKE, true: TRUE})
    put(tmp_path, {"other/notes.txt": "x", ".hidden/Fake.csv": "x"})
    found = find("fake_news", source=tmp_path, places=())
    assert found.files == {"Fake.csv": tmp_path / fake, "True.csv": tmp_path / true}
    if fake.endswith("csv"):
        assert find("fake_news", source=tmp_path / fake).files == found.files  # one file named, the other beside it


def test_two_of_one_name_are_an_error_and_the_exact_name_wins(tmp_path):
    put(tmp_path, {"FAKE.csv": FAKE, "True.csv": TRUE, "fake.csv": FAKE})
    with pytest.raises(SourceError, match=r"expected one Fake.csv, found FAKE.csv and fake.csv. Remove one"):
        find("fake_news", source=tmp_path)
    put(tmp_path, {"Fake.csv": FAKE})
    assert find("fake_news", source=tmp_path).files["Fake.csv"].name == "Fake.csv"
    put(tmp_path / "two", {f"{d}/{n}": FAKE for d in ("a", "b") for n in ("Fake.csv", "True.csv")})
    with pytest.raises(
        SourceError, match=r"expected one folder with Fake.csv, True.csv, found a/ and b/. Name the one"
    ):
        find("fake_news", source=tmp_path / "two")
    (tmp_path / "two" / "b" / "True.csv").unlink()  # half a set beside a whole one is no reason to stop
    assert find("fake_news", source=tmp_path / "two").files["True.csv"].parent.name == "a"
    (tmp_path / "two" / "a" / "True.csv").unlink()
    with pytest.raises(SourceError, match="found no True.csv. Add what is missing"):
        find("fake_news", source=tmp_path / "two")


# ---- messages that say what is so


def test_a_folder_of_the_task_that_is_there_is_not_said_to_be_missing(tmp_path):
    put(tmp_path, {"face_emotion/.DS_Store": b""})
    with pytest.raises(SourceError, match="face_emotion is empty") as told:
        find("face_emotion", source=tmp_path, places=())
    assert "nor a folder" not in str(told.value)
    put(tmp_path, {"face_emotion/notes.txt": "x"})
    with pytest.raises(SourceError, match=r"face_emotion: expected fer2013.zip.*found only notes.txt. Add what is"):
        find("face_emotion", source=tmp_path, places=())
    with pytest.raises(SourceError, match="has neither dog-breeds-20.zip .* nor a folder dog_breeds"):
        find("dog_breeds", source=tmp_path, places=())
    put(tmp_path, {"face_emotion/faces.7z": b"7z\xbc\xaf\x27\x1c" + bytes(99)})
    with pytest.raises(SourceError, match=r"faces.7z: .* found a 7z archive. Unpack it, and name the folder"):
        find("face_emotion", source=tmp_path, places=())
    put(tmp_path / "news", {"archive.zip": b"PK\3\4 cut"})  # it may hold them: nobody can say
    with pytest.raises(
        SourceError, match=r"has neither Fake.csv.*archive.zip: expected a whole zip archive, found a dam"
    ):
        find("fake_news", source=tmp_path / "news", places=())


@pytest.mark.parametrize(
    ("content", "kind", "advice"),
    [
        (b"<!DOCTYPE html><title>Log in</title>", "a web page or other text", "Open it to see"),
        (b'{"code": 403, "message": "Permission denied"}', "a web page or other text", "Open it to see"),
        (b"Rar!\x1a\x07\x01\0" + bytes(99), "a RAR archive", "Unpack it"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7z archive", "Unpack it"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG image", "Name another file"),
        (b"version https://git-lfs.github.com/spec/v1\noid x", "a Git LFS pointer", "git lfs pull"),
        (b"", "an empty file", "fetch this one again"),
        (b"hello there", "bytes starting 68 65 6c 6c", "Name another file"),
        (b"PK\3\4 and no more", "a damaged one", "Fetch it again"),
    ],
)
def test_a_whole_file_of_another_kind_is_not_called_a_damaged_archive(tmp_path, content, kind, advice):
    put(tmp_path, {"fer2013.zip": content})
    with pytest.raises(SourceError) as told:
        get_task("face_emotion").read(find("face_emotion", source=tmp_path))
    assert f"found {kind}" in str(told.value) and advice in str(told.value)
    assert ("damaged" in str(told.value)) == (kind == "a damaged one")


def test_a_program_that_took_too_long_and_one_that_gave_nothing_are_told_apart(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(30)"]
    with pytest.raises(_NotHere, match=r"took more than 0.5 s$"):
        _run(sleep, tmp_path, "it", 0.5, stall=20)
    with pytest.raises(_NotHere, match=r"took more than 0.5 s in which nothing arrived"):
        _run(sleep, tmp_path, "it", 20, stall=0.5)


def test_a_cache_with_some_of_the_files_is_not_said_to_be_empty(small, sample):
    target = _cache(small) / f"{NAMES[0]}.gz"
    target.parent.mkdir(parents=True)
    shutil.copy(sample / target.name, target)
    with pytest.raises(SourceError, match=f"only {NAMES[0]} is there of 4 files"):
        find(small, source="", places=("cache",))


# ---- archives of other kinds, and names of other letters


@pytest.mark.parametrize("end", ["", ":gz", ":bz2", ":xz"])
def test_tables_in_a_tar(tmp_path, end):
    files = {"./News/Fake.csv": FAKE.encode(), "./News/True.csv": TRUE.encode(), "readme": b""}
    path = tarred(tmp_path / "archive.tar.gz", files, f"w{end}")  # its content says how it is packed
    assert archive_kind(path) == "tar"
    found = find("fake_news", source=tmp_path)
    assert found.sha256 == find("fake_news", source=put(tmp_path / "x", {"Fake.csv": FAKE, "True.csv": TRUE})).sha256
    assert read_content(found.files["True.csv"], None, "True.csv").decode() == TRUE


@pytest.mark.skipif(os.name != "posix", reason="a file's name is any bytes on POSIX alone")
def test_a_name_that_is_not_utf8_is_hashed_and_named(tmp_path):
    put(tmp_path, {"pug/1.jpg": b"x"})
    before = hash_folder(tmp_path)
    path = tmp_path / "pug" / os.fsdecode(b"caf\xe9.jpg")
    path.write_bytes(b"x")
    assert len(folder_files(tmp_path)) == 2 and hash_folder(tmp_path) != before
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(SourceError, match=r"caf\\xe9.jpg: expected a file, found a broken link"):
        folder_files(tmp_path)
