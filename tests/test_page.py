"""The web page in a real browser, against the real service."""

import contextlib
import json
import re
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from browser import Browser, find_chromium
from served import HOSTILE, SHADES, Service, news, registry, shades

from project.serve.limits import new_key
from project.serve.page import new_nonce, page, page_headers

pytestmark = pytest.mark.skipif(not find_chromium(), reason="no Chromium on PATH; apt-get install chromium")

PHONE = {"width": 390, "height": 844, "phone": True}


def png(grey, edge=8):
    """A square of one grey."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes([grey]) * edge) * edge)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A registry with an image and a text task, and files to give to them."""
    folder = tmp_path_factory.mktemp("page")
    registry(folder / "registry", shades(folder / "shades"), news(folder / "news"))
    (folder / "bright.png").write_bytes(png(250))
    (folder / "dark.png").write_bytes(png(4))
    (folder / "page.png").write_text("<html>not an image</html>")
    return folder


@pytest.fixture(scope="module")
def service(place):
    with Service(place, PROJECT_SERVE_MAX_BYTES=100_000) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    with Browser() as running:
        yield running


@pytest.fixture
def browser(chromium):
    yield chromium
    chromium.close_tabs()


@pytest.fixture
def tab(browser, service):
    return opened(browser, service)


def opened(browser, service, task="shades", **look):
    """The page at a task, its samples there."""
    tab = browser.open(f"{service.url}/#{task}", **look)
    tab.until("document.querySelector('.panel:not([hidden]) .samples:not([hidden]) button')")
    return tab


def said(tab):
    """The decision, when there is one that is complete."""
    tab.until(
        "document.querySelector('.said') && document.querySelector('#result').getAttribute('aria-busy') === 'false'"
    )
    return tab.text(".said")


FILE = ".panel:not([hidden]) input[type=file]"


def test_each_answer_has_a_policy_of_its_own(service):
    pages = [(service.get("/"), service.headers["content-security-policy"]) for _ in range(2)]
    nonces = [re.search(r"script-src 'nonce-([\w-]{20,})'", policy)[1] for _, policy in pages]
    assert nonces[0] != nonces[1]
    for (html, policy), nonce in zip(pages, nonces, strict=True):
        assert html.count(f'nonce="{nonce}"') == len(re.findall(r"<(?:script|style)\b", html))
        assert "unsafe" not in policy and "default-src 'none'" in policy
    assert service.headers["cache-control"] == "no-store"


def test_an_image_file_is_answered_with_everything(tab, service, place):
    tab.choose_file(FILE, place / "bright.png")
    assert said(tab) == "bright"
    version = next(m["version"] for m in service.get("/models")["models"] if m["task"] == "shades")
    facts = tab.text(".answer > .facts")
    assert version in facts and re.search(r"\d\.\d ms, round trip \d+ ms", facts)
    links = tab.run("[...document.querySelectorAll('.answer a')].map((a) => a.getAttribute('href'))")
    assert links[:2] == ["models/shades/card", "models/shades/lineage"] and links[2].startswith("predictions/")
    logged = service.get(links[2])
    assert (logged["task"], logged["version"], logged["predicted"]) == ("shades", version, "bright")
    shares = tab.run(
        "[...document.querySelectorAll('.bars .fill')].map((f) => parseFloat(f.style.getPropertyValue('--share')))"
    )
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and shares[0] > 90
    assert tab.run("document.querySelector('.decision img').naturalWidth") == 8
    heard = tab.run("(({innerText, role}) => [role, innerText])(document.querySelector('#heard'))")
    assert heard[0] == "status" and heard[1].startswith("bright, 9")
    assert tab.run("scrollY") == 0  # the answer stands beside the input
    assert not tab.troubles
    assert all(url.startswith((service.url, "blob:", "data:")) for url in tab.requests), tab.requests


def test_the_rest_of_many_classes_is_one_press_away_and_names_stay_text(tab, place):
    tab.choose_file(FILE, place / "dark.png")
    assert said(tab) == "dark"
    tab.click(".more")
    names = tab.run("[...document.querySelectorAll('.bars .name')].map((n) => n.textContent)")
    assert sorted(names) == sorted(name.replace("_", " ") for name in SHADES)
    assert HOSTILE in names and tab.run("document.title") == "Ask a model"
    assert tab.run("document.activeElement.className") == "bars"
    assert not tab.troubles


