"""What the internet sends: each is answered with the right 4xx, memory stays flat, and the server still serves."""

import asyncio
import io
import json
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import httpx
import pytest
from PIL import Image
from serve_process import Server, all_of, image_bundle, make_registry, png

from project.serve.load import image_sample, measure

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")
MOST = 2_000_000


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with small limits and little patience."""
    folder = tmp_path_factory.mktemp("hostile")
    make_registry(folder)
    with Server(folder, max_bytes=MOST, read_seconds=1.5, max_pixels=4_000_000) as server:
        yield server


@pytest.fixture(autouse=True)
def still_serving(served):
    """After each attack: a plain request is answered, nothing failed, and memory did not grow by much."""
    plain(served)
    before = served.memory()
    yield
    plain(served)
    assert served.memory() - before < 120_000_000
    assert "Traceback" not in served.errors()


def plain(served):
    """An ordinary request."""
    answer = served.client.post("/predict/brightness", files={"file": png(250)})
    assert answer.status_code == 200 and answer.json()["class"] == "bright"


def refused(answer, *statuses):
    """The error is one of ours, with one of these statuses."""
    assert answer.status_code in statuses, (answer.status_code, answer.text[:300])
    assert answer.headers["content-type"] == "application/problem+json"
    assert "Traceback" not in answer.text
    return answer.json()["detail"]


# --- images


def chunk(kind, content):
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_claiming(width, height, pixels=b"\0" * 100, extra=b""):
    """A PNG with any head."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + extra
        + chunk(b"IDAT", zlib.compress(pixels, 9))
        + chunk(b"IEND", b"")
    )


def as_format(kind, mode="RGB", **options):
    """An ordinary image of a format."""
    out = io.BytesIO()
    Image.new(mode, (40, 30)).save(out, kind, **options)
    return out.getvalue()


