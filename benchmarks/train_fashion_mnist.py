"""How long training takes, against the plain way and against the same fit without Lightning.

    python benchmarks/train_fashion_mnist.py            all of it, half an hour on two cores
    python benchmarks/train_fashion_mnist.py --quick    one seed and few steps, to see that it works
    python benchmarks/train_fashion_mnist.py --json out.json

Every row is measured in fresh processes; times count from the start of one. Nothing here is a test: seconds depend
on the machine and on who else uses it, which is why the spread is printed with every number.
"""

import argparse
import csv
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"tiny": (90, 6), "small": (92, 17), "fast": (93, 48), "better": (94, 110)}  # recipe: % and seconds


def to_accuracy(recipe, seed):
    """Import, fit on all 60,000 training images, score the test set."""
    gc.disable()  # imports make a million objects that stay: collecting among them costs half a second
    from project.data.store import open_data
    from project.train.fit import fit, get_recipe, predict

    gc.enable()
    gc.freeze()
    imported = time.time()
    data = open_data("fashion_mnist")
    chosen = get_recipe("fashion_mnist", recipe, train_on="train+val")
    with tempfile.TemporaryDirectory() as folder:
        result = fit(chosen, data, folder, seed=seed)
        images, labels = data.split("test")
        p = predict(result.net, images, tta=chosen.tta, precision="bf16" if result.precision == "bf16" else "fp32")
        accuracy = float((p.argmax(1) == labels).mean())
        return {
            "accuracy": accuracy,
            "imported": imported,
            "end": time.time(),
            "fit": result.seconds,
            "images_per_s": result.images_per_s,
        }


def bare_steps(net, chosen, batches):
    """Train with a recipe's optimizer, schedule and loss, without Lightning; the seconds of the steps."""
    import torch
    import torch.nn.functional as F

    from project.train.module import lr_schedule, make_optimizer

    optimizer = make_optimizer(net.train(), chosen.optimizer, chosen.lr)
    schedule = lr_schedule(chosen.schedule, chosen.epochs * len(batches))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    start = time.perf_counter()
    for _ in range(chosen.epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x).float(), y, label_smoothing=chosen.label_smoothing).backward()
            optimizer.step()
            scheduler.step()
    return time.perf_counter() - start


def loop(recipe, seed):
    """The recipe as a self-contained loop would have it: torch alone, images of one size, nothing watched or saved."""
    gc.disable()
    import torch

    # our network and optimizer, without Lightning: a module of Lightning's is torch's for whoever needs no Trainer
    sys.modules["pytorch_lightning"] = types.SimpleNamespace(LightningModule=torch.nn.Module)
    from project.data.store import open_data
    from project.train.prepare import choose_precision, init_net, make_loaders, predict, to_precision_
    from project.train.recipe import get_recipe

    gc.enable()
    gc.freeze()
    data, precision = open_data("fashion_mnist"), choose_precision()[0]
    chosen = get_recipe("fashion_mnist", recipe, train_on="train+val", small=0, small_share=0.0)
    net = to_precision_(init_net(chosen, data, seed), precision)
    bare_steps(net, chosen, make_loaders(chosen, data, seed)[0])
    images, labels = data.split("test")
    p = predict(net.eval(), images, tta=chosen.tta, precision=precision)
    return {"accuracy": float((p.argmax(1) == labels).mean()), "end": time.time()}


def first_batch(_recipe, _seed):
    """Import the package and gather one batch."""
    start = time.time()
    import project.train.fit  # noqa: F401

    imported = time.time()
    from project.data.loader import Batches
    from project.data.store import open_data

    data = open_data("fashion_mnist")
    next(iter(Batches(data.images, data.labels, 250, rows=data.splits["train"], shuffle=True)))
    return {"import": imported - start, "batch": time.time() - imported}


