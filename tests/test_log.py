"""The prediction log: real databases, real processes that are killed, a disk that is really full."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from project.serve.log import LogUnavailable, PredictionLog, PredictionTable, fit_row, log_url, new_id, stamp


def row(**fields):
    """A prediction as the service puts it."""
    answer = {"id": new_id(), "task": "fashion_mnist", "version": "v1-1a2b3c4d", "predicted": "Coat"}
    return answer | {"confidence": 0.75, "probabilities": {"Coat": 0.75, "Bag": 0.25}, "embedding": b"\0\1"} | fields


def wait(condition, seconds=20.0):
    """Until a condition holds; it has to in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(0.02)


# A real PostgreSQL: the one that is installed, or Debian's package, unpacked without root


def _apt(*words, folder):
    """What an apt command prints; None where it fails."""
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _unpacked(folder):
    """Debian's postgresql and what it needs here, in a folder; None where it cannot be had."""
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    config, state = folder / "apt.conf", folder / "state"
    (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    own = f'Dir::Cache "{folder}/cache";\nAPT::Sandbox::User "root";\nAcquire::Retries "1";\n'
    config.write_text(own)
    ask = ("apt-get", "-c", str(config), "-qq")
    plan = _apt(*ask, "--no-install-recommends", "-s", "install", "postgresql", folder=folder)
    if plan is None:  # no package lists: lists of our own
        config.write_text(f'{own}Dir::State "{state}";\nDir::State::status "/var/lib/dpkg/status";\n')
        _apt(*ask, "update", folder=folder)
        plan = _apt(*ask, "--no-install-recommends", "-s", "install", "postgresql", folder=folder)
    names = [line.split()[1] for line in (plan or "").splitlines() if line.startswith("Inst ")]
    if not names or _apt(*ask, "download", *names, folder=folder) is None:
        return None
    for deb in folder.glob("*.deb"):
        if _apt("dpkg-deb", "-x", str(deb), str(folder), folder=folder) is None:
            return None
    (folder / "done").touch()
    return folder


def _programs():
    """The folder of initdb and postgres, and the environment they need; None where there is none."""
    places = [Path(p).resolve().parent for p in [shutil.which("postgres")] if p]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "initdb").exists():
            return place, {}
    user = getattr(os, "getuid", int)()
    top = _unpacked(Path(tempfile.gettempdir()) / f"project-tests-postgresql-{user}")
    for place in sorted(top.glob("usr/lib/postgresql/*/bin")) if top else []:
        libraries = ":".join(str(p) for p in top.glob("usr/lib/*-linux-gnu"))
        return place, {"LD_LIBRARY_PATH": libraries}
    return None


class Postgres:
    """A server on a free port of the loopback, with its data in a folder that is deleted."""

    def __init__(self, programs, libraries):
        self.bin, self.folder = programs, Path(tempfile.mkdtemp(prefix="project-postgres-"))
        self.env = os.environ | {"LC_ALL": "C", "TZ": "UTC"} | libraries
        self.who = {}
        if os.getuid() == 0:  # PostgreSQL does not run as root
            self.who = {"user": 65534, "group": 65534, "extra_groups": []}
            os.chown(self.folder, 65534, 65534)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.data = self.folder / "data"
        words = ("-D", str(self.data), "-U", "team", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        made = subprocess.run(
            [self.bin / "initdb", *words], env=self.env, cwd=self.folder, capture_output=True, text=True, **self.who
        )
        assert made.returncode == 0, made.stdout + made.stderr
        self.start()

    def start(self):
        """Run it until it answers."""
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "fsync": "off", "max_connections": "20"}
        settings |= {"unix_socket_directories": "", "shared_buffers": "16MB", "dynamic_shared_memory_type": "mmap"}
        words = [w for name, value in settings.items() for w in ("-c", f"{name}={value}")]
        with (self.folder / "log.txt").open("ab") as out:
            self.process = subprocess.Popen(
                [self.bin / "postgres", "-D", str(self.data), *words],
                env=self.env, cwd=self.folder, stdout=out, stderr=out, **self.who,
            )  # fmt: skip
        wait(self.answers, 60)

    def answers(self):
        """Whether it takes connections."""
        assert self.process.poll() is None, (self.folder / "log.txt").read_text()
        import psycopg

        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(self.url.replace("+psycopg", "")).close()
            return True
        return False

    @property
    def url(self):
        """Where it is."""
        return f"postgresql+psycopg://team@127.0.0.1:{self.port}/postgres"

    def stop(self, how=signal.SIGQUIT):
        """End it: at once, as a crash would."""
        self.process.send_signal(how)
        self.process.wait(30)

    def clear(self):
        """As new."""
        import psycopg

        with psycopg.connect(self.url.replace("+psycopg", "")) as c:
            c.execute("drop table if exists predictions, feedback")


