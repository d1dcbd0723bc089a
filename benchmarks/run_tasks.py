"""The five tasks, each by its run notebook and three seeds, and beside them what the earlier projects did.

    PROJECT_SOURCE=/folder python benchmarks/run_tasks.py              everything, most of an hour on two cores
    PROJECT_SOURCE=/folder python benchmarks/run_tasks.py --only dog_breeds --seeds 1
    PROJECT_SOURCE=/folder python benchmarks/run_tasks.py --only baselines

The runs are ordinary ones, recorded in runs/; `project results --write` makes the table of them. The baselines are
the plain ways: TF-IDF with logistic regression for the texts, and for the faces the small network of an earlier
project with its loader, which opens, converts and scales every image in every epoch. Nothing here is a test.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PLAN = {  # task -> recipes
    "fashion_mnist": ("fast", "better"),
    "face_emotion": ("fast",),
    "dog_breeds": ("fast", "finetune"),
    "fake_news": ("fast", "minilm"),
    "fake_titles": ("fast", "minilm"),
}


def train(task, recipe, seed):
    """The run notebook, as anybody would start it; how long it took in all."""
    from project.core import cache_dir

    shutil.rmtree(cache_dir() / "features", ignore_errors=True)  # what a network saw before is part of the time
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [] if recipe == "fast" else ["-p", "recipe", recipe]
        more = ["-p", "seed", str(seed), "-p", "wandb", "disabled", "-p", "resume", "False"]
        command = [BIN / "papermill", "nbs/train.ipynb", f"{folder}/out.ipynb", "-p", "task", task, *chosen, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{task} {recipe} failed:\n{done.stderr[-3000:]}")
    return time.time() - start


def words(task):
    """TF-IDF of words and pairs of words with logistic regression: test, and sets of another origin."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    from project.data.store import build
    from project.metrics import balanced_accuracy

    data = build(task)
    start = time.perf_counter()
    texts, labels = data.split("train")
    vectors = TfidfVectorizer(lowercase=True, ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=1000).fit(vectors.fit_transform(texts.joined()), labels)
    seconds = time.perf_counter() - start

    def score(name):
        texts, labels = data.split(name)
        return model.predict_proba(vectors.transform(texts.joined())), labels

    p, y = score("test")
    known = [score(name) for name in data.ood if data.split(name)[1].min() >= 0]
    q, z = (np.concatenate(parts) for parts in zip(*known, strict=True)) if known else (None, None)
    return {
        "what": "TF-IDF and logistic regression",
        "test/acc": float((p.argmax(1) == y).mean()),
        "ood/balanced_acc": balanced_accuracy(q, z) if known else None,
        "seconds": seconds,
    }


def faces(epochs):
    """An earlier project's network of 266 thousand parameters, Adam 4e-4, and its loader, an image at a time."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from project.data.store import build
    from project.train.prepare import make_loaders
    from project.train.recipe import get_recipe

    data = build("face_emotion")

    def part(i, o, pool):
        return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]

    torch.manual_seed(0)
    body = part(1, 4, 0) + part(4, 4, 1) + part(4, 8, 0) + part(8, 8, 1) + part(8, 16, 1)
    net = nn.Sequential(*body, nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(), nn.Dropout(0.4), nn.Linear(256, 7))

    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(data.images):  # back to files, as they were published
            Image.fromarray(np.asarray(image)).save(f"{folder}/{i}.jpg", quality=92)

        class Files(Dataset):
            def __init__(self, rows):
                self.rows = rows

            def __len__(self):
                return len(self.rows)

            def __getitem__(self, i):
                with Image.open(f"{folder}/{self.rows[i]}.jpg") as image:
                    pixels = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR).convert("L"))
                return torch.from_numpy(pixels.copy())[None].float() / 255, int(data.labels[self.rows[i]])

        def seconds(loader):
            start = time.perf_counter()
            for _ in loader:
                pass
            return time.perf_counter() - start

        chosen = get_recipe("face_emotion", "fast", small=0, small_share=0.0)
        loader = DataLoader(Files(np.random.default_rng(0).permutation(data.splits["train"])), 64, shuffle=True)
        loads = [(seconds(loader), seconds(make_loaders(chosen, data)[0])) for _ in range(3)]
        optimizer, times = torch.optim.Adam(net.parameters(), 4e-4), []
        for _ in range(epochs):
            start = time.perf_counter()
            net.train()
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
            times.append(time.perf_counter() - start)
        net.eval()
        with torch.inference_mode():
            right = [(net(x).argmax(1) == y).float() for x, y in DataLoader(Files(data.splits["test"]), 256)]
    return {
        "what": f"266 thousand parameters, Adam, {epochs} epochs, an image at a time",
        "parameters": sum(p.numel() for p in net.parameters()),
        "test/acc": float(torch.cat(right).mean()),
        "epoch": statistics.median(times),
        "seconds": sum(times),
        "loader": [a for a, _ in loads],  # of an epoch, without the network
        "our loader": [b for _, b in loads],  # with the recipe's augmentation
    }


def main():
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*PLAN, "baselines"], help="one task, or the baselines")
    parser.add_argument("--recipe", help="one recipe of the task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the baselines alone, an epoch each: does it work")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "baselines.json")
    asked = parser.parse_args()
    os.chdir(ROOT)
    for task in [] if asked.quick else [t for t in PLAN if asked.only in (None, t)]:
        for recipe in [asked.recipe] if asked.recipe else PLAN[task]:
            for seed in range(asked.seeds):
                print(f"{task} {recipe} seed {seed}: {train(task, recipe, seed):.0f} s in all", flush=True)
    if asked.only in (None, "baselines"):
        found = {"fake_news": words("fake_news"), "fake_titles": words("fake_titles")}
        found["face_emotion"] = faces(1 if asked.quick else 30)
        for task, row in found.items():
            print(task, json.dumps(row), flush=True)
        if not asked.quick:
            asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
