"""Behind a proxy: a real nginx before the real service, and before the page that is deployed apart.

nginx is the one on the PATH or in /usr/sbin, or Debian's package, which is unpacked without root.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urljoin

import httpx
import pytest
from browser import Browser, find_chromium
from debian import program
from serve_process import Server, image_bundle, make_registry, png
from test_frontend import Front

from project.serve.client import predict_files
from project.serve.limits import Settings, new_key

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")

MAIN = """
worker_processes 1;
error_log stderr warn;
pid {folder}/nginx.pid;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_max_body_size 50m;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  proxy_http_version 1.1;
  proxy_set_header Host $http_host;
  proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
  proxy_set_header X-Forwarded-Proto $scheme;
  {servers}
}}
"""
CUT = "server {{ listen 127.0.0.1:{port}; location {prefix}/ {{ proxy_pass {to}/; }} }}"
LEFT = "server {{ listen 127.0.0.1:{port}; location {prefix} {{ proxy_pass {to}; }} }}"
LIAR = (
    "server {{ listen 127.0.0.1:{port}; location {prefix} {{ proxy_pass {to}; "
    'proxy_set_header X-Forwarded-For "<script>, 192.0.2.9, <script>"; }} }}'
)


@contextlib.contextmanager
def nginx(folder, to, prefix, *servers):
    """nginx with these servers; their addresses. Its sockets are opened here, so no port is lost in between."""
    exe = program("nginx", "nginx")
    folder.mkdir()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in servers]
    ports = [s.getsockname()[1] for s in sockets]
    text = "\n".join(s.format(port=p, prefix=prefix, to=to) for s, p in zip(servers, ports, strict=True))
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, servers=text), encoding="utf-8")
    fds = [s.fileno() for s in sockets]
    env = os.environ | {"NGINX": "".join(f"{fd};" for fd in fds)}  # as it hands them to the next of itself
    command = [exe, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off; user root;"]
    if os.getuid():
        command[-1] = "daemon off;"
    with (folder / "err.txt").open("wb") as err:
        process = subprocess.Popen(command, env=env, pass_fds=fds, stderr=err, stdout=err)
    for s in sockets:
        s.close()
    try:
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def client(base, address="127.0.0.1", **given):
    """A client that comes from an address of this machine."""
    transport = httpx.HTTPTransport(local_address=address)
    return httpx.Client(base_url=base, transport=transport, timeout=30, trust_env=False, **given)


def get(base, path, address, **given):
    """One question."""
    with client(base, address) as api:
        return api.get(path, **given)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The service that knows its prefix and its proxy."""
    folder = tmp_path_factory.mktemp("proxy")
    make_registry(folder)
    with Server(folder, root_path="/ml/v1", proxies=["127.0.0.1", "::1"], rate=50.0, burst=20.0) as server:
        yield server


@pytest.fixture(scope="module")
def fronts(served, tmp_path_factory):
    """nginx that cuts the prefix off, that leaves it, and that tells nonsense."""
    with nginx(tmp_path_factory.mktemp("nginx") / "here", served.url, "/ml/v1", CUT, LEFT, LIAR) as found:
        yield found


def ask(api, path="predict/brightness", **more):
    """A prediction; one that is told to wait does."""
    for _ in range(20):
        answer = api.post(path, files={"file": png(250)}, **more)
        if answer.status_code != 429:
            return answer
        time.sleep(0.2)
    raise AssertionError("too many requests, twenty times")


@pytest.mark.parametrize("way", [0, 1], ids=["cut", "left"])
def test_everything_below_a_prefix(fronts, way):
    with client(f"{fronts[way]}/ml/v1/", "127.0.0.9") as api:
        answer = ask(api)
        assert answer.status_code == 200 and answer.json()["class"] == "bright"
        time.sleep(0.5)
        page = api.get("").text
        assert not re.search(r"""(?:href|src|action)=["']/""", page)  # all relative
        document = api.get("openapi.json").json()
        assert document["servers"] == [{"url": "/ml/v1"}]
        here = urljoin(fronts[way], document["servers"][0]["url"])
        assert get(here, "/models", "127.0.0.9").status_code == 200
        docs = api.get("docs").text
        for part in re.findall(r"""(?:href|src)="(docs/[^"]+)""", docs):
            assert api.get(part).status_code == 200, part
        url = api.get("samples/brightness").json()["samples"][0]["url"]
        assert url.startswith("/ml/v1/samples/")
        assert api.get(urljoin(fronts[way], url)).headers["content-type"] == "image/png"
        wrong = api.get("models/nosuch")
        assert wrong.status_code == 404 and wrong.json()["instance"] == "/ml/v1/models/nosuch"
        assert api.get("health/ready").json()["status"] == "ready"