IMAGES = {
    "empty": (b"", 400),
    "nul bytes": (b"\0" * 1000, 415),
    "text": (b"hello, I am an image", 415),
    "web page": (b"<html><script>alert(1)</script></html>", 415),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', 415),
    "pdf": (b"%PDF-1.4\n1 0 obj\n", 415),
    "program": (b"\x7fELF" + bytes(100), 415),
    "tiff": (as_format("TIFF"), 415),
    "icon": (as_format("ICO"), 415),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
    "claims 2 gigapixels": (png_claiming(50_000, 50_000), 413),
    "claims the largest": (png_claiming(2**31 - 1, 2**31 - 1), (400, 413)),
    "claims no pixels": (png_claiming(0, 10), 400),
    "bomb": (png_claiming(30_000, 30_000, bytes(30_001 * 3_000)), 413),
    "bomb within the limit of pixels": (png_claiming(2000, 1999, bytes(2001 * 1999)), 200),
    "bomb in a text chunk": (
        png_claiming(28, 28, b"\0" * 812, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
        (200, 400),
    ),
    "truncated png": (png(250)[:45], 400),
    "truncated jpeg": (as_format("JPEG")[:200], 400),
    "truncated gif": (as_format("GIF")[:30], 400),
    "head only": (png(250)[:8], 400),
    "magic and then a page": (b"\x89PNG\r\n\x1a\n<script>alert(1)</script>", (400, 413)),
    "magic and then noise": (b"\xff\xd8\xff" + bytes(range(256)) * 20, 400),
    "wrong checksum": (png(250)[:-20] + b"\0" * 20, (200, 400)),
    "polyglot with a zip": (png(250) + b"PK\x03\x04" + bytes(1000), 200),
    "polyglot with a page": (as_format("GIF") + b"<script>alert(1)</script>", 200),
    "webp": (as_format("WEBP"), 200),
    "one pixel": (png(1, size=1), 200),
    "one row": (png_claiming(5000, 1, bytes(5001)), 200),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(served, name):
    content, status = IMAGES[name]
    for sent in (
        {"files": {"file": ("a.png", content)}},
        {"content": content, "headers": {"content-type": "image/png"}},
    ):
        answer = served.client.post("/predict/brightness", **sent)
        wanted = status if isinstance(status, tuple) else (status,)
        assert answer.status_code in wanted, (answer.status_code, answer.text[:200])
        if answer.status_code != 200:
            refused(answer, *wanted)


# --- names

NAMES = [
    "../../../../tmp/climbed.png",
    "/etc/passwd",
    "C:\\Windows\\climbed.png",
    "a\x00b.png",
    "\u202egnp.exe",
    "💥" * 500,
    "con.png",
    "%2e%2e%2fclimbed.png",
    "a" * 3000 + ".png",
    "; rm -rf.png",
    '"><script>.png',
    "\ufeff\u200b.png",
]


def test_names_are_never_paths(served, tmp_path):
    before = sorted(p.name for p in Path.cwd().iterdir())
    sent = [("files", (name, png(250))) for name in NAMES]
    rows = served.client.post("/predict/brightness/batch", files=sent).json()["rows"]
    for name, row in zip(NAMES, rows, strict=True):
        assert row["prediction"]["class"] == "bright", name
        assert "/" not in row["name"].replace("</", "") and "\\" not in row["name"] and len(row["name"]) <= 120
        assert row["name"].isprintable()
    assert sorted(p.name for p in Path.cwd().iterdir()) == before
    assert not Path("/tmp/climbed.png").exists()


@pytest.mark.parametrize(
    "task", ["%2e%2e", "..%2f..%2fetc", "a" * 5000, "💥", "%00", "news%0d%0aX-Evil: 1", "null", "{task}"]
)
def test_odd_tasks(served, task):
    for path in (f"/predict/{task}", f"/models/{task}", f"/models/{task}/card", f"/samples/{task}"):
        method = "POST" if path.startswith("/predict") else "GET"
        answer = served.client.request(method, path)
        assert answer.status_code in (404, 405), path
        assert "x-evil" not in answer.headers


# --- forms


def form(*parts, boundary="b"):
    """A form, as raw as it has to be."""
    body = b"".join(b"--" + boundary.encode() + b"\r\n" + p + b"\r\n" for p in parts) + f"--{boundary}--\r\n".encode()
    return {"content": body, "headers": {"content-type": f"multipart/form-data; boundary={boundary}"}}


FILE = b'Content-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
FORMS = {
    "thousands of parts": (form(*[b'Content-Disposition: form-data; name="x"\r\n\r\n1'] * 5000), 413),
    "thousands of files": (form(*[FILE + b"x"] * 5000), 413),
    "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
    "empty boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary="}}, 400),
    "no end": ({"content": form(FILE + png())["content"][:-4], "headers": form()["headers"]}, 400),
    "nothing": (form(), (400, 422)),
    "a part without headers": (form(b"\r\nx"), 400),
    "headers that do not end": (form(b"Content-Disposition: form-data; name=x" + b"y" * 5000), 400),
    "a header of 100 kB": (form(b"X-A: " + b"y" * 100_000 + b"\r\n" + FILE + png()), 400),
    "ten thousand headers": (form(b"A: b\r\n" * 10_000 + FILE + png()), 400),
    "no name": (form(b"Content-Disposition: form-data\r\n\r\nx"), 400),
    "not form data": (form(b'Content-Disposition: attachment; name="file"\r\n\r\nx'), 400),
    "a name of 1000 characters": (form(b'Content-Disposition: form-data; name="' + b"n" * 1000 + b'"\r\n\r\nx'), 422),
    "a form in a form": (form(FILE + form(FILE + png(), boundary="c")["content"]), 415),
    "bytes that are no text": (form(b'Content-Disposition: form-data; name="\xff\xfe"\r\n\r\nx'), 422),
    "boundaries everywhere": ({"content": b"--b\r\n" * 20_000, "headers": form()["headers"]}, (400, 413)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(served, name):
    sent, status = FORMS[name]
    answer = served.client.post("/predict/brightness", **sent)
    refused(answer, *(status if isinstance(status, tuple) else (status,)))


# --- texts and JSON

TEXTS = {
    "right to left": "\u202eevil\u202c",
    "combining": "e" + "\u0301" * 5000,
    "emoji": "👩‍👩‍👧‍👦" * 1000,
    "nul": "a\0b",
    "controls": "".join(map(chr, range(32))),
    "private": "\ue000\U0010ffff\uffff",
    "one long word": "x" * 90_000,
    "a million spaces": " " * 90_000 + "x",
    "template": "{{7*7}} ${jndi:ldap://x} '; DROP TABLE predictions;--",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(served, name):
    answer = served.client.post("/predict/news", json={"title": TEXTS[name], "text": "good"})
    assert answer.status_code == 200, answer.text[:200]
    row = served.client.get(f"/predictions/{answer.json()['id']}")
    assert row.status_code == 200 and row.json()["predicted"] == answer.json()["class"]


JSONS = {
    "nothing": (b"", 400),
    "not UTF-8": (b'{"title": "\xff"}', 400),
    "UTF-16": ('{"title": "x"}'.encode("utf-16"), 400),
    "NaN": (b'{"title": NaN}', 400),
    "deep": (b"[" * 500_000, 400),
    "half a million numbers": (b"[" + b"1," * 500_000 + b"1]", 413),
    "half a million names": (b"{" + b",".join(b'"%d":1' % i for i in range(150_000)) + b"}", 413),
    "deep and closed": (b"[" * 5_000 + b"]" * 5_000, (400, 422)),
    "half a character": (b'{"title": "\\ud800"}', 400),
    "half a character in a name": (b'{"\\udfff": "x"}', 400),
    "a number of a million digits": (b'{"title": ' + b"9" * 1_000_000 + b"}", (400, 422)),
    "a huge exponent": (b'{"title": 1e999999}', 422),
    "null": (b"null", 422),
    "a name twice": (b'{"title": "x", "title": 5}', 422),
    "a name twice, as text": (b'{"title": "x", "title": "y"}', 422),
    "ten thousand names": (json.dumps({f"n{i}": "x" for i in range(10_000)}).encode(), 422),
    "too long": (json.dumps({"title": "x" * 1_000_000}).encode(), 413),
    "prototype": (b'{"__proto__": {"x": 1}}', 422),
}


@pytest.mark.parametrize("name", JSONS)
def test_json(served, name):
    content, status = JSONS[name]
    answer = served.client.post("/predict/news", content=content, headers={"content-type": "application/json"})
    refused(answer, *(status if isinstance(status, tuple) else (status,)))


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "x" * 100_000, "Coat\r\nX-Evil: 1"])
def test_labels(served, name):
    id = served.client.post("/predict/brightness", files={"file": png()}).json()["id"]
    content = json.dumps({"label": name})
    answer = served.client.post(
        f"/predictions/{id}/feedback", content=content, headers={"content-type": "application/json"}
    )
    refused(answer, 400, 413, 422)


