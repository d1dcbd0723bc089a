"""Which epoch's weights should be served: every rule's choice, scored on rows that neither training nor validation saw.

    PROJECT_SOURCE=/folder python benchmarks/epochs.py --only dog_breeds --seeds 20
    PROJECT_SOURCE=/folder python benchmarks/epochs.py --only face_emotion --seeds 2 --epochs 15 --rows 5000
    python benchmarks/epochs.py --table          the comparison of all fits that are in the file

Each fit has a split of its own: hidden rows are drawn from the published training rows (for Fashion-MNIST the
published test set is large enough to be the hidden rows), then validation rows, as many as the task has, and the
rest is trained on. The weights of every epoch are scored as they would be served, with a temperature fitted on the
validation rows. Fits are kept in build/epochs.jsonl, a line each, and the rules are compared on the same fits:
mean differences to the first epoch of the highest accuracy, with intervals of 95 % over the fits (Student's t).
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = {"face_emotion": 3000, "dog_breeds": 400, "fake_news": 400, "fake_titles": 6000}


def split(data, seed, rows):
    """The data with splits of its own: "train", "val" and "hidden"; at most so many rows to train on."""
    import numpy as np

    from project.data.cleaning import group_split

    free = np.zeros(len(data.labels), bool)
    free[np.concatenate([data.splits["train"], data.splits["val"]])] = True
    hidden = data.splits["test"]
    if data.task in HIDDEN:
        hidden = group_split(data.labels, HIDDEN[data.task], 1000 + seed, [], free)[1]
        free[hidden] = False
    train, val = group_split(data.labels, len(data.splits["val"]), 2000 + seed, [], free)
    if rows and rows < len(train):
        free[val] = False
        train = group_split(data.labels, rows, 3000 + seed, [], free)[1]
    manifest = data.manifest | {"hash": f"{data.hash}-{seed}-{rows}"}  # features and tokens are cached under it
    return dataclasses.replace(data, manifest=manifest, splits={"train": train, "val": val, "hidden": hidden})


def scores(net, plan, p, rows):
    """What a network says of some rows, and their labels."""
    import numpy as np

    from project.train.prepare import _take, predict

    inputs = p.inputs[rows] if isinstance(p.inputs, np.ndarray) else _take(p.inputs, rows)
    return predict(net, inputs, tta=plan.tta, max_length=plan.max_length), p.labels[rows]


def one(task, recipe, seed, asked, data, features):
    """One fit, and a row an epoch: what validation said, what the hidden rows say."""
    import numpy as np
    import pytorch_lightning as pl
    import torch

    import project.train.fit as module
    from project.metrics import apply_temperature, fit_temperature
    from project.train.recipe import get_recipe

    own = {name: asked[name] for name in ("epochs", "schedule") if asked.get(name)}
    plan = get_recipe(task, recipe, **own)
    here, kept, prepared = split(data, seed, asked.get("rows", 0)), [], []

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            state = pl_module.net.state_dict()
            kept.append({k: v.float().clone() if v.is_floating_point() else v.clone() for k, v in state.items()})

    def prepare(recipe, data, seed):
        p = given(recipe, data, seed, features)
        prepared.append(p)
        return p

    original, module.prepare = module.prepare, prepare
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = module.fit(plan, here, folder, seed=seed, callbacks=[Keep()])
    finally:
        module.prepare = original
    p, out = prepared[0], []
    net = p.net.float().to(memory_format=torch.channels_last).eval()
    for row, state in zip(result.history, kept, strict=True):
        net.load_state_dict(state)
        (val, val_labels), (hidden, labels) = (scores(net, plan, p, here.splits[n]) for n in ("val", "hidden"))
        t = fit_temperature(val, val_labels)

        def loss(probabilities, labels, t=t):
            sure = apply_temperature(probabilities, t)[np.arange(len(labels)), labels]
            return float(-np.log(np.clip(sure, 1e-7, 1)).mean())

        out.append(
            {k: row[k] for k in ("val/acc", "val/loss")}
            | {"val/calibrated": loss(val, val_labels), "acc": float((hidden.argmax(1) == labels).mean())}
            | {"nll": loss(hidden, labels), "nll at 1": loss(hidden, labels, 1.0), "temperature": t}
        )
    n = {name: len(r) for name, r in here.splits.items()}
    return {"task": task, "recipe": recipe, "seed": seed, "asked": asked, "n": n, "epochs": out}


def given(plan, data, seed, features):
    """`prepare`, with the features of frozen networks computed once for all fits."""
    import numpy as np
    import torch

    from project.train.prepare import Prepared, Probe, prepare

    if plan.frozen < 1:
        return prepare(plan, data, seed)
    if not features:
        pool = np.sort(np.concatenate(list(data.splits.values())))
        manifest = data.manifest | {"hash": data.hash.split("-")[0] + "-pool"}  # the same rows in every split
        every = dataclasses.replace(data, manifest=manifest, splits={"train": pool, "val": pool[:0]})
        found = prepare(plan, every, seed)
        features["all"] = np.zeros((len(data.labels), found.inputs.shape[1]), np.float32)
        features["all"][pool] = found.inputs
    torch.manual_seed(seed)
    probe = Probe(features["all"][data.splits["train"]], len(data.classes), plan.dropout)
    return Prepared(probe, features["all"], data.labels, data.splits, probe)


def _latest(good):
    return max(i for i, ok in enumerate(good) if ok)


def _error(acc, n):
    """The standard error of an accuracy; never that of certainty, which a few rows cannot give (add two, Agresti)."""
    p = (acc * n + 2) / (n + 4)
    return math.sqrt(p * (1 - p) / (n + 4))


def rules(fit):
    """The position of the epoch that each rule takes."""
    rows, n = fit["epochs"], fit["n"]["val"]
    acc, loss, calibrated = ([r[k] for r in rows] for k in ("val/acc", "val/loss", "val/calibrated"))
    best = max(acc)
    return {
        "first best accuracy": acc.index(best),
        "last best accuracy": _latest([a == best for a in acc]),
        "best accuracy, ties by loss": max(range(len(rows)), key=lambda i: (acc[i], -loss[i], i)),
        "least loss": _latest([v == min(loss) for v in loss]),
        "least calibrated loss": _latest([v == min(calibrated) for v in calibrated]),
        "latest within one standard error": _latest([best - a <= _error(best, n) for a in acc]),
        "last epoch": len(rows) - 1,
    }


T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)


def interval(values):
    """Mean, and half the width of its 95 % interval."""
    if len(values) < 2:
        return f"{statistics.mean(values):+.4f}"
    t = T[len(values) - 2] if len(values) - 2 < len(T) else 2.0
    return f"{statistics.mean(values):+.4f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def table(fits):
    """A row a rule: accuracy, log loss, and how far they are from those of the first rule, pair by pair."""
    first = [f["epochs"][rules(f)["first best accuracy"]] for f in fits]
    print("| rule | epoch | accuracy, % | difference, points | log loss | difference | best possible in |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for rule in rules(fits[0]):
        taken = [f["epochs"][rules(f)[rule]] for f in fits]
        where = statistics.mean(rules(f)[rule] + 1 for f in fits)
        acc, nll = (statistics.mean(r[k] for r in taken) for k in ("acc", "nll"))
        d = interval([100 * (a["acc"] - b["acc"]) for a, b in zip(taken, first, strict=True)])
        e = interval([a["nll"] - b["nll"] for a, b in zip(taken, first, strict=True)])
        top = sum(r["acc"] >= max(x["acc"] for x in f["epochs"]) for r, f in zip(taken, fits, strict=True))
        print(f"| {rule} | {where:.1f} | {100 * acc:.2f} | {d} | {nll:.4f} | {e} | {top} of {len(fits)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="dog_breeds", help="a task")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--epochs", type=int, default=0, help="in place of the recipe's")
    parser.add_argument("--rows", type=int, default=0, help="at most so many to train on; 0: all")
    parser.add_argument("--schedule", default="", help="in place of the recipe's")
    parser.add_argument("--table", action="store_true", help="no fit: compare those that are there")
    parser.add_argument("--file", default=str(ROOT / "build" / "epochs.jsonl"))
    asked = parser.parse_args()
    file = Path(asked.file)
    if not asked.table:
        from project.data.store import build

        data, features = build(asked.only), {}
        file.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(asked.first, asked.first + asked.seeds):
            start = time.time()
            own = {k: v for k in ("epochs", "rows", "schedule") if (v := getattr(asked, k))}
            fit = one(asked.only, asked.recipe, seed, own, data, features)
            with file.open("a", encoding="utf-8") as f:
                f.write(json.dumps(fit) + "\n")
            print(f"{asked.only} {asked.recipe} seed {seed}: {time.time() - start:.0f} s", file=sys.stderr)
    groups = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        fit = json.loads(line)
        key = (fit["task"], fit["recipe"], "".join(f", {k} {v}" for k, v in fit["asked"].items()))
        groups.setdefault(key, {})[fit["seed"]] = fit  # a seed that was fitted again replaces itself
    for (task, recipe, own), fits in groups.items():
        n = next(iter(fits.values()))["n"]
        print(f"\n{task} {recipe}{own}: {len(fits)} fits; rows {n}\n")
        table(list(fits.values()))


if __name__ == "__main__":
    main()
