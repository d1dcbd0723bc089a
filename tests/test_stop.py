"""How the service ends: nobody whom the kernel let in is reset, and nobody keeps the port who should not."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from serve_process import Server, image_bundle, png
from test_frontend import Front

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")
BODY = png(200)
HEAD = b"POST /predict/brightness HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(
    BODY
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(image_bundle(tmp_path_factory.mktemp("stop") / "image").path)


def connect(server):
    """A connection that the kernel takes, whether the server is awake or not."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def asking(server, n=30):
    """Clients that have sent one whole request each."""
    clients = [connect(server) for _ in range(n)]
    for c in clients:
        c.sendall(HEAD + BODY)
    return clients


def heard(clients):
    """How it ended for each: a status, nothing, or a reset."""
    found = {}
    for c in clients:
        with c:
            try:
                answer = c.recv(65536)[9:12].decode() or "nothing"
            except ConnectionResetError:
                answer = "reset"
        found[answer] = found.get(answer, 0) + 1
    return found


def gone(pid):
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(what, seconds=40):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("drain", [0.0, 0.3])
def test_who_waits_in_the_kernel_when_the_end_is_called_is_answered(tmp_path, bundle, drain):
    with Server(tmp_path, bundles=[bundle], drain=drain) as server:
        os.kill(server.process.pid, signal.SIGSTOP)  # as busy as can be
        clients = asking(server)
        os.kill(server.process.pid, signal.SIGTERM)
        os.kill(server.process.pid, signal.SIGCONT)
        assert heard(clients) == {"200": 30}
        assert server.process.wait(20) in (0, -signal.SIGTERM)


def test_who_comes_in_the_last_moment_is_answered(tmp_path, bundle):
    """The end of the drain falls into a time in which the server accepts nothing."""
    with Server(tmp_path, bundles=[bundle], drain=0.5) as server:
        os.kill(server.process.pid, signal.SIGTERM)
        server.wait_for(lambda: server.client.get("/health/ready").status_code == 503, 10)
        os.kill(server.process.pid, signal.SIGSTOP)
        clients = asking(server)
        time.sleep(1)
        os.kill(server.process.pid, signal.SIGCONT)
        assert heard(clients) == {"200": 30}
        assert server.process.wait(20) in (0, -signal.SIGTERM)


def test_a_connection_that_was_used_before_is_answered_once_more(tmp_path, bundle):
    with Server(tmp_path, bundles=[bundle], drain=0.0) as server:
        clients = asking(server, 10)
        for c in clients:
            answer = b""
            while not answer.endswith(b"}"):  # head and body may come apart
                answer += c.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
        os.kill(server.process.pid, signal.SIGSTOP)
        for c in clients:
            c.sendall(HEAD + BODY)
        os.kill(server.process.pid, signal.SIGTERM)
        os.kill(server.process.pid, signal.SIGCONT)
        assert heard(clients) == {"200": 10}


def test_who_says_nothing_does_not_hold_the_end_up(tmp_path, bundle):
    with Server(tmp_path, bundles=[bundle], drain=0.0) as server:
        silent = [connect(server) for _ in range(5)]
        silent[0].sendall(HEAD[:40])
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(20) in (0, -signal.SIGTERM)
        assert heard(silent[1:]) == {"nothing": 4}
        silent[0].close()


def test_with_workers_who_waits_in_the_kernel_is_answered(tmp_path, bundle):
    with Server(tmp_path, workers=2, bundles=[bundle], drain=0.2) as server:
        workers = server.wait_for(lambda: pids if len(pids := server.children()) == 2 else None)
        server.wait_for(lambda: server.errors().count("Application startup complete") == 2)
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        clients = asking(server)
        os.kill(server.process.pid, signal.SIGTERM)
        server.wait_for(lambda: server.errors().count("Terminated child process") == 2)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        assert heard(clients) == {"200": 30}
        assert server.process.wait(30) in (0, -signal.SIGTERM)


def test_a_killed_parent_leaves_nobody_on_the_port(tmp_path, bundle):
    with Server(tmp_path, workers=2, bundles=[bundle], drain=0.2) as server:
        workers = server.wait_for(lambda: pids if len(pids := server.children()) == 2 else None)
        server.wait_for(lambda: server.errors().count("Application startup complete") == 2)
        clients = asking(server, 5)
        server.process.kill()
        server.process.wait(10)
        try:
            assert heard(clients) == {"200": 5}  # whom they had taken, they answer
            wait_until(lambda: all(map(gone, workers)))
        finally:
            for pid in workers:
                if not gone(pid):
                    os.kill(pid, signal.SIGKILL)
        with pytest.raises(ConnectionRefusedError):
            connect(server)
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", server.port))


def test_workers_that_cannot_start_are_a_failure(tmp_path):
    bundles = [str(tmp_path / "nothing")]
    with pytest.raises(AssertionError, match="the server ended with 3"), Server(tmp_path, workers=2, bundles=bundles):
        pass


def test_the_page_apart_answers_who_waits_in_the_kernel(tmp_path):
    with Front(tmp_path, "http://127.0.0.1:9") as front:
        front.port = int(front.url.rpartition(":")[2])
        os.kill(front.process.pid, signal.SIGSTOP)
        clients = [connect(front) for _ in range(20)]
        for c in clients:
            c.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        os.kill(front.process.pid, signal.SIGTERM)
        os.kill(front.process.pid, signal.SIGCONT)
        assert heard(clients) == {"200": 20}
        assert front.process.wait(30) in (0, -signal.SIGTERM)
