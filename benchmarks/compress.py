"""What int8 brings and what it costs: each bundle as it was trained and in 8 bits, in turn, on one thread.

    python benchmarks/compress.py                      the newest MiniLM and Fashion-MNIST runs; about ten minutes
    python benchmarks/compress.py BUNDLE [BUNDLE …]    these bundles
    python benchmarks/compress.py --quick              few rows and calls, to see that it works

The 8-bit bundle is made anew, in a temporary folder, with the processed data of its task. A batch goes to both models
before the next one does: a slow minute of the machine meets both. Accuracy is that of the test set, which neither the
ranges nor the decision to accept know.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from project.bundle.compress import agreement, quantize  # noqa: E402
from project.bundle.manifest import bundle_tokenizer, onnx_session, open_bundle, run_bundle  # noqa: E402
from project.core import _cpu_name  # noqa: E402
from project.data.store import build  # noqa: E402
from project.runs.record import list_runs  # noqa: E402
from project.serve.predictor import Predictor  # noqa: E402

WANTED = (("fake_titles", "minilm"), ("fashion_mnist", "cnn-m"))


def newest():
    """The bundle of the newest finished run of each task with its model, where there is one."""
    for task, model in WANTED:
        folders = [r["path"] / "bundle" for r in reversed(list_runs(task=task, status="finished"))]
        bundles = (open_bundle(f, verify=False) for f in folders if (f / "manifest.json").is_file())
        if found := next((b for b in bundles if b.manifest.get("model") == model), None):
            yield found.path
        else:
            print(f"(no finished run of {task} with {model}: left out)", file=sys.stderr)


def in_turn(sides, calls, feeds):
    """Milliseconds of each side for each feed; the first call of each warms up."""
    taken = np.zeros((len(sides), calls))
    for i in range(-1, calls):
        feed = feeds[i % len(feeds)]
        for k in range(len(sides)) if i % 2 else reversed(range(len(sides))):
            began = time.perf_counter()
            sides[k](feed)
            taken[k, i] = (time.perf_counter() - began) * 1000
    return taken


def chunks(inputs, size, n):
    """Batches of rows that lie all over a set."""
    rows = np.random.default_rng(0).permutation(len(inputs))[: size * n].reshape(-1, size)
    return [inputs[r] if isinstance(inputs, np.ndarray) else [inputs[i] for i in r] for r in rows]


def batches(bundles, inputs, size, calls):
    """Milliseconds of whole answers, tokenizer included: each bundle, each batch."""
    sides = []
    for bundle in bundles:
        tokenizer = bundle_tokenizer(bundle) if bundle.kind == "text" else None
        session = onnx_session(bundle, threads=1)
        sides.append(lambda rows, b=bundle, s=session, t=tokenizer: run_bundle(b, rows, size, s, t))
    return in_turn(sides, calls, chunks(inputs, size, min(calls, len(inputs) // size)))


def requests(bundles, inputs, calls):
    """Requests a second, one after the other, as the service reads and answers them."""
    sides = []
    for bundle in bundles:
        predictor = Predictor(bundle, threads=1)
        names = bundle.manifest["input"].get("fields") or ["text"]

        def answer(row, p=predictor, name=names[-1]):
            return p.predict([p.read_text({name: row}) if p.kind == "text" else row])

        sides.append(answer)
    rows = [rows[0] for rows in chunks(inputs, 1, min(calls, len(inputs)))]
    return 1000 / in_turn(sides, calls, rows)


def row(what, values, unit, remark=""):
    """One line of the table: median and range."""
    low, mid, high = min(values), statistics.median(values), max(values)
    digits = ".4f" if unit == "share" else ",.0f" if mid >= 100 else ".2f"
    print(f"| {what} | {mid:{digits}} ({low:{digits}} to {high:{digits}}) {unit} | {remark} |", flush=True)
    return {"what": what, "median": mid, "low": low, "high": high, "unit": unit, "remark": remark}


def pair(what, values, unit, goal="", higher=False):
    """Three lines: 32 bits, 8 bits, and how many times better a turn was."""
    before, after = values
    times = after / before if higher else before / after
    yield row(f"{what}: fp32", before.tolist(), unit)
    yield row(f"{what}: int8", after.tolist(), unit)
    yield row(f"{what}: times {'more' if higher else 'faster'}", times.tolist(), "", goal or "in turn")


def accuracies(name, bundles, data):
    """Both on the test set: what the goal of 0.2 points is about."""
    inputs, labels = data.split("test")
    inputs = inputs.joined() if bundles[0].kind == "text" else np.asarray(inputs)
    answers = [run_bundle(b, inputs, 64)[0] for b in bundles]
    found = agreement(answers[0], answers[1], labels)
    told = f"n = {found['rows']:,}, {found['lost']} lost, {found['won']} won"
    yield row(f"{name}: accuracy, fp32", [found["accuracy"]["before"]], "share", told)
    yield row(f"{name}: accuracy, int8", [found["accuracy"]["after"]], "share", "goal: 0.2 points of it")
    yield row(f"{name}: same class", [found["same_class"]], "share")


def measure(path, folder, quick):
    """All lines of one bundle."""
    before = open_bundle(path)
    data, name = build(before.task), f"{before.task}, {before.manifest.get('model')}"
    if quick:
        data = replace(
            data,
            splits={k: v[:: max(1, len(v) // 120)] for k, v in data.splits.items() if k in ("train", "val", "test")},
        )
    began = time.perf_counter()
    after = quantize(before, folder / before.task, data, calibration=16 if quick else 256, seconds=0.1)
    rows = [row(f"{name}: compress, measure and write", [time.perf_counter() - began], "s")]
    sizes = [[b.onnx.stat().st_size / 1e6] for b in (before, after)]
    rows += [row(f"{name}: model.onnx, {bits}", size, "MB") for bits, size in zip(("fp32", "int8"), sizes, strict=True)]
    inputs = data.split("test")[0]
    inputs = inputs.joined() if before.kind == "text" else np.asarray(inputs)
    goal = "in turn; goal 2" if before.manifest.get("model") == "minilm" else ""
    calls = 10 if quick else 200
    for size in (1, 16):
        taken = batches(
            (before, after), inputs, size, max(3, calls // size if quick else calls // 4 if size > 1 else calls)
        )
        rows += pair(f"{name}: batch of {size}", taken, "ms", goal)
    rows += pair(f"{name}: one thread", requests((before, after), inputs, calls), "requests/s", goal, higher=True)
    return [*rows, *accuracies(name, (before, after), data)]


def main():
    """Measure, print the table, keep the numbers."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("bundles", nargs="*", help="folders; none: the newest runs")
    options.add_argument("--quick", action="store_true", help="few rows and calls")
    options.add_argument("--json", default=str(ROOT / "benchmarks/results/compress.json"), help="where to write")
    asked = options.parse_args()
    os.environ.setdefault("PROJECT_PROGRESS", "off")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    print(f"one thread on {_cpu_name()}; {load:.1f} other processes were busy in the last minute\n")
    print("| what | median (range) | remark |\n|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, path in enumerate(asked.bundles or newest()):
            rows += measure(path, Path(folder) / str(i), asked.quick)
    if not asked.quick and rows:
        Path(asked.json).write_text(json.dumps({"busy": load, "cpu": _cpu_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
