"""The service against tuned peers: requests a second, latency, memory, start. One machine, one run, everyone in turn.

    python benchmarks/serve.py            about a quarter of an hour; the first time it installs the peers before
    python benchmarks/serve.py --quick    one short round, to see that it works

Everyone serves the same ONNX file with one thread for the model, behind uvicorn with uvloop and httptools, one worker.
Uploads are PNGs of 28x28 as multipart forms; every answer is checked: status 200, JSON, the class that the model says.
Ours runs as `project serve` starts it: limits, prediction log, access log, metrics, drift features, request ids.
"""

import argparse
import asyncio
import contextlib
import gc
import hashlib
import itertools
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks/peers"
BIN = Path(sys.executable).parent

# ---- who serves ------------------------------------------------------------------------------------------------------
# what each environment needs besides what all have; the seed's style takes torch from the environment this runs in
ALL = ["onnxruntime=={onnxruntime}", "numpy=={numpy}", "pillow=={pillow}", "uvloop", "httptools"]
ENVIRONMENTS = {
    "plain": ["fastapi=={fastapi}", "starlette=={starlette}", "uvicorn=={uvicorn}", "python-multipart"],
    "litserve": ["litserve>=0.2.19", "python-multipart"],
    "bentoml": ["bentoml>=1.4.36"],
}
UVICORN = "-m uvicorn {app}:app --port {port} --loop uvloop --http httptools --no-access-log --log-level warning"
# name -> environment, command after its Python, path that tells readiness ("": the first answer), path, form field
SERVERS = {
    "ours": ("", "", "/health/ready", "/predict/clothes", "file"),
    "ceiling": ("", "ceiling.py {port}", "", "/predict", "file"),
    "nothing": ("plain", UVICORN.replace("{app}", "nothing"), "", "/predict", "file"),
    "fastapi": ("plain", UVICORN.replace("{app}", "fastapi_ort"), "", "/predict", "file"),
    "asgi": ("plain", UVICORN.replace("{app}", "asgi_ort"), "", "/predict", "file"),
    "seed": ("", UVICORN.replace("{app}", "seed_torch"), "", "/predict", "file"),
    "litserve": ("litserve", "litserve_app.py {port}", "/health", "/predict", "file"),
    "bentoml": ("bentoml", "-m bentoml serve bento_app:Peer --host 127.0.0.1 --port {port}", "", "/predict", "images"),
}
SHOWN = {
    "ours": "ours, everything on",
    "nothing": "FastAPI, does nothing",
    "fastapi": "FastAPI + ONNX Runtime in def",
    "asgi": "bare ASGI + ONNX Runtime",
    "seed": "seed style: torch in async def",
    "litserve": "LitServe, batches",
    "bentoml": "BentoML, adaptive batches",
}
# what is tried before the comparison; the best (geometric mean of 10 and 50 clients) is compared
CONFIGS = {
    "litserve": [
        {"size": size, "timeout": timeout, "fast": fast, "workers": workers}
        for size, timeout, fast, workers in [
            (1, 0, False, 1),
            (1, 0, True, 1),
            (16, 0, False, 1),
            (16, 0.001, False, 1),
            (16, 0.001, True, 1),
            (16, 0.005, False, 1),
            (64, 0.002, True, 1),
            (64, 0.01, False, 1),
            (16, 0.001, False, 2),
        ]
    ],
    "bentoml": [
        {"size": size, "ms": ms} for size, ms in [(16, 50), (16, 1000), (32, 200), (64, 1000), (100, 60_000), (8, 1000)]
    ],
}


def environment(name, folder):
    """The Python of an environment, which is made where it is not there yet or was made for something else."""
    if not name:
        return Path(sys.executable)
    from importlib.metadata import version

    wanted = [p.format_map(_Versions(version)) for p in [*ALL, *ENVIRONMENTS[name]]]
    place, mark = folder / name, hashlib.sha256(repr([sys.version, wanted]).encode()).hexdigest()
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (place / "mark").exists() or (place / "mark").read_text() != mark:
        print(f"installing {name} into {place.relative_to(ROOT) if place.is_relative_to(ROOT) else place}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        quiet = ["-q", "--disable-pip-version-check"]
        command = [python, "-m", "pip", "install", *quiet, *wanted]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} cannot be installed (leave it out with --peers):\n{done.stderr[-1000:]}")
        (place / "mark").write_text(mark)
    return python


