"""The page of project.serve.frontend in a process, the real service behind it: over HTTP, and in a real browser."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from browser import Browser, find_chromium
from served import HOSTILE, SHADES, Service, news, registry, shades
from test_page import png

from project.serve.limits import new_key

LIMIT = 100_000  # bytes of an upload
# every address that the page's process looks up or connects to is written down
WATCHED = """
import runpy, sys
log = open(sys.argv.pop(1), "a", buffering=1)
def seen(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        where = args[1] if event != "socket.getaddrinfo" else args[:2]
        log.write(f"{event} {where[0] if isinstance(where, tuple) else where}\\n")
sys.addaudithook(seen)
runpy.run_module("project.serve.frontend", run_name="__main__", alter_sys=True)
"""


class Relay:
    """An address that leads to a service, to another one, or to none."""

    def __init__(self):
        self.socket, self.ends, self.flowing = socket.socket(), [], threading.Event()
        self.socket.bind(("127.0.0.1", 0))  # taken, and refused until it is opened
        self.url, self.target, self.thread = f"http://127.0.0.1:{self.socket.getsockname()[1]}", None, None
        self.flowing.set()

    def lead(self, url):
        """Lead to another address from now on; None: nowhere."""
        self.target = url and ("127.0.0.1", int(url.rpartition(":")[2]))
        self.drop()
        if not self.thread:
            self.socket.listen(64)
            self.thread = threading.Thread(target=self._accept, daemon=True)
            self.thread.start()

    def drop(self):
        """End the connections that there are."""
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.ends = []

    def _accept(self):
        while True:
            try:
                here, _ = self.socket.accept()
            except OSError:
                return
            if not self.target:
                here.close()
                continue
            there = socket.create_connection(self.target, timeout=20)
            self.ends += [here, there]
            for a, b in ((here, there), (there, here)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, a, b):
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                self.flowing.wait(30)
                b.sendall(data)
        for end in (a, b):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        a.close()

    def close(self):
        """Lead nowhere, and end."""
        self.target = None
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.drop()


class Front:
    """The page in a process, ended by its own id."""

    def __init__(self, folder, url, **settings):
        self.folder, self.connections, self.temporary = folder, folder / "connections.txt", folder / "temporary"
        self.temporary.mkdir()
        given = {k: str(v) for k, v in settings.items()} | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PROJECT_", "GRADIO_"))} | given
        self.err = folder / "front.err"
        command = [sys.executable, "-c", WATCHED, self.connections, "--url", url, "--port", "0"]
        with self.err.open("wb") as err:
            self.process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=err)

    def __enter__(self):
        until = time.monotonic() + 90
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", self.errors())):
            if self.process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise AssertionError(f"the page did not start:\n{self.errors()}")
            time.sleep(0.02)
        self.url = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        config = self.http.get("/config").json()
        names = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
        self.outputs = {d["api_name"]: [names[i] for i in d["outputs"]] for d in config["dependencies"]}
        return self

    def __exit__(self, *_):
        self.stop(signal.SIGINT)

    def stop(self, sig):
        """End it; its exit status."""
        if hasattr(self, "http"):
            self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise

    def errors(self):
        """What the process said."""
        return self.err.read_text(encoding="utf-8", errors="replace")

    def join(self, name, *data):
        """Ask for something; the response holds the id of the answer."""
        return self.http.post(f"/gradio_api/call/{name}", json={"data": data})

    def call(self, name, *data):
        """What changed in which part of the page."""
        joined = self.join(name, *data)
        assert joined.status_code == 200, joined.text
        answer = self.http.get(f"/gradio_api/call/{name}/{joined.json()['event_id']}").text
        event, found = re.search(r"event: (complete|error)\ndata: (.*)\n", answer).groups()
        assert event == "complete", answer
        shown = zip(self.outputs[name], json.loads(found), strict=True)
        return {part: {k: v for k, v in it.items() if k != "__type__"} for part, it in shown if len(it) > 1}

    def upload(self, content, name="image.png"):
        """Upload a file as the page does; what a message says of it."""
        response = self.http.post("/gradio_api/upload", files={"files": (name, content, "image/png")})
        assert response.status_code == 200, response.text
        return {"path": response.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def ask(self, task, content=None, first="", second=""):
        """The answer to an input."""
        return self.call("ask", task, self.upload(content) if content is not None else None, first, second)


@pytest.fixture(scope="module")
def key():
    return new_key()


@pytest.fixture(scope="module")
def relay():
    made = Relay()
    yield made
    made.close()


@pytest.fixture(scope="module")
def front(tmp_path_factory, relay, key):
    """The page, started before there is a service."""
    about = {"PROJECT_API_KEY": key[0], "PROJECT_SERVE_MAX_BYTES": LIMIT, "PROJECT_FRONTEND_QUEUE": 3}
    with Front(tmp_path_factory.mktemp("front"), relay.url, PROJECT_FRONTEND_KEPT=3 * LIMIT, **about) as running:
        running.first = running.call("open")
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    registry(folder / "registry", shades(folder / "shades"), news(folder / "news"))
    return folder


@pytest.fixture(scope="module")
def service(place, front, relay, key):
    with Service(place, PROJECT_API_KEYS=key[1], PROJECT_SERVE_MAX_BYTES=LIMIT) as running:
        relay.lead(running.url)
        yield running


@pytest.fixture
def page(front, service, relay):
    """The page, with its service."""
    yield front
    if relay.target != ("127.0.0.1", int(service.url.rpartition(":")[2])):
        relay.lead(service.url)


def words(view, part="said"):
    """What a person reads."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", view[part]["value"])).strip()


