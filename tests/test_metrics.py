"""Metrics held against plain loops, at their edges, and with input that they refuse; figures with hostile input."""

import math
import re

import numpy as np
import pytest

from project.figures import Table, show_confusion, show_images, show_reliability, show_texts
from project.metrics import (
    apply_temperature,
    auroc,
    balanced_accuracy,
    brier,
    by_slice,
    confused_pairs,
    confusion_matrix,
    ece,
    fit_temperature,
    macro_f1,
    origin_metrics,
    origin_rows,
    quantile_groups,
    reliability,
    spread,
    summary,
    wilson_interval,
)


def made(n=600, classes=4, seed=0, sharp=1.0):
    """Probabilities, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), n)
    y = np.array([rng.choice(classes, p=row) for row in p])
    return apply_temperature(p, 1 / sharp), y


# Calibration


@pytest.mark.parametrize("bins", [1, 2, 15, 100])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_ece_is_that_of_a_plain_loop(bins, kind):
    p, y = made(sharp=2.0)
    p = p.astype(kind)
    total = 0.0
    for k in range(bins):
        inside = [i for i in range(len(y)) if k / bins < float(p[i].max()) <= (k + 1) / bins]
        if inside:
            right = sum(p[i].argmax() == y[i] for i in inside) / len(inside)
            total += len(inside) / len(y) * abs(right - sum(float(p[i].max()) for i in inside) / len(inside))
    assert ece(p, y, bins) == pytest.approx(total, abs=1e-6)


def test_bins_have_their_upper_end():
    p = np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    rows = reliability(p, np.array([0, 0, 0]), bins=4)
    assert [(row["from"], row["to"], row["n"]) for row in rows] == [(0.25, 0.5, 1), (0.5, 0.75, 1), (0.75, 1.0, 1)]
    assert reliability(np.array([[0.0, 1.0]]), np.array([1]), bins=4, target=0)[0]["from"] == 0  # none is lost at 0


def test_reliability_accounts_for_every_row_and_json_takes_it():
    import json

    p, y = made()
    for target in (None, 0, 3):
        rows = reliability(p, y, target=target)
        assert sum(row["n"] for row in rows) == len(y) and json.dumps(rows)
        assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
        assert all(row["from"] < row["confidence"] <= row["to"] + 1e-12 for row in rows)
    share = sum(row["n"] * row["accuracy"] for row in reliability(p, y, target=2)) / len(y)
    assert share == pytest.approx((y == 2).mean())


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_the_temperature_is_where_the_loss_is_least(factor):
    p, y = made(n=2000, sharp=factor)
    t = fit_temperature(p, y)

    def loss(t):  # one row in N + 2 is taken to be wrong
        logs, doubt = np.log(apply_temperature(p, t)), 1 / (len(y) + 2)
        true = logs[np.arange(len(y)), y]
        return -((1 - doubt) * true + doubt * (logs.sum(1) - true) / (logs.shape[1] - 1)).mean()

    assert t == pytest.approx(factor, rel=0.15)
    grid = np.geomspace(0.05, 20, 400)
    best = grid[np.argmin([loss(g) for g in grid])]
    assert t == pytest.approx(best, rel=0.02) and loss(t) <= loss(best) + 1e-12


def test_temperatures_stay_between_their_ends():
    right, wrong = np.array([[0.9, 0.1]] * 5), np.array([[0.1, 0.9]] * 5)
    many = np.repeat(right, 1000, 0)
    assert fit_temperature(many, np.zeros(len(many), int)) < fit_temperature(right, np.zeros(5, int)) < 2
    assert fit_temperature(np.array([[0.51, 0.49]] * 5000), np.zeros(5000, int)) == pytest.approx(0.05)
    assert fit_temperature(wrong, np.zeros(5, int)) == pytest.approx(20)
    assert 0.05 <= fit_temperature(np.full((4, 3), 1 / 3), np.array([0, 1, 2, 0])) <= 20  # nothing to be told from
    sure = np.array([[1, 0], [1, 0], [0, 1]], np.float32)  # softmax in single precision ends in ones and zeros
    assert math.isfinite(fit_temperature(sure, np.array([0, 1, 1])))


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0, 7.0, 20.0])
def test_a_temperature_keeps_the_order_and_can_be_taken_back(t):
    p, _ = made()
    q = apply_temperature(p, t)
    assert np.allclose(q.sum(1), 1) and (q.argmax(1) == p.argmax(1)).all()
    assert np.allclose(apply_temperature(apply_temperature(p, 3.0), 1 / 3.0), p, atol=1e-9)
    assert apply_temperature(np.array([[1.0, 0.0]]), t).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("t", [0, -1, math.nan, math.inf])
def test_temperatures_that_are_refused(t):
    with pytest.raises(ValueError, match="t: expected a number above 0"):
        apply_temperature(np.array([[0.5, 0.5]]), t)


@pytest.mark.parametrize("p", [[[0.0, 0.0]], [[-0.1, 1.1]], [[math.nan, 1.0]], [0.5, 0.5]])
def test_probabilities_that_a_temperature_cannot_take(p):
    with pytest.raises(ValueError, match="expected probabilities"):
        apply_temperature(np.array(p), 1.0)


def test_brier_is_that_of_a_plain_loop():
    p, y = made(50)
    rows = [sum((p[i, k] - (y[i] == k)) ** 2 for k in range(4)) for i in range(50)]
    assert brier(p, y) == pytest.approx(sum(rows) / 50)


@pytest.mark.parametrize("metric", [ece, brier, balanced_accuracy, fit_temperature, macro_f1, summary, reliability])
@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), "N > 0"),
        (np.full((3, 2), 0.5), np.zeros(2, int), "expected probabilities"),
        (np.full(3, 0.5), np.zeros(3, int), "expected probabilities"),
        (np.full((3, 2), np.nan), np.zeros(3, int), "diverged"),
        (np.full((3, 2), 0.5), np.array([0, 1, 2]), "labels must lie in 0..1"),
        (np.full((3, 2), 0.5), np.array([0, 1, -1]), "labels must lie in 0..1"),
    ],
)
def test_input_that_could_only_give_a_wrong_number(metric, p, y, message):
    with pytest.raises(ValueError, match=message):
        metric(p, y)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"bins": 0}, "bins: expected 1"), ({"target": 2}, "from 0 to 1"), ({"target": -1}, "target")],
)
def test_bins_and_targets_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ece(np.full((3, 2), 0.5), np.zeros(3, int), **given)
    with pytest.raises(ValueError, match="softmax"):
        ece(np.array([[3.0, -1.0]]), np.array([0]))


# Classes and slices


def test_balanced_accuracy_is_the_mean_recall_of_classes_that_are_there():
    p = np.eye(3)[[0, 0, 1, 1, 1, 1]]
    assert balanced_accuracy(p, np.array([0, 1, 1, 1, 1, 0])) == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert balanced_accuracy(p[:2], np.array([0, 0])) == 1.0
    found = summary(p, np.array([0, 1, 1, 1, 1, 0]))
    assert {"acc", "acc_low", "acc_high", "f1", "balanced_acc", "loss", "ece", "n"} == set(found)


def test_confused_pairs():
    matrix = confusion_matrix(np.array([0, 0, 0, 1, 2, 2]), np.array([1, 1, 0, 1, 0, 2]), 4)
    rows = confused_pairs(matrix, list("abcd"))
    assert [(r["class"], r["taken for"], r["n"]) for r in rows] == [("a", "b", 2), ("c", "a", 1)]
    assert rows[0]["share"] == pytest.approx(2 / 3) and len(confused_pairs(matrix, list("abcd"), 1)) == 1
    assert confused_pairs(np.eye(3, dtype=int), list("abc")) == []
    with pytest.raises(ValueError, match="for the classes"):
        confused_pairs(matrix, list("abc"))


def test_slices_count_every_row_once():
    p, y = made(200)
    groups = np.random.default_rng(1).integers(0, 3, 200)
    rows = by_slice(p, y, groups)
    assert [row["slice"] for row in rows] == [0, 1, 2] and sum(row["n"] for row in rows) == 200
    for row in rows:
        here = groups == row["slice"]
        assert row["acc"] == pytest.approx((p[here].argmax(1) == y[here]).mean())
        assert row["low"] <= row["acc"] <= row["high"] and row["f1"] == pytest.approx(macro_f1(p[here], y[here]))
    with pytest.raises(ValueError, match="each of 200 rows"):
        by_slice(p, y, groups[:5])


@pytest.mark.parametrize("n", [1, 4, 12])
def test_quantiles_sort_as_numbers_do(n):
    values = np.random.default_rng(2).normal(size=500)
    names = np.array(quantile_groups(values, n))
    order = names[np.argsort(values)]
    assert (np.sort(order) == order).all() and len(set(names)) == n
    sizes = np.unique(names, return_counts=True)[1]
    assert sizes.max() - sizes.min() <= 1 + 500 % n


def test_quantiles_of_numbers_that_are_much_the_same():
    assert set(quantile_groups(np.zeros(9))) == {"1: 0 to 0"}
    assert len(set(quantile_groups(np.array([0] * 90 + [1] * 10)))) <= 2
    for wrong in ([], [math.nan], [math.inf, 1]):
        with pytest.raises(ValueError, match="finite"):
            quantile_groups(np.array(wrong, float))


# Other origins


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_pairs(seed):
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, 6, 60) / 5, rng.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(scores, ~positive) == pytest.approx(1 - auroc(scores, positive))


@pytest.mark.parametrize(
    ("scores", "positive", "message"),
    [
        ([1.0, 2.0], [True, True], "both kinds"),
        ([1.0, math.nan], [True, False], "finite"),
        ([1.0, 2.0], [1, 0], "bools"),
        ([1.0], [True, False], "expected"),
    ],
)
def test_auroc_refuses(scores, positive, message):
    with pytest.raises(ValueError, match=message):
        auroc(np.array(scores), np.array(positive))


def test_sets_of_another_origin():
    known, y = made(300, 2)
    p, labels = made(80, 2, seed=3)
    q = made(40, 2, seed=4)[0]
    sets = {"ood-a": (p[:50], labels[:50]), "ood-b": (p[50:], labels[50:]), "ood-satire": (q, np.full(40, -1))}
    found = origin_metrics(sets, known, ["fake", "real"])
    assert found["ood/n"] == 80 and found["ood/acc"] == pytest.approx((p.argmax(1) == labels).mean())
    assert found["ood/balanced_acc"] == pytest.approx(balanced_accuracy(p, labels))
    assert "ood-satire/acc" not in found and found["ood-satire/confidence"] == pytest.approx(q.max(1).mean())
    rows = {row["set"]: row for row in origin_rows(sets, known, ["fake", "real"])}
    share = (q.argmax(1) == 0).mean()
    assert f"fake {share:.0%}" in rows["ood-satire"]["said"] and rows["ood-satire"]["acc"] is None
    assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in found.values())


def test_sets_that_are_partly_labelled_or_none():
    known, _ = made(20, 2)
    p, labels = made(10, 2, seed=3)
    labels[:4] = -1
    assert origin_metrics({"ood-a": (p, labels)}, known, ["fake", "real"])["ood-a/n"] == 6
    assert origin_metrics({}, known, ["fake", "real"]) == {}
    with pytest.raises(ValueError, match="ood-a: expected a label"):
        origin_rows({"ood-a": (p[:0], labels[:0])}, known, ["fake", "real"])


def test_spread():
    found = spread([0.9, 0.92, 0.97])
    assert found["mean"] == pytest.approx(0.93) and found["std"] == pytest.approx(np.std([0.9, 0.92, 0.97], ddof=1))
    assert found["range"] == pytest.approx(0.07) and spread([0.5])["std"] is None
    for wrong in ([], [0.5, math.nan]):
        with pytest.raises(ValueError, match="at least one value"):
            spread(wrong)


# Figures


@pytest.mark.parametrize("classes", [2, 20, 70])
def test_a_confusion_matrix_stays_small_enough_to_keep(classes):
    matrix = np.random.default_rng(0).integers(0, 9, (classes, classes))
    figure = show_confusion(matrix, [f"Class number {k}" for k in range(classes)])
    assert len(figure._repr_png_()) < 200_000 and figure.get_figwidth() < 16


def test_reliability_of_one_bin_and_of_none():
    rows = reliability(np.array([[0.9, 0.1]] * 3), np.array([0, 0, 0]))
    assert len(show_reliability(rows).axes) == 2
    with pytest.raises(ValueError, match="at least one bin"):
        show_reliability([])


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8))]
)
def test_grey_and_colour_are_shown(images):
    assert show_images(images)._repr_png_()


@pytest.mark.parametrize("images", [np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((4, 4))])
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match="expected images"):
        show_images(images)


HOSTILE = "<script>alert('x')</script>\n| **b** | [a](javascript:y) `c` $d$ \\ &amp; # _e_ </td></table>"


def test_nothing_of_a_text_is_markup():
    row = {
        "label": "<b>",
        "said": "a|b",
        "confidence": 1.0,
        "text": HOSTILE,
        "words": [("alert", 0.5), "b", "<script>"],
    }
    shown = show_texts([row], cut=500)
    html = shown._repr_html_()
    assert set(re.findall(r"</?(\w+)", html)) == {"table", "thead", "tbody", "tr", "th", "td", "b"}
    assert "<b>alert</b>" in html and html.count("<table>") == html.count("</table>") == 1
    lines = shown._repr_markdown_().split("\n")
    assert len(lines) == 3 and all(line.count("|") == 6 for line in lines)
    assert "**alert**" in lines[2] and not re.search(r"[<>\[\]`$\\]", lines[2])


@pytest.mark.parametrize("words", [[], [""], ["("], ["a.c"], ["\\"], ["*"], ["don't", "don"], ["ﬁ"]])
def test_words_that_are_no_patterns(words):
    row = {"label": "a", "said": "b", "confidence": 0.5, "text": "abc don't ( a.c", "words": words}
    assert "abc" in show_texts([row])._repr_html_()


def test_texts_are_cut_and_empty_ones_shown():
    row = {"label": "a", "said": "b", "confidence": 0.5, "text": "word " * 1000}
    assert len(show_texts([row], cut=50)._repr_html_()) < 400 and "…" in repr(show_texts([row], cut=50))
    assert show_texts([row | {"text": ""}])._repr_markdown_().endswith("|  |")
    with pytest.raises(ValueError, match="cut: expected 1"):
        show_texts([row], cut=0)


def test_a_table_with_gaps():
    shown = repr(Table([{"a": None, "b": "x\ny|z"}, {"a": 0.5, "b": None}], digits=1))
    assert shown.split("\n")[1:] == ["|--:|---|", "|  | x y\\|z |", "| 0.5 |  |"]
    assert repr(Table([])) == "(no rows)"


@pytest.mark.parametrize(("accuracies", "n"), [((0.5, 0.75), 4), ((1.0, 1.0, 1.0), 199), ((0.93, 0.94, 0.95), 10_000)])
def test_the_interval_of_several_models_on_the_same_rows(accuracies, n):
    """The mean of what was right: between the intervals of the models, and as wide as one of them."""
    middle = sum(accuracies) / len(accuracies) * n
    low, high = wilson_interval(middle, n)
    ends = [wilson_interval(round(a * n), n) for a in accuracies]
    rounding = 1e-12
    assert min(e[0] for e in ends) <= low + rounding and high <= max(e[1] for e in ends) + rounding
    assert low <= middle / n <= high + rounding
