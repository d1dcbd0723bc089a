"""The gate: what it refuses, what it lets through, who may say yes, and what GitHub is told."""

import contextlib
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from project.bundle import gate as g
from project.bundle.gate import (
    Decision,
    GateError,
    Rules,
    approval,
    card_problems,
    compare,
    dispatch_target,
    ece_difference,
    find_challenger,
    find_champion,
    holm,
    mcnemar,
    mismatches,
    paired_interval,
    promote,
    read_decision,
    repository_dispatch,
)
from project.bundle.manifest import open_bundle, write_manifest
from project.bundle.registry import Conflict, Registry
from project.cli import app
from project.core import read_json, runs_dir, write_json
from project.data.store import build
from project.metrics import ece
from project.runs.receipt import KEY, make_receipt

BIN = Path(sys.executable).parent
CALM = Rules(slower=1000, gain=1000)  # time says nothing on a machine that tests share
DATA = {"task": "brightness", "classes": ["bright", "dark"], "hash": "abc", "split": "test"}
RNG = np.random.default_rng(0)
MEANS = RNG.uniform(60, 195, 2000)
IMAGES = np.clip(RNG.normal(MEANS[:, None, None], 30, (2000, 8, 8)), 0, 255).astype(np.uint8)
LABELS = (MEANS + RNG.normal(0, 12, 2000) < 127).astype(np.int64)


# --- bundles