def test_compressed_bodies_are_refused(served):
    """A kilobyte that becomes a gigabyte never gets the chance."""
    packed = zlib.compress(bytes(10_000_000))
    for encoding in ("gzip", "deflate", "br"):
        answer = served.client.post("/predict/news", content=packed, headers={"content-encoding": encoding})
        assert "not compressed" in refused(answer, 415)


# --- sizes


def pieces(n, size=1_000_000):
    """A body without a length."""
    for _ in range(n):
        yield bytes(size)


def test_hundred_megabytes(served):
    headers = {"content-type": "image/png"}
    answer = served.client.post("/predict/brightness", content=bytes(100_000_000), headers=headers)
    assert f"at most {MOST:,} bytes" in refused(answer, 413)
    answer = served.client.post("/predict/brightness", content=pieces(100), headers=headers)
    assert f"at most {MOST:,} bytes" in refused(answer, 413)


def test_a_batch_of_many_rows(served):
    content = b"title,text\n" + b"good,x\n" * 100_000
    answer = served.client.post("/predict/news/batch", content=content, headers={"content-type": "text/csv"})
    assert "at most 256 rows" in refused(answer, 413)
    one = b'title,text\n"' + b"x" * 1_000_000 + b'",x\n'
    answer = served.client.post("/predict/news/batch", content=one, headers={"content-type": "text/csv"})
    if answer.status_code == 200:
        assert answer.json()["rows"][0]["error"]["status"] == 413
    else:
        refused(answer, 400)


def test_many_large_uploads_at_once(served):
    """Many clients that each send what one may send."""

    async def all_of_them():
        async with httpx.AsyncClient(
            base_url=served.url, timeout=60, limits=httpx.Limits(max_connections=60)
        ) as client:
            headers = {"content-type": "image/png"}
            work = [client.post("/predict/brightness", content=bytes(MOST - 10), headers=headers) for _ in range(80)]
            return await asyncio.gather(*work)

    asyncio.run(all_of_them())
    before = served.memory()
    answers = asyncio.run(all_of_them())
    assert {a.status_code for a in answers} <= {415, 503}
    assert all("retry-after" in a.headers for a in answers if a.status_code == 503)
    assert served.memory() - before < 120_000_000  # they sent 160 MB, twice