def test_our_own_client_below_a_prefix(fronts, tmp_path):
    (tmp_path / "a.png").write_bytes(png(5))
    (answer,) = predict_files([tmp_path / "a.png"], url=f"{fronts[1]}/ml/v1", task="brightness")
    assert answer.error == "" and "dark" in str(answer)


@pytest.mark.parametrize("way", [0, 1], ids=["cut", "left"])
def test_redirects_are_relative(fronts, way):
    with client(fronts[way], "127.0.0.8") as api:
        for path, there in {
            "/ml/v1/models/": "/ml/v1/models",
            "/ml/v1/models/brightness/?a=b%2Fc": "/ml/v1/models/brightness?a=b%2Fc",
            "/ml/v1/health/ready/": "/ml/v1/health/ready",
        }.items():
            for host in (None, "evil.example"):
                answer = api.get(path, headers={"host": host} if host else {})
                to = answer.headers["location"]
                assert answer.status_code == 307 and "://" not in to and not to.startswith("/"), to
                assert urljoin(f"{fronts[way]}{path}", to) == f"{fronts[way]}{there}"
        for path in ("//evil.example/", "/nosuch/", *(["/models//", "/models/%2f/"] if way else [])):
            assert api.get(f"/ml/v1{path}").status_code == 404, path
    if way:
        answer = get(fronts[way], "/ml/v1", "127.0.0.8")
        assert urljoin(f"{fronts[way]}/ml/v1", answer.headers["location"]) == f"{fronts[way]}/ml/v1/"


def test_a_rate_is_of_the_client_and_not_of_the_proxy(fronts, served):
    """Nobody escapes by writing an address, and nobody suffers for another behind the same proxy."""
    forged = ({}, {"x-forwarded-for": "192.0.2.1"}, {"x-forwarded-for": "127.0.0.1"}, {"x-forwarded-for": "<script>"})
    with client(f"{fronts[0]}/ml/v1", "127.0.0.2") as loud, client(f"{fronts[0]}/ml/v1", "127.0.0.3") as quiet:
        said = [loud.get("/models", headers=forged[i % 4]).status_code for i in range(120)]
        assert 429 in said[20:] and 429 in said[21::4] and 429 in said[22::4] and 429 in said[23::4]
        assert quiet.get("/models").status_code == 200
    lines = served.wait_for(lambda: [x for x in access(served) if x.get("client") == "127.0.0.3"], 10)
    assert lines and not {x["client"] for x in access(served) if "client" in x} & {"192.0.2.1", "<script>"}


def access(server):
    """The access log."""
    return [json.loads(line) for line in server.out.read_text(encoding="utf-8").splitlines()]


def test_what_is_no_address_names_nobody(fronts, served):
    marked = {"x-request-id": "nonsense-1"}
    assert get(fronts[2], "/ml/v1/models", "127.0.0.5", headers=marked).status_code == 200
    (line,) = served.wait_for(lambda: [x for x in access(served) if x["request_id"] == "nonsense-1"], 10)
    assert line["client"] == "127.0.0.1"  # the proxy itself, which wrote it


def test_who_is_no_proxy_is_not_believed(served):
    with client(served.url, "127.0.0.6") as api:
        for i, address in enumerate(("192.0.2.1", "127.0.0.1", "::1")):
            assert api.get("/models", headers={"x-forwarded-for": address, "x-request-id": f"direct-{i}"}).is_success
    lines = served.wait_for(
        lambda: n if len(n := [x for x in access(served) if "direct-" in x["request_id"]]) == 3 else 0
    )
    assert {line["client"] for line in lines} == {"127.0.0.6"}


