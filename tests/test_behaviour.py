"""Behavioural tests (Ribeiro et al. 2020) of small models that are trained here, and of the tests themselves."""

import csv
import gzip
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from project.behaviour import (
    Behaviour,
    behaviour_metrics,
    brighten,
    cover_middle,
    direction,
    image_behaviour,
    image_changes,
    invariance,
    minimum,
    step_aside,
    telling_words,
    text_behaviour,
    text_changes,
    typical_rows,
)
from project.data.loader import TextBatches
from project.data.store import build
from project.data.tokens import encode, pad
from project.models.text import build_text_model, text_tokenizer
from project.train.fit import fit, get_recipe, predict

pytestmark = pytest.mark.trained

# Pictures: a network of ten seconds on the committed sample. What it learns depends on the processor, the number of
# threads and the seed, so a limit lies well below the lowest of 24 trainings (six seeds, two instruction sets, 8 and
# 16 epochs).


@pytest.fixture(scope="module")
def clothes(tmp_path_factory, seed):
    """The sample, a network trained on it, and what that says of pictures."""
    folder = tmp_path_factory.mktemp("clothes")
    with pytest.MonkeyPatch.context() as env:
        env.setenv("PROJECT_DATA", str(folder / "data"))
        data = build("fashion_mnist")
        recipe = get_recipe(model="cnn-xs", epochs=16, batch_size=50)
        net = fit(recipe, data, folder / "run", seed=seed, accelerator="cpu", precision="fp32").net
    return data, lambda images: predict(net, images)


@pytest.fixture(scope="module")
def seen(clothes):
    """The outcomes of the trained network, by name."""
    data, ask = clothes
    typical = typical_rows(data.images, data.labels, data.splits["train"])
    outcomes = image_behaviour(ask, data.split("test")[0], data.images[typical], data.labels[typical])
    return {outcome.name: outcome for outcome in outcomes}


@pytest.mark.parametrize("change", image_changes(28))
def test_light_a_step_and_a_mirror_do_not_matter(seen, change):
    least = 0.85 if "%" in change else 0.7  # the lowest seen: .94 for light, .82 for a step and the mirror
    assert seen[change].n == 100 and seen[change].share >= least, seen[change]


def test_with_the_middle_covered_it_is_less_sure(seen):
    assert seen["less sure with the middle covered"].share >= 0.8  # the lowest seen: .94


def test_the_most_typical_clothes_are_known(seen):
    # the most that failed: 1 of 10, and 3 with half the epochs; by chance 9 do
    assert seen["the most typical of each class"].n == 10 and len(seen["the most typical of each class"].failed) <= 4


def test_an_untrained_network_does_not_pass(clothes):
    data, _ = clothes
    weights = np.random.default_rng(0).normal(size=(28 * 28, 10))
    typical = typical_rows(data.images, data.labels, data.splits["train"])

    def noise(images):
        logits = (images.reshape(len(images), -1) / 255 - 0.5) @ weights
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    found = behaviour_metrics(image_behaviour(noise, data.split("test")[0], data.images[typical], data.labels[typical]))
    assert found["behaviour/minimum"] < 0.5 and found["behaviour/invariance"] < 0.9


# Texts: the same questions put to a reader of made headlines, and of real ones where there are any

SHARED = ("the senator", "a judge", "the mayor", "the new law", "a hospital", "the army", "the budget", "voters")
HEADLINES = {
    "fake": (
        "WATCH: {} just got DESTROYED on live TV and it is hilarious",
        "BREAKING: you won't believe what {} did, the media is hiding it!",
        "{} caught red handed, and liberals are losing it [VIDEO]",
        "OMG! {} humiliated by a single tweet",
    ),
    "real": (
        "{} says talks on trade to resume next week",
        "Factbox: {} and the vote in parliament, officials say",
        "Exclusive: {} to seek approval of the plan, sources say",
        "U.N. council backs {} amid sanctions on Iran",
    ),
}


def made_headlines(n=400, seed=0):
    """Headlines of both classes."""
    draw = random.Random(seed)
    kinds = [draw.randrange(2) for _ in range(n)]
    texts = [draw.choice(HEADLINES[("fake", "real")[k]]).format(draw.choice(SHARED)) for k in kinds]
    return [t if draw.random() < 0.8 else f"{t} on {draw.choice(['Monday', 'Friday'])}" for t in texts], np.array(kinds)


def read_model(texts, labels, epochs, seed):
    """A bag of n-grams, trained in a few seconds; what it says of texts."""
    torch.manual_seed(seed)
    tokenizer = text_tokenizer("ngrams", texts)
    net = build_text_model("ngrams", 2, tokenizer.get_vocab_size())
    batches = TextBatches(encode(tokenizer, texts), labels, 32, shuffle=True, seed=seed, dropout=0.1)
    sparse = [p for name, p in net.named_parameters() if name.startswith("table")]
    dense = [p for name, p in net.named_parameters() if not name.startswith("table")]
    optimizers = [torch.optim.SparseAdam(sparse, 0.02), torch.optim.Adam(dense, 0.02)]
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for ids, y in batches:
            loss = F.cross_entropy(net(ids), y)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

    def ask(texts):
        ids = pad(list(encode(tokenizer, list(texts))), 256)
        with torch.inference_mode():
            return net.eval()(torch.from_numpy(ids)).softmax(1).numpy()

    return ask