# --- slow and broken clients


def connect(served):
    """A connection to write anything to."""
    return socket.create_connection(("127.0.0.1", served.port), timeout=20)


def test_slow_body(served):
    """A byte now and then, for ever."""
    with connect(served) as c:
        c.sendall(
            b"POST /predict/brightness HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n"
        )
        c.settimeout(0.2)
        found, end = b"", time.monotonic() + 20
        while not found and time.monotonic() < end:
            try:
                c.sendall(b"x")
                found = c.recv(65536)
            except TimeoutError:
                pass
        c.settimeout(20)
        found += all_of(c)
    assert found.startswith(b"HTTP/1.1 408") and b"of 1,000 bytes" in found


def test_no_body_at_all(served):
    with connect(served) as c:
        c.sendall(b"POST /predict/brightness HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert all_of(c).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("start", [b"", b"GET /models HTTP/1.1\r\nX-A: ", b"POST"])
def test_slow_headers(served, start):
    with connect(served) as c:
        c.sendall(start)
        found = all_of(c)  # ends, because the server closes
    assert found == b"" or found.startswith(b"HTTP/1.1 4")


def test_endless_headers(served):
    with connect(served) as c:
        c.sendall(b"GET /models HTTP/1.1\r\n")
        try:
            for _ in range(400):
                c.sendall(b"X-A: " + b"y" * 10_000 + b"\r\n")
            found = all_of(c)
        except OSError:
            return  # cut off while it sent
    assert found.startswith(b"HTTP/1.1 4") or found == b""


BROKEN = [
    b"\0\0\0\0\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"POST /predict/news HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /predict/news HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"POST /predict/news HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /predict/news HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"GET /models\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"TRACE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n",
]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_broken_requests(served, content):
    with connect(served) as c:
        try:
            c.sendall(content)
            c.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        found = all_of(c)
    assert not found or found.startswith((b"HTTP/1.1 4", b"HTTP/1.1 2")), found[:100]


def test_clients_that_leave(served):
    """Hundreds that hang up in the middle of everything."""
    head = b"POST /predict/brightness HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 5000\r\n\r\n"
    for i in range(300):
        with connect(served) as c:
            c.sendall(head[: len(head) * (i % 10 + 1) // 10])
    full = (
        b"POST /predict/brightness HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
        % len(png())
    )
    for _ in range(100):
        with connect(served) as c:
            c.sendall(full + png())


# --- the document's own promises


def test_schemathesis(served, tmp_path):
    """Whatever OpenAPI allows, and much that it does not: no 5xx, and answers as documented."""
    command = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or shutil.which("schemathesis")
    if not command:
        pytest.skip("schemathesis is not installed")
    checks = "not_a_server_error,content_type_conformance,response_schema_conformance"
    options = [
        "--max-examples",
        "6",
        "--phases",
        "examples,fuzzing",
        "--seed",
        "1",
        "--no-color",
        "--suppress-health-check",
        "all",
    ]
    found = subprocess.run(
        [command, "run", f"{served.url}/openapi.json", "--checks", checks, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


# --- more than it can answer


def test_five_times_its_capacity(tmp_path):
    """Some are answered, in bounded time; the rest is told when to come back; memory stays where it is."""
    image_bundle(tmp_path / "slow", work=3072)
    settings = {"bundles": [str(tmp_path / "slow")], "max_queue": 8, "max_batch": 2, "seconds": 5.0, "max_requests": 40}
    sent = [image_sample(png(250))]
    with Server(tmp_path, **settings) as server:
        alone = measure(server.url, "brightness", sent, clients=4, seconds=3)
        crowd = measure(server.url, "brightness", sent, clients=60, seconds=20, pid=server.process.pid)
        plain(server)
    assert not alone.refused and not alone.failed and not crowd.failed
    asked = (len(crowd.latencies) + crowd.refused) / crowd.seconds
    assert asked > 5 * alone.per_second and crowd.refused
    assert len(crowd.latencies) > 30 and crowd.ms(99) < 3000  # bounded by the queue, not by the clients
    held = [bytes for _, bytes in crowd.memory]
    assert max(held[-50:]) - max(held[:50]) < 20_000_000  # the last five seconds, and the first
