"""Cross-validation: no row and no twin of it on both sides, the published test rows left alone, a kill survived."""

import dataclasses
import json

import numpy as np
import pytest
from pytest_notebooks import ROOT

from project.core import write_json
from project.data.store import build
from project.train.crossval import cross_metrics, cross_validate, fold_data, fold_rows
from project.train.recipe import get_recipe


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """The committed sample."""
    return build("fashion_mnist", tmp_path_factory.mktemp("data") / "d", source=ROOT / "tests" / "samples")


@pytest.mark.parametrize("folds", [2, 3, 7])
@pytest.mark.parametrize("seed", [0, 5])
def test_each_training_row_is_tested_once(clothes, folds, seed):
    """No row is in two parts of a fold, and none of the published test set is in any."""
    parts = fold_data(clothes, folds, seed)
    pool = {*clothes.splits["train"].tolist(), *clothes.splits["val"].tolist()}
    tested = np.concatenate([part.splits["test"] for part in parts])
    assert len(parts) == folds and sorted(tested.tolist()) == sorted(pool)
    for part in parts:
        rows = np.concatenate(list(part.splits.values()))
        assert len({*rows.tolist()}) == len(rows) == len(pool) and {*rows.tolist()} == pool
        assert all(len(np.unique(clothes.labels[part.splits[n]])) == 10 for n in ("train", "val", "test"))
    assert len({part.hash for part in [*parts, clothes]}) == folds + 1  # no cache of one is taken for another


def test_twins_stay_in_one_fold(clothes):
    """A near copy of a training row is never among the rows that are tested."""
    pool = np.sort(np.concatenate([clothes.splits["train"], clothes.splits["val"]]))
    images = np.array(clothes.images)
    twins = [(pool[i], pool[i + 1]) for i in range(0, 60, 2)]
    labels = np.array(clothes.labels)
    for a, b in twins:
        images[b], labels[b] = images[a], labels[a]
        images[b][0, 0] ^= 1  # nearly the same
    changed = dataclasses.replace(clothes, images=images, labels=labels)
    for part in fold_data(changed, 4):
        tested = {*part.splits["test"].tolist()}
        torn = [pair for pair in twins if (pair[0] in tested) != (pair[1] in tested)]
        assert torn == []


@pytest.mark.parametrize("folds", [1, 0, -3])
def test_fewer_than_two_folds_are_none(folds):
    with pytest.raises(ValueError, match="folds: expected 2 or more"):
        fold_rows(np.arange(20) % 2, folds)


def test_more_folds_than_rows_of_a_class_are_refused():
    with pytest.raises(ValueError, match="expected enough rows"):
        fold_rows(np.array([0] * 20 + [1] * 3), 9)


def test_what_was_done_is_not_done_again(clothes, tmp_path):
    """Folds whose result is there are read; the others are trained."""
    write_json(tmp_path / "fold-0.json", {"acc": 0.5, "n": 10, "seconds": 1.0})
    told = []
    recipe = get_recipe("fashion_mnist", "tiny")
    rows = cross_validate(recipe, clothes, tmp_path, 2, on_fold=lambda i, row: told.append(i), limit_batches=1)
    assert told == [0, 1] and rows[0] == {"acc": 0.5, "n": 10, "seconds": 1.0} and rows[1]["n"] == 250
    assert json.loads((tmp_path / "fold-1.json").read_text(encoding="utf-8")) == rows[1]
    assert not (tmp_path / "fold-1" / "checkpoints").exists()


def test_the_figure_is_that_of_all_rows():
    """Folds of different sizes count by their rows."""
    found = cross_metrics([{"acc": 1.0, "n": 300, "seconds": 2.0}, {"acc": 0.0, "n": 100, "seconds": 3.0}])
    assert found["cv/acc"] == 0.75 and found["cv/n"] == 400 and found["train/seconds"] == 5.0
    assert found["cv/acc_low"] < 0.75 < found["cv/acc_high"]
