"""What drift reports see and what they cost: false alarms, power, ranges, fingerprints, seconds and memory.

    python benchmarks/drift.py               the newest Fashion-MNIST run; a quarter of an hour
    python benchmarks/drift.py BUNDLE        this bundle; it is copied, and gets a reference there where it has none
    python benchmarks/drift.py --quick       few windows, to see that it works

Windows are drawn from the test set, which neither the model nor its reference knows. False alarms are counted twice:
of windows beside a reference from the same ten thousand rows, where nothing differs but chance, and of test windows
beside the bundle's own reference of validation rows, where an epoch that was chosen on them shows too.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two threads that wait for each other say more of the neighbours

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from project.bundle import reference as known  # noqa: E402
from project.bundle.manifest import onnx_session, open_bundle  # noqa: E402
from project.core import _cpu_name  # noqa: E402
from project.data.store import open_data  # noqa: E402
from project.monitor import drift  # noqa: E402
from project.runs.record import latest_bundle  # noqa: E402

LEVEL = drift.LEVEL
POOL = 2500  # rows of each shift


def shifts():
    """Name -> (how images change, the fingerprint that should be named, whether ten points are at stake)."""
    ways = known.image_corruptions(28)
    one = lambda name: ways[name][0]  # noqa: E731
    return {
        "brightness x .99": (partial(known._times, factor=0.99), ""),
        "brightness x .9": (one("slightly darker"), "slightly darker"),
        "brightness x .5": (one("darker"), "darker"),
        "noise 10": (one("noise"), "noise"),
        "noise 40": (one("strong noise"), "strong noise"),
        "blur .7 px": (one("blurred"), "blurred"),
        "moved 3 px": (lambda x, _: known.moved(x, -3, 0), "moved by 3 px"),
        "moved 3 px, askew": (lambda x, _: known.moved(x, 2, 2), "moved by 3 px"),
        "rotated 20 degrees": (one("rotated by 20 degrees"), "rotated by 20 degrees"),
        "inverted": (one("inverted"), "inverted"),
        "JPEG of quality 10": (one("JPEG of low quality"), "JPEG of low quality"),
        "contrast x .4": (one("less contrast"), "less contrast"),
        "covered in part": (one("covered in part"), "covered in part"),
        "scaled to 0 and 1": (one("scaled to 0 and 1"), "scaled to 0 and 1"),
    }


class Pools:
    """The test set as the model sees it: as it is, and under each shift."""

    def __init__(self, bundle, data, quick):
        images, labels = data.split("test")
        rng, session = np.random.default_rng(11), onnx_session(bundle)
        images, self.labels = np.ascontiguousarray(images), np.asarray(labels)
        self.plain = known.look_at(bundle, images, session=session)
        some = images[: 600 if quick else POOL]
        self.moved = {
            name: known.look_at(bundle, np.ascontiguousarray(change(some, rng)), session=session)
            for name, (change, _) in shifts().items()
        }

    def window(self, name, n, rng):
        """Rows and labels of one window."""
        if name in self.moved:
            which = rng.choice(len(self.moved[name]), n, replace=False)
            return self.moved[name].take(which), self.labels[which]
        if name == "10 % inverted":
            few = n // 10
            a, b = self.window("inverted", few, rng), self.window("none", n - few, rng)
            rows = [
                np.concatenate([getattr(a[0], f), getattr(b[0], f)]) for f in ("features", "probabilities", "embedding")
            ]
            return known.Rows(*rows), np.concatenate([a[1], b[1]])
        weight = {"one class twice as often": {6: 2.0}, "two classes halved": {2: 0.5, 4: 0.5}}.get(name, {})
        w = np.array([weight.get(int(label), 1.0) for label in self.labels])
        which = rng.choice(len(self.labels), n, replace=False, p=w / w.sum())
        return self.plain.take(which), self.labels[which]


def alarm(rows, reference, classes):
    """Whether any family says that something changed."""
    projected = reference.project(rows.embedding)
    tested = drift.compare(rows, projected, reference, classes)
    return {f.name: f.adjusted <= LEVEL for f in tested} | {"any": any(f.adjusted <= LEVEL for f in tested)}


def false_alarms(bundle, reference, pools, windows, n):
    """The share of windows without a shift that are called changed."""
    found, total = [], len(pools.labels)
    families = ("any", "inputs", "predictions", "confidence", "embedding", "together")
    for beside in ("rows of the same kind", "the bundle's reference"):
        counts, rng = Counter(), np.random.default_rng(n)
        for _ in range(windows):
            order, own = rng.permutation(total), reference
            if beside == "rows of the same kind":
                part, half = order[: total // 2], pools.plain.take(order[: total // 2])
                own = replace(
                    reference,
                    features=half.features.astype(np.float32),
                    probabilities=half.probabilities.astype(np.float16),
                    projected=reference.project(half.embedding),
                    labels=pools.labels[part].astype(np.int16),
                )
            counts.update(k for k, v in alarm(pools.plain.take(order[-n:]), own, bundle.classes).items() if v)
        found.append({"n": n, "beside": beside, "windows": windows} | {k: counts[k] / windows for k in families})
        print(f"| false alarms, n = {n}, beside {beside} | {counts['any'] / windows:.1%} | at most 5 % |", flush=True)
    return found


SIZES = {"brightness x .99": (500, 2000), "brightness x .9": (100, 200, 500), "none": (100, 500)}
SIZES |= {"10 % inverted": (200, 500), "one class twice as often": (200, 500), "two classes halved": (500,)}


def grid(bundle, reference, pools, before, windows):
    """Power, verdicts, ranges and names on each shift."""
    found = []
    names = [*shifts(), "10 % inverted", "one class twice as often", "two classes halved", "none"]
    for name in names:
        expected = shifts().get(name, ("", ""))[1]
        for n in SIZES.get(name, (100, 200)):
            if n > len(next(iter(pools.moved.values()))):
                continue
            rng, verdicts, told, fits = np.random.default_rng(n), Counter(), Counter(), []
            truths, ranges, changed = [], [], 0
            for _ in range(windows):
                rows, labels = pools.window(name, n, rng)
                blank = ("",) * n
                window = drift.Window(rows, blank, blank, blank, np.full(n, -2), blank, {})
                report = drift.report_on(window, reference, bundle.classes, bundle.task, "", before)
                truth = float((rows.probabilities.argmax(1) == labels).mean())
                verdicts[report.verdict] += 1
                changed += any(f.adjusted <= LEVEL for f in report.families)
                told.update(m.name for m in report.like)
                truths.append(truth)
                ranges.append((report.accuracy.low, report.accuracy.high))
                fits.append(report.accuracy.low <= truth <= report.accuracy.high)
            low, high = np.mean(ranges, 0)
            row = {
                "shift": name,
                "n": n,
                "windows": windows,
                "accuracy": float(np.mean(truths)),
                "changed": changed / windows,
            }
            row |= {"verdicts": {k: v / windows for k, v in verdicts.items()}, "range": [float(low), float(high)]}
            row |= {"range holds": float(np.mean(fits)), "expected": expected}
            row |= {"named right": told[expected] / windows if expected else None, "names": dict(told.most_common(3))}
            found.append(row)
            right = f", named right {row['named right']:.0%}" if expected else ""
            print(
                f"| {name}, n = {n}: accuracy {row['accuracy']:.1%}, said {low:.1%} to {high:.1%} "
                f"| changed {row['changed']:.0%}{right}; range holds {row['range holds']:.0%} | {dict(verdicts)} |",
                flush=True,
            )
    return found


def columns(kind, n, rng):
    """Two tables of n rows and 20 columns, most with ties."""
    if kind == "means of bytes":
        return [rng.integers(0, 255 * 784, (n, 20)) / (255 * 784) for _ in range(2)]
    if kind == "bytes":
        return [rng.integers(0, 256, (n, 20)) / 255 for _ in range(2)]
    return [rng.normal(size=(n, 20)) for _ in range(2)]


def speed(quick):
    """Our statistic of 20 columns beside a loop over scipy's, in turn."""
    from scipy import stats

    from project.monitor.tests import ks_columns

    n, found = 50_000 if quick else 1_000_000, []

    def timed(what):
        began, used = time.perf_counter(), time.process_time()
        return what(), time.perf_counter() - began, time.process_time() - used

    for kind in ("bytes", "means of bytes", "continuous"):
        x, y = columns(kind, n, np.random.default_rng(3))
        wall, used, apart = {"ours": [], "scipy": []}, {"ours": [], "scipy": []}, 0.0
        for _ in range(1 if quick else 2):
            sides = {
                "ours": timed(lambda x=x, y=y: ks_columns(x, y)),
                "scipy": timed(lambda x=x, y=y: [stats.ks_2samp(x[:, i], y[:, i], method="asymp") for i in range(20)]),
            }
            for name, (_, seconds, processor) in sides.items():
                wall[name].append(seconds)
                used[name].append(processor)
            pairs = zip(sides["ours"][0], sides["scipy"][0], strict=True)
            apart = max(apart, *(abs(a.statistic - b.statistic) for a, b in pairs))
        fast, slow = min(wall["ours"]), min(wall["scipy"])
        work = min(used["scipy"]) / min(used["ours"])
        found.append(
            {
                "kind": kind,
                "rows": n,
                "seconds": fast,
                "scipy": slow,
                "ratio": slow / fast,
                "ratio of processor": work,
                "apart": apart,
            }
        )
        print(
            f"| KS of {n:,} against {n:,} rows x 20, {kind} | {fast:.2f} s, scipy {slow:.2f} s: "
            f"{slow / fast:.1f} times ({work:.1f} of processor), apart {apart:.0e} | 20 times, 1e-12 |",
            flush=True,
        )
    return found


