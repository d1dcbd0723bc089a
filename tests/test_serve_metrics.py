"""Metrics of a service with several workers: real processes, killed ones among them, and a disk that is full."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from project.serve import metrics as module
from project.serve.metrics import FAMILIES, Metrics, shared_folder

COUNT = """
import sys, time
from project.serve.metrics import Metrics
metrics = Metrics(sys.argv[1])
metrics.set_queue("t", 5)
metrics.set_model("t", sys.argv[2])
metrics.observe_log({"ok": True, "written": 7, "dropped": 2, "waiting": 3})
for i in range(int(sys.argv[3])):
    metrics.observe_request("/predict/{task}", "POST", 200, 0.004)
    metrics.observe_prediction("t", sys.argv[2], "Coat", 0.95)
print("ready", flush=True)
time.sleep(float(sys.argv[4]))
"""


def worker(folder, version="v1", n=10, seconds=0):
    """A process that counts and, if it is asked to, stays for a while."""
    words = [sys.executable, "-c", COUNT, str(folder), version, str(n), str(seconds)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def end(process):
    """Kill a worker."""
    process.kill()
    process.wait(20)
    process.stdout.close()


def samples(metrics):
    """What a scrape reads, by Prometheus's own parser: value by name and labels."""
    text, kind = metrics.render()
    assert kind.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for s in family.samples:
            key = (s.name, *(f"{k}={v}" for k, v in sorted(s.labels.items())))
            assert key not in found, f"{key} is there twice"
            found[key] = s.value
    return found


@pytest.fixture
def metrics(tmp_path):
    """Of this process, in a folder that others share."""
    made = Metrics(tmp_path / "metrics")
    yield made
    made.close()


REQUESTS = ("project_requests_total", "method=POST", "route=/predict/{task}", "status=200")


def test_one_process_needs_no_folder():
    metrics = Metrics()
    metrics.observe_request("/predict/{task}", "POST", 503, 0.03)
    metrics.observe_request("", "GET", 404, 0.0001)
    metrics.observe_batch("t", 3)
    metrics.observe_prediction("t", "v1", "Coat", 0.93)
    metrics.set_queue("t", 12)
    metrics.set_model("t", "v1")
    metrics.observe_log({"ok": False, "written": 5, "dropped": 2, "waiting": 9, "reason": "the disk is full"})
    found = samples(metrics)
    assert found["project_requests_total", "method=GET", "route=none", "status=404"] == 1
    assert found["project_request_errors_total", "route=/predict/{task}", "status=503"] == 1
    seconds = ("method=POST", "route=/predict/{task}")
    assert found["project_request_seconds_bucket", "le=0.02", *seconds] == 0
    assert found["project_request_seconds_bucket", "le=0.05", *seconds] == 1
    assert found["project_request_seconds_bucket", "le=+Inf", *seconds] == 1
    assert found["project_request_seconds_count", *seconds] == 1
    assert found["project_request_seconds_sum", *seconds] == 0.03
    assert found["project_batch_rows_bucket", "le=4.0", "task=t"] == 1
    assert found["project_batch_rows_sum", "task=t"] == 3
    assert found["project_predictions_total", "predicted=Coat", "task=t", "version=v1"] == 1
    assert found["project_confidence_bucket", "le=0.9", "task=t", "version=v1"] == 0
    assert found["project_confidence_bucket", "le=+Inf", "task=t", "version=v1"] == 1
    assert found["project_queue_rows", "task=t"] == 12
    assert found["project_model_info", "task=t", "version=v1"] == 1
    assert found["project_log_rows_total", "outcome=dropped"] == 2
    assert found["project_log_rows_total", "outcome=written"] == 5
    assert (found["project_log_waiting_rows",], found["project_log_up",], found["project_workers",]) == (9, 0, 1)
    assert not [key for key in found if "other" in str(key)]


def test_a_boundary_is_in_its_bucket():
    metrics = Metrics()
    metrics.observe_request("/", "GET", 200, 0.05)
    found = samples(metrics)
    assert found["project_request_seconds_bucket", "le=0.05", "method=GET", "route=/"] == 1
    assert found["project_request_seconds_bucket", "le=0.02", "method=GET", "route=/"] == 0


