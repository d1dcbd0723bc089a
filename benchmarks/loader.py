"""How fast batches come, against a DataLoader that makes them of single examples.

    python benchmarks/loader.py            about four minutes
    python benchmarks/loader.py --quick    once each and few examples, to see that it works

Everything runs in one process on one core, ours and the plain way in turn: a slow minute of the machine meets both.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from project.data.loader import Batches, TextBatches  # noqa: E402

SIZES = {"faces, 48x48 grey": (15_000, (48, 48), 250, 48), "dogs, 256x256 colour": (600, (256, 256, 3), 100, 224)}


class OneByOne(Dataset):
    """What a course would write: an example at a time, with plain torch, on the arrays that our own batches read."""

    def __init__(self, images, labels, edge):
        self.images, self.labels, self.edge = images, labels, edge

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        x = torch.from_numpy(self.images[i])
        x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)
        if not self.edge:
            return x, int(self.labels[i])
        x = x.float()
        area, aspect = random.uniform(0.35, 1), math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = (min(n, round(n * math.sqrt(area * r))) for n, r in zip(x.shape[1:], (1 / aspect, aspect), strict=True))
        top, left = random.randint(0, x.shape[1] - h), random.randint(0, x.shape[2] - w)
        x = F.interpolate(x[None, :, top : top + h, left : left + w], (self.edge, self.edge), mode="bilinear")[0]
        if random.random() < 0.5:
            x = x.flip(2)
        x = (x * random.uniform(0.6, 1.4)).clamp(0, 255)
        mean = x.mean()
        return ((x - mean) * random.uniform(0.6, 1.4) + mean).clamp(0, 255).to(torch.uint8), int(self.labels[i])


class Texts:
    """Random numbers, with the lengths of news articles: a median of 250 words, a few of thousands."""

    def __init__(self, n):
        lengths = np.random.default_rng(0).lognormal(math.log(250), 0.8, n).astype(int).clip(1)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.ids = np.random.default_rng(0).integers(2, 50_000, self.offsets[-1], np.int32)

    def __len__(self):
        return len(self.offsets) - 1


def padded(examples):
    """Collate (ids, label) pairs, as many tutorials do."""
    ids, labels = zip(*examples, strict=True)
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor(labels)


class TextByText(Dataset):
    """A text at a time."""

    def __init__(self, texts, labels):
        self.texts, self.labels = texts, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        start, end = self.texts.offsets[i : i + 2]
        return torch.from_numpy(self.texts.ids[start : min(end, start + 256)]).long(), int(self.labels[i])


def rate(batches, at_most=math.inf):
    """Examples a second of one pass, or of the beginning of one."""
    start, seen = time.perf_counter(), 0
    for _, y in batches:
        seen += len(y)
        if seen >= at_most:
            break
    return seen / (time.perf_counter() - start)


def images(name, share, repeats):
    """Images a second, ours and one by one in turn, without and with augmentation."""
    n, shape, size, edge = SIZES[name]
    n = max(2 * size, round(n * share))
    array, labels = np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8), np.arange(n) % 20
    same = {"crop": edge, "flip": "random", "colour": 0.4}
    more = {**same, "rotate": 10, "erase": 0.3, "mixup": 0.3, "classes": 20}
    plain = Batches(array, labels, size, shuffle=True)
    alike = Batches(array, labels, size, shuffle=True, **same)
    fuller = Batches(array, labels, size, shuffle=True, **more)
    bare, single = (DataLoader(OneByOne(array, labels, e), size, shuffle=True) for e in (0, edge))
    for batches in (plain, alike, fuller, bare, single):
        rate(batches, 2 * size)
    runs = [[rate(b) for b in (plain, bare, alike, single, fuller)] for _ in range(repeats)]
    ours, theirs, augmented, their_augmented, everything = zip(*runs, strict=True)
    yield f"{name}: as stored", ours, theirs
    yield f"{name}: crops, flips and colours", augmented, their_augmented
    yield f"{name}: and turned, erased and mixed", everything, ()


def texts(share, repeats):
    """Texts a second, ours and one by one in turn; and how much of each is padding."""
    source = Texts(round(20_000 * share))
    labels = np.arange(len(source)) % 2
    ours = TextBatches(source, labels, 64, shuffle=True)
    theirs = DataLoader(TextByText(source, labels), 64, shuffle=True, collate_fn=padded)
    shares = [float(np.mean([(ids == 0).float().mean().item() for ids, _ in b])) for b in (ours, theirs)]
    runs = [[rate(b) for b in (ours, theirs)] for _ in range(repeats)]
    return *zip(*runs, strict=True), shares


def from_disk(share, repeats):
    """Images a second of a set that the system's cache does not hold: with advice a batch ahead, and without."""
    n = max(400, round(4000 * share))
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:  # the usual place may be memory
        path, block = f"{folder}/images.npy", np.random.default_rng(0).integers(0, 256, (100, 256, 256, 3), np.uint8)
        array = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 256, 256, 3))
        for i in range(0, n, 100):
            array[i : i + 100] = block
        array.flush()
        del array
        runs = [[cold(path, n, ahead, i) for ahead in (0, math.inf)] for i in range(repeats)]
    return zip(*runs, strict=True)


def cold(path, n, ahead, seed):
    """Images a second of the first few batches, after the cache was told to forget the file."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    batches = Batches(np.load(path, mmap_mode="r"), np.zeros(n, int), 100, shuffle=True, seed=seed)
    batches.ahead = ahead
    return rate(batches, 400)


def row(what, values, unit, remark):
    """One line of the table: median and range."""
    low, mid, high = min(values), statistics.median(values), max(values)
    digits = ",.0f" if mid >= 100 else ".2f"
    print(f"| {what} | {mid:{digits}} ({low:{digits}} to {high:{digits}}) {unit} | {remark} |", flush=True)
    return {"what": what, "median": mid, "low": low, "high": high, "unit": unit, "remark": remark}


def pair(what, ours, theirs, unit, plain):
    """Three lines: ours, theirs, and the ratio of each turn; one where nobody else was asked."""
    if not theirs:
        return [row(what, ours, unit, "")]
    return [
        row(what, ours, unit, ""),
        row(f"{what}: {plain}", theirs, unit, ""),
        row(f"{what}: ratio", [a / b for a, b in zip(ours, theirs, strict=True)], "times", "in turn"),
    ]


def main():
    """Measure, print the table, keep the numbers."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="once each, a tenth of the examples")
    options.add_argument("--json", default=str(ROOT / "benchmarks/results/loader.json"), help="where to write")
    asked = options.parse_args()
    torch.set_num_threads(1)
    share, repeats = (0.1, 1) if asked.quick else (1.0, 5)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    print(f"one core of {os.cpu_count()}; {load:.1f} other processes were busy in the last minute\n")
    print("| what | median (range) | remark |\n|---|---|---|")
    rows = []
    for name in SIZES:
        for what, ours, theirs in images(name, share, repeats):
            rows += pair(what, ours, theirs, "images/s", "DataLoader")
    ours, theirs, shares = texts(share, repeats)
    rows += pair("texts, batches of 64", [r / 64 for r in ours], [r / 64 for r in theirs], "batches/s", "DataLoader")
    rows += [row("texts: padding", [shares[0]], "", ""), row("texts: padding, DataLoader", [shares[1]], "", "")]
    if hasattr(os, "posix_fadvise"):
        ours, theirs = from_disk(share, repeats)
        rows += pair("dogs from a cold disk, advised a batch ahead", ours, theirs, "images/s", "without advice")
    if not asked.quick:
        Path(asked.json).write_text(json.dumps({"busy": load, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