def whole(path):
    """In a process of its own: ten thousand rows of a window, from a file, against the reference; everything."""
    bundle = open_bundle(path, verify=False)
    reference, n = known.open_reference(bundle), 10_000
    with np.load(Path(path).parent / "window.npz") as z:
        rows = known.Rows(z["features"], z["probabilities"], z["embedding"])
    blank, inputs = ("",) * n, tuple(map(str, range(n)))
    window = drift.Window(rows, blank, blank, inputs, np.full(n, -2), blank, {})
    began, used = time.perf_counter(), time.process_time()
    report = drift.report_on(window, reference, bundle.classes, bundle.task)
    page = drift.to_html(report)
    found = {"seconds": time.perf_counter() - began, "processor": time.process_time() - used, "rows": report.rows}
    status = Path("/proc/self/status").read_text(encoding="ascii")  # getrusage would know the parent's peak, too
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024
    print(json.dumps(found | {"MB": peak, "page": len(page.encode()), "verdict": report.verdict}))


def making(bundle, data):
    """What a reference costs."""
    began = time.perf_counter(), time.process_time()
    bundle = known.make_reference(bundle, data)
    cost = {"seconds": time.perf_counter() - began[0], "processor": time.process_time() - began[1]}
    cost["bytes"] = bundle.manifest["files"][known.FILE]["bytes"]
    print(
        "| reference: {seconds:.1f} s, {processor:.1f} s of processor | {bytes:,} bytes | 20 s, 400 kB |".format(**cost)
    )
    return cost