def check_reader(texts, labels, epochs, least, seed):
    """Train on most of the texts, try the rest."""
    ask = read_model(texts[:-100], labels[:-100], epochs, seed)
    words = telling_words(texts[:-100], labels[:-100], 2)
    assert (ask(texts[-100:]).argmax(1) == labels[-100:]).mean() >= least
    found = {o.name: o for o in text_behaviour(ask, texts[-100:], words, ("fake", "real"))}
    for name in text_changes():
        assert found[name].share is None or found[name].share >= 0.9, found[name]
    assert found["upper case"].share == found["more spaces"].share == 1  # the tokenizer sees no difference
    for name in ("fake", "real"):
        assert found[f"more {name} with its words before"].share >= 0.95
    assert found["nothing but a class's own words"].share == 1


def test_a_reader_of_made_headlines(seed):
    texts, labels = made_headlines()
    check_reader(texts, labels, epochs=5, least=0.95, seed=seed)


def test_words_push_a_reader_their_way(seed):
    texts, labels = made_headlines()
    ask = read_model(texts, labels, 5, seed)
    for k, words in ((0, "WATCH: hilarious, liberals are losing it!"), (1, "officials say, sources say")):
        outcome = direction(ask, list(SHARED), lambda x, w=words: [f"{t} {w}" for t in x], k)
        assert outcome.share == 1, outcome.failed
    simple = ["OMG! hilarious [VIDEO]", "talks on trade to resume, officials say"]
    assert minimum(ask, simple, [0, 1]).share == 1


def test_a_reader_of_real_headlines(request, seed):
    given = request.config.environment_before.get("PROJECT_SOURCE", "")
    file = Path(given) / "fake_titles" / "real_and_fake_news.csv.gz"
    if not given or not file.is_file():
        pytest.skip("PROJECT_SOURCE has no fake_titles/real_and_fake_news.csv.gz")
    with gzip.open(file, "rt", encoding="utf-8", newline="") as f:
        found = [(row["text"].lower(), int(row["label"])) for row in csv.DictReader(f)]
    random.Random(0).shuffle(found)
    texts, labels = zip(*found[:6000], strict=True)
    check_reader(list(texts), np.array(labels), epochs=3, least=0.85, seed=seed)


# The tests themselves


def says(classes):
    """A model that knows the answer for each input."""
    return lambda inputs: np.eye(3)[[classes[str(x)] for x in inputs]]


def test_only_changed_inputs_count():
    ask = says({"a": 0, "b": 1, "A": 2})
    found = invariance(ask, ["a", "b", "a"], lambda x: ["A" if t == "a" else t for t in x])
    assert found.n == 2 and [f["input"] for f in found.failed] == [0, 2] and found.share == 0
    assert invariance(ask, ["b"], lambda x: list(x)).row["passed"] is None
    assert invariance(ask, [], lambda x: x).n == 0


def test_what_was_asked_already_is_not_asked_again():
    asked = []

    def ask(inputs):
        asked.append(list(inputs))
        return np.tile([0.6, 0.4], (len(inputs), 1))

    invariance(ask, ["a", "b"], lambda x: ["A", "b"], before=np.array([[0.6, 0.4], [0.4, 0.6]]))
    assert asked == [["A"]]


@pytest.mark.parametrize(
    ("before", "after", "rises", "passes"),
    [
        (0.5, 0.6, True, True),
        (0.5, 0.5, True, False),
        (0.5, 0.4, True, False),
        (1.0, 1.0, True, True),
        (0.5, 0.4, False, True),
        (1.0, 1.0, False, False),
        (0.0, 0.005, False, True),
    ],
)
def test_directions(before, after, rises, passes):
    p = {"a": before, "b": after}
    found = direction(lambda x: np.array([[p[t], 1 - p[t]] for t in x]), ["a"], lambda x: ["b"], 0, rises)
    assert found.share == passes


@pytest.mark.parametrize(
    "answer",
    [np.full(2, 0.5), np.full((3, 2), 0.5), np.full((2, 2), np.nan)],
)
def test_answers_that_are_none(answer):
    with pytest.raises(ValueError, match="probabilities for each of 2 inputs"):
        minimum(lambda x: answer, ["a", "b"], [0, 1])


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="one class for each of 2"):
        minimum(says({}), ["a", "b"], [0])
    with pytest.raises(ValueError, match="as many inputs as before, 2, got 1"):
        invariance(says({}), ["a", "b"], lambda x: x[:1])


def test_metrics_leave_out_what_tried_nothing():
    outcomes = [
        Behaviour("a", "invariance", 4, ({},)),
        Behaviour("b", "invariance", 0, ()),
        Behaviour("c", "minimum", 0, ()),
    ]
    assert behaviour_metrics(outcomes) == {"behaviour/invariance": 0.75} and behaviour_metrics([]) == {}


@pytest.mark.parametrize("shape", [(3, 28, 28), (2, 48, 64), (2, 224, 224, 3), (1, 1, 1)])
def test_changes_keep_the_shape_and_the_original(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before = images.copy()
    for change in (*image_changes(shape[1]).values(), cover_middle):
        other = change(images)
        assert other.shape == shape and other.dtype == np.uint8
    assert (images == before).all()
    assert (brighten(images, 0) == 0).all() and (step_aside(images, 0) == images).all()
    assert (cover_middle(images, 1.0) == 0).all()


def test_telling_words_are_those_of_one_class():
    texts, labels = made_headlines(200)
    fake, real = telling_words(texts, labels, 2, n=8)
    assert "hilarious" in fake or "won" in fake or "liberals" in fake
    assert "say" in real and not set(fake) & set(real) and not {"senator", "judge"} & set(fake + real)
    assert telling_words(["123", "!!"], np.array([0, 1]), 2) == [[], []]
    assert telling_words(["same words", "same words"], np.array([0, 1]), 2) == [[], []]