def model(weights, threshold=127.0, sure=0.05, end="Softmax", slow=0, ballast=0, shape=(8, 8)):
    """An ONNX model: weighted pixels against a threshold, (classes of a row) times how sure it is."""
    value, tensor, node = helper.make_tensor_value_info, helper.make_tensor, helper.make_node
    weights = np.asarray(weights, np.float32)
    chain = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("Flatten", ["pixels"], ["rows"]),
        node("MatMul", ["rows", "weights"], ["embedding" if not slow else "e0"]),
    ]
    parts = [tensor("weights", TensorProto.FLOAT, weights.shape, weights.ravel())]
    if slow:  # as many more multiplications, which leave everything as it was
        n, k = 1200, weights.shape[1]
        parts.append(tensor("in", TensorProto.FLOAT, [k, n], np.eye(k, n, dtype=np.float32).ravel()))
        parts.append(tensor("all", TensorProto.FLOAT, [n, n], np.eye(n, dtype=np.float32).ravel()))
        parts.append(tensor("out", TensorProto.FLOAT, [n, k], np.eye(n, k, dtype=np.float32).ravel()))
        chain.append(node("MatMul", ["e0", "in"], ["s0"]))
        chain += [node("MatMul", [f"s{i}", "all"], [f"s{i + 1}"]) for i in range(slow)]
        chain.append(node("MatMul", [f"s{slow}", "out"], ["embedding"]))
    if weights.shape[1] == 1:
        sign = np.array([[sure, -sure]], np.float32)
        parts.append(tensor("threshold", TensorProto.FLOAT, [1], [threshold]))
        chain.append(node("Sub", ["embedding", "threshold"], ["above"]))
    else:
        sign = np.eye(weights.shape[1], dtype=np.float32) * np.float32(sure)
        chain.append(node("Identity", ["embedding"], ["above"]))
    parts.append(tensor("sign", TensorProto.FLOAT, sign.shape, sign.ravel()))
    chain += [node("MatMul", ["above", "sign"], ["logits"]), node(end, ["logits"], ["probabilities"])]
    if ballast:
        parts.append(tensor("ballast", TensorProto.UINT8, [ballast], bytes(ballast), raw=True))
    graph = helper.make_graph(
        chain,
        "toy",
        [value("images", TensorProto.UINT8, ["batch", *shape])],
        [
            value("probabilities", TensorProto.FLOAT, ["batch", sign.shape[1]]),
            value("embedding", TensorProto.FLOAT, ["batch", weights.shape[1]]),
        ],
        parts,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def mean_of(pixels, n=64):
    """Weights of the mean of the first pixels."""
    return np.where(np.arange(n) < pixels, 1 / min(pixels, n), 0)[:, None]


def card(run, bundle_run, status="finished", metrics=None, data="abc"):
    """The executed notebook of a run, as papermill's engine leaves it."""
    record = {"id": bundle_run, "task": "brightness", "status": status, "reason": "", "parameters": {}}
    record |= {"metrics": metrics or {"test/acc": 0.9}, "data": {"hash": data, "task": "brightness"}}
    record |= {"schema": 1, "started": "2026-01-01T00:00:00+00:00", "process": {}}
    write_json(run / "run.json", record)
    cell = {"cell_type": "code", "source": "1 + 1", "metadata": {}, "outputs": [], "execution_count": 1}
    nb = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    facts = {"notebook": "nbs/toy.ipynb", "commit": {"commit": "c" * 40, "dirty": False}}
    nb["metadata"]["project"] = {"status": status, "receipt": make_receipt(nb, status, runs=[run], **facts)}
    return nb


def make(name, pixels=64, *, content=None, status="finished", data="abc", **changes):
    """A bundle with its card, in the folder of its run."""
    own = {k: changes.pop(k) for k in ("threshold", "sure", "end", "slow", "ballast", "shape") if k in changes}
    run, shape = runs_dir() / name, list(own.get("shape", (8, 8)))
    (run / "bundle").mkdir(parents=True)
    (run / "bundle" / "model.onnx").write_bytes(content or model(mean_of(pixels, math.prod(shape)), **own))
    nb = card(run, name, status, data=data)
    write_json(run / "bundle" / "notebook.ipynb", nb)
    fields = {
        "task": "brightness",
        "kind": "image",
        "classes": ["bright", "dark"],
        "metrics": {"test/acc": 0.9},
        "run": name,
        "commit": "c" * 40,
        "data_hash": data,
        "input": {"name": "images", "dtype": "uint8", "layout": "NHW", "shape": [None, *shape], "channels": 1},
        "outputs": {
            "probabilities": {"dtype": "float32", "shape": [None, 2]},
            "embedding": {"dtype": "float32", "shape": [None, 1]},
        },
    }
    return write_manifest(run / "bundle", **fields | changes)


@pytest.fixture
def champion(isolated):
    """A model that looks at three pixels."""
    return make("champion", 3)


@pytest.fixture
def challenger(isolated):
    """One that looks at all of them."""
    return make("challenger")


def ask(new, old, n=2000, rules=CALM, **kwargs):
    """A comparison on the first rows."""
    return compare(new, old, IMAGES[:n], LABELS[:n], rules=rules, **{"data": DATA, "calls": 15} | kwargs)


def says(decision, check):
    """State and words of one check."""
    return next((c["state"], c["says"]) for c in decision.checks if c["check"] == check)


# --- the verdicts


def test_better_is_promoted_and_worse_refused(champion, challenger):
    better, worse = ask(challenger, champion), ask(champion, challenger)
    assert (better.verdict, worse.verdict) == ("promote", "refuse")
    state, words = says(better, "accuracy")
    assert state == "promote" and "the champion's is" in words and "McNemar p < 0.0001" in words
    assert says(worse, "accuracy")[0] == "refuse" and worse.reasons[0].startswith("accuracy: worse")
    a, b = (d.evidence["paired"] for d in (better, worse))
    assert (a["won"], a["lost"], a["p"]) == (b["lost"], b["won"], b["p"])
    assert a["low"] < a["difference"] < a["high"] and a["difference"] == -b["difference"]
    assert a["both"] + a["neither"] + a["won"] + a["lost"] == 2000


def test_the_numbers_are_those_of_the_rows(champion, challenger):
    found = ask(challenger, champion).evidence
    for side, pixels in (("challenger", 64), ("champion", 3)):
        said = (IMAGES.reshape(2000, -1)[:, :pixels].mean(1) < 127).astype(int)
        assert found["scores"][side]["acc"] == pytest.approx((said == LABELS).mean(), abs=1e-3)
    classes = {r["slice"]: r for r in found["slices"] if r["by"] == "class"}
    assert {k: r["n"] for k, r in classes.items()} == {"bright": int((LABELS == 0).sum()), "dark": int(LABELS.sum())}
    assert found["size"]["challenger"] == open_bundle(challenger.path).manifest["files"]["model.onnx"]["bytes"]


def test_the_same_again_and_nothing_new_keep(champion):
    again = ask(champion, champion)
    assert again.verdict == "keep" and "the challenger is the champion" in again.reasons[0]
    twin = make("twin", 3)  # another run, the same function
    alike = ask(twin, champion)
    assert alike.verdict == "keep" and says(alike, "accuracy")[0] == "fine"
    assert alike.reasons == ["nothing speaks for a change"]


def test_few_rows_are_a_doubt(champion, challenger):
    few = ask(challenger, champion, n=40)
    assert few.verdict == "keep" and few.reasons[0] == "rows: 40 say too little; at least 100 are needed"


def test_as_good_and_smaller_is_promoted_as_good_and_larger_is_not(challenger):
    heavy = make("heavy", ballast=60_000)
    lighter, heavier = ask(challenger, heavy, rules=Rules(slower=1000)), ask(heavy, challenger)
    assert lighter.verdict == "promote" and says(lighter, "size")[0] == "promote"
    assert heavier.verdict == "refuse" and "2 times the champion's" in says(heavier, "size")[1]
    assert ask(heavy, challenger, rules=Rules(slower=1000, gain=1000, larger=100)).verdict == "keep"
    tight = ask(heavy, None, rules=Rules(max_mb=0.05))
    assert tight.verdict == "refuse" and "0.05 MB" in says(tight, "size")[1]


def test_slower_is_refused_however_good():
    slow, blind = make("slow", slow=24), make("blind", threshold=-1.0)  # 24 times 1200 x 1200
    decision = ask(slow, blind, 150, Rules(larger=10**9), calls=40)
    assert decision.verdict == "refuse" and says(decision, "accuracy")[0] == "promote"
    assert "slower; the budget is 1.5 times the champion's" in says(decision, "latency")[1]
    assert ask(slow, blind, 150, Rules(larger=10**9, slower=10**9)).verdict == "promote"
    budget = ask(slow, blind, 150, Rules(larger=10**9, slower=10**9, max_ms=0.001))
    assert budget.verdict == "refuse" and "the budget for p95 is 0.001 ms" in says(budget, "latency")[1]


def test_faster_and_as_good_is_promoted(challenger):
    decision = ask(challenger, make("slow", slow=24), 150, Rules(), calls=40)
    assert decision.verdict == "promote" and says(decision, "latency")[0] == "promote"
    assert says(decision, "accuracy")[0] == "fine"


def test_worse_calibrated_is_refused(champion):
    loud = make("loud", sure=5.0)
    decision = ask(loud, champion)
    assert decision.verdict == "refuse" and says(decision, "accuracy")[0] == "promote"
    assert says(decision, "calibration")[1].startswith("worse: error")
    assert ask(loud, champion, rules=Rules(slower=1000, calibration=0.5)).verdict == "promote"


def test_worse_for_one_class_is_refused(champion):
    decision = ask(make("lopsided", threshold=115.0), champion)
    assert decision.verdict == "refuse" and decision.evidence["paired"]["difference"] > 0
    assert "class dark" in says(decision, "slices")[1]


def test_other_origins_are_beside_and_count(champion, challenger):
    # elsewhere only the first three pixels mean anything
    odd = np.full((300, 8, 8), 250, np.uint8)
    odd[:150, 0, :3] = 0
    labels = np.repeat([1, 0], 150)
    sets = {"ood-odd": (odd, labels), "ood-none": (IMAGES[:50] // 2 + 64, np.full(50, -1))}
    decision = ask(challenger, champion, sets=sets)
    assert decision.verdict == "refuse" and "origin ood-odd" in says(decision, "slices")[1]
    assert "accuracy 50.00% (44.38% to 55.62%, n = 300), the champion's is 100.00%" in says(decision, "ood-odd")[1]
    assert "accuracy" not in says(decision, "ood-none")[1] and "AUROC" in says(decision, "ood-none")[1]
    rows = decision.evidence["origins"]
    assert [r["set"] for r in rows["champion"]] == ["ood-odd", "ood-none"] == [r["set"] for r in rows["challenger"]]


def test_the_first_model_has_to_know_something(challenger):
    first = ask(challenger, None)
    assert first.verdict == "promote" and "no champion serves" in first.reasons[0]
    blind = ask(make("blind", threshold=-1.0), None)
    assert blind.verdict == "refuse" and "always saying the most frequent class" in blind.reasons[0]
    assert first.evidence["champion"] is None and first.evidence["paired"] is None


@pytest.mark.parametrize("end", ["Identity", "Neg", "Log"])
def test_answers_that_are_no_probabilities(champion, end):
    decision = ask(make("logits", end=end), champion)
    assert decision.verdict == "refuse" and says(decision, "answers")[0] == "refuse"
    assert "scores" not in decision.evidence


def test_a_champion_that_cannot_answer_is_no_reason_to_promote(challenger):
    with pytest.raises(GateError, match="the champion cannot be asked"):
        ask(challenger, make("logits", end="Identity"))


# --- mismatched

MISMATCHES = {
    "task": ({"task": "darkness"}, "its task is darkness, the champion's is brightness"),
    "classes": ({"classes": ["bright", "dim"]}, "it alone has dim; it lacks dark"),
    "order": ({"classes": ["dark", "bright"]}, "in another order"),
    "size": ({"shape": (6, 6)}, r"its input shape is \[None, 6, 6\]"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatched_is_refused_and_never_asked(champion, name):
    changes, words = MISMATCHES[name]
    other = make("other", **changes)
    decision = ask(other, champion)
    assert decision.verdict == "refuse" and re.search(words, decision.reasons[0]) and "scores" not in decision.evidence
    alone = ask(other, None)  # and it does not fit the rows either
    assert alone.verdict == "refuse"


def test_mismatched_kind(champion):
    words = texts("words", {"bad": (2, 0), "good": (0, 2)})
    assert any("kind" in m for m in mismatches(words, champion))
    assert compare(words, champion, ["bad"] * 100, np.zeros(100, int)).verdict == "refuse"


def test_trained_on_other_data_is_a_doubt_that_a_person_can_dispel(champion):
    elsewhere = make("elsewhere", data="f" * 64)
    decision = ask(elsewhere, champion)
    assert decision.verdict == "keep" and "held out: trained on data ffffffffffff" in decision.reasons[0]
    assert ask(elsewhere, champion, rules=Rules(slower=1000, gain=1000, other_data=True)).verdict == "promote"


def test_labels_that_are_none(champion, challenger):
    for labels in (LABELS[:10], LABELS[:20] + 1, LABELS[:20] - 1, LABELS[:20] / 2, LABELS[:20].tolist()[:0]):
        with pytest.raises(GateError, match="expected"):
            compare(challenger, champion, IMAGES[:20], labels)


@pytest.mark.parametrize("bad", [{"alpha": 0}, {"slower": 0.9}, {"worse": -0.1}, {"max_ms": -1}, {"alpha": math.nan}])
def test_rules_that_mean_nothing(bad):
    with pytest.raises(GateError, match=next(iter(bad))):
        Rules(**bad)


# --- hollow


def edit(bundle, change):
    """Change a bundle's notebook, and make the manifest fit it, as a forger would."""
    file = bundle.path / "notebook.ipynb"
    nb = read_json(file)
    nb = change(nb) or nb
    write_json(file, nb)
    return write_manifest(bundle.path, **bundle.manifest)


def without(bundle):
    """No notebook at all."""
    (bundle.path / "notebook.ipynb").unlink()
    return write_manifest(bundle.path, **bundle.manifest)


def another_model(bundle):
    """A model that the notebook did not make, where its run is not at hand."""
    (bundle.path.parent / "run.json").unlink()
    (bundle.path / "model.onnx").write_bytes(model(mean_of(64), threshold=126.0))
    return write_manifest(bundle.path, **bundle.manifest)


def garbage(bundle):
    """Something that is no notebook."""
    (bundle.path / "notebook.ipynb").write_bytes(b"\x00\xff{")
    return write_manifest(bundle.path, **bundle.manifest)


def receipt_of(nb):
    """The receipt in a notebook."""
    return nb["metadata"]["project"]["receipt"]


HOLLOW = {
    "no notebook": (without, "no executed notebook"),
    "not executed": (lambda b: edit(b, lambda nb: nb["metadata"].clear()), "no receipt in it"),
    "killed": (lambda b: edit(b, lambda nb: nb["metadata"].update(project={"status": "running"})), "HOLLOW"),
    "an output": (lambda b: edit(b, lambda nb: nb["cells"][0].update(source="1 + 2")), "FORGED"),
    "the receipt": (lambda b: edit(b, lambda nb: receipt_of(nb).update(status="finished!")), "FORGED"),
    "a newer receipt": (lambda b: edit(b, lambda nb: receipt_of(nb).update(format=99)), "upgrade"),
    "an odd receipt": (
        lambda b: edit(b, lambda nb: nb["metadata"]["project"].update(receipt=[1])),
        "cannot be checked",
    ),
    "half a receipt": (lambda b: edit(b, lambda nb: receipt_of(nb).pop("runs")), "cannot be checked"),
    "other JSON": (lambda b: edit(b, lambda nb: {"cells": 1}), "cannot be checked"),
    "no JSON": (garbage, "cannot be checked"),
    "another model": (another_model, "model.onnx: the manifest says"),
    "another run": (lambda b: write_manifest(b.path, **b.manifest | {"run": "r2"}), "knows no run r2"),
    "no run": (lambda b: write_manifest(b.path, **b.manifest | {"run": None}), "knows no run None"),
    "a metric": (
        lambda b: write_manifest(b.path, **b.manifest | {"metrics": {"test/acc": 0.99}}),
        "test/acc: the manifest says 0.99",
    ),
    "the data": (lambda b: write_manifest(b.path, **b.manifest | {"data_hash": "xyz"}), "data: the manifest says xyz"),
}


@pytest.mark.parametrize("name", HOLLOW)
def test_hollow_is_refused(champion, challenger, name):
    spoil, words = HOLLOW[name]
    spoiled = spoil(challenger)
    decision = ask(spoiled, champion)
    assert decision.verdict == "refuse"
    assert says(decision, "executed notebook")[0] == "refuse" and words in says(decision, "executed notebook")[1]


@pytest.mark.parametrize("status", ["failed", "interrupted", "terminated", "kernel died", "timed out"])
def test_unfinished_is_refused(champion, status):
    decision = ask(make("broken", status=status), champion)
    assert decision.verdict == "refuse" and status in says(decision, "executed notebook")[1]


def test_a_team_with_a_key_takes_signed_notebooks_only(challenger, monkeypatch):
    monkeypatch.setenv(KEY, "team")
    assert "not signed" in card_problems(challenger)[0][0]
    assert card_problems(make("signed"))[0] == []


def test_what_is_only_worth_a_word(champion, challenger):
    run = challenger.path.parent
    record = read_json(run / "run.json") | {"parameters": {"limit_batches": 5}}
    write_json(run / "run.json", record)
    nb = read_json(run / "bundle" / "notebook.ipynb")
    facts = {"notebook": "nbs/toy.ipynb", "commit": {"commit": "d" * 40, "dirty": True}}
    nb["metadata"]["project"]["receipt"] = make_receipt(nb, "finished", runs=[run], **facts)
    write_json(run / "bundle" / "notebook.ipynb", nb)
    decision = ask(write_manifest(challenger.path, **challenger.manifest), champion)
    assert decision.verdict == "refuse" and says(decision, "whole training")[0] == "refuse"
    allowed = ask(challenger, champion, rules=Rules(slower=1000, gain=1000, partial=True))
    assert allowed.verdict == "promote"
    for words in ("not committed", "a commit was made"):
        assert words in says(allowed, "executed notebook")[1] and words in str(allowed)


LEFT_OUT = {
    "smoke": "5 batches an epoch, as in a smoke test",
    "short": "0.5 epochs, where the recipe has 4",
    "stopped": "2 epochs, where 4 were asked for",
}


@pytest.mark.parametrize("serves", [True, False])
@pytest.mark.parametrize("left_out", LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_model_that_was_trained_in_part_is_refused_unless_told(champion, left_out, serves, tmp_path, person):
    part = make("part", partial=[left_out])
    old = champion if serves else None
    decision = ask(part, old)
    assert decision.verdict == "refuse"
    assert decision.reasons == [
        f"whole training: trained in part: {left_out}. Train it whole, or say that it will do with -p partial True"
    ]
    allowed = ask(part, old, rules=Rules(slower=1000, gain=1000, partial=True))
    assert allowed.verdict == "promote" and allowed.rules["partial"] is True
    assert f"whole training: trained in part: {left_out}; which the rules allow" in allowed.reasons
    registry = Registry(str(tmp_path / "registry"))
    if serves:
        registry.alias("brightness", "production", registry.add(champion).name)
    promote(registry, allowed, True, part)
    assert left_out in str(registry.history("brightness")), "and it is written down where the alias is moved"


def test_a_compressed_model_is_as_whole_as_the_one_it_was_made_from():
    part = make("parent", partial=["5 batches an epoch, as in a smoke test"])
    small = {k: v for k, v in part.manifest.items() if k != "partial"}
    small["compression"] = {"parent": part.manifest, "parent_hash": part.hash}
    assert says(ask(write_manifest(part.path, **small), None), "whole training")[0] == "refuse"


def test_a_part_of_the_rows_decides_nothing_unless_told(champion, challenger):
    data = DATA | {"rows": 10_000}
    decision = ask(challenger, champion, data=data)
    assert decision.verdict == "keep" and decision.reasons[0].startswith("rows: 2,000 of 10,000 were asked")
    allowed = ask(challenger, champion, data=data, rules=Rules(slower=1000, gain=1000, partial=True))
    assert allowed.verdict == "promote" and "which the rules allow" in allowed.reasons[-1]
    assert not any("were asked" in c["says"] for c in ask(challenger, champion, data=DATA | {"rows": 2000}).checks)


def test_no_line_says_its_name_twice(champion, challenger):
    sets = {"other": (IMAGES[:50], LABELS[:50])}
    for decision in (
        ask(challenger, champion, sets=sets),
        ask(champion, challenger, sets=sets),
        ask(challenger, None, sets=sets),
    ):
        for line in str(decision).splitlines()[1:]:
            name, _, rest = line.strip().partition(": ")
            assert rest and not rest.removeprefix("better: ").removeprefix("worse: ").startswith(name), line


def test_the_terminal_says_the_accuracy_elsewhere(champion, challenger):
    known, strange = (IMAGES[:500], LABELS[:500]), (IMAGES[:20], np.full(20, -1))
    decision = ask(challenger, champion, sets={"ood-night": known, "ood-noise": strange})
    row = decision.evidence["origins"]["challenger"][0]
    (line,) = [x for x in str(decision).splitlines() if "ood-" in x]
    assert line.strip().startswith(
        f"ood-night: accuracy {row['acc']:.2%} ({row['low']:.2%} to {row['high']:.2%}, n = 500)"
    )
    assert row["low"] < row["acc"] < row["high"]
    assert "ood-night" in str(ask(challenger, None, sets={"ood-night": known})), "also where no champion serves"
    assert "origin" not in str(ask(challenger, champion))


# --- texts


def texts(name, points, fields=("title", "text")):
    """A bundle that adds up what its words are worth."""
    vocabulary = {"[PAD]": (0, 0), "[UNK]": (0, 0), **points}
    table = np.array([*vocabulary.values()], np.float32)
    value, tensor, node = helper.make_tensor_value_info, helper.make_tensor, helper.make_node
    chain = [
        node("Gather", ["points", "ids"], ["each"]),
        node("ReduceSum", ["each", "axis"], ["embedding"], keepdims=0),
        node("Softmax", ["embedding"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        chain,
        "reader",
        [value("ids", TensorProto.INT64, ["batch", "length"])],
        [value(out, TensorProto.FLOAT, ["batch", 2]) for out in ("probabilities", "embedding")],
        [
            tensor("points", TensorProto.FLOAT, table.shape, table.ravel()),
            tensor("axis", TensorProto.INT64, [1], [1]),
        ],
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[PAD]"])
    spec = {"name": "ids", "dtype": "int64", "layout": "NL", "shape": [None, None], "max_length": 8}
    outputs = {out: {"dtype": "float32", "shape": [None, 2]} for out in ("probabilities", "embedding")}
    (runs_dir() / name / "bundle").mkdir(parents=True)
    (runs_dir() / name / "bundle" / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    (runs_dir() / name / "bundle" / "model.onnx").write_bytes(content.SerializeToString())
    path = runs_dir() / name
    write_json(path / "bundle" / "notebook.ipynb", card(path, name))
    more = {"fields": list(fields), "vocabulary": len(vocabulary)}
    facts = {"task": "news", "kind": "text", "classes": ["fake", "real"], "data_hash": "abc", "run": name}
    return write_manifest(path / "bundle", **facts, commit="c" * 40, input=spec | more, outputs=outputs)


def test_texts_are_compared_too():
    old = texts("old", {"bad": (2, 0), "good": (0, 2)})
    new = texts("new", {"bad": (2, 0), "good": (0, 2), "worse": (3, 0)})
    bodies = ["bad news", "good news", "worse news of all", "worse still, said nobody"] * 50
    rows = [{"title": text, "text": ""} for text in bodies]
    labels = np.array([0, 1, 0, 0] * 50)
    better = compare(new, old, rows, labels, rules=Rules(slower=1000, gain=1000, calibration=0.9), calls=10)
    # the old one knows nothing of "worse", and says the first class of two that are equal: right by luck
    assert better.evidence["scores"]["champion"]["acc"] == 1.0 and better.verdict == "keep"
    flipped = compare(new, old, rows, 1 - labels, rules=Rules(slower=1000, gain=1000, calibration=0.9), calls=10)
    assert {r["by"] for r in flipped.evidence["slices"]} > {"words"}
    # never right, as the champion is not: that nothing got worse is no reason to keep quiet
    assert flipped.verdict == "refuse" and "less often than by chance: class" in flipped.reasons[0]
    other = texts("other", {"bad": (2, 0), "good": (0, 2)}, fields=("headline",))
    assert "its input fields is" in compare(other, old, rows, labels).reasons[0]


# --- the statistics


def test_mcnemar_is_exact():
    for a in range(0, 25):
        for b in range(0, 25):
            n = a + b
            tail = sum(math.comb(n, k) for k in range(min(a, b) + 1)) / 2**n
            assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)
    assert mcnemar(100_000, 90_000) == mcnemar(90_000, 100_000) < 1e-100
    with pytest.raises(GateError):
        mcnemar(-1, 3)


def test_of_equal_models_few_are_called_different():
    rng = np.random.default_rng(1)
    called = 0
    for _ in range(400):
        a, b = rng.random((2, 500)) < 0.85
        called += mcnemar(int((a & ~b).sum()), int((b & ~a).sum())) < 0.05
    assert called <= 0.06 * 400  # exact: at most 5 % in the long run
    assert called >= 4  # and it can tell at all


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(2)
    covered = 0
    for i in range(200):
        x = rng.choice([1.0, 0.0, -1.0], 400, p=[0.10, 0.84, 0.06])
        low, high = paired_interval(x, resamples=800, seed=i)
        covered += low <= 0.04 <= high
    assert 0.90 * 200 <= covered <= 200


def test_the_interval_is_the_same_by_rows_and_by_counts():
    x = np.repeat([1.0, 0.0, -1.0], [30, 150, 20])
    plain = paired_interval(x, resamples=20_000)
    noisy = paired_interval(x + np.linspace(-1e-9, 1e-9, 200), resamples=20_000)
    assert plain == pytest.approx(noisy, abs=0.01)
    assert paired_interval(x, seed=3) == paired_interval(x, seed=3)
    for bad in (np.array([]), np.array([[1.0]]), np.array([math.nan])):
        with pytest.raises(GateError):
            paired_interval(bad)


def test_holm_by_hand():
    assert holm([0.04, 0.001, 0.5, 0.02]) == pytest.approx([0.08, 0.004, 0.5, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def test_calibration_difference():
    rng = np.random.default_rng(3)
    p = rng.dirichlet([1, 1, 1], 3000)
    labels = np.array([rng.choice(3, p=row) for row in p])
    sharp = p**4 / (p**4).sum(1, keepdims=True)
    found, low, high = ece_difference(sharp, p, labels)
    assert found == pytest.approx(ece(sharp, labels) - ece(p, labels)) and low < found < high and low > 0.05
    assert ece_difference(p, p, labels) == (0.0, 0.0, 0.0)


# --- the decision as data


def test_a_decision_survives_a_file_and_no_hand(champion, challenger, tmp_path):
    decision = ask(challenger, champion)
    file = decision.save(tmp_path / "decision.json")
    assert read_decision(file) == decision
    plain = json.loads(file.read_text(encoding="utf-8"))
    assert plain["verdict"] == "promote" and plain["reasons"] == decision.reasons
    for change in (
        lambda d: d.update(verdict="refuse"),
        lambda d: d["evidence"]["challenger"].update(hash="0" * 64),
        lambda d: d["checks"].pop(),
        lambda d: d.update(seal={"method": "sha256", "value": "0"}),
    ):
        said = json.loads(file.read_text(encoding="utf-8"))
        change(said)
        write_json(tmp_path / "other.json", said)
        with pytest.raises(GateError, match="was changed after it was written"):
            read_decision(tmp_path / "other.json")
    for content in ([], {}, {"format": 1}, {"format": 2, **{k: v for k, v in plain.items() if k != "format"}}):
        write_json(tmp_path / "other.json", content)
        with pytest.raises(GateError, match="expected a decision"):
            read_decision(tmp_path / "other.json")


def test_signed_decisions(champion, challenger, tmp_path, monkeypatch):
    plain = ask(challenger, champion).save(tmp_path / "plain.json")
    monkeypatch.setenv(KEY, "team")
    with pytest.raises(GateError, match="was changed"):
        read_decision(plain)
    signed = ask(make("signed"), champion).save(tmp_path / "signed.json")
    assert read_decision(signed).verdict == "promote"
    monkeypatch.setenv(KEY, "others")
    with pytest.raises(GateError, match="was changed"):
        read_decision(signed)
    monkeypatch.delenv(KEY)
    with pytest.raises(GateError, match="is signed"):
        read_decision(signed)


def test_it_shows_itself(champion, challenger):
    decision = ask(challenger, champion)
    assert str(decision).startswith("promote: brightness") and decision._repr_markdown_().count("\n| ") > 6
    assert g.show_slices(decision)._repr_png_()[:4] == g.show_calibration(decision)._repr_png_()[:4] == b"\x89PNG"
    assert g.show_slices(ask(challenger, None), most=3) and g.show_calibration(ask(challenger, None))
    mismatched = ask(make("dim", classes=["bright", "dim"]), champion)
    with pytest.raises(GateError, match="nothing was measured"):
        g.show_slices(mismatched)


# --- saying yes


@pytest.fixture
def person(monkeypatch):
    """No CI, and nobody to tell."""
    github = (
        "GITHUB_ACTOR",
        "GITHUB_REPOSITORY",
        "GITHUB_API_URL",
        "PROJECT_GITHUB_TOKEN",
        "PROJECT_GITHUB_REPOSITORY",
    )
    for name in ("CI", "PROJECT_CI_ENVIRONMENT", *github):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def registry(tmp_path, champion, person):
    """A registry in which the champion serves."""
    found = Registry(tmp_path / "registry")
    found.alias("brightness", "production", found.add(champion).name)
    return found


def serving(registry):
    """What the service would load."""
    return registry.get("brightness").hash


def test_a_person_moves_the_alias(registry, champion, challenger):
    decision = ask(challenger, find_champion(registry, "brightness"))
    done = promote(registry, decision, yes=True)
    assert serving(registry) == challenger.hash and done["previous"] != done["version"]
    assert not done["dispatch"]["sent"] and "no token" in done["dispatch"]["why"]
    last = registry.history("brightness", "production")[-1]
    assert last["to"] == done["version"] and "approved by" in last["reason"] and "better" in last["reason"]
    again = promote(registry, decision, yes=True)
    assert again["version"] == done["version"] and len(registry.history("brightness", "production")) == 2
    assert registry.rollback("brightness").hash == champion.hash


def test_the_first_to_serve(tmp_path, challenger, person):
    registry = Registry(tmp_path / "empty")
    assert find_champion(registry, "brightness") is None
    promote(registry, ask(challenger, None), yes=True)
    assert serving(registry) == challenger.hash


def test_nobody_said_yes(registry, champion, challenger):
    decision = ask(challenger, champion)
    with pytest.raises(GateError, match="nobody said yes"):
        promote(registry, decision)
    assert serving(registry) == champion.hash and len(registry.list("brightness")) == 1


@pytest.mark.parametrize("verdict", ["keep", "refuse"])
def test_a_yes_does_not_help_what_the_gate_holds_back(registry, champion, verdict):
    decision = ask(make("twin", 3), champion) if verdict == "keep" else ask(make("loud", sure=5.0), champion)
    assert decision.verdict == verdict
    for one in (decision, Decision(**{**vars(decision), "verdict": "promote"})):
        with pytest.raises(GateError, match="the gate says"):
            promote(registry, one, yes=True)
    assert serving(registry) == champion.hash and len(registry.list("brightness")) == 1


def test_in_ci_only_a_named_environment_counts(registry, champion, challenger, monkeypatch):
    decision = ask(challenger, champion)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(GateError, match="PROJECT_CI_ENVIRONMENT"):
        promote(registry, decision, yes=True)
    monkeypatch.setenv("PROJECT_CI_ENVIRONMENT", "production")
    monkeypatch.setenv("GITHUB_ACTOR", "ada")
    assert promote(registry, decision)["by"] == "ada in the environment production"
    assert serving(registry) == challenger.hash


def test_approval_by_itself():
    assert not approval(False, {"PROJECT_CI_ENVIRONMENT": "production"})  # not in CI: somebody exported it once
    assert approval(False, {"CI": "1", "PROJECT_CI_ENVIRONMENT": "production"}) == "CI in the environment production"
    assert not approval(True, {"CI": "1", "PROJECT_CI_ENVIRONMENT": "  "}) and approval(True, {"CI": "false"})


def test_somebody_was_faster(registry, champion, challenger):
    decision, third = ask(challenger, champion), make("third", threshold=126.0)
    registry.alias("brightness", "production", registry.add(third).name)
    with pytest.raises(GateError, match="not what the challenger was held against"):
        promote(registry, decision, yes=True)
    assert serving(registry) == third.hash

    class Slow(Registry):
        """Somebody moves the alias between the look and the move."""

        def add(self, bundle):
            Registry(tmp).alias("brightness", "production", "v2")
            return super().add(bundle)

    tmp = registry._place.path
    registry.alias("brightness", "production", "v1")
    with pytest.raises(Conflict):
        promote(Slow(tmp), decision, yes=True)
    assert serving(registry) == third.hash


def test_another_bundle_than_was_decided(registry, champion, challenger):
    decision = ask(challenger, champion)
    with pytest.raises(GateError, match="run the gate again"):
        promote(registry, decision, yes=True, challenger=make("third", threshold=126.0))
    edit(challenger, lambda nb: nb["metadata"].update(more=1))  # its run has another bundle by now
    with pytest.raises(GateError, match="run the gate again"):
        promote(registry, decision, yes=True)
    assert serving(registry) == champion.hash


def test_the_command_promotes_a_folder_that_is_no_run(registry, champion, challenger, tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_REGISTRY", str(tmp_path / "registry"))
    decision, elsewhere = ask(challenger, champion), tmp_path / "elsewhere"
    shutil.copytree(challenger.path, elsewhere)
    shutil.rmtree(challenger.path.parent)  # its run
    decision.save(tmp_path / "decision.json")
    command = ["promote", "--decision", str(tmp_path / "decision.json"), "--yes"]
    lost = CliRunner().invoke(app, command)
    assert lost.exit_code == 1 and "give its folder" in lost.output and serving(registry) == champion.hash
    moved = CliRunner().invoke(app, ["promote", str(elsewhere), *command[1:]])
    assert moved.exit_code == 0 and serving(registry) == challenger.hash, moved.output


def test_where_a_challenger_is_found(registry, champion, challenger, tmp_path):
    for name in ("challenger", str(challenger.path), str(challenger.path.parent), "last"):
        assert find_challenger(name).hash == (champion if name == "last" else challenger).hash or name == "last"
    assert find_challenger("v1", "brightness", registry).hash == champion.hash
    assert find_challenger("", "brightness").task == "brightness"
    with pytest.raises(ValueError, match="no run 'nothing'"):
        find_challenger("nothing")
    with pytest.raises(ValueError, match="no version or alias 'nothing'"):
        find_challenger("nothing", "brightness", registry)
    (runs_dir() / "unfinished").mkdir()
    write_json(
        runs_dir() / "unfinished" / "run.json",
        read_json(runs_dir() / "champion" / "run.json") | {"id": "unfinished", "status": "failed"},
    )
    with pytest.raises(GateError, match="run unfinished is failed and has no bundle"):
        find_challenger("unfinished")


# --- telling GitHub

# the request body of `repos/create-dispatch-event` in GitHub's OpenAPI description (github/rest-api-description)
PATH = "/repos/{owner}/{repo}/dispatches"
SCHEMA = {
    "type": "object",
    "required": ["event_type"],
    "properties": {
        "event_type": {"type": "string", "minLength": 1, "maxLength": 100},
        "client_payload": {"type": "object", "additionalProperties": True, "maxProperties": 10},
    },
}


class GitHub(http.server.BaseHTTPRequestHandler):
    """A stand-in that takes what GitHub's description says, and answers what the test wants."""

    def do_POST(self):
        """One dispatch."""
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.seen.append((self.path, dict(self.headers), body))
        status, headers = server.answers.pop(0) if server.answers else (204, {})
        if status == "hang":
            server.free.wait(20)
            return
        if status == "garbage":
            self.wfile.write(b"\x00\x01 what?\r\n\r\n")
            return
        if status == 204:
            status = self.judge(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        """Nobody should ask, and whoever follows a redirect would."""
        self.server.seen.append((self.path, dict(self.headers), b""))
        self.send_response(204)
        self.end_headers()

    def judge(self, body):
        """What GitHub would say to this request."""
        if self.headers.get("Authorization") != "Bearer t0p-secret":
            return 401
        if self.path != PATH.format(owner="team", repo="models"):
            return 404
        try:
            jsonschema.validate(json.loads(body), SCHEMA)
        except (ValueError, jsonschema.ValidationError):
            return 422
        small = len(body) < 64_000 and self.headers.get("Content-Type", "").startswith("application/json")
        return 204 if small else 422

    def log_message(self, *args):
        """Nothing."""


@contextlib.contextmanager
def github(*answers):
    """A server on this machine; what it saw is in `seen`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GitHub)
    server.daemon_threads = True
    server.seen, server.answers, server.free = [], list(answers), threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.free.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def settings(server, **more):
    """The variables that send to it."""
    api = f"http://127.0.0.1:{server.server_address[1]}"
    return {
        "PROJECT_GITHUB_TOKEN": "t0p-secret",
        "GITHUB_REPOSITORY": "team/models",
        "GITHUB_API_URL": api,
    } | more


@pytest.fixture
def configured(monkeypatch, person):
    """Set the variables."""

    def configure(server, **more):
        for name, value in settings(server, **more).items():
            monkeypatch.setenv(name, value)

    return configure


def test_github_is_told_of_a_promotion(registry, champion, challenger, configured):
    decision = ask(challenger, champion)
    with github() as server:
        configured(server)
        done = promote(registry, decision, yes=True)
    assert done["dispatch"]["sent"], done
    (path, headers, body), *more = server.seen
    said = json.loads(body)
    assert not more and path == "/repos/team/models/dispatches"
    assert headers["Accept"] == "application/vnd.github+json" and headers["X-Github-Api-Version"] == "2022-11-28"
    assert said["event_type"] == "model-promoted"
    payload = said["client_payload"]
    assert payload["version"] == done["version"] and payload["previous"] == done["previous"]
    assert payload["hash"] == challenger.hash and payload["run"] == "challenger" and payload["reasons"]


def test_the_stub_is_as_strict_as_the_description():
    with github() as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/repos/team/models/dispatches"
        bodies = {
            204: {"event_type": "x", "client_payload": {}},
            422: {"event_type": "x" * 101},
        }
        for status, body in bodies.items():
            got = g._post(url, "t0p-secret", json.dumps(body).encode(), 5)
            assert got[0] == status
        many = {"event_type": "x", "client_payload": dict.fromkeys(map(str, range(11)), 1)}
        assert g._post(url, "t0p-secret", json.dumps(many).encode(), 5)[0] == 422
        assert g._post(url, "wrong", b"{}", 5)[0] == 401


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "not accepted"), (403, "may not write"), (404, "no such repository"), (422, "does not take")],
)
def test_what_github_refuses_is_said_and_not_tried_again(registry, champion, challenger, configured, status, words):
    with github((status, {})) as server:
        configured(server)
        done = promote(registry, ask(challenger, champion), yes=True)
    assert len(server.seen) == 1 and words in done["dispatch"]["why"] and not done["dispatch"]["sent"]
    assert serving(registry) == challenger.hash  # the promotion stands
    assert "t0p-secret" not in json.dumps(done)


def send(server, **kwargs):
    """A dispatch without a promotion."""
    return repository_dispatch("model-promoted", {"task": "x"}, dispatch_target(settings(server)), wait=0.01, **kwargs)


def test_what_may_pass_is_tried_again():
    with github((502, {}), (429, {})) as server:
        assert send(server)["sent"] and len(server.seen) == 3
    with github((500, {}), (500, {}), (500, {}), (204, {})) as server:
        done = send(server)
        assert not done["sent"] and done["why"].startswith("500") and len(server.seen) == 3
    with github(("garbage", {})) as server:
        assert send(server)["sent"] and len(server.seen) == 2


def test_a_server_that_hangs_is_given_up():
    with github(*[("hang", {})] * 2) as server:
        started = time.monotonic()
        done = send(server, tries=2, timeout=0.3)
        assert not done["sent"] and "no answer" in done["why"] and time.monotonic() - started < 15


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_token_does_not_follow_a_redirect(status):
    with github() as elsewhere:
        there = f"http://127.0.0.1:{elsewhere.server_address[1]}/x"
        with github((status, {"Location": there})) as server:
            done = send(server)
    assert not done["sent"] and "moved to" in done["why"] and len(server.seen) == 1 and elsewhere.seen == []


@pytest.mark.parametrize(
    "bad",
    [
        {"GITHUB_REPOSITORY": ""},
        {"GITHUB_REPOSITORY": "team/models/../../user"},
        {"GITHUB_API_URL": "http://example.org"},
        {"GITHUB_API_URL": "file:///etc"},
        {"PROJECT_GITHUB_TOKEN": "t0p-secret\ntoken"},
    ],
)
def test_settings_that_cannot_work_are_told_before_anything_is_moved(registry, champion, challenger, configured, bad):
    decision = ask(challenger, champion)
    with github() as server:
        configured(server, **bad)
        with pytest.raises(GateError) as error:
            promote(registry, decision, yes=True)
    assert server.seen == [] and serving(registry) == champion.hash and "t0p-secret" not in str(error.value)


def test_a_payload_within_githubs_limits():
    with pytest.raises(GateError, match="less than 64 kB"):
        g.dispatch_body("x", {"a": "b" * 70_000})
    for event in ("", "x" * 101):
        with pytest.raises(GateError, match="1 to 100 characters"):
            g.dispatch_body(event, {})


# --- the notebook


def clothes(name, data, rows, runs):
    """A bundle that knows the mean picture of each class, of some training rows."""
    index = data.splits["train"][:rows]
    x, y = np.asarray(data.images)[index].reshape(len(index), -1) / 255.0, data.labels[index]
    means = np.stack([x[y == k].mean(0) if (y == k).any() else np.full(784, 9.0) for k in range(10)])
    weights = np.concatenate([2 * means.T / 255.0, np.zeros((0, 10))])
    offset = -np.square(means).sum(1)
    value, tensor, node = helper.make_tensor_value_info, helper.make_tensor, helper.make_node
    chain = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("Flatten", ["pixels"], ["rows"]),
        node("Gemm", ["rows", "weights", "offset"], ["embedding"], alpha=0.2, beta=0.2),
        node("Softmax", ["embedding"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        chain,
        "clothes",
        [value("images", TensorProto.UINT8, ["batch", 28, 28])],
        [value(out, TensorProto.FLOAT, ["batch", 10]) for out in ("probabilities", "embedding")],
        [
            tensor("weights", TensorProto.FLOAT, weights.shape, weights.astype(np.float32).ravel()),
            tensor("offset", TensorProto.FLOAT, [10], offset.astype(np.float32)),
        ],
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder = runs / name
    (folder / "bundle").mkdir(parents=True)
    (folder / "bundle" / "model.onnx").write_bytes(content.SerializeToString())
    write_json(folder / "bundle" / "notebook.ipynb", card(folder, name, data=data.hash))
    outputs = {out: {"dtype": "float32", "shape": [None, 10]} for out in ("probabilities", "embedding")}
    spec = {"name": "images", "dtype": "uint8", "layout": "NHW", "shape": [None, 28, 28], "channels": 1}
    facts = {"task": data.task, "kind": "image", "classes": data.classes, "run": name, "commit": "c" * 40}
    return write_manifest(folder / "bundle", **facts, data_hash=data.hash, input=spec, outputs=outputs)


def execute(out, *parameters, **env):
    """Run the notebook through papermill."""
    notebook = Path(__file__).parent.parent / "nbs" / "promote.ipynb"
    words = [w for name, value in parameters for w in ("-p", name, str(value))]
    command = [BIN / "papermill", notebook, out, "--no-progress-bar", "-k", "python3", "-p", "slower", "1000", *words]
    done = subprocess.run(command, env=os.environ | env, cwd=out.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    nb = json.loads(out.read_text(encoding="utf-8"))
    assert nb["metadata"]["project"]["receipt"]["status"] == "finished"
    record = read_json(runs_dir() / nb["metadata"]["project"]["receipt"]["runs"][0]["id"] / "run.json")
    shown = "".join("".join(o.get("text", "")) for c in nb["cells"] for o in c.get("outputs", []))
    return record, read_decision(runs_dir() / record["id"] / "decision.json"), shown, out.read_text(encoding="utf-8")


def test_the_notebook_decides_moves_and_tells(tmp_path, monkeypatch, person):
    monkeypatch.setenv("PROJECT_REGISTRY", str(tmp_path / "registry"))
    data = build("fashion_mnist")
    poor, good = clothes("poor", data, 12, runs_dir()), clothes("good", data, 458, runs_dir())
    registry = Registry()
    registry.alias(data.task, "production", registry.add(poor).name)
    with github() as server:
        record, decision, shown, whole = execute(
            tmp_path / "out.ipynb", ("challenger", "good"), ("yes", True), ("calls", 20), **settings(server)
        )
    assert decision.verdict == "promote" and record["verdict"] == "promote" and len(server.seen) == 1
    assert registry.get(data.task).hash == good.hash and "production is v2-" in shown and "GitHub was told" in shown
    assert "t0p-secret" not in whole and whole.count("image/png") >= 2
    assert record["metrics"]["gate/difference"] == decision.evidence["paired"]["difference"] > 0

    assert "better: " in shown and "accuracy: accuracy" not in shown
    record, decision, shown, _ = execute(tmp_path / "worse.ipynb", ("challenger", "poor"), ("yes", True), ("calls", 20))
    assert decision.verdict == "refuse" and "nothing was moved: accuracy: worse" in shown
    assert registry.get(data.task).hash == good.hash and record["status"] == "finished"


def test_the_gate_is_light():
    heavy = ("torch", "pandas", "lightning", "transformers", "matplotlib", "onnxruntime", "fsspec")
    code = f"import sys, project.bundle.gate; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# --- faults are marked


def test_a_class_that_is_never_recognised_is_a_fault_in_notebook_and_terminal():
    classes = ["Bag", "Coat", "Dress"]
    rows = [
        {"by": "class", "slice": c, "n": 1000, "champion": None, "challenger": {"acc": a, "low": 0.0, "high": h}}
        for c, a, h in (("Bag", 0.0, 0.004), ("Coat", 0.9, 0.92), ("Dress", 0.31, 0.34))
    ]
    found = g._check_slices({"slices": rows, "paired": None}, Rules())
    assert found["state"] == "refuse" and "class Bag, 0.00% of 1,000" in found["says"] and "Dress" not in found["says"]
    rows[0]["challenger"] |= {"acc": 0.5, "high": 0.53}
    assert g._check_slices({"slices": rows, "paired": None}, Rules())["state"] == "fine"
    assert len(classes) == 3


@pytest.mark.parametrize("state", ["refuse", "keep", "allow"])
def test_what_is_not_fine_stands_first_marked_and_is_said_in_the_terminal(state):
    checks = [g._check("size", "fine", "3 MB"), g._check("whole training", state, "trained in part: 1 batch an epoch")]
    checks.append(g._check("other", "refuse", "another fault"))
    decision = g.Decision("t", g._verdict(checks), checks, {}, {}, "2026-11-28T00:00:00+00:00")
    table = decision._repr_markdown_().splitlines()[4:]
    assert table[-1].startswith("| size | fine") and any(f"{state}** | trained in part" in line for line in table[:2])
    assert "whole training: trained in part: 1 batch an epoch" in str(decision) and "3 MB" not in str(decision)
