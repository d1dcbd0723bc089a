"""What figures and tables say to who cannot see them, and what a browser makes of them."""

import re

import mistune
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter

from project.figures import Table, show_confusion, show_history, show_images, show_race, show_reliability
from project.train.recipe import RECIPES, split_plan

HISTORY = [{"epoch": e, "val/acc": a, "val/loss": 1 / e} for e, a in ((1, 0.36), (2, 0.41), (3, 0.92), (4, 0.93))]
BINS = [{"from": 0.5, "to": 1.0, "confidence": 0.8, "accuracy": 0.75, "low": 0.7, "high": 0.8, "n": 400}]
MATRIX = np.array([[90, 8, 2], [5, 95, 0], [0, 1, 99]])
SHADE = (0, 2.4, "images of 18 x 18")
FIGURES = {
    "images": (lambda: show_images(np.zeros((2, 28, 28), np.uint8), ["Bag", "Coat"]), "2 images in a grid: Bag, Coat"),
    "history": (lambda: show_history(HISTORY, mark=4, shade=SHADE), "images of 18 x 18 from epoch 0 to 2.4"),
    "confusion": (lambda: show_confusion(MATRIX, ["Shirt", "Coat", "Bag"]), "Shirt taken for Coat (8)"),
    "reliability": (lambda: show_reliability(BINS), "confidence 80.00% and accuracy 75.00%"),
    "race": (lambda: show_race({"small": [(20, 0.91), (22, 0.912)]}), "small 91.10% in 21 s"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_what_it_shows_as_text_and_as_alternative_text(name):
    make, words = FIGURES[name]
    data, metadata = DisplayFormatter().format(make())
    assert words in data["text/plain"] and metadata["image/png"]["alt"] == data["text/plain"]
    assert data["image/png"][:4] == b"\x89PNG" and len(data["image/png"]) < 100_000


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_in_a_figure_is_smaller_than_ten_pixels(name):
    figure = FIGURES[name][0]()
    figure.canvas.draw()
    texts = [t for t in figure.findobj(match=lambda a: hasattr(a, "get_fontsize")) if t.get_text().strip()]
    assert texts and min(t.get_fontsize() for t in texts) * figure.dpi / 72 >= 10


def test_losses_on_two_scales_have_two_panels_and_small_images_are_shaded():
    figure = show_history([*HISTORY, {"epoch": 0.5, "train/loss": 2.0}], shade=SHADE)
    assert [ax.get_title() for ax in figure.axes] == ["train/loss", "val/loss", "val/acc"]
    for ax in figure.axes:
        (span,) = [p for p in ax.patches if p.get_label() == SHADE[2]]
        assert span.get_x() == 0 and span.get_width() == 2.4
    assert not any(ax.patches for ax in show_history(HISTORY).axes)


def html_cells(table):
    """The cells of each row of a table, as a browser has them."""
    page = mistune.create_markdown(plugins=["table"], escape=False)(table._repr_markdown_())
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)]


@pytest.mark.parametrize(
    "rows",
    [
        [{"layer": "conv", "params": 144, "flops": 2}, {"layer": "all", "params": 144}],
        [{"set": "a", "n": 3}, {"set": "b", "n": 3, "accuracy": 0.5}],
        [{"flops": 2}, {"layer": "all"}, {}],
        [{"a|b": "x|y", "n": None}, {"n": 1}],
    ],
)
def test_a_table_with_missing_keys_is_whole_in_html(rows):
    found = html_cells(Table(rows))
    columns = list(dict.fromkeys(k for row in rows for k in row))
    assert found[0] == columns and [len(line) for line in found] == [len(columns)] * (1 + len(rows))
    for row, line in zip(rows, found[1:], strict=True):
        assert [bool(text) for text in line] == [row.get(c) is not None for c in columns]


def test_folded_rows_are_in_the_page_and_not_in_the_way():
    table = Table([{"setting": "lr"}], folded=[{"setting": "max_length"}], summary="1 of <texts>")
    page = mistune.create_markdown(plugins=["table"], escape=False)(table._repr_markdown_())
    head, fold = page.split("<details>")
    assert "lr" in head and "max_length" not in head and "max_length" in fold and "1 of &lt;texts&gt;" in fold


@pytest.mark.parametrize("task", RECIPES)
def test_a_plan_shows_what_applies_to_its_task(task):
    kind = "text" if task.startswith("fake") else "image"
    for recipe in RECIPES[task].values():
        used, idle = split_plan(recipe, kind)
        assert {"model", "epochs", "lr", "optimizer", "train_on"} <= set(used) and not set(used) & set(idle)
        assert ("max_length" in used) == (kind == "text") and ("small" in used) == (
            kind == "image" and recipe.small > 0
        )