def report_cost(bundle, pools, folder):
    """What a report on ten thousand rows costs."""
    rows, command = pools.plain, [sys.executable, __file__, str(bundle.path), "--whole"]
    np.savez(folder / "window.npz", features=rows.features, probabilities=rows.probabilities, embedding=rows.embedding)
    done = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    cost = min(done, key=lambda d: d["seconds"])
    line = "{seconds:.2f} s ({processor:.2f} s of processor), {MB:.0f} MB, page of {page:,} bytes".format(**cost)
    print(f"| 10,000 rows against the reference, page included | {line} | 2 s, 300 MB, 200 kB |", flush=True)
    return cost


def main():
    """Measure, print the table, keep the numbers."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("bundle", nargs="?", help="a folder; none: the newest run")
    options.add_argument("--quick", action="store_true", help="few windows")
    options.add_argument(
        "--only", action="append", choices=["ks", "reference", "whole", "grid", "alarms"], help="a part; repeatable"
    )
    options.add_argument("--windows", type=int, default=200, help="without a shift; an eighth of them of each shift")
    options.add_argument(
        "--sizes", type=int, nargs="+", default=[50, 100, 500, 5000], help="of windows without a shift"
    )
    options.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--json", default=str(ROOT / "benchmarks/results/drift.json"), help="where to write")
    asked = options.parse_args()
    if asked.whole:
        return whole(asked.bundle)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    print(f"{_cpu_name()}; {load:.1f} other processes were busy in the last minute\n")
    print("| what | found | goal or verdicts |\n|---|---|---|", flush=True)
    kept = Path(asked.json)
    result = json.loads(kept.read_text()) if kept.is_file() and asked.only else {}

    def keep(**part):
        result.update(part, cpu=_cpu_name())
        result.setdefault("busy", {}).update(dict.fromkeys(part, load))
        if not asked.quick:
            kept.write_text(json.dumps(result, indent=1) + "\n")

    asks = lambda part: not asked.only or part in asked.only  # noqa: E731
    if asks("ks"):
        keep(ks=speed(asked.quick))
    with tempfile.TemporaryDirectory() as folder:
        copytree(asked.bundle or latest_bundle("fashion_mnist"), Path(folder) / "bundle")
        bundle = open_bundle(Path(folder) / "bundle")
        data = open_data(bundle.task)
        if asks("reference") or known.FILE not in bundle.manifest["files"]:
            keep(reference=making(bundle, data))
            bundle = open_bundle(bundle.path)
        reference, pools = known.open_reference(bundle), Pools(bundle, data, asked.quick)
        right = float((pools.plain.probabilities.argmax(1) == pools.labels).mean())
        keep(accuracy={"test": right, "validation": reference.accuracy})
        if asks("whole"):
            keep(whole=report_cost(bundle, pools, Path(folder)))
        if asks("grid"):
            keep(
                grid=grid(
                    bundle,
                    reference,
                    pools,
                    bundle.metrics.get("test/acc", right),
                    4 if asked.quick else asked.windows // 8,
                )
            )
        if asks("alarms"):
            rows = {(r["n"], r["beside"]): r for r in result.get("false alarms", [])}
            for n in asked.sizes:
                found = false_alarms(bundle, reference, pools, 10 if asked.quick else asked.windows, n)
                rows |= {(r["n"], r["beside"]): r for r in found}
                keep(**{"false alarms": [rows[key] for key in sorted(rows)]})
    return None


if __name__ == "__main__":
    main()