def test_several_workers(metrics):
    metrics.observe_request("/predict/{task}", "POST", 200, 0.004)
    others = [worker(metrics.folder, f"v{i}", 100, 60) for i in (1, 2)]
    try:
        found = samples(metrics)
        assert found[REQUESTS] == 201
        assert found["project_predictions_total", "predicted=Coat", "task=t", "version=v2"] == 100
        assert (found["project_queue_rows", "task=t"], found["project_workers",]) == (10, 3)
        assert found["project_model_info", "task=t", "version=v1"] == 1
        assert found["project_log_rows_total", "outcome=dropped"] == 4
        assert found["project_log_up",] == 2
        other = Metrics(metrics.folder)  # whichever worker is asked says the same
        expected = found | {("project_workers",): 4}
        assert samples(other) == expected == samples(metrics)
        other.close()
    finally:
        for process in others:
            end(process)


@pytest.mark.parametrize("locking", ["locks", "claims"])
def test_a_worker_that_is_killed(metrics, request, monkeypatch, locking):
    """Its counts stay, its gauges go, its file goes; asked again and again, nothing counts twice."""
    if locking == "claims":  # the folder has no locks
        request.getfixturevalue("without_locks")
        monkeypatch.setattr("project.locks._lock_file", lambda file: None)
    process = worker(metrics.folder, "v1", 100, 60)
    assert samples(metrics)[REQUESTS] == 100
    os.kill(process.pid, signal.SIGKILL)
    end(process)
    for _ in range(3):
        found = samples(metrics)
        assert found[REQUESTS] == 100 and found["project_workers",] == 1
        assert found["project_request_seconds_count", "method=POST", "route=/predict/{task}"] == 100
        assert ("project_queue_rows", "task=t") not in found
        assert ("project_model_info", "task=t", "version=v1") not in found
        assert found["project_log_rows_total", "outcome=written"] == 7
        assert [p.suffix for p in metrics.folder.iterdir()].count(".worker") == 1
    for i in range(3):  # they come and go
        end(worker(metrics.folder, "v1", 10, 60))
        assert samples(metrics)[REQUESTS] == 110 + 10 * i
    assert sorted(p.suffix for p in metrics.folder.iterdir()) == ["", ".held", ".json", ".worker"]


def test_a_burial_that_is_broken_off(metrics, monkeypatch):
    """Killed between adding a dead worker's numbers and deleting its file: the next scrape knows."""
    end(worker(metrics.folder, n=10, seconds=60))
    own = metrics._numbers.file.name.replace(".new", ".worker")
    (file,) = (p for p in metrics.folder.glob("*.worker") if not p.samefile(own))
    content = file.read_bytes()
    assert samples(metrics)[REQUESTS] == 10 and not file.exists()
    file.write_bytes(content)  # as if it had not been deleted
    assert samples(metrics)[REQUESTS] == 10 and not file.exists()


def test_counting_while_others_are_scraped_and_killed(metrics):
    """A counter never goes back, whoever asks and whoever dies meanwhile."""
    stop, seen = threading.Event(), []

    def scrape():
        other = Metrics(metrics.folder)
        while not stop.is_set():
            seen.append(samples(other)[REQUESTS])
        other.close()

    metrics.observe_request("/predict/{task}", "POST", 200, 0.004)
    readers = [threading.Thread(target=scrape) for _ in range(2)]
    for r in readers:
        r.start()
    try:
        before = 0
        for i in range(4):
            process = worker(metrics.folder, n=50, seconds=60)
            end(process)
            now = samples(metrics)[REQUESTS]
            assert now >= before and now == 51 + 50 * i
            before = now
    finally:
        stop.set()
        for r in readers:
            r.join(20)
    assert samples(metrics)[REQUESTS] == 201 and max(seen) <= 201


def test_threads_lose_no_count(metrics):
    def count():
        for _ in range(2000):
            metrics.observe_request("/predict/{task}", "POST", 200, 0.001)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    found = samples(metrics)
    assert found[REQUESTS] == 8000
    assert found["project_request_seconds_count", "method=POST", "route=/predict/{task}"] == 8000


def test_labels_are_bounded(metrics):
    """Whatever the caller passes on, the number of series and the memory have an end."""
    for i in range(6_000):
        metrics.observe_request(f"/wp-admin/{i}", f"METHOD{i}", 404, 0.001)
        metrics.observe_prediction("t", f"v{i}", f"class {i}", 0.5)
    found = samples(metrics)
    assert sum(v for k, v in found.items() if k[0] == "project_requests_total") == 6_000
    assert found["project_predictions_total", "predicted=other", "task=other", "version=other"] > 1_000
    assert len(found) < sum(f.most * (f.size + 1) for f in FAMILIES)
    assert len(metrics._numbers.slots) <= module._REMEMBERED + sum(f.most for f in FAMILIES)
    assert {k[1] for k in found if k[0] == "project_requests_total"} == {"method=other"}
    size = sum(p.stat().st_size for p in metrics.folder.iterdir())
    assert size == module._NAMES + module._NUMBERS
    end(worker(metrics.folder, n=0, seconds=60))
    assert samples(metrics)["project_predictions_total", "predicted=other", "task=other", "version=other"] > 1_000


