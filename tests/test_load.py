"""The load test: a wrong answer is a failure whatever its status, a refusal is neither a failure nor a prediction."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from pytest_notebooks import ROOT
from serve_process import Server, image_bundle, make_registry

from project.serve.load import (
    Level,
    LoadError,
    check_prediction,
    data_samples,
    image_sample,
    measure,
    memory_of,
    own_server,
    pick_task,
    served_samples,
    served_version,
    text_sample,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")
GOOD = {
    "id": "0",
    "task": "news",
    "model_version": "v1-0",
    "class": "fake",
    "confidence": 0.75,
    "probabilities": {"fake": 0.75, "real": 0.25},
}
WRONG = [
    {"class": "real"},
    {"class": "other"},
    {"confidence": 0.5},
    {"task": "titles"},
    {"id": ""},
    {"model_version": ""},
    {"probabilities": {}},
    {"probabilities": {"fake": 0.75, "real": 0.75}},
    {"probabilities": {"fake": 3.1, "real": -2.1}, "confidence": 3.1},
    {"probabilities": {"fake": float("nan"), "real": 0.25}},
    {"probabilities": [0.75, 0.25]},
    {"probabilities": {"fake": "0.75"}},
]


def says(value):
    return json.dumps(value).encode()


class Service(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Clients may go at any time."""


@contextmanager
def answering(*answers, chunked=False, close=False):
    """A service that gives these answers in turn: (status, body, headers)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version, turn = "HTTP/1.1", 0
        disable_nagle_algorithm = True

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body, headers = answers[Handler.turn % len(answers)]
            Handler.turn += 1
            if status == 0:  # hangs up
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if close:
                self.send_header("Connection", "close")
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                pieces = [piece for piece in (body[:10], body[10:]) if piece]
                self.wfile.write(b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n")
            else:
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def do_GET(self):
            sample = {"id": "0", "label": "fake", "kind": "text", "text": "a"}
            found = {"models": [{"task": "news"}], "samples": [sample]}
            self.send_response(200)
            self.send_header("Content-Length", str(len(says(found))))
            self.end_headers()
            self.wfile.write(says(found))

        def log_message(self, *_):
            pass

    server = Service(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A real server with two tasks."""
    folder = tmp_path_factory.mktemp("load")
    make_registry(folder)
    with Server(folder) as server:
        yield server


def test_only_a_prediction_is_a_prediction():
    assert check_prediction(says(GOOD), "news") == ""
    for change in WRONG:
        assert check_prediction(says(GOOD | change), "news"), change
    for key in GOOD:
        assert check_prediction(says({k: v for k, v in GOOD.items() if k != key}), "news"), key
    for body in (b"", b"ok", b"[]", b"null", b'"fake"', b"\xff", b'{"prediction": 1}'):
        assert check_prediction(body, "news") == "not a prediction"


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_refusals_and_wrong_bodies_are_counted_apart(chunked, close):
    answers = [
        (200, says(GOOD), {}),
        (200, b'{"status": "ok"}', {}),
        (429, b"{}", {"Retry-After": "1"}),
        (503, b"{}", {"retry-after": "1"}),
        (503, b"{}", {}),
        (422, b"{}", {"Retry-After": "1"}),
        (0, b"", {}),
    ]
    with answering(*answers, chunked=chunked, close=close) as url:
        found = measure(url, "news", [text_sample({"text": "a"})], clients=1, seconds=0.4)
    turns = len(found.latencies)
    assert turns > 2
    assert abs(found.refused - 2 * turns) <= 2
    assert set(found.failed) == {"not a prediction", "status 503", "status 422", "no answer (IncompleteReadError)"}
    assert all(abs(n - turns) <= 1 for n in found.failed.values())
    assert found.metrics["load/1/errors"] == sum(found.failed.values())