def step(recipe, steps):
    """The same steps by Lightning and by a bare loop, in turn."""
    from project.data.store import open_data
    from project.train.fit import choose_precision, fit, get_recipe, init_net, make_loaders, to_precision_

    data, precision = open_data("fashion_mnist"), choose_precision()[0]
    chosen = get_recipe("fashion_mnist", recipe, batch_size=250, epochs=1)
    times = {"loop": [], "fit": []}
    for _ in range(5):
        net = to_precision_(init_net(chosen, data), precision)
        times["loop"].append(bare_steps(net, chosen, make_loaders(chosen, data, limit_batches=steps)[0]) / steps)
        with tempfile.TemporaryDirectory() as folder:
            result = fit(dataclasses.replace(chosen, train_on="train"), data, folder, limit_batches=steps)
            times["fit"].append(chosen.batch_size / result.images_per_s)
    return times


def plain(_recipe, steps):
    """ResNet-18, Adam, batch 64, a DataLoader, a loop: what a course would write, for an epoch or a few steps of it."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from project.data.store import open_data
    from project.models.vision import build_model
    from project.train.fit import predict

    data = open_data("fashion_mnist")
    images, labels = (np.concatenate(pair) for pair in zip(data.split("train"), data.split("val"), strict=True))
    torch.manual_seed(0)
    net = build_model("resnet18", 10, (28, 28)).train()
    # the stem of the well-known network, for photographs: a twelfth of the arithmetic of ours for small images
    net.stem = nn.Sequential(nn.Conv2d(1, 64, 7, 2, 3, bias=False), *net.stem[1:], nn.MaxPool2d(3, 2, 1))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    examples = TensorDataset(torch.from_numpy(images)[:, None], torch.from_numpy(labels))
    start = time.perf_counter()
    for done, (x, y) in enumerate(DataLoader(examples, 64, shuffle=True), 1):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if done == steps:
            break
    speed = 64 * done / (time.perf_counter() - start)
    test_images, test_labels = data.split("test")
    accuracy = float((predict(net, test_images).argmax(1) == test_labels).mean())
    return {"accuracy": accuracy, "images_per_s": speed, "end": time.time()}


def rate(_recipe, repeats):
    """What this machine's convolutions can do at best: 64 to 64 channels, 3x3, in the precision the recipes use."""
    import torch
    import torch.nn.functional as F

    from project.train.fit import choose_precision

    kind = torch.bfloat16 if choose_precision()[0] == "bf16" else torch.float32
    x = torch.randn(250, 64, 13, 13).to(kind, memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3).to(kind, memory_format=torch.channels_last)
    with torch.inference_mode():
        F.conv2d(x, w, padding=1)
        start = time.perf_counter()
        for _ in range(repeats):
            F.conv2d(x, w, padding=1)
    flops = 2 * 250 * 13 * 13 * 64 * 64 * 9 * repeats
    return {"gflops": flops / (time.perf_counter() - start) / 1e9, "precision": str(kind).removeprefix("torch.")}


def papermill(recipe, seed):
    """The run notebook; the fit's own seconds are in its metrics."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "papermill",
            "nbs/train.ipynb",
            f"{folder}/out.ipynb",
            "-p",
            "recipe",
            recipe,
            "-p",
            "seed",
            str(seed),
        ]
        env = os.environ | {"PROJECT_RUNS": folder, "WANDB_MODE": "disabled"}
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
        rows = [
            row for path in Path(folder).glob("*/metrics.csv") for row in csv.DictReader(path.open(encoding="utf-8"))
        ]
    seconds = [float(row["seconds"]) for row in rows if row.get("seconds")]
    return {"wall": time.time() - start, "fit": max(seconds, default=float("nan"))}


def alone(recipe, seed):
    """The same fit, called from Python with a validation set."""
    from project.data.store import open_data
    from project.train.fit import fit, get_recipe

    with tempfile.TemporaryDirectory() as folder:
        return {"fit": fit(get_recipe("fashion_mnist", recipe), open_data("fashion_mnist"), folder, seed=seed).seconds}


CHILDREN = {f.__name__: f for f in (to_accuracy, loop, first_batch, step, plain, rate, papermill, alone)}


def child(name, recipe="-", number=0):
    """Run one measurement in a process of its own."""
    started = time.time()
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, recipe, str(number)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the measurement {name} {recipe} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"seconds": result["end"] - started} if "end" in result else result


def noise():
    """The spread of a fixed piece of work: what differences below it mean nothing."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        sum(i * i for i in range(2_000_000))
        times.append(time.perf_counter() - start)
    return (max(times) - min(times)) / statistics.median(times)