@pytest.mark.parametrize("odd", ["\ud800", "\0", 'a"b\\c\nd', "‮", "é" * 1000, "x" * 10_000, "", None, 7, ("a",)])
def test_odd_labels(metrics, odd):
    metrics.observe_prediction("t", "v", odd, 0.5)
    metrics.observe_request(odd, "GET", 200, 0.1)
    found = samples(metrics)
    assert sum(v for k, v in found.items() if k[0] == "project_predictions_total") == 1
    assert sum(v for k, v in found.items() if k[0] == "project_requests_total") == 1


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -5.0])
def test_a_time_that_is_none(odd):
    metrics = Metrics()
    metrics.observe_request("/", "GET", 200, odd)
    metrics.observe_request("/", "GET", 200, 0.5)
    found = samples(metrics)
    assert found["project_request_seconds_sum", "method=GET", "route=/"] == 0.5
    assert found["project_request_seconds_count", "method=GET", "route=/"] == 2


def test_a_new_version_takes_over(metrics):
    for version in ("v1", "v2", "v2"):
        metrics.set_model("t", version)
    infos = {k: v for k, v in samples(metrics).items() if k[0] == "project_model_info"}
    assert infos == {("project_model_info", "task=t", "version=v2"): 1}
    metrics.set_model("t", "")
    assert not [k for k in samples(metrics) if k[0] == "project_model_info"]


def test_damaged_files(metrics):
    metrics.observe_request("/predict/{task}", "POST", 200, 0.1)
    (metrics.folder / "1-a.worker").write_bytes(b"")
    (metrics.folder / "2-b.worker").write_bytes(os.urandom(5000))
    (metrics.folder / "3-c.worker").write_bytes(os.urandom(module._NAMES + module._NUMBERS))
    (metrics.folder / "gone.json").write_text('{"series": [["project_requests", [1')
    found = samples(metrics)
    assert found[REQUESTS] == 1 and found["project_workers",] == 1
    assert samples(metrics) == found


@pytest.mark.parametrize("small_disk", ["1536k"], indirect=True)
def test_the_disk_is_full(small_disk):
    """What is reserved can be written; who finds no room counts alone; the dead keep their files till there is room."""
    process = worker(small_disk / "m", n=10, seconds=60)
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(module._log, "warning", lambda text, *args: said.append(text % args))
        alone = Metrics(small_disk / "m")
    assert alone.folder is None and "is counted alone" in said[0] and len(list((small_disk / "m").iterdir())) == 2
    alone.observe_request("/predict/{task}", "POST", 200, 0.1)
    assert samples(alone)[REQUESTS] == 1
    end(process)
    with (small_disk / "ballast").open("wb") as f, pytest.raises(OSError, match="No space"):
        f.write(bytes(1 << 20))
    late = Metrics()
    late.folder = small_disk / "m"
    for _ in range(2):
        assert samples(late)[REQUESTS] == 10
    (small_disk / "ballast").unlink()
    assert samples(late)[REQUESTS] == 10 and not list((small_disk / "m").glob("*.worker"))


def _ask(queue):
    queue.put(str(shared_folder()))


def test_workers_of_one_parent_share_a_folder(tmp_path, monkeypatch):
    """As the workers of `uvicorn --workers` are started."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("PROJECT_SERVE_METRICS", raising=False)
    base = tmp_path / f"project-metrics-{os.getuid()}"
    old = base / "999999999-1"
    old.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_ask, args=(queue,)) for _ in range(2)]
    for w in workers:
        w.start()
    folders = {queue.get(timeout=30) for _ in workers}
    for w in workers:
        w.join(20)
    assert len(folders) == 1
    folder = Path(folders.pop())
    assert folder.parent == base and folder.name.startswith(f"{os.getpid()}-") and not old.exists()
    assert shared_folder() is None


def test_it_imports_little():
    heavy = ("prometheus_client", "sqlalchemy", "torch", "pandas", "numpy")
    code = f"import sys, project.serve.metrics; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