def chances(view):
    """Class -> probability, as the bars show it."""
    return {row["label"]: row["confidence"] for row in view["bars"]["value"]["confidences"]}


def test_it_starts_without_a_service_and_finds_it_later(front, service):
    first = front.first
    assert first["work"] == {"visible": False} and first["banner"]["visible"]
    assert "is the service running?" in words(first, "banner") and "Reload this page" in words(first, "banner")
    assert "127.0.0.1" not in words(first, "banner")  # strangers need not know where it is
    assert "no service that can be asked" in front.errors()
    view = front.call("open")
    assert view["work"] == {"visible": True} and view["banner"] == {"visible": False}
    assert sorted(task for _, task in view["task"]["choices"]) == ["fake_news", "shades"]


def test_a_task_has_its_inputs_and_samples(page):
    view = page.call("choose", "shades")
    assert view["picture"]["visible"] and not view["first"]["visible"] and not view["second"]["visible"]
    captions = [row["caption"] for row in view["gallery"]["value"]]
    assert captions == ["bright", "dark", "dark"]
    path = view["gallery"]["value"][0]["image"]["path"]
    assert page.http.get(f"/gradio_api/file={path}").content.startswith(b"\x89PNG")
    view = page.call("choose", "fake_news")
    assert not view["picture"]["visible"] and not view["gallery"]["visible"]
    assert (view["first"]["label"], view["second"]["label"]) == ("Title", "Text")
    assert view["sample"]["choices"][0] == ["The minister said no", 0]


def test_an_image_is_answered_with_everything(page, service, key):
    view = page.ask("shades", png(250))
    assert words(view).startswith("bright 97.") and "round trip" in words(view)
    assert list(chances(view))[0] == "bright" and len(chances(view)) == 5
    assert f"All {len(SHADES)} classes" in words(view)
    logged = service.get(f"/predictions/{view['id']['value']}", **{"X-API-Key": key[0]})
    assert (logged["task"], logged["predicted"], logged["input_bytes"]) == ("shades", "bright", len(png(250)))
    assert logged["version"] in words(view) and "commit c0ffee" in words(view)
    links = re.findall(r'href="([^"]+)"', view["said"]["value"])
    assert links == ["models/shades/card", "models/shades/lineage", f"predictions/{view['id']['value']}"]
    assert page.http.get(f"/{links[1]}").json()["version"] == logged["version"]
    assert page.http.get(f"/{links[2]}").json()["predicted"] == "bright"
    card = page.http.get(f"/{links[0]}")
    assert "Intended use" in card.text and "default-src 'none'" in card.headers["content-security-policy"]
    notebook = page.http.get("/models/shades/notebook")  # the toy bundle has none, and that is what the service says
    assert notebook.status_code == 404 and "no executed notebook" in notebook.json()["detail"]
    assert "sandbox" in notebook.headers["content-security-policy"]


def test_texts_are_answered(page):
    view = page.ask("fake_news", first="Shocking, shocking miracle", second="said the minister")
    assert words(view).startswith("fake ") and list(chances(view)) == ["fake", "real"]
    assert "classes" not in words(view)