@pytest.fixture(scope="session")
def server():
    """PostgreSQL, once for all tests of this file."""
    found = _programs() if os.name == "posix" else None
    if not found:
        pytest.skip("no PostgreSQL is installed, and Debian's package cannot be had here")
    postgres = Postgres(*found)
    yield postgres
    postgres.stop()
    shutil.rmtree(postgres.folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """Where to log: a file, and a server."""
    if request.param == "sqlite":
        return log_url(tmp_path / "deep" / "log.db")
    postgres = request.getfixturevalue("server")
    postgres.clear()
    return postgres.url


@pytest.fixture
def opened():
    """Make logs that are closed at the end."""
    logs = []

    def make(url, **options):
        logs.append(PredictionLog(url, **{"every": 0.05} | options))
        return logs[-1].start()

    yield make
    for log in logs:
        log.close(1)
        log._database.let_go()


# Every database


def test_a_row_comes_back_as_it_went(url, opened):
    log = opened(url)
    full = row(
        time=datetime(2026, 11, 21, 15, 48, 3, 123456, UTC),
        latency_ms=1.25,
        batch=3,
        input_sha256="ab" * 32,
        input_bytes=784,
        features={"brightness": 0.5},
        embedding=bytes(range(256)),
        request_id="r-1",
        client="c-1",
        input=b"\x89PNG\0\xff",
    )
    assert log.put(full)
    wait(lambda: log.written == 1)
    found = PredictionTable(url).get(full["id"])
    assert found == full | {
        "time": "2026-11-21T15:48:03.123456Z",
        "label": None,
        "label_source": None,
        "label_time": None,
        "feedback": [],
    }
    assert log.state() == {"ok": True, "waiting": 0, "written": 1, "dropped": 0, "reason": ""}


def test_what_an_attacker_may_send(url, opened):
    log = opened(url)
    odd = ["\0", "\ud800", "'; drop table predictions; --", "‮right to left", "%(id)s :id ?", "x" * 100_000, "\x1b[31m"]
    rows = [row(predicted="Coat", request_id=text, client=text, features={text[:50]: 1.0}) for text in odd]
    rows += [row(input_bytes=10**30, batch=-(10**30), confidence=float("inf"), latency_ms=float("nan"))]
    assert all(log.put(r) for r in rows)
    wait(lambda: log.written == len(rows))
    found = {r["id"]: r for r in log.rows()}
    assert found.keys() == {r["id"] for r in rows} and log.dropped == 0
    assert [found[r["id"]]["request_id"] for r in rows[:3]] == ["\ufffd", "?", odd[2]]
    assert len(found[rows[5]["id"]]["client"]) == 1000
    last = found[rows[-1]["id"]]
    assert (last["input_bytes"], last["confidence"], last["latency_ms"]) == (2**63 - 1, None, None)
    for text in odd:
        assert log.get(text) is None
        with pytest.raises(LookupError, match="no prediction"):
            log.feedback(text, "Coat")


def test_feedback_keeps_its_history(url, opened):
    log = opened(url, every=30)
    log.flush()
    put = row()
    log.put(put)
    assert log.get(put["id"])["predicted"] == "Coat" and log.count() == 0  # not written yet, and found
    first = log.feedback(put["id"], "Dress", "page")
    assert first == {"id": put["id"], "label": "Dress", "previous": None, "class": "Coat"}
    assert log.feedback(put["id"], "Bag")["previous"] == "Dress"
    assert log.flush()
    for found in (log.get(put["id"]), *log.rows()):
        assert (found["label"], found["label_source"]) == ("Bag", "")
    assert [(f["label"], f["source"]) for f in log.get(put["id"])["feedback"]] == [("Dress", "page"), ("Bag", "")]
    with pytest.raises(LookupError, match="may have expired"):
        log.feedback(new_id(), "Coat")


def test_rows_in_pages(url, opened):
    log = opened(url)
    moments = [1_700_000_000 + i // 3 for i in range(2500)]  # three share a time: the id decides
    rows = [row(time=t, task=("a", "b")[i % 2]) for i, t in enumerate(moments)]
    assert all(map(log.put, rows))
    wait(lambda: log.written == 2500)
    in_order = [r["id"] for r in sorted(rows, key=lambda r: (r["time"], r["id"]))]
    assert [r["id"] for r in log.rows()] == in_order
    assert [r["id"] for r in log.rows(newest=True)] == in_order[::-1]
    assert [r["id"] for r in log.rows(limit=1001)] == in_order[:1001]
    assert list(log.rows(limit=0)) == []
    assert {r["task"] for r in log.rows("a")} == {"a"} and log.count("a") == 1250
    since, until = moments[300], moments[600]
    chosen = {r["id"] for r in rows if since <= r["time"] < until and r["task"] == "b"}
    assert [r["id"] for r in log.rows("b", since, stamp(until))] == [i for i in in_order if i in chosen]
    with pytest.raises(ValueError, match="is no moment"):
        list(log.rows(since="last week"))


def test_a_batch_that_is_tried_again_is_there_once(url, opened):
    log = opened(url)
    same = row()
    log.put(same)
    wait(lambda: log.written == 1)
    other = opened(url)  # the commit came through, and the answer to it did not
    other.put(same | {"predicted": "Dress"})
    other.put(row())
    wait(lambda: other.written == 2)
    assert log.count() == 2 and log.get(same["id"])["predicted"] == "Coat"


def test_retention(url, opened):
    log, now = opened(url), time.time()
    old = [row(time=now - 40 * 86400) for _ in range(1100)]
    young = [row(time=now - 20 * 86400) for _ in range(10)]
    assert all(map(log.put, old + young))
    wait(lambda: log.written == 1110)
    log.feedback(old[0]["id"], "Dress")
    log.feedback(young[0]["id"], "Dress")
    assert log.purge(30) == 1100
    assert {r["id"] for r in log.rows()} == {r["id"] for r in young}
    assert log.get(old[0]["id"]) is None and log.get(young[0]["id"])["label"] == "Dress"
    assert log.purge(30) == 0
    for wrong in (-1, float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="days must be"):
            log.purge(wrong)


def test_export_to_parquet(url, opened, tmp_path):
    from pyarrow import parquet

    log = opened(url)
    rows = [row(time=1_700_000_000 + i, predicted=("Coat", "Kjole ✓")[i % 2], confidence=i / 1500) for i in range(1500)]
    assert all(map(log.put, [*rows, row(task="other")]))
    wait(lambda: log.written == 1501)
    log.feedback(rows[3]["id"], "Bag", "page")
    assert log.export(tmp_path / "out" / "log.parquet", task="fashion_mnist") == 1500
    table = parquet.read_table(tmp_path / "out" / "log.parquet")
    assert table.column("id").to_pylist() == [r["id"] for r in rows]
    third = table.slice(3, 1).to_pylist()[0]
    assert third["time"] == datetime.fromtimestamp(1_700_000_003, UTC) and third["confidence"] == 3 / 1500
    assert (third["predicted"], third["label"], third["label_source"]) == ("Kjole ✓", "Bag", "page")
    assert json.loads(third["probabilities"]) == {"Coat": 0.75, "Bag": 0.25} and third["embedding"] == b"\0\1"
    assert log.export(tmp_path / "none.parquet", task="nothing") == 0
    assert parquet.read_table(tmp_path / "none.parquet").column_names == table.column_names
    assert sorted(p.name for p in tmp_path.rglob("*.parquet*")) == ["log.parquet", "none.parquet"]


def test_several_workers_write_one_log(url):
    code = """
import sys
from project.serve.log import PredictionLog, new_id
log = PredictionLog(sys.argv[1], every=0.01).start()
for i in range(400):
    assert log.put({"id": new_id(), "task": sys.argv[2], "version": "v", "predicted": str(i)})
log.close(30)
assert log.state() == {"ok": True, "waiting": 0, "written": 400, "dropped": 0, "reason": ""}, log.state()
"""
    workers = [subprocess.Popen([sys.executable, "-c", code, url, f"worker{i}"]) for i in range(3)]
    assert [w.wait(60) for w in workers] == [0, 0, 0]
    assert [PredictionTable(url).count(f"worker{i}") for i in range(3)] == [400, 400, 400]


def test_another_workers_row_is_waited_for(url, opened):
    one, two = opened(url, every=0.5), opened(url)
    wait(lambda: one._database._opened and one._database._opened[2])
    put = row()
    one.put(put)
    assert two.feedback(put["id"], "Bag", wait=20)["class"] == "Coat"


# Trouble


def test_killed_while_it_writes(url, tmp_path):
    """SIGKILL under load: no committed row is lost, and of the others at most the last second."""
    code = """
import sys, time
from project.serve.log import PredictionLog, new_id
log = PredictionLog(sys.argv[1]).start()
for i in range(10**9):
    assert log.put({"id": new_id(), "task": "t", "version": "v", "predicted": str(i), "embedding": bytes(500)})
    print(i, time.monotonic(), flush=True)
    time.sleep(0.002)
"""
    out = tmp_path / "put.txt"
    with out.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", code, url], stdout=file)
    table = PredictionTable(url)

    def committed():
        with contextlib.suppress(LogUnavailable):
            return {int(r["predicted"]) for r in table.rows()}
        return set()

    try:
        wait(lambda: len(committed()) > 1000, 60)
        before = committed()
    finally:
        killed = time.monotonic()
        process.kill()
        process.wait(30)
    after = committed()
    assert before <= after
    put = [line.split() for line in out.read_text().splitlines()[:-1]]
    due = {int(i) for i, at in put if float(at) < killed - 1.5}  # half a second, and room for a busy machine
    assert len(due) > 0 and due <= after
    assert after == set(range(max(after) + 1))
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(table._database.file)) as db:
            assert db.execute("pragma integrity_check").fetchone() == ("ok",)


def test_a_server_that_crashes_and_comes_back(server, opened):
    server.clear()
    log = opened(server.url)
    first, later = row(), row()
    log.put(first)
    wait(lambda: log.written == 1)
    server.stop()
    try:
        began = time.monotonic()
        assert log.put(later)
        assert time.monotonic() - began < 5
        wait(lambda: log.reason)
        assert "does not answer" in log.state()["reason"] and log.state()["waiting"] == 1
        assert log.get(later["id"])["feedback"] == []  # it waits in memory
        with pytest.raises(LogUnavailable):
            log.get(first["id"])
        with pytest.raises(LogUnavailable):
            log.feedback(later["id"], "Coat")
    finally:
        server.start()
    wait(lambda: log.written == 2)
    assert [r["id"] for r in log.rows()] == [first["id"], later["id"]] and log.dropped == 0


def test_the_disk_is_full(small_disk, opened):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(500_000))
    log = opened(small_disk / "log.db", capacity=50)
    n = 0
    while not log.reason:  # rows may be dropped before, where they come faster than they are written
        log.put(row(embedding=os.urandom(5000)))
        n += 1
        assert n < 2000
        time.sleep(0.002)
    while log.put(row(embedding=os.urandom(5000))):
        n += 1
    n += 1
    assert "full" in log.reason or "I/O error" in log.reason
    assert log.state()["waiting"] == 50 and not log.state()["ok"]
    assert log.written + 50 + log.dropped == n
    found = log.get(next(log.rows())["id"])  # what is written can be read
    assert found["predicted"] == "Coat"
    ballast.unlink()
    wait(lambda: log.state()["waiting"] == 0)
    assert log.state()["ok"] and log.count() == log.written == n - log.dropped


