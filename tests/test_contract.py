"""The contract: what is refused, through the plain `papermill` command and `project`, before a kernel starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from project.runs.contract import (
    ContractError,
    check,
    contract_table,
    find_problems,
    json_schema,
    load_contract,
    read_contract,
)

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
    refused(papermill(tmp_path, "-p", "a", "2"), tmp_path, "there is no cell tagged `parameters`")
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
        ("a: float = 0", 3, 3),
        ("a: list = []", (1, 2), None),
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