def test_a_sample_tells_the_truth(page):
    page.call("open")
    view = page.call("sample", "shades", 2)
    assert "Wrong: the sample is labelled dark." in words(view) and list(chances(view))[0] == "bright"
    assert page.http.get(f"/gradio_api/file={view['picture']['value']['path']}").status_code == 200
    view = page.call("sample", "fake_news", 1)
    assert "Right: the sample is labelled fake." in words(view)
    assert view["first"]["value"] == "Shocking miracle" and view["second"]["value"].startswith("They do not want")


def test_a_label_is_corrected(page, service, key):
    view = page.ask("shades", png(250))
    id = view["id"]["value"]
    assert view["correction"] == {"visible": True} and view["label"]["value"] is None  # nothing to confirm by accident
    assert "Choose the true class first" in words(page.call("correct", id, None), "told")
    assert service.get(f"/predictions/{id}", **{"X-API-Key": key[0]})["label"] is None
    assert (
        words(page.call("correct", id, HOSTILE), "told")
        == "Noted as &lt;img src=x onerror=document.title=&#x27;owned&#x27;&gt;."
    )
    assert service.get(f"/predictions/{id}", **{"X-API-Key": key[0]})["label"] == HOSTILE
    told = words(page.call("correct", id, "brihgt"), "told")
    assert "Expected a class of shades" in told and "Did you mean &#x27;bright&#x27;?" in told
    assert "There is no answer to correct" in words(page.call("correct", "", "dark"), "told")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("shades", b"<html>not an image</html>"), "found a web page"),
        (("shades", b""), "empty"),
        (("shades",), "Choose an image first."),
        (("fake_news", None, " ", ""), "Type a title or a text first."),
        (("shade", png(1)), "Did you mean &#x27;shades&#x27;?"),
        (("", png(1)), "Choose a task first."),
        (({"a": 1}, png(1)), "Choose a task first."),
        (("../models", png(1)), "status 404"),
    ],
)
def test_what_goes_wrong_is_said_in_words_and_nothing_stale_is_left(page, given, told):
    view = page.ask(*given)
    assert told in words(view) and words(view).startswith("That did not work."), words(view)
    assert view["bars"] == {"value": {}, "visible": False} or view["bars"]["value"] is None
    assert view["correction"] == {"visible": False} and "Traceback" not in words(view)


def test_uploads_have_the_services_limits(page):
    files = {"files": ("large.png", bytes(LIMIT), "image/png")}
    large = page.http.post("/gradio_api/upload", files=files)
    assert large.status_code == 413 and "at most 100,000 bytes" in large.json()["detail"]
    kept = {"files": ("noise.png", os.urandom(LIMIT - 5_000), "image/png")}
    statuses = [
        page.http.post(
            "/gradio_api/upload", files=kept | {"files": (f"{i}.png", os.urandom(LIMIT - 5_000))}
        ).status_code
        for i in range(4)
    ]
    assert statuses[0] == 200 and statuses[-1] == 503  # what all uploads take together is limited as well
    for path in Path(page.temporary).rglob("*.png"):
        path.unlink()
    assert words(page.ask("shades", png(250))).startswith("bright")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/hostname",
        "/gradio_api/file={folder}/../../../../etc/hostname",
        "/gradio_api/file={folder}%2F..%2F..%2F..%2Fetc%2Fhostname",
        "/gradio_api/file=http://127.0.0.1:9/",
        "/gradio_api/file=https://example.org/",
        "/gradio_api/proxy=https://a.hf.space/",
        "/gradio_api/deep_link",
        "/gradio_api/runs",
        "/gradio_api/vibe-code/",
        "/gradio_api/stream/a/b/1/playlist.m3u8",
        "/gradio_api/openapi.json",
        "/gradio_api/token",
        "/monitoring",
        "/monitoring/summary",
        "/docs",
        "/openapi.json",
        "/login",
        "/models/shades/../../health/ready",
    ],
)
def test_what_the_page_does_not_need_does_not_exist(page, path):
    folder = next(page.temporary.glob("project-frontend-*"))
    found = page.http.get(path.format(folder=folder))
    assert found.status_code in (403, 404), (found.status_code, found.text[:200])


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "{folder}/../../front.err", "http://127.0.0.1:9/a.png", "https://example.org/a.png"]
)
@pytest.mark.parametrize("part", ["picture", "task", "first"])
def test_a_message_names_no_file_that_was_not_uploaded(page, path, part):
    folder = next(page.temporary.glob("project-frontend-*"))
    named = {"path": path.format(folder=folder), "meta": {"_type": "gradio.FileData"}}
    given = {"task": "shades", "picture": None, "first": "", "second": ""} | {
        part: [named] if part == "first" else named
    }
    before = sorted(folder.rglob("*"))
    for route in ("call/ask", "queue/join"):
        about = {"data": [*given.values()], "fn_index": 2, "session_hash": "abc"}
        refused = page.http.post(f"/gradio_api/{route}", json=about)
        assert refused.status_code == 403 and "uploaded here" in refused.json()["detail"]
    assert page.http.post("/gradio_api/run/ask", json={"data": [*given.values()]}).status_code == 404
    assert sorted(folder.rglob("*")) == before


