"""Whatever is sent, memory is bounded, nothing large is done where everybody waits, and nobody waits for a look-up."""

import asyncio
import io
import json
import random
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image, features
from serve_process import Server, image_bundle, make_registry, png, text_bundle

from project.data.readers import ImageError, decode_image, image_bytes
from project.serve import api, inputs, models, predict, predictor, routes
from project.serve.limits import Call, Problem, Settings, check_json, form_parts, json_body
from project.serve.log import PredictionLog, new_id

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc, and limits of Linux")
EDGE = 5000  # of a bomb: 25 million pixels


# --- files that are small and images that are not


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(edge: int, colour: int, depth: int = 8, extra: bytes = b"") -> bytes:
    """A PNG of zeros."""
    bits = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + edge * bits // 8)) for _ in range(edge)) + packer.flush()
    head = struct.pack(">IIBBBBB", edge, edge, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def lossless(edge: int) -> bytes:
    """A lossless picture of WebP in which every pixel is the same and takes no bit."""
    bits, place = 0, 0
    for value, n in ((edge - 1, 14), (edge - 1, 14), (1, 1), (0, 3), (0, 3), *[(1, 4)] * 5):
        bits, place = bits | value << place, place + n
    content = b"\x2f" + bits.to_bytes((place + 7) // 8, "little")
    return b"VP8L" + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def riff(content: bytes) -> bytes:
    """A file of WebP."""
    return b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content


def webp_canvas(edge: int) -> bytes:
    """A large canvas with an animation of one pixel."""
    side, one = (edge - 1).to_bytes(3, "little"), lossless(1)
    frame = bytes(12) + (100).to_bytes(3, "little") + b"\0" + one
    parts = (b"VP8X", b"\x12\0\0\0" + side + side), (b"ANIM", bytes(6)), (b"ANMF", frame)
    return riff(b"".join(name + struct.pack("<I", len(part)) + part for name, part in parts))


def bmp_runs(edge: int) -> bytes:
    """A BMP of runs, the first of which says that there are no more."""
    head = struct.pack("<IiiHHIIiiII", 40, edge, edge, 1, 8, 1, 2, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1080, 0, 0, 1078) + head + bytes(1024) + b"\0\1"


def gif_screen(edge: int) -> bytes:
    """A GIF with a large screen and a frame of one pixel, with a colour that is transparent."""
    whole = io.BytesIO()
    Image.new("P", (1, 1)).save(whole, "GIF", transparency=0)
    content = whole.getvalue()
    return content[:6] + struct.pack("<HH", edge, edge) + content[10:]


def saved(kind: str, edge: int, mode: str = "RGB", **options: object) -> bytes:
    """An image of one colour."""
    out = io.BytesIO()
    Image.new(mode, (edge, edge)).save(out, kind, **options)
    return out.getvalue()


def notes() -> bytes:
    """Notes that are a kilobyte each, and a megabyte each when they are unpacked."""
    return chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 60


def bombs(edge: int = EDGE) -> dict[str, bytes]:
    """A file of every format that is read, each as large as its format lets a small file be."""
    return {
        "WebP of 38 bytes": riff(lossless(edge)),
        "WebP canvas": webp_canvas(edge),
        "PNG grey": png_bomb(edge, 0),
        "PNG bits": png_bomb(edge, 0, 1),
        "PNG RGB": png_bomb(edge, 2),
        "PNG palette": png_bomb(edge, 3, extra=chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(9))),
        "PNG grey, 16 bits": png_bomb(edge, 0, 16),
        "PNG grey with alpha": png_bomb(edge, 4),
        "PNG RGBA": png_bomb(edge, 6),
        "PNG RGBA, 16 bits": png_bomb(edge, 6, 16),
        "PNG with notes": png_bomb(28, 0, extra=notes()),
        "GIF screen": gif_screen(edge),
        "BMP runs": bmp_runs(edge),
        "JPEG": saved("JPEG", edge),
        "JPEG progressive": saved("JPEG", edge, progressive=True, subsampling=0),
        "JPEG progressive, CMYK": saved("JPEG", edge, "CMYK", progressive=True),
    }


PEAK = """
import contextlib, os, re, sys
from pathlib import Path
from project.data.readers import ImageError, decode_image

def memory(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def held(content, channels):
    "What a process that did nothing else holds more while it decodes, and what was said of it before."
    told = []
    room = lambda n: (told.append(n), contextlib.nullcontext())[1]
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    with contextlib.suppress(ImageError):
        decode_image(content, 32, channels, room=room)
    return memory("VmHWM") - before, told[0]

for kind in sys.argv[2].split(","):  # Pillow finds its formats
    with contextlib.suppress(ImageError):
        decode_image(Path(sys.argv[1], kind).read_bytes(), 32, 3, max_pixels=0)
for path in sorted(Path(sys.argv[1]).iterdir()):
    for channels in (1, 3):
        content = path.read_bytes()
        if (child := os.fork()) == 0:
            found, told = held(content, channels)
            print(f"{path.name}|{channels}|{found}|{told}", flush=True)
            os._exit(0)
        os.waitpid(child, 0)
"""


def test_what_decoding_holds_is_said_before(tmp_path):
    """The peak of a process of its own, for every format and kind of pixels, is never above what the head told."""
    files = bombs(2500)
    with pytest.raises(ImageError, match="damaged"):  # before anything of it is known
        image_bytes(files.pop("PNG with notes"), 32)
    turned = Image.Exif()
    turned[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP"):
        files[f"{kind} turned"] = saved(kind, 2500, exif=turned)
    files["WebP lossy"] = saved("WEBP", 2500, method=0)
    files["GIF"], files["BMP"] = saved("GIF", 2500, "L"), saved("BMP", 2500)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", PEAK, str(tmp_path), "JPEG,PNG RGB,WebP lossy,GIF,BMP"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
    assert len(said) == 2 * len(files)
    for line in said:
        name, channels, found, told = line.split("|")
        assert int(found) <= int(told) + 3_000_000, line  # the interpreter's own
        assert int(told) < 20 * 2500**2 + 10_000_000, line
        assert image_bytes(files[name], 32, int(channels)) == int(told)


def test_a_large_image_made_flat_in_parts_is_the_same(monkeypatch):
    """Each kind of pixels, wide and tall, in many parts and in one."""
    noise = random.Random(0).randbytes
    for size in ((90, 40), (40, 90), (333, 3)):
        whole = Image.frombytes("RGBA", size, noise(4 * size[0] * size[1]))
        made = {m: whole.convert(m) for m in ("RGBA", "RGB", "LA", "L", "1", "CMYK")}
        made["P"] = made["RGB"].quantize(30)
        made["I;16"] = Image.frombytes("I;16", size, noise(2 * size[0] * size[1]))
        for mode, image in made.items():
            for options in [{}, {"transparency": bytes([0, 99])}] if mode == "P" else [{}]:
                out = io.BytesIO()
                image.save(out, "JPEG" if mode == "CMYK" else "PNG", **options)
                for channels in (1, 3):
                    monkeypatch.setattr("project.data.readers._PART", 10**9)
                    one = decode_image(out.getvalue(), 24, channels)
                    monkeypatch.setattr("project.data.readers._PART", 100)
                    assert (decode_image(out.getvalue(), 24, channels) == one).all(), (mode, size, options)


def peak(pid: int) -> int:
    """The most that a process ever had in memory."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def test_bombs_of_every_format_at_once(tmp_path):
    """A real service with its own settings, four clients, and all uploads that there is room for: below 512 MB."""
    make_registry(tmp_path)
    files = bombs() | {"WebP of 38 bytes": riff(lossless(7000))}
    assert len(files["WebP of 38 bytes"]) <= 38 and len(files["PNG RGBA"]) < 300_000
    rows = [{"title": "x" * 110_000}] * 80  # longer than a text may be, so that nothing but reading takes time
    plain, wide = (json.dumps({"rows": [*rows, {"title": c}]}, ensure_ascii=False).encode() for c in "x\U0001f600")
    found: dict[str, set[int]] = {name: set() for name in files}

    def send(n: int) -> None:
        order = random.Random(n % 2).sample(sorted(files), len(files))[n // 2 :: 2]  # each file is sent twice
        with httpx.Client(base_url=server.url, timeout=120) as client:
            for name in order:
                kind = {"content-type": "image/png"}
                sent = {"content": files[name], "headers": kind} if n < 2 else {"files": {"file": files[name]}}
                answer = client.post("/predict/brightness", **sent)
                assert answer.status_code in (200, 400, 413, 503), (name, answer.text)
                found[name].add(answer.status_code)
                assert client.post("/predict/brightness", files={"file": png()}).status_code in (200, 503)

    def upload(n: int) -> None:
        kind = {"content-type": "application/json"}
        with httpx.Client(base_url=server.url, timeout=120) as client:
            for content in (plain, wide, plain):
                answer = client.post("/predict/news/batch", content=content, headers=kind)
                assert answer.status_code == 503 or answer.json()["rows"][0]["error"]["status"] == 413
                assert client.post("/predict/brightness", files={"file": bytes(9_900_000)}).status_code in (415, 503)

    with Server(tmp_path, seconds=100) as server, ThreadPoolExecutor(10) as pool:
        for work in [*(pool.submit(send, n) for n in range(4)), *(pool.submit(upload, n) for n in range(6))]:
            work.result(300)
        most = peak(server.process.pid)
        assert server.client.post("/predict/brightness", files={"file": png(250)}).json()["class"] == "bright"
        assert "Traceback" not in server.errors()
    assert most < 512 * 2**20, f"{most:,} {found}"
    refused = {name for name, statuses in found.items() if 413 in statuses}
    assert {"WebP of 38 bytes", "WebP canvas", "PNG RGB", "PNG RGBA", "PNG grey with alpha"} <= refused
    assert not refused & {"JPEG", "PNG grey", "PNG bits", "PNG with notes"}
    assert 200 in found["JPEG"] and 200 in found["PNG grey"]


def service_of(folder: Path, **settings: object) -> models.Service:
    """A service that is not behind HTTP."""
    given = {"log": str(folder / "log.db"), "access": False, "bundles": (str(folder / "image"), str(folder / "text"))}
    image_bundle(folder / "image")
    text_bundle(folder / "text")
    return models.Service(Settings(**given | settings))


def call(path: str, body: bytes, kind: str, method: str = "POST") -> Call:
    """A request whose body was read."""
    made = Call({"method": method, "path": path, "headers": [(b"content-type", kind.encode())]})
    made.body = body
    return made


def test_large_images_wait_where_nobody_else_does(tmp_path):
    """While the turn of the large ones is taken, small ones and photographs are answered."""

    async def main() -> None:
        service = service_of(tmp_path)
        await api.start(service)
        try:
            large = png_bomb(5000, 0)
            assert image_bytes(large, 28, 1) > predictor._LIGHT
            send = [call("/predict/brightness", x, "image/png") for x in [large] * 6 + [png(250, 1000), png(250)] * 4]
            with predictor._one_at_a_time:
                work = [asyncio.create_task(predict.predict(service, "brightness", c)) for c in send]
                await asyncio.gather(*work[6:])
                assert not any(w.done() for w in work[:6])
            assert {r.status for r in await asyncio.gather(*work)} == {200}
        finally:
            await api.stop(service)

    asyncio.run(main())


# --- nothing large in the event loop


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" + b"1," * 4_000_000 + b"1]", 413),
        (b"[" + b"[]," * 3_000_000 + b"1]", 413),
        (b'{"rows": [' + b"{}," * 3_000_000 + b"{}]}", 413),
        (b"{" + b",".join(b'"%d":1' % i for i in range(500_000)) + b"}", 413),
        (b"[" * 5_000_000, 400),
        (b'{"a":' * 1_000_000, 400),
        (b'{"title": "' + b"x" * 9_000_000 + b'"}', 413),
        (b'{"title": "' + b'\\"' * 4_000_000 + b'"}', 413),
        (b'{"title": "' + b"x" * 500_000, 400),
        (b'"' + b"\\" * 400_001 + b'"', 400),
    ],
    ids=["numbers", "lists", "rows", "names", "deep", "deep names", "long", "escapes", "no end", "backslashes"],
)
def test_json_is_counted_before_it_is_made(body, status):
    tracemalloc.start()
    try:
        with pytest.raises(Problem) as told:
            json_body(body, longest=600_000)
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()
    assert told.value.status == status and len(told.value.detail) < 200


def test_json_that_is_meant_is_read():
    rows = {"rows": [{"title": 'a "b", [c] {d}: \\ é \U0001f600' * 500, "text": "x" * 30_000} for _ in range(256)]}
    for ascii in (True, False):
        body = json.dumps(rows, ensure_ascii=ascii).encode()
        check_json(body, 600_000)
        assert json_body(body, 600_000) == rows
    assert json_body(json.dumps({"instances": [{"b64": "A" * 9_000_000}]}).encode())["instances"]


@pytest.mark.parametrize("body", [b'["x"', b'{"a" 1}', b"[1,]", b"{1:2}", b"]" * 9, b"x" * 70_000, b" " * 70_000])
def test_json_that_is_none(body):
    with pytest.raises(Problem) as told:
        json_body(body.ljust(70_000))
    assert told.value.status == 400


def test_errors_do_not_repeat_what_was_sent():
    many = json.dumps({"rows": [["x"] * 20] * 250 + [{"title": ["x"] * 1000}]}).encode()
    rows = inputs.read_many(call("/", many, "application/json"), "text", ["title"], 256)
    assert {r.detail for r in rows[:-1]} == {'expected an object of texts such as {"title": "…"}, found a list.'}
    assert rows[-1].detail.endswith("found a 'title' that is a list.")


def test_large_bodies_are_taken_apart_in_a_thread(tmp_path, monkeypatch):
    """JSON, a table and a form, for each route that reads them; small ones are read where the server stands."""
    places: list[str] = []

    def noted(work):
        def done(*args):
            places.append(threading.current_thread().name)
            return work(*args)

        return done

    monkeypatch.setattr(inputs, "json_body", noted(inputs.json_body))
    monkeypatch.setattr(inputs, "form_parts", noted(inputs.form_parts))
    monkeypatch.setattr(inputs, "csv_rows", noted(inputs.csv_rows))
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/vertex")
    long = "x" * 70_000
    form = {"files": {"file": ("a.csv", f"title,text\n{long},x\n")}}
    one = {"files": {"title": (None, long)}}

    async def main() -> None:
        app = api.create_app(service_of(tmp_path).settings)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client,
        ):
            for path, sent, status in (
                ("/predict/news", {"json": {"title": long}}, 200),
                ("/predict/news", one, 200),
                ("/predict/news/batch", {"json": {"rows": [{"title": long}]}}, 200),
                ("/predict/news/batch", form, 200),
                ("/vertex", {"json": {"instances": [{"title": long}]}}, 200),
                ("/predict/news", {"json": [1] * 100_000}, 413),
                ("/predictions/0000000000/feedback", {"json": {"label": long}}, 413),
            ):
                places.clear()
                answer = await client.post(path, **sent)
                assert answer.status_code == status, answer.text
                assert all(place.startswith("decode") for place in places), (path, places)
                assert places or status == 413
            places.clear()
            assert (await client.post("/predict/news", json={"title": "good"})).status_code == 200
            assert places == [threading.current_thread().name]

    asyncio.run(main())


def test_a_table_with_endless_rows():
    for content in (b"," * 5_000_000, b"title,text\n" + b'"\n",' * 1_000_000, b"title,text\n" + b"x" * 3_000_000):
        with pytest.raises(Problem) as told:
            inputs.csv_rows(content, ["title"], 256)
        assert told.value.status in (400, 413)
    rows = inputs.csv_rows(b"title,text\n" + b"good,bad\n" * 256, ["title", "text"], 256)
    assert len(rows) == 256 and rows[0].row == {"title": "good", "text": "bad"}


def test_a_large_file_of_a_form_is_not_copied():
    content = random.Random(0).randbytes(3_000_000)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    body = head + content + b"\r\n--b--\r\n"
    tracemalloc.start()
    (part,) = form_parts(body, "multipart/form-data; boundary=b")
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 100_000 and part.content == content and part.filename == "a.png"


# --- nothing given twice

TWICE = {
    "JSON": ("/predict/news", b'{"title": "good", "title": "bad"}', "application/json"),
    "escaped": ("/predict/news", b'{"title": "good", "t\\u0069tle": "bad"}', "application/json"),
    "a row": ("/predict/news/batch", b'{"rows": [{"title": "a", "text": "b", "title": "a"}]}', "application/json"),
    "rows": ("/predict/news/batch", b'{"rows": [], "rows": [{"title": "a"}]}', "application/json"),
    "feedback": ("/predictions/0000000000/feedback", b'{"label": "fake", "label": "real"}', "application/json"),
    "form": (
        "/predict/news",
        b"".join(b'--b\r\nContent-Disposition: form-data; name="title"\r\n\r\n%d\r\n' % i for i in (1, 2)) + b"--b--",
        "multipart/form-data; boundary=b",
    ),
    "table": ("/predict/news/batch", b"title,text,title\na,b,c\n", "text/csv"),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A service with a text task and an image task."""
    folder = tmp_path_factory.mktemp("bounds")
    make_registry(folder)
    with Server(folder) as server:
        yield server


@pytest.mark.parametrize("name", TWICE)
def test_given_twice(served, name):
    path, content, kind = TWICE[name]
    answer = served.client.post(path, content=content, headers={"content-type": kind})
    assert answer.status_code == 422, answer.text
    assert ("once" in answer.json()["detail"]) and ("twice" in answer.json()["detail"] or name == "table")


# --- formats that are not read

OTHERS = {
    "a HEIC image": [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", b"\0\0\0 ftyphevc"],
    "an AVIF image": [b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf", b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif"],
    "a TIFF image": [saved("TIFF", 9), b"MM\0*" + bytes(50), b"MM\0+\0\x08" + bytes(50)],
    "a JPEG 2000 image": [b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50), b"\xff\x4f\xff\x51" + bytes(50)],
    "a JPEG XL image": [b"\xff\x0a" + bytes(50), b"\0\0\0\x0cJXL \r\n\x87\n"],
    "an ICO image": [saved("ICO", 16)],
    "a Photoshop image": [b"8BPS\0\1" + bytes(50)],
    "an SVG image": [b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', b"<svg/>"],
}
if features.check("avif"):
    OTHERS["an AVIF image"].append(saved("AVIF", 64))
if features.check("jpg_2000"):
    OTHERS["a JPEG 2000 image"].append(saved("JPEG2000", 64))


@pytest.mark.parametrize("kind", OTHERS)
def test_formats_that_are_not_read_are_named(served, kind):
    for content in OTHERS[kind]:
        answer = served.client.post("/predict/brightness", files={"file": ("photo", content)})
        detail = answer.json()["detail"]
        assert answer.status_code == 415, detail
        assert f"found {kind}, which is not read here. Save it as JPEG or PNG" in detail


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow knows no AVIF")
def test_why_avif_is_not_read():
    """Its head may declare a size that its decoder does not care for: if that changes, it can be read."""
    large = saved("AVIF", 2000, speed=10)
    place = large.index(b"ispe") + 8
    small = large[:place] + struct.pack(">II", 64, 64) + large[place + 8 :]
    with Image.open(io.BytesIO(small)) as image:
        assert image.size == (64, 64)
        image.load()  # 2000 x 2000 pixels were decoded and then made smaller


# --- look-ups


def unknown(n: int) -> str:
    """The id of a row that is not there: made just now, long ago, or by somebody else."""
    return (new_id(), str(uuid.UUID(int=random.getrandbits(128), version=4)), f"0199c0de-7e57-7abc-8def-{n:012x}")[
        n % 3
    ]


def test_nobody_waits_for_a_look_up(tmp_path):
    """Two hundred that wait for a row that may be on its way take no thread from anybody; old ids do not wait."""

    async def main() -> None:
        app = api.create_app(service_of(tmp_path).settings)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=60) as client,
        ):
            fresh = [asyncio.create_task(client.get(f"/predictions/{new_id()}")) for _ in range(200)]
            await asyncio.sleep(0.2)
            busy = [t.name for t in threading.enumerate() if t.name.startswith(("look-up", "asyncio_"))]
            assert len([name for name in busy if name.startswith("look-up")]) <= 4
            assert (await client.get("/metrics")).status_code == 200
            assert await asyncio.to_thread(lambda: True)
            assert (await client.get("/predictions/0000000000000000")).status_code == 404
            waiting = [t for t in fresh if not t.done()]
            assert len(waiting) > 50  # all of the above went past them
            assert {r.status_code for r in await asyncio.gather(*fresh)} <= {404, 503}

    asyncio.run(main())


def test_unknown_ids_are_asked_for_as_often_as_makes_sense(tmp_path):
    async def main() -> None:
        service = service_of(tmp_path)
        await api.start(service)
        try:
            asked: list[str] = []
            get = service.log.get
            service.log.get = lambda id: (asked.append(id), get(id))[1]
            for n in range(9):
                asked.clear()
                id = unknown(n)
                with pytest.raises(Problem, match="none by this id"):
                    await routes.logged(service, id)
                assert len(asked) == (6 if n % 3 == 0 else 1)
            for odd in ("", "x", "a" * 65, "a/b", "💥" * 9):
                asked.clear()
                with pytest.raises(Problem):
                    await routes.logged(service, odd)
                assert not asked
        finally:
            await api.stop(service)

    asyncio.run(main())


def test_a_row_on_its_way_is_waited_for(tmp_path):
    """Another worker writes it a moment after its client asks."""

    async def main() -> None:
        service = service_of(tmp_path)
        await api.start(service)
        other = PredictionLog(service.settings.log)
        try:
            id = new_id()
            asked = asyncio.create_task(routes.logged(service, id))
            await asyncio.sleep(0.1)
            other.put({"id": id, "task": "news", "version": "v1", "predicted": "fake"})
            assert await asyncio.to_thread(other.flush)
            assert (await asked)["predicted"] == "fake"
        finally:
            other.close()
            await api.stop(service)

    asyncio.run(main())


def test_a_swap_goes_past_look_ups(tmp_path):
    """A real service that is asked for unknown ids without end takes a new version and tells its metrics."""
    registry, versions = make_registry(tmp_path)
    with Server(tmp_path) as server, ThreadPoolExecutor(40) as pool:
        stop = threading.Event()

        def ask(n: int) -> int:
            count = 0
            with httpx.Client(base_url=server.url, timeout=60) as client:
                while not stop.is_set():
                    assert client.get(f"/predictions/{unknown(n)}").status_code in (404, 503)
                    count += 1
            return count

        try:
            work = [pool.submit(ask, n) for n in range(40)]
            time.sleep(0.5)
            registry.alias("brightness", "production", versions[1])
            server.wait_for(lambda: server.client.get("/models/brightness").json()["version"] == versions[1], 30)
            assert "project" in server.client.get("/metrics").text
        finally:
            stop.set()
        assert all(w.result(60) for w in work)
        assert "Traceback" not in server.errors()


# --- file handles


def test_file_handles_run_out(tmp_path):
    """One line, and everything goes on afterwards."""
    import resource

    make_registry(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        server = Server(tmp_path).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        pid = server.process.pid
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] == min(hard, 65_536)  # the soft limit was raised
        few = len([*Path(f"/proc/{pid}/fd").iterdir()]) + 8
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, few))
        held = [httpx.Client(base_url=server.url, timeout=3) for _ in range(30)]
        for client in held:
            try:
                client.get("/health/live")
            except httpx.TransportError:
                break
        server.wait_for(lambda: "no file handle is left" in server.errors(), 30)
        time.sleep(1)
        for client in held:
            client.close()
        server.wait_for(lambda: server.is_ready(), 30)
        answer = server.client.post("/predict/brightness", files={"file": png(250)})
        assert answer.json()["class"] == "bright"
        assert server.errors().count("no file handle is left") == 1 and "Traceback" not in server.errors()
    finally:
        server.__exit__()