def middle(values):
    """Median with the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def measure(quick):
    """All rows: name, value, remark; and the raw numbers."""
    raw, rows = {"noise before": noise(), "rate": child("rate", "-", 100), "loops": {}, "recipes": {}}, []
    rows.append(("convolutions of this machine", f"{raw['rate']['gflops']:.0f} GFLOP/s", raw["rate"]["precision"]))
    for recipe in ("tiny",) if quick else TARGETS:
        pairs = [(child("loop", recipe, s), child("to_accuracy", recipe, s)) for s in range(1 if quick else 3)]
        loops, runs = [bare for bare, _ in pairs], [ours for _, ours in pairs]
        raw["loops"][recipe], raw["recipes"][recipe] = loops, runs
        accuracy = statistics.mean(r["accuracy"] for r in runs)
        target, seconds = TARGETS[recipe]
        took, speed = middle([r["seconds"] for r in runs]), statistics.median(r["images_per_s"] for r in runs)
        rows.append(
            (
                f"recipe `{recipe}`: test accuracy {accuracy:.2%}",
                f"{took} s",
                f"goal {target} % in {seconds} s; {speed:,.0f} images/s in training",
            )
        )
        ratios = [ours["seconds"] / bare["seconds"] for bare, ours in pairs]
        bare = middle([r["seconds"] for r in loops])
        accuracy = statistics.mean(r["accuracy"] for r in loops)
        rows.append((f"over a bare loop, which gets {accuracy:.2%}", middle(ratios), f"loop {bare} s; goal 1.30"))
    runs = raw["first batch"] = [child("first_batch") for _ in range(2 if quick else 5)]
    rows.append(("import project.train.fit", f"{middle([r['import'] for r in runs])} s", "mostly torch and Lightning"))
    rows.append(
        ("first batch after it", f"{middle([1000 * r['batch'] for r in runs])} ms", "opens the data, shuffles, gathers")
    )
    steps = child("step", "fast", 20 if quick else 60)
    raw["step"] = steps
    ratios = [a / b for a, b in zip(steps["fit"], steps["loop"], strict=True)]
    rows.append(
        (
            "Lightning's step over the bare loop's, batch 250",
            middle(ratios),
            f"loop {1000 * statistics.median(steps['loop']):.1f} ms; goal 1.10",
        )
    )
    slow = raw["plain"] = child("plain", "-", 8 if quick else 0)
    rows.append(
        (
            f"the plain way, ResNet-18 for {'8 steps' if quick else 'an epoch'}: test accuracy {slow['accuracy']:.2%}",
            f"{slow['seconds']:.0f} s",
            f"{slow['images_per_s']:,.0f} images/s in training",
        )
    )
    if (ROOT / "nbs/train.ipynb").exists():
        recipe = "tiny"
        pairs = raw["papermill"] = [
            (child("alone", recipe, s), child("papermill", recipe, s)) for s in range(1 if quick else 3)
        ]
        rows.append(
            (
                "the fit inside papermill over the fit alone",
                middle([b["fit"] / a["fit"] for a, b in pairs]),
                f"whole notebook {middle([b['wall'] for _, b in pairs])} s; goal 1.05",
            )
        )
    raw["noise after"] = noise()
    return raw, rows


def main():
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps")
    parser.add_argument("--json", type=Path, help="where to write the raw numbers")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, recipe, number = args.child
        print(json.dumps(CHILDREN[name](recipe, int(number))))
        return
    from project.core import environment
    from project.data.store import build

    build("fashion_mnist")
    raw, rows = measure(args.quick)
    machine = environment()
    print(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['packages']['torch']}")
    print(f"noise of a fixed piece of work: {raw['noise before']:.0%} before, {raw['noise after']:.0%} after\n")
    print("| what | median (range) | remark |\n|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    if args.json:
        from project.core import write_json

        write_json(args.json, raw | {"machine": machine})


if __name__ == "__main__":
    main()