class _Versions(dict):
    """The versions that the project itself runs with, when they are asked for."""

    def __init__(self, version):
        self.version = version

    def __missing__(self, name):
        return self.version(name)


class Server:
    """A server on a free port, for as long as the block."""

    def __init__(self, name, work, config=None, workers=1):
        self.name, self.work, self.config, self.workers = name, work, config, workers
        _, self.command, self.ready, self.path, self.field = SERVERS[name]

    def __enter__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        python = self.work.pythons[self.name]
        command = [str(python), *self.command.format(port=self.port).split()]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PROJECT_", "AIP_", "PEER_", "OMP_"))}
        env |= {"OMP_NUM_THREADS": "1", "PEER_BUNDLE": str(self.work.bundle), "BENTOML_DO_NOT_TRACK": "true"}
        env |= {"PEER_CONFIG": json.dumps(self.config)} if self.config else {}
        if self.name == "ours":
            self.log = self.work.folder / f"predictions-{self.port}.db"
            command = [str(BIN / "project"), "serve", "--port", str(self.port), "--workers", str(self.workers)]
            command += ["--bundle", str(self.work.bundle)]
            env |= {"PROJECT_SERVE_LOG": str(self.log), "PROJECT_SERVE_DRAIN": "0"}
        if self.name == "seed":  # torch and the network from here, what FastAPI's forms need from the plain environment
            env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *self.work.forms])
        self.said = (self.work.folder / f"{self.name}.txt").open("wb")
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=PEERS, env=env, stdin=subprocess.DEVNULL, stdout=self.said, stderr=self.said,
            start_new_session=True,
        )  # fmt: skip
        try:
            self._wait(began + 60)
        except BaseException:
            self.__exit__()
            raise
        self.started = time.perf_counter() - began
        return self

    def _wait(self, until):
        """Poll until it answers 200."""
        _, request = request_bytes(self, self.work.inputs[0][0])
        if self.ready:
            request = f"GET {self.ready} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        while time.perf_counter() < until and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 10) as s:
                s.sendall(request)
                if b" 200 " in s.recv(1000).partition(b"\r\n")[0]:
                    return
            time.sleep(0.005)
        tail = Path(self.said.name).read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{self.name} did not get ready, or ended:\n{tail}")

    def state(self):
        """What `/health/ready` of ours says."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/ready", timeout=10) as found:
            return json.load(found)

    def __exit__(self, *_):
        """End it, and what it started: its process group is its own."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self.said.close()
        if self.name == "ours":
            for file in self.work.folder.glob(f"{self.log.name}*"):
                file.unlink()


def tree(pid):
    """A process and those below it."""
    found = [pid]
    with contextlib.suppress(OSError, ValueError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [p for child in (task / "children").read_text().split() for p in tree(int(child))]
    return found


def held(pid):
    """Bytes that a process and those below it hold, shared pages counted in each."""
    pages = 0
    for p in tree(pid):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{p}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def processor(pid):
    """Seconds of processor that a process and those below it have used."""
    ticks = 0
    for p in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


# ---- the client ------------------------------------------------------------------------------------------------------
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)


def request_bytes(server, file):
    """The class of a file, and the request that uploads it."""
    content, edge = file.read_bytes(), "benchmark-of-the-service"
    head = f'--{edge}\r\nContent-Disposition: form-data; name="{server.field}"; filename="{file.name}"\r\n'
    body = f"{head}Content-Type: image/png\r\n\r\n".encode() + content + f"\r\n--{edge}--\r\n".encode()
    lines = [f"POST {server.path} HTTP/1.1", "Host: localhost", "Accept: */*"]
    lines += [f"Content-Type: multipart/form-data; boundary={edge}", f"Content-Length: {len(body)}", "", ""]
    return file.name, "\r\n".join(lines).encode() + body