def test_silence_is_a_failure_after_patience():
    """A service that takes connections and says nothing does not hold the test up."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        found = measure(url, "news", [text_sample({})], clients=2, seconds=0.2, patience=0.1)
    assert not len(found.latencies) and set(found.failed) == {"no answer (TimeoutError)"}


@pytest.mark.parametrize("task", ["brightness", "news"])
def test_a_real_server_answers_many_clients_with_predictions(served, task):
    samples = served_samples(served.url, task)
    assert len(samples) == 2 and samples[0] != samples[1]
    found = measure(served.url, task, samples, clients=20, seconds=0.5, pid=served.process.pid, name="some")
    assert found.failed == {} and found.refused == 0 and len(found.latencies) >= 20
    assert (np.diff(found.latencies) >= 0).all() and found.seconds >= 0.5
    assert found.memory and all(b > 10_000_000 for _, b in found.memory)
    metrics = found.metrics
    assert metrics["load/some/p50_ms"] <= metrics["load/some/p95_ms"] <= metrics["load/some/p99_ms"]
    other = "news" if task == "brightness" else "brightness"
    wrong = measure(served.url, other, samples, clients=2, seconds=0.1)
    assert not len(wrong.latencies) and all(why.startswith("status 4") for why in wrong.failed)


def test_a_full_server_refuses_and_fails_nobody(tmp_path):
    make_registry(tmp_path)
    with Server(tmp_path, max_queue=2, max_requests=8) as server:
        found = measure(server.url, "brightness", served_samples(server.url, "brightness"), clients=40, seconds=0.7)
        assert found.refused and len(found.latencies) and found.failed == {}
        server.wait_for(server.is_ready)


def test_what_cannot_be_asked_is_said_in_words(served):
    with pytest.raises(LoadError, match="serves brightness, news, not newz.*news"):
        pick_task(served.url, "newz")
    assert pick_task(served.url) == "brightness"
    assert served_version(served.url, "brightness").startswith("v1-")
    with pytest.raises(LoadError, match="expected an answer, found status 404"):
        served_samples(served.url, "nothing")
    with pytest.raises(LoadError, match="no service answers"):
        pick_task("http://127.0.0.1:9")
    for url in ("127.0.0.1:8000", "ftp://127.0.0.1", "http://"):
        with pytest.raises(LoadError, match="expected an address"):
            measure(url, "news", [text_sample({})])
    with pytest.raises(LoadError, match="printable"):
        measure(served.url, "news", [text_sample({})], key="a\r\nb")


def test_a_server_of_its_own_ends_with_the_block(tmp_path):
    bundle = image_bundle(tmp_path / "bundle")
    with own_server("", str(bundle.path)) as (url, pid):
        assert pick_task(url) == "brightness" and memory_of(pid) > 10_000_000
    assert memory_of(pid) == 0
    with pytest.raises(RuntimeError, match="stop"), own_server("", str(bundle.path)) as (url, pid):
        raise RuntimeError("stop")
    assert memory_of(pid) == 0
    with pytest.raises(LoadError, match="or ended"), own_server("", str(tmp_path / "none")):
        pass
    with pytest.raises(ValueError, match="no finished run with a bundle"), own_server():
        pass


def test_a_server_of_its_own_ends_when_nobody_is_left(tmp_path):
    image_bundle(tmp_path / "bundle")
    code = "import sys, time; from project.serve.load import own_server\n"
    code += "with own_server('', sys.argv[1]) as (url, pid): print(pid, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, tmp_path / "bundle"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        pid = int(process.stdout.readline())
        assert memory_of(pid) > 10_000_000
        process.kill()
    end = time.monotonic() + 30
    while memory_of(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert memory_of(pid) == 0


def test_inputs_of_a_bundle_without_samples(samples):
    found = data_samples("fashion_mnist", samples, most=5)
    assert 0 < len(found) <= 5 and all(b"\x89PNG" in one.body for one in found)
    assert image_sample(b"x").content_type.startswith("multipart/form-data; boundary=")


def test_no_answers_have_no_latency():
    level = Level(3, 1.0, np.array([]), refused=2)
    assert level.ms(50) is None and level.metrics["load/3/refused"] == 2 and "load/3/p99_ms" not in level.metrics


def locust(url, folder, task, wanted):
    """Two seconds of Locust, longer until the wanted lines have two requests; its status, its output, lines by name."""
    for seconds in (2, 10, 40):  # a busy machine may answer nothing in the first two
        status, said, rows = locust_once(url, folder, task, seconds)
        if all(int(rows.get(name, {"Request Count": 0})["Request Count"]) > 1 for name in wanted):
            break
    return status, said, rows


def locust_once(url, folder, task, seconds):
    """So many seconds of Locust."""
    script = ROOT / "tests" / "performance" / "locustfile.py"
    options = ["--headless", "-u", "5", "-r", "5", "-t", f"{seconds}s", "--host", url, "--csv", str(folder / "out")]
    env = os.environ | {"PROJECT_LOAD_TASK": task}
    done = subprocess.run(
        [sys.executable, "-m", "locust", "-f", script, *options],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120 + seconds,
        check=False,
    )
    file = Path(folder / "out_stats.csv")
    assert file.exists(), done.stderr
    with file.open(encoding="utf-8", newline="") as lines:
        return done.returncode, done.stderr, {row["Name"]: row for row in csv.DictReader(lines)}


needs_locust = pytest.mark.skipif(
    not importlib.util.find_spec("locust"), reason="locust is not installed: python -m pip install locust"
)


@needs_locust
def test_locust_counts_predictions_and_refusals(tmp_path):
    make_registry(tmp_path)
    with Server(tmp_path, rate=10) as server:
        names = "/predict/{task}", "/predict/{task} (refused)"
        status, said, rows = locust(server.url, tmp_path, "brightness", names)
    good, refused = (rows[name] for name in names)
    assert int(good["Request Count"]) > 1 and int(refused["Request Count"]) > 1, said
    assert good["Failure Count"] == refused["Failure Count"] == "0" and status == 0, said


@needs_locust
def test_locust_counts_a_wrong_body_as_a_failure(tmp_path):
    with answering((200, says(GOOD), {}), (200, b'{"status": "ok"}', {})) as url:
        status, said, rows = locust(url, tmp_path, "news", ["/predict/{task}"])
    row = rows["/predict/{task}"]
    assert status == 1 and 0 < int(row["Failure Count"]) < int(row["Request Count"]), said