def test_an_export_to_a_full_disk(small_disk, tmp_path, opened):
    log = opened(tmp_path / "log.db")
    assert all(log.put(row(embedding=os.urandom(2000))) for _ in range(1500))
    wait(lambda: log.written == 1500)
    (small_disk / "log.parquet").write_text("the one before")
    with pytest.raises(OSError, match="No space left"):
        log.export(small_disk / "log.parquet")
    assert [p.name for p in small_disk.iterdir()] == ["log.parquet"]
    assert (small_disk / "log.parquet").read_text() == "the one before"


def test_reading_makes_nothing(server, tmp_path):
    """A role that may only read can read; a file that is no log is left as it is."""
    server.clear()
    with pytest.raises(LogUnavailable, match="does not exist"):
        PredictionTable(server.url).count()
    (tmp_path / "other.db").touch()
    with pytest.raises(LogUnavailable, match="no such table"):
        PredictionTable(tmp_path / "other.db").count()


def test_no_room_for_the_log_at_all(small_disk, opened):
    (small_disk / "ballast").write_bytes(bytes(1 << 20))
    log = opened(small_disk / "sub" / "log.db", capacity=5)
    assert [log.put(row()) for _ in range(6)] == [True] * 5 + [False]
    wait(lambda: log.reason)
    (small_disk / "ballast").unlink()
    wait(lambda: log.written == 5)
    assert log.dropped == 1 and log.count() == 5


