"""The contract: what is refused, through the plain `papermill` command and `project`, before a kernel starts."""

import datetime
import decimal
import enum
import json
import math
import os
import subprocess
import sys
import typing
from pathlib import Path

import annotated_types as at
import nbformat
import numpy as np
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook
from papermill.cli import _resolve_type
from pytest_notebooks import ROOT

from project.runs.contract import (
    ContractError,
    _within,
    check,
    contract_table,
    find_problems,
    json_schema,
    load_contract,
    notebook_contract,
    read_contract,
    say_value,
    value_key,
)
from project.runs.record import parameters

KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
BIN = Path(sys.executable).parent


def write(path: Path, *cells: str, tagged: tuple[int, ...] = (0,)) -> Path:
    """A notebook of these cells that imports project; those `tagged` have the tag `parameters`."""
    code = [new_code_cell(c, metadata={"tags": ["parameters"]} if i in tagged else {}) for i, c in enumerate(cells)]
    nbformat.write(new_notebook(cells=[*code, new_code_cell("import project.core")], metadata=KERNEL), path)
    return path


def papermill(folder: Path, *options: str, notebook: str = "in.ipynb") -> subprocess.CompletedProcess:
    """The plain command."""
    return subprocess.run(
        [BIN / "papermill", notebook, "out.ipynb", "--no-progress-bar", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(done: subprocess.CompletedProcess, folder: Path, *words: str) -> None:
    """Exit status 1, the words in the message, no traceback, nothing written."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr
    assert sorted(p.name for p in folder.iterdir() if p.suffix == ".ipynb") == ["in.ipynb"]


def test_the_command_of_the_training_notebook(root, tmp_path):
    done = papermill(tmp_path, "-p", "lr", "abc", "-p", "epoch", "3", notebook=str(root / "nbs/train.ipynb"))
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert "lr: expected a number above 0 and at most 10, or None, got 'abc'" in done.stderr
    assert "epoch: no such parameter. Did you mean 'epochs'?" in done.stderr
    assert "No kernel was started and nothing was written." in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("cell", "options", "words"),
    [
        ("a: int = 1", ("-p", "a", "x", "-p", "b", "2"), ("a: expected a whole number, got 'x'", "b: no such")),
        ("a: int = 'x'", (), ("a: its default breaks its own type: expected a whole number, got 'x'",)),
        ("a: Annotated[int, Gt(1)] = 0", (), ("a: its default breaks its own type",)),
        ("a: np.ndarray = None", (), ("a: its type 'np.ndarray' is not understood",)),
        ("a: list[ = 1", (), ("the parameters cell is not Python",)),
        ("a = print", (), ("a: expected a plain value as its default, found 'print'",)),
        ("a: int", (), ("a: expected a whole number, got nothing; it has no default",)),
        ("k: Secret = 'env:K'", ("-p", "k", "hunter2hunter2"), ("k: expected a reference",)),
        ("_rules = 'no.such:f'\na: int = 1", (), ("_rules: expected 'module:function'",)),
    ],
)
def test_what_the_engine_refuses(tmp_path, cell, options, words):
    write(tmp_path / "in.ipynb", cell)
    done = papermill(tmp_path, *options)
    refused(done, tmp_path, *words)
    assert "hunter2" not in done.stderr + done.stdout


def test_two_cells_and_none(tmp_path):
    write(tmp_path / "in.ipynb", "a = 1", "b = 2", tagged=(0, 1))
    refused(papermill(tmp_path), tmp_path, "2 cells are tagged `parameters`; expected one")
    write(tmp_path / "in.ipynb", "a = 1", tagged=())
    refused(papermill(tmp_path, "-p", "a", "2"), tmp_path, "there is no code cell tagged `parameters`")
    assert papermill(tmp_path).returncode == 0  # without parameters there is nothing to refuse


def test_a_parameter_file_that_is_not_yaml(tmp_path):
    write(tmp_path / "in.ipynb", "a: int = 1")
    (tmp_path / "p.yaml").write_text("a: [1")
    call = [BIN / "project", "run", "in.ipynb", "out.ipynb", "-f", "p.yaml"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    refused(done, tmp_path, "p.yaml: expected YAML")


def test_values_arrive_as_their_types_read_them(tmp_path):
    cell = "a: bool = True\nb: float = 1.0\nc: list[int] = [1]\nd: int | None = 3"
    write(tmp_path / "in.ipynb", cell, "print(repr((a, b, c, d)))")
    done = papermill(tmp_path, "-p", "a", "false", "-y", "{b: 1e-3, c: [2, 3], d: null}")
    assert done.returncode == 0, done.stderr
    nb = nbformat.read(tmp_path / "out.ipynb", 4)
    assert nb.cells[2].outputs[0].text == "(False, 0.001, [2, 3], None)\n"
    assert nb.metadata.papermill.parameters == {"a": False, "b": 0.001, "c": [2, 3], "d": None}


def test_by_name_and_in_process(tmp_path):
    import papermill as pm

    write(tmp_path / "in.ipynb", "a: int = 1")
    for engine in (None, "project"):
        with pytest.raises(ContractError, match="a: expected a whole number"):
            pm.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"a": "x"}, engine_name=engine)
    assert not (tmp_path / "out.ipynb").exists()


def test_a_notebook_of_somebody_else_is_papermills_own_business(tmp_path):
    nb = new_notebook(cells=[new_code_cell("a: int = 1", metadata={"tags": ["parameters"]})], metadata=KERNEL)
    nbformat.write(nb, tmp_path / "in.ipynb")
    assert papermill(tmp_path, "-p", "a", "x", "-p", "typo", "1").returncode == 0
    assert "project" not in nbformat.read(tmp_path / "out.ipynb", 4).metadata


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"cells": 3}', "\x00\xff"])
def test_files_that_are_no_notebooks(tmp_path, content):
    (tmp_path / "x.ipynb").write_text(content)
    with pytest.raises(ValueError, match="expected"):
        load_contract(tmp_path / "x.ipynb")
    assert (tmp_path / "x.ipynb").read_text() == content


@pytest.mark.parametrize("name", ["train", "evaluate", "data"])
def test_every_run_notebook_has_a_contract(root, name):
    contract = load_contract(root / "nbs" / f"{name}.ipynb")
    assert not contract.problems and contract.parameters
    assert find_problems(contract, contract.defaults)[0] == []
    assert all(
        p.description and row["takes"] != "anything"
        for p, row in zip(contract.parameters, contract_table(contract), strict=True)
    )
    schema = json_schema(contract)
    assert set(schema["properties"]) == set(contract.names) and json.dumps(schema)


def test_the_schema_says_what_the_contract_does():
    import jsonschema

    cell = """
a: Annotated[int, Ge(1), MultipleOf(2)] = 2
b: dict[str, float] | None = None
c: Literal["x", 1] = "x"
d: Annotated[list[str], Len(1, 2)] = ["a"]
e: Annotated[float, Interval(gt=0, le=1)] = 1.0
"""
    contract = read_contract(cell)
    schema = json_schema(contract)
    jsonschema.Draft202012Validator.check_schema(schema)
    values = [
        {"a": 4},
        {"a": 3},
        {"b": {"x": 1.5}},
        {"b": {"x": "y"}},
        {"c": 1},
        {"c": "y"},
        {"d": []},
        {"d": ["a", "b", "c"]},
        {"e": 0},
        {"e": 1},
        {"f": 1},
    ]
    for value in values:
        assert jsonschema.Draft202012Validator(schema).is_valid(value) == (not find_problems(contract, value)[0]), value


@pytest.mark.parametrize(
    ("cell", "value", "result"),
    [
        ("a: str = ''", "007", "007"),
        ("a: int = 0", "12", 12),
        ("a: float = 0", 3, 3.0),
        ("a: list = []", (1, 2), [1, 2]),
        ("a: list[int] = []", (1, 2), [1, 2]),
        ("a: bool = True", "TRUE", True),
        ("a: bool = True", 1, None),
        ("a: int = 0", True, None),
        ("a: float = 0", "inf", None),
        ("a: str = ''", 7, None),
        ("a = 0", "anything", "anything"),
        ("a: 'int | None' = None", 3, 3),
        ("a: typing.Optional[int] = None", "x", None),
    ],
)
def test_values_and_types(cell, value, result):
    contract = read_contract(cell)
    if result is None:
        with pytest.raises(ContractError):
            check(contract, {"a": value})
    else:
        good = check(contract, {"a": value})["a"]
        assert good == result and type(good) is type(result)


def test_a_rule_that_reads_all_values(tmp_path):
    (tmp_path / "my_rules.py").write_text("def agree(v): return [] if v['a'] < v['b'] else ['a: expected less than b']")
    write(tmp_path / "in.ipynb", "_rules = 'my_rules:agree'", "a: int = 1\nb: int = 2", tagged=(1,))
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    call = [BIN / "papermill", "in.ipynb", "out.ipynb", "-p", "a", "5", "-p", "c", "1"]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "a: expected less than b" in done.stderr and "c: no such parameter" in done.stderr


def same_form(cell, *values):
    """The one form in which a parameter arrives, however it is spelled."""
    contract = read_contract(cell)
    forms = {repr(check(contract, {"a": value})["a"]) for value in values}
    assert len(forms) == 1, forms
    return forms.pop()


@pytest.mark.parametrize(
    ("cell", "values", "form"),
    [
        ("a: Annotated[float, Gt(0)] | None = None", (2, 2.0, "2", "2.0", "2e0", np.float32(2), np.int64(2)), "2.0"),
        ("a: float = 0", (1e-3, "1e-3", "0.001", "1.0E-3"), "0.001"),
        ("a: float = 1", (0, -0.0, "-0"), "0.0"),
        ("a: int = 0", (3, 3.0, "3", "3.0", np.int8(3)), "3"),
        ("a: int = 0", ("9007199254740993", 9007199254740993), "9007199254740993"),
        ("a: bool = True", (False, "false", "False", np.bool_(False)), "False"),
        ("a: list[float] = []", ([1, 2], (1.0, "2"), [np.float64(1), 2]), "[1.0, 2.0]"),
        ("a: Literal[1, 2] = 1", (2, 2.0, "2"), "2"),
        ("a: Place = ''", ("data/x", "./data/x", "data//x/", Path("data/x")), "'data/x'"),
        ("a: Place | None = ''", ("gs://b/x", "gs://b/x/"), "'gs://b/x'"),
        ("a = 0", ((1, (2,)), [1, [2]]), "[1, [2]]"),
    ],
)
def test_a_value_spelled_otherwise_is_the_same_value(cell, values, form):
    assert same_form(cell, *values) == form


def test_stored_values_are_told_apart_by_what_they_are():
    assert value_key([2.0, {"b": 1}]) == value_key((2, {"b": 1.0}))
    assert len({value_key(v) for v in (1, True, "1", None, "None", "true")}) == 6
    assert (say_value(2.0), say_value(0.5), say_value("2.0")) == ("2", "0.5", "2.0")


class Colour(enum.StrEnum):
    """A text that is a member of an enumeration."""

    RED = "red"


def nested(depth):
    """A list in a list in a list."""
    return [nested(depth - 1)] if depth else []


def endless():
    """A list that holds itself."""
    a = []
    a.append(a)
    return a


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("float", 10**400),
        ("int", 10**400),
        pytest.param("int", 10**5000, id="thousands of digits"),
        ("float", math.inf),
        ("float", "nan"),
        ("Any", math.nan),
        ("Any", {1, 2}),
        ("Any", b"x"),
        ("Any", datetime.date(2026, 1, 2)),
        ("Any", {1: 2}),
        ("dict", {None: 2}),
        ("Any", nested(50)),
        ("Any", endless()),
        ("Any", np.zeros(2)),
        ("str", "\ud800"),
        ("str", datetime.date(2026, 1, 2)),
        ("float", decimal.Decimal("0.1")),
        ("Place", "a\0b"),
        ("Any", [[0] * 1000] * 1000),
    ],
)
def test_what_no_parameter_can_be_is_refused_in_a_sentence(kind, value):
    default = {"float": "0.0", "int": "0", "dict": "{}"}.get(kind, "''")
    with pytest.raises(ContractError) as error:
        check(read_contract(f"a: {kind} = {default}"), {"a": value})
    assert "a: expected " in str(error.value) and len(str(error.value)) < 600


def test_members_and_paths_are_plain_text():
    good = check(read_contract("a: str = ''\nb: str = ''"), {"a": Colour.RED, "b": Path("x")})
    assert good == {"a": "red", "b": "x"} and {type(v) for v in good.values()} == {str}


ALIASES = "from annotated_types import Gt as Above\nRate = Annotated[float, Above(0)]\nCount = int"
FIVE = "lr: Rate = 0.1\nmomentum: Rate = 0.5\nn: Count = 1\nm: Count = 2\ndecay: Rate | None = None"


@pytest.mark.parametrize(
    ("above", "cell", "problems"),
    [
        ("%load_ext autoreload\n!ls\n" + ALIASES, FIVE, 0),
        ("%%time\n" + ALIASES, "%matplotlib inline\n" + FIVE, 0),
        ("%%bash\nls", "%%capture\na, b = 1, 2\nc = d = 60 * 60\nprint(a)\ne: int\ne = 3", 0),
        ("", "Rate = Annotated[float, Gt(0)]\nlr: Rate = 2 * 0.5", 0),
        ("", "a: Annotated[int, 'seconds', Gt(0)] = 1", 0),
        ("from mine import Rate, Count", FIVE, 2),  # one a name
        ("def f(:\n    pass\n" + ALIASES, FIVE, 1),
        ("", "a = 1\na += 1", 1),
        ("", "if True:\n    a = 1\n    b = 2", 1),
        ("", "a = compute(3)\nb: int = 2", 1),
        ("", "a: list[ = 1\nb = 2", 1),
        ("", "%%bash\nls", 1),
        ("", "a, *b = 1, 2, 3", 1),
        ("", "a = 9 ** 9 ** 9", 1),
    ],
)
def test_one_true_message_or_none(above, cell, problems):
    cells = [new_code_cell(above), new_code_cell(cell, metadata={"tags": ["parameters"]})]
    contract = notebook_contract(new_notebook(cells=cells))
    names = [n for n in ("lr", "momentum", "n", "m", "decay", "a", "b", "c", "d", "e") if f"{n}" in contract.names]
    assert contract.parameters or not contract.whole
    found, _ = find_problems(contract, dict.fromkeys([*names, *(() if contract.whole else ("lr",))], 1))
    assert len(contract.problems) == problems and not any("no such parameter" in p for p in found), found
    if not problems:
        assert find_problems(contract, {"typo": 1})[0][0].startswith("typo: no such parameter")


def test_two_parameters_cells_are_one_message():
    cells = [new_code_cell(f"a{i} = 1", metadata={"tags": ["parameters"]}) for i in range(2)]
    found, _ = find_problems(notebook_contract(new_notebook(cells=cells)), {"a0": 2, "a1": 3})
    assert found == ["2 cells are tagged `parameters`; expected one"]


@pytest.mark.parametrize("text", ["94", "1e3", "True", "None", "007", "+1"])
def test_a_text_parameter_takes_the_text_that_was_typed(text):
    contract = read_contract("a: str = ''\nb: str | None = None\nc: Place = ''")
    value = _resolve_type(text)
    assert check(contract, {"a": value}, typed={"a": text}) == {"a": text}
    assert check(contract, {"b": value}, typed={"b": text}) == {"b": None if text == "None" else text}
    with pytest.raises(ContractError, match="quotation marks, or use papermill's `-r NAME VALUE`"):
        check(contract, {"a": value})


def test_the_command_keeps_a_text_and_takes_its_own_paths(tmp_path):
    cell = "a: str = ''\nn: int = 1"
    write(tmp_path / "in.ipynb", cell, "print(repr((a, n, PAPERMILL_INPUT_PATH, PAPERMILL_OUTPUT_PATH)))")
    done = papermill(tmp_path, "-p", "a", "007", "--inject-paths")
    assert done.returncode == 0, done.stderr
    nb = nbformat.read(tmp_path / "out.ipynb", 4)
    assert nb.cells[2].outputs[0].text == "('007', 1, 'in.ipynb', 'out.ipynb')\n"


def test_papermills_own_paths_are_no_parameters():
    own = {"PAPERMILL_INPUT_PATH": "in.ipynb", "PAPERMILL_OUTPUT_PATH": "out.ipynb"}
    assert check(read_contract("a: int = 1"), own) == own
    assert check(notebook_contract(new_notebook()), own) == own  # without a parameters cell too
    assert parameters({"a": 1, **own}) == {"a": 1}


def choices():
    """Every name that somebody may type for a parameter of a shipped notebook."""
    from project.data.tasks import task_names
    from project.train.recipe import MODELS, RECIPES

    yield from (*task_names(), *RECIPES, *MODELS, *(name for recipes in RECIPES.values() for name in recipes))
    for path in sorted((ROOT / "nbs").glob("[a-z]*.ipynb")):
        for p in load_contract(path).parameters:
            for t in (p.type, *typing.get_args(p.type)):
                yield from typing.get_args(t) if typing.get_origin(t) is typing.Literal else ()
            yield from (p.default,) if isinstance(p.default, str) and p.default else ()


def test_no_shipped_choice_is_anything_but_a_text_to_yaml_and_papermill():
    names = {name for name in choices() if isinstance(name, str)}
    assert len(names) > 40 and {"fast", "fashion_mnist", "cnn-m", "auto"} <= names
    assert [name for name in names if yaml.safe_load(name) != name or _resolve_type(name) != name] == []
    assert yaml.safe_load("94") == _resolve_type("94") == 94  # as a recipe was called once


@pytest.mark.parametrize(
    ("bound", "fits"),
    [
        (at.Gt(2), [False, False, True]),
        (at.Ge(2), [False, True, True]),
        (at.Lt(2), [True, False, False]),
        (at.Le(2), [True, True, False]),
    ],
)
def test_a_bound_is_within_where_its_name_says_so(bound, fits):
    assert [_within(value, bound) for value in (1, 2, 3)] == fits
