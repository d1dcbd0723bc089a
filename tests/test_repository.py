"""The habits of this repository that a tool can check: what notebooks hold, what is generated, what may import what."""

import ast
import configparser
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pytest_notebooks import FLOORS, ROOT

BIN = Path(sys.executable).parent
LIBRARY = [path for floor in FLOORS for path in sorted(floor.glob("*.ipynb"))]
NOTEBOOKS = [*LIBRARY, *sorted((ROOT / "nbs").glob("*.ipynb"))]
RUNS = [path for path in (ROOT / "nbs").glob("*.ipynb") if path.name not in ("index.ipynb", "tutorial.ipynb")]
SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
EXPORT = re.compile(r"^#\|\s*exports?i?\b", re.M)
LONG_ON_PURPOSE: dict[str, str] = {}  # cell id -> why an exported cell has more than 60 lines


@functools.cache
def all_cells(path):
    """Every cell of a notebook, sources joined; nothing here changes one."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in found]


def cells(path, kind=None):
    """The cells of a notebook, sources joined."""
    return [c for c in all_cells(path) if kind in (None, c["cell_type"])]


def exported(path):
    """The exported cells of a notebook."""
    return [cell for cell in cells(path, "code") if EXPORT.search(cell["source"])]


def default_exp(path):
    """The module a notebook names, or None."""
    named = [m[1] for c in cells(path, "code") for m in re.finditer(r"^#\|\s*default_exp (\S+)", c["source"], re.M)]
    assert len(named) <= 1, f"{path.name} names {len(named)} modules: {named}"
    return f"project.{named[0]}" if named else None


def modules():
    """Every generated module, by import name."""
    files = [
        p.relative_to(ROOT).with_suffix("")
        for p in (ROOT / "project").rglob("*.py")
        if p.stem[0] != "_" or p.stem == "__main__"
    ]
    return sorted(".".join(path.parts) for path in files)


def python(code, cwd=ROOT, **env):
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse(source):
    """The tree of a cell; IPython's own syntax and directives are no part of it."""
    return ast.parse("\n".join(line for line in source.split("\n") if not line.startswith(("#|", "%", "!"))))


def book(path):
    """A notebook's name below nbs/."""
    return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def of_each(paths):
    """Make a test of one notebook a test of all of them, which names every one that fails."""

    def decorate(test):
        def all_of_them():
            found = []
            for path in paths:
                try:
                    test(path)
                except AssertionError as e:
                    found.append(f"{book(path)}: {e}")
            if found:
                raise AssertionError("\n".join(found))

        all_of_them.__name__, all_of_them.__doc__ = test.__name__, test.__doc__
        return all_of_them

    return decorate


by_notebook, by_library, by_run = of_each(NOTEBOOKS), of_each(LIBRARY), of_each(RUNS)


def test_every_notebook_that_fails_is_named():
    @of_each(LIBRARY[:3])
    def some(path):
        assert path == LIBRARY[1], "not this one"

    with pytest.raises(AssertionError) as caught:
        some()
    named = re.findall(r"^(\S+): not this one", str(caught.value), re.M)
    assert named == [book(LIBRARY[0]), book(LIBRARY[2])]


# What notebooks hold


@by_notebook
def test_notebook_starts_with_a_title_and_one_line(path):
    first = cells(path)[0]
    lines = [line for line in first["source"].split("\n") if line.strip()]
    assert first["cell_type"] == "markdown" and lines[0].startswith("# "), "the first cell is the title"
    assert len(lines) > 1 and lines[1].startswith("> "), "below the title stands one line: > what it is"
    rest = [line for line in lines[2:] if not re.match(r"- [\w-]+: ", line)]
    assert not rest, f"the docs drop what follows in the title's cell; give it a cell of its own: {rest}"


@by_notebook
def test_notebook_is_of_the_current_format(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5), "run `make notebooks`"
    assert notebook["metadata"].get("kernelspec", {}).get("name") == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids), "cell ids are what exported modules refer to; they must differ"