def test_a_locked_database(tmp_path, opened):
    log = opened(tmp_path / "log.db")
    wait((tmp_path / "log.db").exists)
    wait(lambda: log._database._opened and log._database._opened[2])
    log._database.wait = 0.1
    log._database.let_go()
    with contextlib.closing(sqlite3.connect(tmp_path / "log.db", isolation_level=None)) as other:
        other.execute("begin exclusive")
        put = row()
        assert log.put(put) and log.get(put["id"])["id"] == put["id"]
        wait(lambda: "locked" in log.reason)
        other.execute("rollback")
    wait(lambda: log.written == 1)
    assert log.state()["ok"] and log.dropped == 0


def test_a_database_that_vanishes(tmp_path, opened):
    log = opened(tmp_path / "a" / "log.db")
    log.put(row())
    wait(lambda: log.written == 1)
    shutil.rmtree(tmp_path / "a")
    put = row()
    log.put(put)
    wait(lambda: log.written == 2)
    assert [r["id"] for r in PredictionTable(tmp_path / "a" / "log.db").rows()] == [put["id"]]
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    (tmp_path / "a" / "log.db").write_bytes(b"no database at all" * 100)
    log.put(row())
    wait(lambda: "not a database" in log.reason)
    assert (tmp_path / "a" / "log.db").read_bytes().startswith(b"no database")  # somebody's file is left as it is
    (tmp_path / "a" / "log.db").unlink()
    wait(lambda: log.written == 3)


