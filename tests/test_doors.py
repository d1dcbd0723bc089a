"""Doors that must not open by accident: health routes, silence bought with bytes, near misses, files of keys."""

import concurrent.futures
import contextlib
import hmac
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import fields

import httpx
import pytest
from pytest_notebooks import ROOT
from serve_process import Server, all_of, image_bundle, png

from project.core import VARIABLES, check_variables
from project.serve import api, frontend, limits, process
from project.serve.limits import Keys, Settings, new_key, read_hashes

linux = pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")
KEY, HASHED = new_key()
HEADER = b"X-API-Key: " + KEY.encode()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A closed service with little room and little patience."""
    folder = tmp_path_factory.mktemp("doors")
    image = image_bundle(folder / "image")
    small = {
        "max_bytes": 2_000_000,
        "max_held": 3_000_000,
        "max_requests": 6,
        "read_seconds": 1.5,
        "upload_seconds": 5.0,
    }
    with Server(folder, bundles=[str(image.path)], keys=[HASHED], mode="production", **small) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_held(request):
    """After each attack the service is ready, and answers."""
    yield
    if "served" in request.fixturenames:
        served = request.getfixturevalue("served")
        served.wait_for(served.is_ready, 30)
        sent = {"content": png(250), "headers": {"x-api-key": KEY, "content-type": "image/png"}}
        assert served.client.post("/predict/brightness", **sent).json()["class"] == "bright"
        assert "Traceback" not in served.errors()


def connect(served):
    """A connection to write anything to."""
    return socket.create_connection(("127.0.0.1", served.port), timeout=30)


def head(method, path, length, *more):
    """The head of a request with a body."""
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", b"Content-Type: image/png", *more]
    return b"\r\n".join([*lines, b"Content-Length: %d" % length, b"", b""])


# --- health


def announced(served, method, path):
    """What is answered to a request that announces 1.9 MB and sends 1 kB of them."""
    with connect(served) as c:
        c.sendall(head(method, path, 1_900_000) + b"x" * 1000)
        return all_of(c).lower()


@linux
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_health_is_answered_before_its_body_comes(served, method, path):
    found = announced(served, method, path)
    assert found.startswith(b"http/1.1 200") and b"connection: close" in found


@linux
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/health/live"),
        ("POST", "/health/ready"),
        ("GET", "/health/"),
        ("POST", "/health/x"),
        ("POST", "/health/live/x"),
        ("GET", "/health/../metrics"),
        ("POST", "/"),
        ("PUT", "/health/live"),
    ],
)
def test_only_the_exact_health_routes_are_for_everybody(served, method, path):
    """Others are refused, and what is sent to them is not waited for: 1.9 MB were announced."""
    found = announced(served, method, path)
    assert found.startswith(b"http/1.1 401") and b"connection: close" in found


@linux
def test_health_passes_when_there_is_no_room_and_says_so(served):
    """Six clients who know a key take all places, or all bytes, with uploads that do not end."""
    for length, piece, reason in ((500_000, 1000, "no more are taken"), (1_990_000, 1_950_000, "no room for uploads")):
        n = 6 if piece == 1000 else 2
        clients = [connect(served) for _ in range(n)]
        for i, c in enumerate(clients):
            size = piece if i == 0 or piece == 1000 else 900_000
            c.sendall(head("POST", "/predict/brightness", length, HEADER) + b"x" * size)
        answer = served.wait_for(
            lambda: a if (a := served.client.get("/health/ready")).status_code == 503 else None, 10
        )
        assert any(reason in r for r in answer.json()["reasons"]), answer.text
        assert served.client.get("/health/live").status_code == 200
        for c in clients:
            c.close()
        served.wait_for(served.is_ready, 20)


@linux
def test_bytes_do_not_buy_silence(served):
    """1.9 MB at once were worth 95 seconds of silence."""
    with connect(served) as c:
        c.sendall(head("POST", "/predict/brightness", 1_990_000, HEADER) + b"x" * 1_900_000)
        c.settimeout(40)
        assert all_of(c).startswith(b"HTTP/1.1 408")


@linux
def test_an_upload_has_an_end_however_it_is_sent(served):
    """Fast enough for each moment, and never done: 1.5 MB a minute."""
    with connect(served) as c:
        c.sendall(head("POST", "/predict/brightness", 1_990_000, HEADER))
        c.settimeout(0.05)
        found, end = b"", time.monotonic() + 50
        while not found and time.monotonic() < end:
            try:
                c.sendall(b"x" * 2_500)
                found = c.recv(65536)
            except TimeoutError:
                pass
    assert found.startswith(b"HTTP/1.1 408")


@linux
def test_answers_that_nobody_reads_keep_no_places(tmp_path):
    """Clients that ask for the largest file again and again, and read nothing."""
    image = image_bundle(tmp_path / "image")
    with Server(tmp_path, bundles=[str(image.path)], max_requests=8, read_seconds=1.0) as server:
        clients = [connect(server) for _ in range(12)]
        for c in clients:
            c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            c.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        time.sleep(0.5)
        server.wait_for(lambda: server.client.get("/models").status_code == 200, 40)
        server.wait_for(lambda: server.client.get("/health/ready").status_code == 200, 40)
        for c in clients:
            c.settimeout(0.2)  # those that were told to come again are still connected
            with c, contextlib.suppress(TimeoutError):
                assert len(all_of(c)) < 20 * 1_000_000


# --- near misses

MISSES = {
    "PROJECT_API_KEY": "PROJECT_API_KEYS",
    "PROJECT_MODE": "PROJECT_SERVE_MODE",
    "PROJECT_SERVE_MAX_BYTE": "PROJECT_SERVE_MAX_BYTES",
    "PROJECT_SERVE_KEYS": "PROJECT_",
    "PROJECT_APIKEYS": "PROJECT_API_KEYS",
    "PROJECT_KEYS": "PROJECT_API_KEYS",
    "project_api_keys": "PROJECT_API_KEYS",
    "Project_Serve_Mode": "PROJECT_SERVE_MODE",
    "PROJECT_FRONTEND_PROT": "PROJECT_FRONTEND_PORT",
    "PROJECT_REGISTERY": "PROJECT_REGISTRY",
}


@pytest.mark.parametrize("name", MISSES)
def test_a_near_miss_is_refused_with_the_nearest_name(name):
    with pytest.raises(ValueError, match=f"{name}.*'{MISSES[name]}"):
        Settings.from_env({name: "x"})


@pytest.mark.parametrize("env", [{"PROJECT_API_KEYS": ""}, {"PROJECT_API_KEYS": " "}, {"PROJECT_API_KEYS_FILE": ""}])
def test_keys_that_are_set_and_empty_are_refused(env):
    with pytest.raises(ValueError, match="is set, and empty"):
        Settings.from_env(env)


def test_a_clients_key_beside_the_services_is_fine():
    assert Settings.from_env({"PROJECT_API_KEY": KEY, "PROJECT_API_KEYS": HASHED}).keys == (HASHED,)
    assert Settings.from_env({"PROJECT_API_KEY": KEY, "PROJECT_API_KEYS": "none"}).keys == ("none",)


@linux
@pytest.mark.parametrize("name", ["PROJECT_API_KEY", "PROJECT_MODE"])
def test_the_service_does_not_start_beside_one(tmp_path, name):
    with pytest.raises(AssertionError, match=name), Server(tmp_path, env={name: "production"}):
        pass


def test_an_open_door_is_said_loudly():
    for host in ("0.0.0.0", "::", "10.0.0.7", "models.example.org"):
        (said,) = api._loud(Settings(), host, 1)
        assert "OPEN DOOR" in said and host in said and "PROJECT_API_KEYS" in said
        (said,) = api._loud(Settings(mode="production", keys=("none",)), host, 1)
        assert "OPEN DOOR" in said and "is none" in said
        assert not api._loud(Settings(keys=(HASHED,)), host, 1)
    for host in ("127.0.0.1", "::1", "localhost"):
        assert not api._loud(Settings(), host, 1)
    (said,) = api._loud(Settings(rate=5.0), "127.0.0.1", 4)
    assert "4 workers" in said and "20 times a second" in said


def test_production_refuses_an_open_door(monkeypatch):
    monkeypatch.delenv("PROJECT_API_KEYS", raising=False)
    monkeypatch.setenv("PROJECT_SERVE_MODE", "production")
    with pytest.raises(ValueError, match="expected hashes of keys in production mode"):
        api.serve(host="0.0.0.0", port=0)


@pytest.mark.parametrize("prefix", ["/predict", "ml"])
def test_the_command_takes_a_prefix_and_refuses_a_wrong_one(tmp_path, prefix):
    command = [sys.executable, "-m", "project", "serve", "--root-path", prefix, "--port", "0"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PROJECT_")}
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1 and "PROJECT_SERVE_ROOT_PATH: expected a p" in ended.stderr
    assert repr(prefix) in ended.stderr and "Traceback" not in ended.stderr


NAME = re.compile(r"(?<![A-Z0-9_$])PROJECT_[A-Z0-9]+(?:_[A-Z0-9]+)*(?![A-Z0-9_{*])")
WRONG = {"PROJECT_DATE", "PROJECT_API_KEYES", *MISSES}  # shown as what is refused
BEGINNINGS = {"PROJECT_API", "PROJECT_PAPERMILL"}  # by which tests tell names


def known():
    """All names that something reads."""
    return {*VARIABLES, *(f.metadata["env"] for s in (Settings, frontend.Settings) for f in fields(s))}


def test_every_name_in_the_repository_is_known_and_every_known_name_is_used():
    places = [
        "project/**/*.py",
        "nbs/**/*.ipynb",
        "tests/**/*.py",
        "docker/*",
        ".github/**/*.yml",
        ".ci/*",
        ".devcontainer/*",
    ]
    files = [p for place in places for p in ROOT.glob(place) if p.is_file() and p.name not in ("_modidx.py",)]
    files += [ROOT / "Makefile", ROOT / "README.md", ROOT / "pyproject.toml"]
    used = {}
    for path in files:
        for name in NAME.findall(path.read_text(encoding="utf-8", errors="replace")):
            used.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    strange = {name: where[:3] for name, where in used.items() if name not in known() | WRONG | BEGINNINGS}
    assert not strange, "put them into project.core.VARIABLES, or correct them"
    unused = [n for n in VARIABLES if not {*used.get(n, ())} - {"project/core.py", "nbs/core/00_core.ipynb"}]
    assert not unused, "nothing reads them"


def test_no_name_has_two_places():
    settings = {f.metadata["env"] for f in fields(Settings)}
    assert not settings & {*VARIABLES}
    check_variables(dict.fromkeys(known(), "x"), settings)


# --- keys in a file


def test_a_file_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# two\n\n{HASHED} ada, her laptop\n  {'0' * 64}\n", encoding="utf-8")
    assert read_hashes(path) == [HASHED, "0" * 64]
    for wrong in (KEY, HASHED[:-1], HASHED.upper(), f"ada {HASHED}"):
        path.write_text(f"{HASHED}\n{wrong}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="line 2: expected a SHA-256 hash") as told:
            Keys(path=str(path))
        assert wrong not in str(told.value)
    path.write_text("# none yet\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no hash of a key"):
        Keys(path=str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        Keys(path=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="found none"):
        Settings(keys=("none",), keys_file=str(path))
    assert Settings(mode="production", keys_file=str(path)).production  # the app reads it


def test_of_thousands_one_is_compared(tmp_path, monkeypatch):
    """The work for a key does not grow with their number."""
    path = tmp_path / "keys"
    many = [new_key()[1] for _ in range(20_000)]
    path.write_text("\n".join([*many, HASHED]), encoding="utf-8")
    keys, compared = Keys(path=str(path)), []
    real = hmac.compare_digest
    monkeypatch.setattr(limits.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    assert keys.owner(KEY.encode()) == HASHED[:12] and keys.owner(b"pk_other") == "" and keys.owner(b"") == ""
    assert len(compared) == 3 and all(len(a) == len(b) == 64 for a, b in compared)


@linux
def test_the_service_reads_its_keys_again(tmp_path):
    image, path = image_bundle(tmp_path / "image"), tmp_path / "keys"
    path.write_text(f"{HASHED}\n", encoding="utf-8")
    other, more = new_key()

    def status(server, key):
        return server.client.get("/models", headers={"x-api-key": key} if key else {}).status_code

    def put(text):
        beside = tmp_path / "keys.new"
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)

    with Server(tmp_path, bundles=[str(image.path)], keys_file=str(path), mode="production") as server:
        assert [status(server, k) for k in (KEY, other, "")] == [200, 401, 401]
        put(f"{HASHED}\n{more} bob\n")
        server.wait_for(lambda: status(server, other) == 200, 20)
        put(f"{more}\n")
        server.wait_for(lambda: status(server, KEY) == 401, 20)
        put(f"{more}\n{other}\n")  # somebody wrote the key itself
        server.wait_for(lambda: "line 2: expected a SHA-256" in server.errors(), 20)
        assert [status(server, k) for k in (KEY, other, "")] == [401, 200, 401] and other not in server.errors()
        path.unlink()
        server.wait_for(lambda: "cannot be read" in server.errors(), 20)
        assert [status(server, k) for k in (KEY, other, "")] == [401, 200, 401]
        put("# everybody has left\n")
        server.wait_for(lambda: status(server, other) == 401, 20)
        assert [status(server, k) for k in (KEY, other, "")] == [401, 401, 401]  # and not: everybody is let in
        assert httpx.get(f"{server.url}/").status_code == 200
        put(f"{HASHED}\n")
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: server.wait_for(lambda: status(server, KEY) == 200, 20), range(4)))


def test_connections_have_the_patience_of_the_settings(monkeypatch):
    monkeypatch.delenv("PROJECT_SERVE_READ_SECONDS", raising=False)
    assert process._patience.__wrapped__() == Settings().read_seconds
    monkeypatch.setenv("PROJECT_SERVE_READ_SECONDS", "soon")
    with pytest.raises(ValueError, match="PROJECT_SERVE_READ_SECONDS: expected a number, found 'soon'"):
        process._patience.__wrapped__()
