"""A small CNN, trained for a moment on the sample of Fashion-MNIST, as a bundle; and images it is sure about, as PNG.

python make_bundle.py FOLDER MODEL
"""

import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from project.bundle.export import export_bundle  # noqa: E402
from project.bundle.manifest import onnx_session  # noqa: E402
from project.models.vision import build_model, set_normalization_, whiten_  # noqa: E402

CLASSES = ["top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def idx(name, offset, shape):
    """A file of the sample as an array."""
    content = gzip.decompress((ROOT / "tests/samples/fashion_mnist" / name).read_bytes())
    return np.frombuffer(content, np.uint8, offset=offset).reshape(-1, *shape)


def trained(name, images, labels, steps=150):
    """A network that has seen the images a few times."""
    torch.manual_seed(0)
    net, x = build_model(name, len(CLASSES), (1, 28, 28)), torch.tensor(images)[:, None]
    net = whiten_(set_normalization_(net, x), x)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 2e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (32,))
        loss = torch.nn.functional.cross_entropy(net(x[rows]), torch.tensor(labels)[rows].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def main():
    """Make the bundle, and beside it what is sent: the surest image of each class, and the class of each."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    images, seen = (idx(f"{split}-images-idx3-ubyte.gz", 16, (28, 28)) for split in ("t10k", "train"))
    net = trained(name, seen, idx("train-labels-idx1-ubyte.gz", 8, ()))
    made = export_bundle(net, folder, task="clothes", classes=CLASSES, images=images, model=name, replace=True)
    p = onnx_session(made, 1).run(["probabilities"], {made.manifest["input"]["name"]: images})[0]
    inputs = folder.with_name(folder.name + "-inputs")
    inputs.mkdir(exist_ok=True)
    for old in inputs.glob("*.png"):
        old.unlink()
    sure = np.flatnonzero(np.sort(p, 1)[:, -1] - np.sort(p, 1)[:, -2] > 0.1)[:64]
    for i in sure:
        file = io.BytesIO()
        Image.fromarray(images[i]).save(file, "PNG")
        (inputs / f"{i:03d}.png").write_bytes(file.getvalue())
    (inputs / "classes.json").write_text(json.dumps({f"{i:03d}.png": CLASSES[p[i].argmax()] for i in sure}))
    print(f"{name}: {len(sure)} images, classes {sorted({CLASSES[p[i].argmax()] for i in sure})}")


if __name__ == "__main__":
    main()