def test_without_proxies_in_the_settings_no_header_counts(tmp_path):
    """The proxy's own address is loopback, which uvicorn would believe."""
    image = image_bundle(tmp_path / "image")
    with Server(tmp_path, bundles=[str(image.path)]) as server:
        server.client.get("/models", headers={"x-forwarded-for": "192.0.2.1", "x-request-id": "told-1"})
        (line,) = server.wait_for(lambda: [x for x in access(server) if x["request_id"] == "told-1"], 10)
        assert line["client"] == "127.0.0.1"


def test_uvicorns_own_root_path(tmp_path):
    image = image_bundle(tmp_path / "image")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PROJECT_")}
    env |= {"PROJECT_SERVE_BUNDLES": str(image.path), "PROJECT_SERVE_LOG": "off"}
    command = [sys.executable, "-m", "uvicorn", "project.serve.api:app", "--port", "0", "--root-path", "/ml"]
    with (tmp_path / "err.txt").open("wb") as err:
        process = subprocess.Popen(command, env=env, stderr=err, stdout=err)
    try:
        end, found = time.monotonic() + 60, None
        while not found:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "err.txt").read_text()
            found = re.search(r"running on (http://[\d.:]+)", (tmp_path / "err.txt").read_text())
            time.sleep(0.05)
        with client(found[1]) as api:
            assert ask(api, "/predict/brightness").status_code == 200
            assert api.get("/openapi.json").json()["servers"] == [{"url": "/ml"}]
            assert api.get("/models/").headers["location"] == "../models"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize(
    "prefix", ["ml", "/ml/", "//evil.example", "/a/../b", "/predict", "/models/v1", "/a b", "https://x/y"]
)
def test_prefixes_that_cannot_be_meant(prefix):
    with pytest.raises(ValueError, match="PROJECT_SERVE_ROOT_PATH: expected"):
        Settings.from_env({"PROJECT_SERVE_ROOT_PATH": prefix})


# --- HEAD wherever GET is


def test_head_is_get_without_the_body(served):
    with client(served.url, "127.0.0.7") as api:
        id = ask(api, "/predict/brightness").json()["id"]
        time.sleep(1.5)
        document = api.get("/openapi.json").json()
        paths = [path for path, route in document["paths"].items() if "get" in route]
        known = {"task": "brightness", "number": "0", "id": id}
        assert len(paths) > 8
        for path in (
            *(p.format(**known) for p in paths),
            "/",
            "/docs",
            "/docs/swagger-ui.css",
            "/models/nosuch",
            "/nosuch",
        ):
            full, bare = api.get(path), api.head(path)
            assert bare.status_code == full.status_code != 405 and bare.content == b"", path
            assert bare.headers["content-type"] == full.headers["content-type"], path
            if path not in ("/metrics", "/", "/health/ready"):  # which are never twice the same
                assert abs(int(bare.headers["content-length"]) - int(full.headers["content-length"])) < 9, path
            time.sleep(0.1)
        assert api.head("/predict/brightness").status_code == 405
        assert api.put("/models").headers["allow"] == "GET, HEAD"
        raw = socket.create_connection(("127.0.0.1", served.port), timeout=10)
        with raw:
            raw.sendall(b"HEAD /models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            text = b""
            while got := raw.recv(65536):
                text += got
        assert text.startswith(b"HTTP/1.1 200") and text.endswith(b"\r\n\r\n")


# --- pages of other origins


def test_other_origins_are_refused_unless_they_are_named(served):
    with client(served.url, "127.0.0.10") as api:
        answer = api.get("/models", headers={"origin": "https://a.example"})
        assert answer.status_code == 200 and not [h for h in answer.headers if h.startswith("access-control")]
        sent = {"origin": "https://a.example", "access-control-request-method": "POST"}
        assert api.options("/predict/brightness", headers=sent).status_code == 405


def test_origins_that_are_named_may_ask_and_need_their_key(tmp_path):
    image = image_bundle(tmp_path / "image")
    key, hashed = new_key()
    with Server(tmp_path, bundles=[str(image.path)], keys=[hashed], origins=["https://a.example"]) as server:
        api, here = server.client, {"origin": "https://a.example"}
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key,content-type"}
        said = api.options("/predict/brightness", headers=here | asks)
        assert said.status_code == 200 and said.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-api-key" in said.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in said.headers
        assert api.options("/predict/brightness", headers=asks | {"origin": "https://b.example"}).status_code == 400
        assert api.options("/predict/brightness", headers=here | {"access-control-request-method": "PUT"}).is_error
        refused = ask(api, "/predict/brightness", headers=here)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example"
        answer = ask(api, "/predict/brightness", headers=here | {"x-api-key": key})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://a.example"
        other = ask(api, "/predict/brightness", headers={"origin": "https://b.example", "x-api-key": key})
        assert other.status_code == 200 and "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "origin", ["a.example", "https://a.example/", "https://*.example", "null", "https://a.example/x"]
)
def test_origins_that_cannot_be_meant(origin):
    with pytest.raises(ValueError, match="PROJECT_SERVE_ORIGINS: expected"):
        Settings.from_env({"PROJECT_SERVE_ORIGINS": origin})