# --- a promise


def test_killed_under_load_at_most_the_last_second_is_lost(tmp_path):
    """`kill -9` while eight clients ask: each row that was answered a second before is in the log, and whole."""
    make_registry(tmp_path)
    answered: list[tuple[float, str]] = []

    def ask(n: int) -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while True:
                try:
                    answer = client.post("/predict/news", json={"title": f"good {n}", "text": "bad"})
                except httpx.TransportError:
                    return
                answered.append((time.monotonic(), answer.json()["id"]))

    with Server(tmp_path) as server, ThreadPoolExecutor(8) as pool:
        work = [pool.submit(ask, n) for n in range(8)]
        end = time.monotonic() + 60
        while (len(answered) < 300 or time.monotonic() - answered[0][0] < 3) and time.monotonic() < end:
            time.sleep(0.05)
        killed = time.monotonic()
        server.process.send_signal(signal.SIGKILL)
        for w in work:
            w.result(60)
    with sqlite3.connect(tmp_path / "log.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        kept = {id for (id,) in database.execute("select id from predictions")}
        features = [json.loads(f) for (f,) in database.execute("select features from predictions")]
    early = [id for at, id in answered if at < killed - 1]
    assert len(early) > 100 and set(early) <= kept
    assert all(f["length"] for f in features)