def test_a_message_that_is_none_is_refused(page):
    for body in (b"{", b"[" * 100_000, b"\xff", b"null", b'{"data": 7}'):
        refused = page.http.post("/gradio_api/call/ask", content=body, headers={"Content-Type": "application/json"})
        assert 400 <= refused.status_code < 500, (body[:9], refused.status_code, refused.text[:200])


def test_the_browser_is_told_to_load_nothing_from_elsewhere(page):
    index = page.http.get("/")
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy and "unsafe-eval" not in policy
    assert index.headers["cache-control"] == "no-store" and "x-request-id" in index.headers
    script = re.search(r'src="\.?(/assets/[^"]+\.js)"', index.text)[1]
    assert "max-age" in page.http.get(script).headers["cache-control"]
    assert page.http.get("/health/live").json() == {"status": "live"}


def test_questions_that_wait_are_bounded(page, relay):
    picture = page.upload(png(250))
    relay.flowing.clear()  # the service is slow now
    try:
        joined = [page.join("ask", "shades", picture, "", "") for _ in range(16)]
    finally:
        relay.flowing.set()
    statuses = [response.status_code for response in joined]
    assert statuses.count(200) <= 8 + 3 + 1 and 503 in statuses, statuses  # eight at once, three that wait
    assert "full" in joined[-1].json()["detail"].lower()
    for response in joined:
        if response.status_code == 200:
            page.http.get(f"/gradio_api/call/ask/{response.json()['event_id']}")
    assert words(page.ask("shades", png(250))).startswith("bright")


def test_a_service_that_refuses_the_key_says_so(page, relay, place):
    with Service(place, PROJECT_API_KEYS=new_key()[1], PROJECT_SERVE_LOG="off") as other:
        relay.lead(other.url)
        assert "Expected a key that is known here" in words(page.call("open"), "banner")
        assert "(status 401)" in words(page.ask("shades", png(250)))


def test_a_service_that_is_gone_is_told(page, relay):
    relay.lead(None)
    told = words(page.ask("shades", png(250)))
    assert "is the service running?" in told and relay.url not in told
    assert page.http.get("/models/shades/lineage").status_code == 502


def test_it_asks_nobody_but_the_service(page, relay):
    """Last of those that talk to the page: whatever was done until now is in the list."""
    words(page.ask("shades", png(250)))
    found = {line.partition(" ")[2].strip() for line in page.connections.read_text(encoding="utf-8").splitlines()}
    assert found and found <= {"127.0.0.1", "b'127.0.0.1'", "localhost"}, found


def test_an_import_loads_nothing_heavy():
    heavy = ("gradio", "fastapi", "uvicorn", "torch", "pandas", "onnxruntime")
    code = f"import project.serve.frontend, sys; print([m for m in {heavy} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


# ---- in a browser
SEEN = pytest.mark.skipif(not find_chromium(), reason="no Chromium on PATH; apt-get install chromium")
FILE = "#picture input[type=file]"


@pytest.fixture(scope="module")
def chromium():
    with Browser() as running:
        yield running


@pytest.fixture
def tab(chromium, page):
    """The page, its tasks there."""
    tab = chromium.open(page.url)
    tab.until("document.querySelector('#task input')")
    yield tab
    chromium.close_tabs()


def choose(tab, task, there):
    """Pick a task, and wait until something of it is there."""
    tab.run(f"document.querySelector('#task input[value={task}]').click()")
    tab.until(f"document.querySelector('{there}')")