# --- the page that is deployed apart


@pytest.fixture(scope="module")
def page(served, tmp_path_factory):
    """The page below a prefix, before the service."""
    folder = tmp_path_factory.mktemp("page")
    settings = {"PROJECT_FRONTEND_ROOT_PATH": "/ask", "PROJECT_CACHE": str(folder)}
    with Front(folder, f"{served.url}", **settings) as front:
        yield front


@pytest.mark.parametrize("way", [CUT, LEFT], ids=["cut", "left"])
def test_the_page_below_a_prefix(page, tmp_path, way):
    with nginx(tmp_path / "nginx", page.url, "/ask", way) as (url,), client(f"{url}/ask", "127.0.0.1") as http:
        config = http.get("/config").json()
        assert config["root"] == f"{url}/ask"
        shown = http.get("/").text
        parts = set(re.findall(r"""(?:src|href)="(\.?/?(?:assets|static|theme)[^"]*)""", shown))
        assert parts
        for part in parts:
            assert http.get(urljoin(f"{url}/ask/", part)).status_code == 200, part
        upload = http.post("/gradio_api/upload", files={"files": ("a.png", png(250), "image/png")}).json()[0]
        data = ["brightness", {"path": upload, "meta": {"_type": "gradio.FileData"}}, "", ""]
        joined = http.post("/gradio_api/call/ask", json={"data": data})
        answer = http.get(f"/gradio_api/call/ask/{joined.json()['event_id']}").text
        assert "event: complete" in answer and "bright" in answer
        assert http.get("/models/brightness/card").status_code == 200
        assert "location" not in http.get("/models/brightness/card/", headers={"host": "evil.example"}).headers
        assert http.get("/health/live").json() == {"status": "live"}
        assert http.get("/monitoring").status_code == 404


@pytest.mark.skipif(not find_chromium(), reason="no Chromium")
@pytest.mark.parametrize("way", [CUT, LEFT], ids=["cut", "left"])
def test_both_pages_below_a_prefix_in_a_browser(page, served, fronts, tmp_path, way):
    with nginx(tmp_path / "nginx", page.url, "/ask", way) as (url,), Browser() as browser:
        tab = browser.open(f"{url}/ask/")
        tab.until("document.querySelector('#gallery img')?.naturalWidth > 0")
        tab.run("document.querySelector('#gallery button').click()")
        tab.until("document.querySelector('#said .truth')")
        links = tab.run("[...document.querySelectorAll('#said a')].map((a) => new URL(a.href).pathname)")
        assert links[0] == "/ask/models/brightness/card"
        elsewhere = {asked for asked in tab.requests if not asked.startswith((f"{url}/ask/", "blob:", "data:"))}
        wanted = {
            f"{url}/manifest.json",
            f"{url}/favicon.ico",
        }  # Gradio's template has the one, browsers look for the other
        assert {asked for asked in elsewhere if asked.startswith(url)} <= wanted
        own = browser.open(f"{fronts[way == LEFT]}/ml/v1/#brightness")
        own.until("document.querySelector('.panel:not([hidden]) .samples:not([hidden]) button')")
        own.run("document.querySelector('.panel:not([hidden]) .samples button').click()")
        own.until("document.querySelector('.said')")
        assert not own.troubles