@by_notebook
def test_outputs_are_of_no_one_machine(path):
    here = {str(ROOT), str(Path.home()), tempfile.gettempdir()} - {"/"}
    foreign = re.compile(
        "|".join([r"/home/\w", r"/root/", r"/Users/\w", r"/tmp/", r"\b[A-Z]:\\", *map(re.escape, here)])
    )
    for cell in cells(path, "code"):
        for text in output_texts(cell):
            assert not (m := foreign.search(text)), (
                f"cell {cell['id']} shows a path of one machine: {m and text[m.start() :][:80]!r}"
            )
    about = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert not foreign.search(json.dumps(about)) and "papermill" not in about


@by_notebook
def test_outputs_are_the_same_every_time(path):
    changing = {
        "a time": r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d",
        "an address": r"\bat 0x[0-9a-f]{4,}",
        "a progress bar": r"\d+%\|[ █▏▎▍▌▋▊▉#]|\bit/s\b",
    }
    for cell in cells(path, "code"):
        assert not [o for o in cell["outputs"] if o.get("name") == "stderr"], f"cell {cell['id']} keeps an error stream"
        assert not [o for o in cell["outputs"] if o["output_type"] == "error"], f"cell {cell['id']} keeps an error"
        assert not [k for o in cell["outputs"] for k in o.get("data", {}) if "widget" in k], (
            f"cell {cell['id']} keeps a widget"
        )
        for text in output_texts(cell):
            for what, pattern in changing.items():
                assert not (m := re.search(pattern, text)), f"cell {cell['id']} shows {what}: {m and m.group()!r}"


@by_notebook
def test_figures_are_small(path):
    for cell in cells(path, "code"):
        sizes = [
            len("".join(o["data"]["image/png"])) * 3 // 4 for o in cell["outputs"] if "image/png" in o.get("data", {})
        ]
        assert all(size < 100_000 for size in sizes), f"cell {cell['id']} holds a figure of {max(sizes)} bytes"


def output_texts(cell):
    """Every text a cell shows; pictures aside."""
    for output in cell["outputs"]:
        yield "".join(output.get("text", ""))
        for kind, data in output.get("data", {}).items():
            if not kind.startswith("image/") or kind == "image/svg+xml":
                yield "".join(data) if isinstance(data, list) else str(data)


@by_run
def test_run_notebook_has_one_parameters_cell(path):
    tags = [tag for cell in cells(path) for tag in cell["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1, "papermill reads its parameters from one cell tagged `parameters`"
    assert "injected-parameters" not in tags, "this is the output of a run, not the notebook"
    assert default_exp(path) is None and not exported(path), "a run notebook exports nothing"


@by_library
def test_library_notebook_exports_and_has_no_parameters(path):
    assert default_exp(path) and exported(path)
    assert not [
        cell for cell in cells(path) if {"parameters", "injected-parameters"} & set(cell["metadata"].get("tags", []))
    ]


@by_notebook
def test_directives_are_the_first_lines(path):
    for cell in cells(path, "code"):
        lines = [line for line in cell["source"].split("\n") if line.strip()]
        code = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
        late = [line for line in lines[code:] if line.startswith("#|")]
        assert not late, f"cell {cell['id']}: nbdev overlooks a directive below other lines: {late}"


@by_library
def test_imports_stand_alone(path):
    for cell in cells(path, "code"):
        body = parse(cell["source"]).body
        imports = [node for node in body if is_import(node)]
        assert not imports or len(imports) == len(body), (
            f"cell {cell['id']} mixes imports and code; the docs run it and fail"
        )


def is_import(node):
    """An import, or a block (`if TYPE_CHECKING`, `try`) that holds imports only."""
    if isinstance(node, ast.If | ast.Try):
        return all(is_import(child) for child in node.body)
    return isinstance(node, ast.Import | ast.ImportFrom)


@by_notebook
def test_import_forms_that_nbdev_gets_wrong(path):
    for cell in cells(path, "code"):
        for node in ast.walk(parse(cell["source"])):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"cell {cell['id']}: write project.x, not a relative import"
                assert node.module != "project", (
                    f"cell {cell['id']}: write `from project.x import y`, not `from project import x`"
                )
                assert not (node.module or "").startswith("project") or node.names[0].name != "*", (
                    f"cell {cell['id']}: star import"
                )


@by_library
def test_exported_cells(path):
    for cell in exported(path):
        lines = [line for line in cell["source"].split("\n") if line.strip() and not line.startswith("#|")]
        assert not [line for line in lines if line.startswith(("%", "!"))], (
            f"cell {cell['id']}: a magic breaks the module"
        )
        assert len(lines) <= 60 or cell["id"] in LONG_ON_PURPOSE, (
            f"cell {cell['id']} exports {len(lines)} lines: {lines[0]}"
        )


# What is generated


def checkout(folder):
    """A copy of what git would hold: tracked files, and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def contents(folder):
    """Every file's bytes, by name."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and ".git" not in p.parts
    }


def test_clean_export_and_readme_change_nothing(tmp_path):
    copy = checkout(tmp_path / "copy")
    before = contents(copy)
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}  # with it nbdev_export does nothing
    for command in ([BIN / "nbdev_clean"], [BIN / "nbdev_export"], [sys.executable, ".ci/readme.py"]):
        subprocess.run(command, cwd=copy, env=env, check=True)
    after = contents(copy)
    assert sorted(before) == sorted(after), "run `make notebooks`"
    assert [name for name in before if before[name] != after[name]] == [], "run `make notebooks`"