class Load:
    """What all connections of one level share."""

    def __init__(self, port, requests, until, most):
        self.port, self.requests, self.until, self.most = port, requests, until, most
        self.sent, self.open, self.latencies, self.kept, self.failed = 0, 0, [], [], Counter()
        self.finished = asyncio.get_running_loop().create_future()

    @property
    def over(self):
        """Whether no more requests should be sent."""
        return self.sent >= self.most or time.perf_counter() >= self.until


class Connection(asyncio.Protocol):
    """One client: asks again as soon as it has its answer."""

    def __init__(self, load):
        self.load, self.buffer, self.waiting = load, b"", False
        load.open += 1

    def connection_made(self, transport):
        """Begin."""
        self.transport = transport
        self.ask()

    def ask(self):
        """Send the next request, or end."""
        load = self.load
        if load.over:
            self.transport.close()
            return
        self.number = load.sent % len(load.requests)
        load.sent += 1
        self.waiting, self.began = True, time.perf_counter()
        self.transport.write(load.requests[self.number])

    def data_received(self, data):
        """An answer, or a part of it. It is only kept here: the clock must not wait for checks."""
        self.buffer = data = self.buffer + data if self.buffer else data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        length = _LENGTH.search(data, 0, end)
        if length is None or len(data) < end + int(length[1]):
            if length is None:
                self.load.failed["no length"] += 1
                self.transport.abort()
            return
        load, self.buffer, self.waiting = self.load, b"", False
        load.latencies.append(time.perf_counter() - self.began)
        load.kept.append((self.number, data[9:12], data[end:]))
        if b"\r\nconnection: close" in data[:end].lower():
            self.transport.close()
        else:
            self.ask()

    def connection_lost(self, exc):
        """Come again, unless it is over."""
        load = self.load
        load.open -= 1
        if self.waiting:
            load.failed["cut off"] += 1
        if not load.over:
            asyncio.get_running_loop().create_task(connect(load))
        elif not load.open and not load.finished.done():
            load.finished.set_result(None)


async def connect(load):
    """A client; where none can connect, that is counted."""
    try:
        await asyncio.get_running_loop().create_connection(lambda: Connection(load), "127.0.0.1", load.port)
    except OSError as e:
        load.failed[f"no connection ({type(e).__name__})"] += 1
        await asyncio.sleep(0.02)
        if not load.over:
            await connect(load)
        elif not load.open and not load.finished.done():
            load.finished.set_result(None)


async def _level(port, requests, clients, seconds, most):
    """Load from so many clients."""
    began = time.perf_counter()
    load = Load(port, requests, began + seconds, most)
    await asyncio.gather(*(connect(load) for _ in range(clients)))
    try:
        await asyncio.wait_for(asyncio.shield(load.finished), seconds + 15)
    except TimeoutError:
        load.failed["no answer within 15 s"] += load.open
    return load, time.perf_counter() - began


def loop_factory():
    """uvloop's, or Python's own."""
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


def wrong(status, body, expected):
    """What is wrong with an answer; empty: nothing."""
    if status != b"200":
        return f"status {status.decode(errors='replace')}"
    try:
        found = json.loads(body)
        said = (found[0] if isinstance(found, list) else found)["class"]
    except (ValueError, LookupError, TypeError):
        return "no prediction"
    return "" if said == expected else "another class"