def test_no_log_yet(tmp_path):
    table = PredictionTable(tmp_path / "none" / "log.db")
    for call in (
        table.get,
        table.purge,
        table.export,
        lambda _: list(table.rows()),
        lambda x: table.feedback(x, "Bag"),
    ):
        with pytest.raises(LogUnavailable, match="there is no prediction log at"):
            call(3 if call == table.purge else str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []  # asking makes nothing


def test_the_queue_is_bounded(tmp_path, caplog):
    log = PredictionLog(tmp_path / "log.db", capacity=100)  # nobody writes
    assert [log.put(row()) for _ in range(250)] == [True] * 100 + [False] * 150
    assert (log.dropped, log.state()["waiting"]) == (150, 100)
    said = [r.getMessage() for r in caplog.records]
    assert [s.split()[2] for s in said] == ["1", "10", "100"] and all("the queue is full" in s for s in said)
    big = PredictionLog(tmp_path / "log.db")
    kept = [big.put(row(input=bytes(10_000_000))) for _ in range(10)]
    assert kept == [True] * 6 + [False] * 4
    assert big.flush() and big._inputs == 0 and big.put(row(input=bytes(10_000_000)))
    log._database.let_go()
    big._database.let_go()


def test_what_is_left_for_later(tmp_path, caplog):
    told = []

    def complete(rows):
        told.append(len(rows))
        for r in rows:
            r["features"] = {"bytes": r.pop("raw").nbytes}

    log = PredictionLog(tmp_path / "log.db", complete=complete)
    rows = [row(raw=np.zeros(i, np.uint8)) for i in range(40)]
    assert all(map(log.put, rows)) and log._inputs == sum(range(32, 40))
    assert log.get(rows[7]["id"])["features"] == {"bytes": 7}  # asked for before it is written
    assert log.flush() and told == [16, 16, 8] and (log.written, log._inputs) == (40, 0)
    found = {r["id"]: r["features"]["bytes"] for r in log.rows()}
    assert found == {r["id"]: i for i, r in enumerate(rows)}
    kept = [log.put(row(raw=np.zeros(10_000_000, np.uint8))) for _ in range(10)]
    assert kept == [True] * 6 + [False] * 4 and not caplog.text.count("lack what")
    log._complete = lambda rows: rows[0]["nothing"]  # the row is written without it
    assert log.flush() and log.written == 46 and caplog.text.count("6 rows lack what should have been added") == 1
    assert sum(r["features"] is None for r in log.rows()) == 6
    log._database.let_go()


def test_rows_that_cannot_be_written_among_many(tmp_path):
    log = PredictionLog(tmp_path / "log.db")
    rows = [row(**({"confidence": "high"} if i % 2 else {})) for i in range(80)]
    assert all(map(log.put, rows)) and log.get(rows[40]["id"])
    assert log.flush() and (log.written, log.dropped, log.state()["waiting"]) == (40, 40, 0)
    assert {r["id"] for r in log.rows()} == {r["id"] for r in rows[::2]}
    log._database.let_go()


def test_rows_that_are_none(tmp_path, opened):
    log = opened(tmp_path / "log.db")
    good, twice = row(), row()
    assert log.put(twice)
    assert not any(log.put(bad) for bad in (None, 7, {}, {"id": []}, {"id": "x", "input": 7}))
    assert log.put(good) and log.dropped == 5
    assert log.put({"id": "no task"}) and log.put(row(confidence="high")) and log.put(row(time="yesterday"))
    wait(lambda: log.written == 2 and log.dropped == 8)
    assert {r["id"] for r in log.rows()} == {good["id"], twice["id"]}


def test_a_row_that_the_database_refuses_fails_alone(tmp_path, opened):
    with contextlib.closing(sqlite3.connect(tmp_path / "log.db")) as db:
        log = opened(tmp_path / "log.db")
        wait(lambda: log._database._opened and log._database._opened[2])
        raising = "begin select raise(fail, 'no bags'); end"
        db.execute(f"create trigger t before insert on predictions when new.predicted = 'Bag' {raising}")
        db.commit()
    rows = [row(predicted=p) for p in ("Coat", "Bag", "Dress")]
    for r in rows:
        log.put(r)
    wait(lambda: log.written == 2 and log.dropped == 1)
    assert [r["predicted"] for r in log.rows()] == ["Coat", "Dress"] and log.state()["ok"]


def test_the_end_of_a_service(tmp_path, opened):
    log = opened(tmp_path / "log.db", every=60)
    wait(lambda: (tmp_path / "log.db").exists())
    time.sleep(0.1)
    for _ in range(500):
        log.put(row())
    log.close(20)
    assert log.state() == {"ok": True, "waiting": 0, "written": 500, "dropped": 0, "reason": ""}
    assert not log.put(row()) and log.dropped == 1
    assert not [t for t in threading.enumerate() if t is log._thread]


def test_the_end_while_the_database_is_away(tmp_path, opened, caplog):
    (tmp_path / "file").touch()
    log = opened(tmp_path / "file" / "log.db")
    assert all(log.put(row()) for _ in range(7))
    began = time.monotonic()
    log.close(0.5)
    assert time.monotonic() - began < 10
    assert (log.dropped, log.state()["waiting"]) == (7, 0)
    assert "7 rows dropped so far (not written before the service ended" in caplog.records[-1].getMessage()


def test_clock_jumps(tmp_path, opened, monkeypatch):
    """Set forward by 50 years, and back to 1970: rows are written, ids differ, and nothing expires for it."""
    log, now, jump = opened(tmp_path / "log.db", days=30), time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    ids = []
    for i, by in enumerate((0, 50 * 365 * 86400, -now() + 1, 0)):
        jump = by
        ids += [new_id() for _ in range(10)]
        assert all(log.put(row(id=x)) for x in ids[-10:])
        wait(lambda n=i: log.written == 10 * n + 10)
    assert len(set(ids)) == 40 and log.count() == 40 and log.dropped == 0
    jump = 50 * 365 * 86400
    log._purged = -float("inf")  # an hour later
    wait(lambda: log.days is None)
    assert log.count() == 40


def test_what_is_old_expires(tmp_path, opened):
    log = opened(tmp_path / "log.db")
    assert log.put(row(time=time.time() - 8 * 86400)) and log.put(row())
    wait(lambda: log.written == 2)
    keeps = opened(tmp_path / "log.db", days=7)
    wait(lambda: log.count() == 1)
    assert keeps.days == 7


def test_metrics_are_told(tmp_path, opened):
    told = []
    log = opened(tmp_path / "log.db", report=lambda state: told.append(state) or 1 / 0)
    log.put(row())
    wait(lambda: told and told[-1]["written"] == 1)
    log.put(row())
    wait(lambda: told[-1]["written"] == 2)  # what the metrics do is no reason to stop


@pytest.mark.parametrize(
    "wrong",
    [
        "mysql://db/x",
        "sqlite://",
        "sqlite:///:memory:",
        "postgresql://u:secret@db:port/x",
        "postgresql://[::1/secret",
        "file://x",
    ],
)
def test_urls_that_cannot_work(wrong):
    with pytest.raises(ValueError, match="expected|needs a file") as told:
        PredictionLog(wrong)
    assert "secret" not in str(told.value)


def test_a_server_that_is_not_there(opened):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"postgresql://team:secret@127.0.0.1:{s.getsockname()[1]}/x"
    log = opened(url)
    assert log.put(row())
    wait(lambda: log.reason)
    assert "does not answer" in log.reason and "secret" not in log.reason


def test_ids():
    ids = [new_id() for _ in range(1000)]
    assert len({i[9:] for i in ids}) == 1000 and {i[14] for i in ids} == {"7"} and {i[19] for i in ids} <= set("89ab")
    a = new_id()
    time.sleep(0.003)
    assert a < new_id()


def test_fitting_is_for_good():
    once = fit_row(row(features={"a": float("nan")}, time=0))
    assert fit_row(once) == once and json.loads(once["features"]) == {"a": None}


def test_it_imports_little():
    heavy = ("sqlalchemy", "pyarrow", "torch", "pandas", "numpy")
    code = f"import sys, project.serve.log; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