def test_modules_are_what_notebooks_name():
    assert modules() == sorted(default_exp(path) for path in LIBRARY), "a module without a notebook, or the reverse"


def test_library_is_numbered_in_import_order():
    numbers = {default_exp(path): (FLOORS.index(path.parent), path.name.split("_")[0]) for path in LIBRARY}
    assert len(set(numbers.values())) == len(numbers), f"two notebooks have one number: {sorted(numbers.values())}"
    for path in LIBRARY:
        for cell in exported(path):
            for node in ast.walk(parse(cell["source"])):
                names = (
                    [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
                )
                later = [n for n in names if n in numbers and numbers[n] >= numbers[default_exp(path)]]
                assert not isinstance(node, ast.Import | ast.ImportFrom) or not later, (
                    f"{book(path)} imports {later} from below"
                )


def test_a_notebook_lies_where_its_module_says():
    """Folder and name are the module's; those of the first floor, and the command, are at the top of the package."""
    there = {p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert there == {*NOTEBOOKS}, "library notebooks lie in the folder of a floor of .ci/floors.toml"
    for path in LIBRARY:
        number, _, name = path.stem.partition("_")
        assert re.fullmatch(r"\d\d", number), f"{book(path)}: expected a number of two digits"
        top = path.parent.name in ("core", "cli")
        assert default_exp(path).replace("__", "") == ".".join(["project", *[path.parent.name] * (not top), name])


def test_the_front_page_draws_the_floors_as_they_are():
    """The picture is made from the imports; its words are compared, as pixels differ from machine to machine."""
    code = [c["source"] for c in cells(ROOT / "nbs" / "index.ipynb", "code")]
    start = next(i for i, source in enumerate(code) if "floors.toml" in source)
    drawn = next(c for c in cells(ROOT / "nbs" / "index.ipynb", "code") if "show_floors(floors" in c["source"])
    alt = drawn["outputs"][0]["metadata"]["image/png"]["alt"]
    made = python(
        "\n".join([code[0], *code[start : start + 2]]).replace("\nshow_floors(", "\nfigure = show_floors(")
        + "\nprint(figure.alt)"
    )
    assert made.strip() == alt, "run nbs/index.ipynb and `make notebooks`"


def private_signatures(path):
    """The private functions of exported cells whose signatures have a comment: name, and the lines of the signature."""
    for cell in exported(path):
        lines = [line for line in cell["source"].split("\n") if not line.startswith(("#|", "%", "!"))]  # as parsed
        for node in ast.walk(parse(cell["source"])):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and re.match(r"_[^_]", node.name):
                text = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
                if re.search(r"  # (?!type:|noqa)", text):
                    yield node.name


def test_private_helpers_have_plain_signatures():
    """A parameter a line with its comment is for what is public; a helper's names and types say enough."""
    assert {book(path): found for path in LIBRARY if (found := list(private_signatures(path)))} == {}


# What importing does

FORBIDDEN = {"torch", "lightning", "pytorch_lightning", "transformers", "pandas"}
LIGHT = re.compile(r"project\.(core|runs\..+|serve\..+|monitor\..+|bundle\.(?!export).+|data\.(sources|tasks|store))$")


def test_light_modules_import_nothing_heavy():
    """All of them in one process: what none of them loads, no single one does. If there is something, whose it is."""
    light = [name for name in modules() if LIGHT.match(name)]
    heavy = FORBIDDEN & set(python(f"import sys, {', '.join(light)}; print(*sys.modules)").split())
    assert not heavy, {
        name: found
        for name in light
        if (found := FORBIDDEN & set(python(f"import sys, {name}; print(*sys.modules)").split()))
    }


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """What a process that has imported every module says of itself, and the empty folder that it was in."""
    here = tmp_path_factory.mktemp("here").resolve()
    code = f"""
import importlib, json, logging, os, types, typing
before, wrong = dict(os.environ), []
loaded = [importlib.import_module(name) for name in {modules()!r}]
ours = [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "project" and logging.getLogger(n).handlers]
changed = [n for n in os.environ if n.startswith("PROJECT_") and before.get(n) != os.environ[n]]
for module in loaded:
    for public in module.__all__:
        if isinstance(getattr(module, public), (logging.Logger, typing.TypeVar, types.ModuleType)):
            wrong.append(f"{{module.__name__}}.{{public}}")
print(json.dumps([ours, changed, len(logging.root.handlers), os.getcwd(), wrong]))
"""
    folders = {f"PROJECT_{name}": str(here / name.lower()) for name in ("DATA", "RUNS", "CACHE")}
    return *json.loads(python(code, cwd=here, **folders)), here


def test_importing_everything_has_no_side_effects(everything):
    ours, changed, handlers, cwd, _, here = everything
    assert (ours, changed, handlers, cwd) == ([], [], 0, str(here))
    assert list(here.iterdir()) == [], "importing made files"


def test_public_names(everything):
    assert everything[4] == [], "a star import would bring these along; begin their names with _"


# Versions and requirements


def requirements(key):
    """The requirements of one entry of settings.ini."""
    return [Requirement(line) for line in SETTINGS[key].split("\n") if line.strip()]


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[?v?(\d+\.\d+\.\d+)", changelog, re.M)
    assert newest and newest[1] == SETTINGS["version"], "the newest version in CHANGELOG.md is not settings.ini's"
    assert python("import project; print(project.__version__)").strip() == SETTINGS["version"]


def test_nbdev_is_pinned_with_its_family():
    given = {r.name: str(r.specifier) for r in requirements("requirements")}
    wanted = {"nbdev": "<3,>=2.4.14", "execnb": "<0.2", "fastcore": "<2", "ghapi": "<2", "fastgit": "<0.2"}
    assert {name: given.get(name) for name in wanted} == wanted
    assert given["torch"] == "==2.13.0"
    assert SETTINGS["update_pyproject"] == "False" and "tags" in SETTINGS["allowed_cell_metadata_keys"].split()


@pytest.mark.parametrize("key", ["requirements", "serve_requirements", "docs_requirements", "dev_requirements"])
def test_requirements_are_installed_as_written(key):
    for requirement in requirements(key):
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), str(
                requirement
            )


# Commands: the Makefile, CI and the README


def make_targets():
    """Every target of the Makefile that a person may call -> its help."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()
    helped = dict(re.findall(r"^([a-z-]+):[^\n#]*## (.+)$", text, re.M))
    assert set(phony) == set(helped), "every target has a ## line"
    return helped


def test_make_targets():
    expected = {"help", "setup", "train", "test", "lint", "notebooks", "lab", "docs", "bench", "clean"}
    assert expected <= set(make_targets())


@pytest.mark.parametrize(
    "path", [".ci/run", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob(".github/workflows/*"))]
)
def test_ci_calls_targets_that_exist(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    called = {
        t
        for line in text.split("\n")
        if "#" not in line.split("make ")[0]
        for t in re.findall(r"\bmake ([a-z]+)\b", line)
    }
    assert called and called <= set(make_targets())


def readme_commands():
    """Every command in the README's shell blocks, as words; `&&` separates, a backslash continues."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    return [
        words
        for line in lines
        for part in line.split("&&")
        if (words := shlex.split(part.removeprefix("$ "), comments=True))
    ]


def without_assignments(words):
    """A command without the `NAME=value` before it."""
    return words[next((i for i, word in enumerate(words) if not re.match(r"\w+=", word)), len(words)) :]


README = list(dict.fromkeys(shlex.join(w) for w in map(without_assignments, readme_commands()) if w))
SHELL = {"cd", "source", ".", "export", "git", "python", "python3"}


def test_readme_names_the_two_commands():
    assert {"make train", "make test"} <= set(README)
    assert re.search(r"\bmake test\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8")), (
        "CI runs the README's test command"
    )