def level(server, clients, seconds, most=math.inf):
    """What so many clients see, every answer checked; latencies are those of right answers."""
    requests = [request_bytes(server, file)[1] for file, _ in server.work.inputs]
    expected = [c if server.name not in ("nothing", "ceiling") else "nothing" for _, c in server.work.inputs]
    gc.collect()
    gc.disable()
    try:
        own, theirs = time.process_time(), processor(server.process.pid)
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            load, took = runner.run(_level(server.port, requests, clients, seconds, most))
        own, theirs = time.process_time() - own, processor(server.process.pid) - theirs
    finally:
        gc.enable()
    verdicts = [wrong(status, body, expected[i]) for i, status, body in load.kept]
    load.failed.update(v for v in verdicts if v)
    fine = sorted(s for s, v in zip(load.latencies, verdicts, strict=True) if not v)
    at = {p: fine[min(len(fine) - 1, int(len(fine) * p / 100))] * 1000 if fine else math.nan for p in (50, 95, 99)}
    shown = {"server": server.name, "clients": clients, "per_second": len(fine) / took, "answers": len(fine)}
    shown |= {f"p{p}_ms": v for p, v in at.items()} | {"errors": dict(load.failed)}
    shown |= {"server_ms": theirs * 1000 / max(1, len(fine)), "client_cpu": own / took, "server_cpu": theirs / took}
    return shown | {"memory_mb": held(server.process.pid) / 1e6, "start_s": server.started}