@contextlib.contextmanager
def stub(html, nonce):
    """A server of one page, which never answers a POST."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/" else 404)
            for name, value in {"Content-Type": "text/html; charset=utf-8", **page_headers(nonce)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(html.encode())

        def do_POST(self):
            enough.wait(30)

        def log_message(self, *_):
            pass

    enough = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        enough.set()
        server.shutdown()


def test_what_slips_through_the_escaping_would_not_run(browser):
    """The page with holes made on purpose: code as an element and as an attribute; the policy stops each."""
    nonce = new_nonce()
    holes = f"{HOSTILE}<script>document.title = 'owned'</script><a id=a onclick=\"document.title = 'owned'\">a</a>"
    html = page([], {"nonce": nonce}).replace("</main>", f"{holes}</main>")
    assert html.count("owned") == 3

    with stub(html, nonce) as url:
        tab = browser.open(url)
        tab.click("#a")
        for script in ("document.body.innerHTML = '<b>owned</b>'", "eval('document.title = 1')"):
            with pytest.raises(RuntimeError, match="Trusted|Content Security Policy"):
                tab.run(script)
        tab.until("document.readyState === 'complete'")
        assert tab.run("document.title") == "Ask a model"
    assert sum("Content Security Policy" in trouble for trouble in tab.troubles) >= 3, tab.troubles


def test_dropped_and_pasted_images_are_answered(tab, place):
    tab.drop(".panel:not([hidden]) .drop", place / "dark.png")
    assert said(tab) == "dark"
    tab.paste(png(250))
    tab.until("document.querySelector('.said').textContent === 'bright'")
    tab.drop("footer", place / "dark.png")  # beside the marked place: answered too, and the page stays
    tab.until("document.querySelector('.said').textContent === 'dark'")
    assert not tab.troubles


def test_a_sample_tells_the_truth_and_its_label_can_be_corrected(tab, service):
    tab.click(".shelf button:nth-child(3)")
    assert said(tab) == "bright" and tab.text(".truth") == "Wrong: the sample is labelled dark."
    tab.click(".shelf button:nth-child(2)")
    tab.until("document.querySelector('.said').textContent === 'dark'")
    assert tab.text(".truth") == "Right: the sample is labelled dark."
    id = tab.run("document.querySelector('.answer a[href^=predictions]').getAttribute('href')")
    tab.click(".yes")
    tab.until("document.querySelector('.told').textContent.includes('Noted as dark')")
    assert service.get(id)["label"] == "dark"
    tab.run(f"document.querySelector('#label').value = {json.dumps(HOSTILE)}")
    tab.click(".feedback [type=submit]")
    tab.until("document.querySelector('.told').textContent.includes('onerror')")
    assert service.get(id)["label"] == HOSTILE
    assert not tab.troubles


def test_a_text_by_keyboard_alone(browser, service):
    tab = opened(browser, service, "fake_news")
    tab.tab_to("it.name === 'title'")
    tab.press("Shocking, shocking miracle", "Enter")
    assert said(tab) == "fake"
    tab.tab_to("it.classList.contains('yes')")
    outline = tab.run("getComputedStyle(document.activeElement).outline")
    assert "solid" in outline and "3px" in outline  # where the focus is can be seen
    tab.press("Enter")
    tab.until("document.querySelector('.told').textContent.includes('Noted as fake')")
    id = tab.run("document.querySelector('.answer a[href^=predictions]').getAttribute('href')")
    assert service.get(id)["label"] == "fake"
    assert not tab.troubles


def test_tasks_are_picked_with_the_arrows_and_stay_in_the_address(tab, service):
    tab.tab_to("it.name === 'task'")
    before = tab.run("document.activeElement.value")
    tab.press("ArrowRight")
    after = tab.run("document.activeElement.value")
    assert {before, after} == {"shades", "fake_news"}
    tab.until(f"document.querySelector('.panel:not([hidden])').dataset.task === '{after}'")
    assert tab.run("location.hash") == f"#{after}"
    tab.go(f"{service.url}/?again#{after}")
    assert tab.run("document.querySelector('.panel:not([hidden])').dataset.task") == after


def test_every_control_has_a_name_and_the_answer_is_announced(tab, place):
    tab.choose_file(FILE, place / "bright.png")
    said(tab)
    found = tab.names()
    controls = [
        (role, name) for role, name in found if role in ("button", "radio", "textbox", "combobox", "link", "image")
    ]
    assert len(controls) > 8 and all(name.strip() for _, name in controls), controls
    assert ("heading", "Ask a model") in found and ("list", "Probabilities") in found
    assert any(role == "status" for role, _ in found) and ("region", "Answer") in found
    drop = next(name for _, name in found if "choose a file" in name)
    assert "Drop an image here" in drop
    assert tab.run("document.documentElement.lang") == "en"


def test_lineage_is_shown_where_the_answer_is(tab, service, place):
    tab.choose_file(FILE, place / "bright.png")
    said(tab)
    tab.click("summary")
    tab.until("document.querySelector('.lineage').childElementCount")
    shown, lineage = tab.text(".lineage"), service.get("/models/shades/lineage")
    assert lineage["version"] in shown and "c0ffee" in shown
    assert not re.search(r"\[object|undefined|null|NaN", shown)
    steps = tab.run("[...document.querySelectorAll('.chain > li > strong')].map((s) => s.textContent)")
    assert steps == [
        "Problem",
        "Version",
        "Bundle",
        "Run",
        "Code",
        "All of it",
    ]  # these have no notebook, data or packages
    assert "holds no executed notebook" in tab.text(".chain .bad") and "1 value" not in shown
    links = tab.run("[...document.querySelectorAll('.chain a')].map((a) => a.getAttribute('href'))")
    assert links == ["models/shades/card", "models/shades/lineage"]
    for link in links:
        assert service.get(f"/{link}")


def test_errors_are_told_in_words(tab, place, tmp_path):
    tab.choose_file(FILE, place / "page.png")
    tab.until("document.querySelector('.problem')")
    words = tab.text(".problem")
    assert (
        "Another format is needed" in words
        and "Expected an image" in words
        and "found a web page" in words
        and "Request " in words
    )
    (tmp_path / "large.png").write_bytes(bytes(200_000))
    asked = len(tab.requests)
    tab.choose_file(FILE, tmp_path / "large.png")
    tab.until("document.querySelector('.problem').innerText.includes('Too large')")
    assert "0.2 MB" in tab.text(".problem") and "0.1 MB at most" in tab.text(".problem")
    assert len(tab.requests) == asked  # it was not even sent
    tab.choose_file(FILE, place / "bright.png")  # and the next one is answered
    assert said(tab) == "bright"


@pytest.mark.parametrize(
    "content", [b"\x00\x01\xfe\xff binary", b"\x89PNG\r\n\x1a\n", b"plain words", b"%PDF-1.7 \xe2"]
)
def test_errors_have_no_hexadecimal_bytes(tab, tmp_path, content):
    (tmp_path / "odd.png").write_bytes(content)
    tab.choose_file(FILE, tmp_path / "odd.png")
    tab.until("document.querySelector('.problem .detail')")
    detail = tab.text(".problem .detail")
    assert "Expected an image" in detail and not re.search(r"\b[0-9a-f]{2} [0-9a-f]{2}\b|\\x[0-9a-f]{2}", detail), (
        detail
    )


def test_nothing_to_read_is_told_and_leads_to_the_field(browser, service):
    tab = opened(browser, service, "fake_news")
    tab.click(".panel:not([hidden]) button.main")
    tab.until("document.querySelector('.problem')")
    assert "Type a title or a text first." in tab.text(".problem")
    assert tab.run("document.activeElement.name") == "title"


def test_a_service_that_never_answers_is_told_and_can_be_left(browser, place):
    nonce, models = new_nonce(), [{"task": t, "kind": "image", "classes": ["a", "b"]} for t in ("one", "two")]
    with stub(page(models, {"nonce": nonce, "timeout": 1}), nonce) as url:
        tab = browser.open(url)
        tab.choose_file(FILE, place / "bright.png")
        tab.until("document.querySelector('#result').getAttribute('aria-busy') === 'true'")
        tab.click("#tasks label:nth-of-type(2)")  # gone on: what was asked there is nobody's business here
        tab.run("new Promise((r) => setTimeout(r, 1500))")
        assert tab.text("#place") == "The answer appears here."
        tab.choose_file(FILE, place / "bright.png")
        tab.until("document.querySelector('.problem')")
        assert "There was none within 1 second." in tab.text(".problem")


def test_a_service_that_is_gone_is_told(browser, place):
    with Service(place) as service:
        tab = opened(browser, service)
    tab.choose_file(FILE, place / "bright.png")
    tab.until("document.querySelector('.problem')")
    assert "cannot be reached" in tab.text(".problem")


def test_a_key_is_asked_for_and_used(browser, place):
    key, digest = new_key()
    with Service(place, PROJECT_API_KEYS=digest, PROJECT_SERVE_MODE="production") as service:
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            service.get("/models")
        tab = browser.open(service.url)
        tab.run("document.querySelector('input[value=shades]').click()")
        tab.choose_file(FILE, place / "bright.png")
        tab.until("document.querySelector('.problem')")
        assert "Enter an API key" in tab.text(".problem")
        assert tab.run("document.activeElement.id") == "key"
        tab.press(key, "Tab")
        tab.until("document.querySelector('.samples:not([hidden]) img')?.naturalWidth === 8")
        tab.choose_file(FILE, place / "bright.png")
        assert said(tab) == "bright"


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_all_of_it_in_reach_of_a_thumb(browser, service, place, width):
    tab = opened(browser, service, **(PHONE | {"width": width}))
    tab.choose_file(FILE, place / "bright.png")
    said(tab)
    tab.run("document.querySelector('details').open = true")
    tab.until("document.querySelector('.lineage').childElementCount")
    assert tab.run("document.documentElement.scrollWidth") <= width
    small = tab.run(
        "[...document.querySelectorAll('button,select,summary,input:not([type=hidden]),textarea')]"
        ".filter((e) => e.offsetParent && e.getBoundingClientRect().height < 44).map((e) => e.outerHTML)"
    )
    assert not small
    top = tab.run("document.querySelector('#result').getBoundingClientRect().top")
    assert top < 844 / 2  # the page went to the answer


def test_light_and_dark_follow_the_system(browser, service, tmp_path):
    backs = []
    for dark in (False, True):
        tab = opened(browser, service, dark=dark)
        backs.append(tab.run("getComputedStyle(document.body).backgroundColor"))
        tab.screenshot(tmp_path / f"{dark}.png")
    assert backs == ["rgb(245, 246, 248)", "rgb(15, 19, 26)"]
    assert (tmp_path / "True.png").stat().st_size > 5000


def test_a_slow_answer_does_not_replace_a_newer_one(tab, place):
    tab.run(
        "(() => { const real = fetch; let n = 0; window.fetch = async (...args) => {"
        "const mine = ++n, answer = await real(...args); if (mine === 1) await new Promise((r) => setTimeout(r, 600));"
        "return answer; }; })()"
    )
    tab.choose_file(FILE, place / "dark.png")
    tab.choose_file(FILE, place / "bright.png")
    assert said(tab) == "bright"
    tab.run("new Promise((r) => setTimeout(r, 700))")
    assert tab.text(".said") == "bright"


def test_without_a_model_the_page_says_what_to_do(browser, tmp_path):
    with Service(tmp_path) as service:
        tab = browser.open(service.url)
        assert "No model is served yet" in tab.text("main") and not tab.troubles


def test_the_documentation_needs_nobody_else(browser, service):
    tab = browser.open(f"{service.url}/docs")
    tab.until("document.querySelectorAll('.opblock').length > 10")
    assert "/predict/{task}" in tab.text(".swagger-ui") and not tab.troubles
    loaded = tab.run("performance.getEntriesByType('resource').map((e) => e.name)")
    assert any(name.endswith("swagger-ui-bundle.js") for name in loaded)
    assert all(name.startswith((service.url, "data:")) for name in loaded), loaded


@pytest.mark.parametrize("width", [390, 1280])
def test_what_is_not_as_it_should_be_is_told_on_top(browser, tmp_path, width):
    """In words for everybody, at both widths, and gone when it is mended."""
    with Service(tmp_path, PROJECT_SERVE_POLL=0.1, PROJECT_CACHE=tmp_path / "cache") as running:
        place = registry(tmp_path / "registry", shades(tmp_path / "a"), news(tmp_path / "b"))
        running.wait_for(lambda: len(running.get("/models")["models"]) == 2)
        worse = place.add(shades(tmp_path / "c", sign=-1.0))
        file = place.open(worse).path / "model.onnx"
        content = file.read_bytes()
        file.chmod(0o644)
        file.write_bytes(content[:-1] + b"!")
        place.alias("shades", "production", worse.name)
        place.alias("fake_news", "production", None)
        running.wait_for(lambda: len(running.get("/health/ready")["reasons"]) == 2)
        tab = browser.open(f"{running.url}/", width=width)
        told = tab.text(".notices")
        assert f"shades: {worse.name}, which is in production, cannot be loaded; v1-" in told and "goes on" in told
        assert "fake_news: it was retired on" in told and str(tmp_path) not in told
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
        card = browser.open(f"{running.url}/models/shades/card", width=width)
        assert "Intended use" in card.text("main") and not card.troubles
        assert card.run("document.documentElement.scrollWidth <= innerWidth")
        file.write_bytes(content)
        running.wait_for(lambda: running.get("/health/ready")["status"] == "ready")
        assert "cannot be loaded" not in running.get("/")