@pytest.mark.parametrize("command", README)
def test_readme_command_exists(command):
    program, *arguments = shlex.split(command)
    assert program in SHELL | {"make"} or (BIN / program).exists() or shutil.which(program), (
        f"no such program: {program}"
    )
    for path in (a for a in arguments if re.match(r"(nbs|tests|benchmarks)/", a)):
        assert (ROOT / path).exists(), f"no such file: {path}"
    if program == "make":
        assert {a for a in arguments if "=" not in a} <= set(make_targets())
    if program == "papermill" or (program == "project" and arguments[:1] == ["run"]):
        check_papermill([a for a in arguments if a != "run"])
    elif program == "project":
        check_project(arguments)


def check_papermill(arguments):
    """The notebook has every parameter that is given."""
    notebook = ROOT / "nbs" / Path(arguments[0]).with_suffix(".ipynb").name
    assert notebook.exists(), f"no such notebook: {arguments[0]}"
    known = {
        node.id
        for c in cells(notebook, "code")
        if "parameters" in c["metadata"].get("tags", [])
        for node in names_set(c)
    }
    given = {arguments[i + 1] for i, a in enumerate(arguments) if a in ("-p", "-r", "--parameters", "--parameters_raw")}
    assert given <= known, f"{notebook.name} has no parameter {given - known}"


def names_set(cell):
    """The names that a cell assigns."""
    return [n for n in ast.walk(parse(cell["source"])) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def check_project(arguments):
    """The verb exists and takes the options that are given."""
    verbs = []
    for word in arguments:
        if (
            word.startswith("-")
            or not re.fullmatch(r"[a-z-]+", word)
            or run_project([*verbs, word, "--help"]).returncode
        ):
            break
        verbs.append(word)
    assert verbs or arguments == ["--help"], f"no such verb: project {shlex.join(arguments)}"
    shown = run_project([*verbs, "--help"]).stdout
    assert all(a.split("=")[0] in shown for a in arguments if a.startswith("-")), f"unknown option: {arguments}"


def run_project(arguments):
    """The `project` command, in this test's own folders."""
    env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run([BIN / "project", *arguments], env=env, capture_output=True, text=True, encoding="utf-8")


QUICK = [
    c for c in README if c.split()[:2] in (["project", "doctor"], ["project", "runs"]) or c in ("make", "make help")
]


@pytest.mark.parametrize("command", QUICK)
def test_quick_readme_command_runs(command):
    program, *arguments = shlex.split(command)
    if program == "make" and not shutil.which("make"):
        pytest.skip("no make here")
    command = [program if program == "make" else BIN / program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