@SEEN
def test_an_image_in_a_browser(tab, page, tmp_path):
    (tmp_path / "bright.png").write_bytes(png(250))
    choose(tab, "shades", "#gallery img")
    tab.until("document.querySelector('#gallery img').naturalWidth === 8")
    assert tab.run("[...document.querySelectorAll('#gallery img')].map((i) => i.alt)") == ["bright", "dark", "dark"]
    edges = "[...document.querySelectorAll('#gallery {}')].map((e) => Math.round(e.getBoundingClientRect().{}))"
    below, above = tab.run(edges.format("img", "bottom")), tab.run(edges.format(".caption-label", "top"))
    assert len(above) == 3 and all(b <= a for b, a in zip(below, above, strict=True)), "a caption covers its picture"
    tab.choose_file(FILE, tmp_path / "bright.png")
    tab.until("document.querySelector('#said .said')")
    assert tab.text("#said .said").startswith("bright 97")
    tab.until("document.querySelectorAll('#bars meter, #bars [role=meter]').length === 5")
    tab.until("document.querySelector('#note')")
    tab.click("#note")  # carelessly
    tab.until("document.querySelector('#told').innerText.includes('Choose the true class')")
    tab.run("document.querySelector('#label input').focus()")
    tab.press("bright", "Enter")
    tab.click("#note")
    tab.until("document.querySelector('#told').innerText.includes('Noted as bright')")
    tab.run("document.querySelectorAll('#gallery button')[2].click()")
    tab.until("document.querySelector('#said .truth')")
    assert tab.text("#said .truth") == "Wrong: the sample is labelled dark."
    assert tab.run("document.querySelector('#label input').value") == ""
    links = tab.run("[...document.querySelectorAll('#said a')].map((a) => new URL(a.href).pathname)")
    assert links[:2] == ["/models/shades/card", "/models/shades/lineage"]
    assert HOSTILE in tab.text("#bars") and tab.run("document.title") == "Ask a model"  # its name stays text
    assert tab.run("document.querySelector('#said').getAttribute('aria-live')") == "polite"
    assert not tab.troubles
    assert all(url.startswith((page.url, "blob:", "data:")) for url in tab.requests), tab.requests


@SEEN
def test_a_text_in_a_browser_on_a_phone(chromium, page):
    tab = chromium.open(page.url, width=390, height=844, phone=True)
    tab.until("document.querySelector('#task input')")
    choose(tab, "fake_news", "#first textarea, #first input")
    tab.run("document.querySelector('#first textarea, #first input').focus()")
    tab.press("Shocking, shocking miracle", "Enter")
    tab.until("document.querySelector('#said .said')")
    assert tab.text("#said .said").startswith("fake 99")
    tab.until("document.querySelector('#label input') && document.querySelector('#bars [role=meter], #bars meter')")
    assert tab.run("document.documentElement.scrollWidth") <= 390
    found = tab.names()
    controls = [(role, name) for role, name in found if role in ("button", "radio", "textbox", "combobox", "link")]
    assert len(controls) > 8 and all(name.strip() for _, name in controls), controls
    assert ("textbox", "Title") in found and ("combobox", "What it really is") in found
    assert not tab.troubles
    tab.close()


@SEEN
def test_no_service_in_a_browser_and_then_one(chromium, page, relay, service):
    relay.lead(None)
    tab = chromium.open(page.url)
    tab.until("document.querySelector('#banner .trouble')")
    assert "Reload this page" in tab.text("#banner") and not tab.run("document.querySelector('#task')?.offsetParent")
    relay.lead(service.url)
    tab.go(f"{page.url}/?again")
    tab.until("document.querySelector('#task input')")
    tab.close()


def test_it_ends_at_once_and_leaves_nothing(front):
    """The last of all: pages that are open do not hold it up, and uploads are gone."""
    front.upload(png(250))
    assert [*front.temporary.rglob("*.png")]
    with front.http.stream("GET", "/gradio_api/heartbeat/abc") as stream:
        assert next(stream.iter_text()).startswith("data: ALIVE")
        began = time.monotonic()
        front.process.send_signal(signal.SIGTERM)
        assert front.process.wait(20) == 0
        assert time.monotonic() - began < 20, front.errors()  # an open connection does not hold it; a busy machine may
    assert not [*front.temporary.iterdir()]
    assert "Traceback" not in front.errors() and "Exception" not in front.errors(), front.errors()