# ---- what is measured ------------------------------------------------------------------------------------------------
class Work:
    """Where things are: folders, the bundle, what is sent, and each server's Python."""

    def __init__(self, folder, names, model):
        self.folder, self.bundle = folder / "work", folder / "work" / f"bundle-{model}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pythons = {n: environment(SERVERS[n][0], folder) for n in ["ceiling", *names]}
        plain = environment("plain", folder) if "seed" in names else None
        self.forms = [_site(plain)] if plain else []
        made = subprocess.run([sys.executable, PEERS / "make_bundle.py", self.bundle, model], check=True, cwd=ROOT,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
        print(made.stdout.strip(), flush=True)
        inputs = self.bundle.with_name(self.bundle.name + "-inputs")
        self.inputs = [(inputs / n, c) for n, c in json.loads((inputs / "classes.json").read_text()).items()]


def _site(python):
    """Where an environment keeps its packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def ceiling(work, seconds, clients):
    """What the client itself can do, against a server that answers each upload with a constant."""
    with Server("ceiling", work) as server:
        return [level(server, n, seconds) for n in clients]


def tuned(name, work, seconds):
    """The best of a peer's configurations, and what each did."""
    tried = []
    for config in CONFIGS[name]:
        try:
            with Server(name, work, config) as server:
                level(server, 50, seconds / 4)
                found = [level(server, n, seconds) for n in (10, 50)]
        except RuntimeError as e:
            print(f"{name} {json.dumps(config)}: does not work: {str(e)[-300:]}", flush=True)
            continue
        score = math.sqrt(math.prod(f["per_second"] for f in found))
        errors = sum(sum(f["errors"].values()) for f in found)
        tried.append({"config": config, "score": score, "errors": errors, "levels": found})
        a, b = (f"{f['per_second']:,.0f}" for f in found)
        print(f"{name} {json.dumps(config)}: {a} and {b} a second at 10 and 50 clients, {errors} errors", flush=True)
    if not tried:
        raise SystemExit(f"{name} does not work in any configuration")
    return max(tried, key=lambda t: t["score"]), tried


def compare(work, names, clients, rounds, seconds, configs):
    """Everyone at each number of clients, in turn; the order moves on by one each time."""
    found = []
    for turn, (i, n) in enumerate(itertools.product(range(rounds), clients)):
        for name in [names[(k + turn) % len(names)] for k in range(len(names))]:
            with Server(name, work, configs.get(name)) as server:
                level(server, n, max(0.5, seconds / 5))
                found.append(level(server, n, seconds) | {"round": i})
            f = found[-1]
            print(f"  round {i + 1}, {n:>2} clients, {name}: {f['per_second']:,.0f} a second", end=", ", flush=True)
            print(f"p50 {f['p50_ms']:.1f}, p99 {f['p99_ms']:.1f} ms, errors {f['errors'] or 0}", flush=True)
    return found


def memory(work, requests, clients=10):
    """The memory of ours, ten times on the way; and whether its log lost rows."""
    with Server("ours", work) as server:
        level(server, clients, 2)
        points, done, rates = [held(server.process.pid)], 0, []
        for _ in range(10):
            found = level(server, clients, 600, requests // 10)
            done += found["answers"]
            rates.append(found["per_second"])
            points.append(held(server.process.pid))
        time.sleep(1)
        log = server.state()["log"]
    return {"requests": done, "clients": clients, "mb": [p / 1e6 for p in points], "per_second": rates, "log": log}


def two_workers(work, clients, rounds, seconds, workers):
    """More processes over one, in turn."""
    pairs = []
    for _ in range(rounds):
        pair = []
        for n in (1, workers):
            with Server("ours", work, workers=n) as server:
                level(server, clients, 1)
                pair.append(level(server, clients, seconds))
        pairs.append(pair)
    return pairs


# ---- what is told ----------------------------------------------------------------------------------------------------
def median(found, key, **where):
    """Median, lowest and highest of a value over the rounds."""
    values = [f[key] for f in found if all(f[k] == v for k, v in where.items())]
    return statistics.median(values), min(values), max(values)


def ratio(found, key, ours, theirs, clients):
    """Ours over theirs, each round by itself: median, lowest, highest."""
    by = {(f["server"], f["round"]): f[key] for f in found if f["clients"] == clients}
    values = [by[ours, i] / by[theirs, i] for s, i in by if s == ours and (theirs, i) in by]
    return (statistics.median(values), min(values), max(values)) if values else None


def table(found, names, clients):
    """A line for each server and number of clients."""
    heads = ["server", "clients", "requests/s", "p50 ms", "p95 ms", "p99 ms", "errors", "CPU ms", "MB", "start s"]
    print(f"\n| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 1)}")
    for name, n in itertools.product(names, clients):
        mine = [f for f in found if f["server"] == name and f["clients"] == n]
        rate, low, high = median(mine, "per_second")
        p50, p95, p99, cpu, mb, start = (
            median(mine, k)[0] for k in ("p50_ms", "p95_ms", "p99_ms", "server_ms", "memory_mb", "start_s")
        )
        errors = sum(sum(f["errors"].values()) for f in mine)
        rates = f"{rate:,.0f} ({low:,.0f} to {high:,.0f})"
        line = f"| {SHOWN[name]} | {n} | {rates} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {errors:,} "
        print(f"{line}| {cpu:.2f} | {mb:.0f} | {start:.2f} |")


def goals(found, extra):
    """Each goal, what was found, and whether it is met."""
    rows = []

    def goal(what, wanted, value, met, unit=""):
        if value is None:
            return
        mid, low, high = value if isinstance(value, tuple) else (value, None, None)
        shown = f"{mid:.2f}{unit}" + (f" ({low:.2f} to {high:.2f})" if low is not None and low != high else "")
        rows.append({"what": what, "goal": wanted, "found": shown, "value": value, "met": bool(met(mid))})

    levels = sorted({f["clients"] for f in found})
    for peer, least in (("litserve", 2.5), ("bentoml", 5.0)):
        for n in [n for n in levels if n >= 10]:
            value = ratio(found, "per_second", "ours", peer, n)
            goal(f"requests/s over {peer}'s, {n} clients", f"{least} or more", value, lambda v, w=least: v >= w)
            value = ratio(found, "p99_ms", "ours", peer, n)
            goal(f"p99 over {peer}'s, {n} clients", "below 1", value, lambda v: v < 1)
    if 1 in levels:
        value = ratio(found, "p50_ms", "ours", "asgi", 1)
        goal("median latency over bare ASGI's, 1 client", "1.3 or less", value, lambda v: v <= 1.3)
    for n in levels:
        value = ratio(found, "per_second", "ours", "nothing", n)
        goal(f"requests/s over doing nothing's, {n} clients", "0.45 or more", value, lambda v: v >= 0.45)
    goal("seconds until ready", "below 1", median(found, "start_s", server="ours"), lambda v: v < 1, " s")
    value = median(found, "memory_mb", server="ours")
    goal("memory of the server under load", "below 150", value, lambda v: v < 150, " MB")
    if "memory" in extra:
        mb = extra["memory"]["mb"]
        what = f"memory after {extra['memory']['requests']:,} requests over that after a tenth"
        goal(what, "1.05 or less", mb[-1] / mb[1], lambda v: v <= 1.05)
        goal("rows that the prediction log dropped", "0", float(extra["memory"]["log"]["dropped"]), lambda v: v == 0)
    if pairs := extra.get("workers"):
        values = [b["per_second"] / a["per_second"] for a, b in pairs]
        value = statistics.median(values), min(values), max(values)
        goal("more workers over one, 50 clients", "1.6 or more", value, lambda v: v >= 1.6)
    print("\n| what | goal | found | |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['goal']} | {row['found']} | {'met' if row['met'] else '**missed**'} |")
    return rows


def options():
    """What is asked for."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    asked.add_argument("--clients", default="1,10,50", help="numbers of clients, with commas")
    asked.add_argument("--peers", default=",".join(list(SERVERS)[2:]), help="with commas; none: ours")
    asked.add_argument("--model", default="cnn-s", help="a network of the project")
    asked.add_argument("--memory", type=int, default=200_000, help="requests of the memory test; 0: none")
    asked.add_argument("--workers", type=int, default=2, help="processes to compare with one; 1: none")
    asked.add_argument("--peers-env", default=str(ROOT / "build/peers"), help="where the peers are installed")
    asked.add_argument("--no-tuning", action="store_true", help="take each peer's first configuration")
    asked.add_argument("--quick", action="store_true", help="one short round, nothing written")
    asked.add_argument("--json", default=str(ROOT / "benchmarks/results/serve.json"), help="where to write")
    found = asked.parse_args()
    if found.quick:
        found.rounds, found.seconds, found.memory = 1, min(found.seconds, 1.5), min(found.memory, 10_000)
    return found


def main():
    """Measure, print the tables, keep the numbers."""
    asked = options()
    names = ["ours", *(n for n in asked.peers.split(",") if n and n != "none")]
    if unknown := [n for n in names if n not in SERVERS]:
        raise SystemExit(f"--peers: expected some of {', '.join(SERVERS)}, found {', '.join(unknown)}")
    clients = [int(n) for n in asked.clients.split(",")]
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores; {load:.1f} other processes were busy in the last minute", flush=True)
    work = Work(Path(asked.peers_env).resolve(), names, asked.model)
    top = ceiling(work, asked.seconds, clients)
    shown = ", ".join(f"{c['per_second']:,.0f} from {c['clients']}" for c in top)
    print(f"the client's own ceiling, requests a second: {shown}", flush=True)
    configs, tuning = {}, {}
    for name in (n for n in names if n in CONFIGS):
        first = {"config": CONFIGS[name][0]}
        best, tried = (first, [first]) if asked.no_tuning else tuned(name, work, min(asked.seconds, 2.0))
        configs[name], tuning[name] = best["config"], tried
        print(f"{name}: {json.dumps(best['config'])} is compared", flush=True)
    found = compare(work, names, clients, asked.rounds, asked.seconds, configs)
    extra = {}
    if asked.memory:
        extra["memory"] = memory(work, asked.memory)
        print("\nmemory, MB: " + ", ".join(f"{mb:.0f}" for mb in extra["memory"]["mb"]), extra["memory"]["log"])
    if asked.workers > 1:
        extra["workers"] = two_workers(work, 50, asked.rounds, asked.seconds, asked.workers)
        cpu = statistics.median(b["client_cpu"] for _, b in extra["workers"])
        print(f"with {asked.workers} workers the client beside them took {cpu:.0%} of a processor", flush=True)
    table(found, names, clients)
    rows = goals(found, extra)
    if not asked.quick:
        kept = {"busy": load, "cores": os.cpu_count(), "model": asked.model, "seconds": asked.seconds, "goals": rows}
        kept |= {"ceiling": top, "tuning": tuning, "configs": configs, "levels": found, **extra}
        Path(asked.json).write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
