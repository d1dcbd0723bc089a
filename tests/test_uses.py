"""The rhythm of a lesson: why, definition, use. Each definition of the service's parts is used in the next cell."""

import ast
import json
import re
from itertools import pairwise

import pytest
from pytest_notebooks import ROOT

EXPORT = re.compile(r"^#\|\s*exports?i?\b", re.M)
PARTS = ("55_schemas", "60_inputs", "65_models", "70_swaps", "75_predict", "80_routes", "90_api")


def tree(cell):
    """The tree of a cell, without its directives."""
    return ast.parse("\n".join(line for line in "".join(cell["source"]).split("\n") if not line.startswith("#|")))


def defines(cell):
    """Whether a cell is exported and more than imports."""
    exported = EXPORT.search("".join(cell["source"]))
    return bool(exported) and not all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree(cell).body)


def is_use(cell):
    """Whether a cell is no part of the module, and shows a value or asserts one."""
    if EXPORT.search("".join(cell["source"])):
        return False
    return bool(cell["outputs"]) or any(isinstance(node, ast.Assert) for node in ast.walk(tree(cell)))


def uses(cells):
    """For each definition, in order, whether the next cell of code is a use of it."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [is_use(after) for cell, after in pairwise(code) if defines(cell)]


def longest_gap(found):
    """How many definitions stand together without a use."""
    return max(map(len, "".join("x" if used else "-" for used in found).split("x")))


@pytest.mark.parametrize("name", PARTS)
def test_definitions_are_followed_by_their_use(name):
    cells = json.loads((ROOT / "nbs" / "serve" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    found = uses(cells)
    assert sum(found) * 3 >= len(found) * 2, f"{sum(found)} of {len(found)} definitions are used in the next cell"
    assert longest_gap(found) <= 2


def cell(source, shows=False):
    """A cell of code."""
    return {"cell_type": "code", "source": [source], "outputs": [{}] if shows else []}


def test_what_counts_as_a_use():
    definition, helper = cell("#| export\ndef f(x):\n    return x"), cell("g = f")
    assert uses([cell("#| export\nimport os"), definition, cell("f(1)", shows=True)]) == [True]
    assert uses([definition, cell("assert f(1) == 1")]) == [True]
    assert uses([definition, helper, cell("f(1)", shows=True)]) == [False]
    assert uses([definition, definition, definition, cell("assert f(1)")]) == [False, False, True]
    assert longest_gap([True, False, False, True, False]) == 2 and longest_gap([True]) == 0


def test_the_app_is_the_last_and_least_of_the_parts():
    """What a request needs lies in the parts; the module that users name only puts them together."""
    lines = {name: (ROOT / "project" / "serve" / f"{name[3:]}.py").read_text("utf-8").count("\n") for name in PARTS}
    assert lines["90_api"] <= 450 and max(lines.values()) <= 600, lines
