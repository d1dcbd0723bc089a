"""Test what changed and what imports it: `quick.py [--since REV] [--list]`, for an answer within a minute.

Changed is what git says: since the branch left main, staged or not, and files that are new; or all since REV. A module
is tested by its notebook and by the test files that import it; the modules that import it, by their notebooks. A test's
helper stands for the tests that import it. The habits of the repository are tested always, but for the slow ones.
`make test` is for the rest: what imports the importers, and what nobody imports, as settings.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from project.runs.imports import imported

ROOT = Path(__file__).resolve().parent.parent
CHEAP = "notebook or stand_alone or import_forms or exported or directives or outputs or figures"
HABITS = ["tests/test_repository.py", "-k", CHEAP]
NOTHING = 5  # pytest's status when no test was chosen


def git(root, *words):
    """The lines that git prints; none where it fails."""
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, encoding="utf-8", check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed_files(root, since=""):
    """What differs from `since`, or from where the branch left main; new files as well."""
    if since and not git(root, "rev-parse", "--verify", "--quiet", f"{since}^{{commit}}"):
        raise SystemExit(f"--since: expected a revision, found {since!r}. `git log --oneline` lists them.")
    left = (git(root, "merge-base", "HEAD", main) for main in ("main", "origin/main"))
    base = since or next((lines[0] for lines in left if lines), "HEAD")
    new = git(root, "ls-files", "--others", "--exclude-standard")
    return sorted({*git(root, "diff", "--name-only", base), *new})


def sources(path):
    """The source of a file's cells, or the file: one text a piece of code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return [text]
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def module_of(path, root):
    """The module that a file is, or is exported to; else nothing."""
    if path.suffix == ".py":
        parts = path.relative_to(root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    named = re.search(r"^#\|\s*default_exp (\S+)", "\n".join(sources(path)), re.M)
    return f"project.{named[1]}" if named else ""


def graph(root):
    """Which module or helper each file of nbs/, project/ and tests/ imports: path below the top -> names."""
    kinds = {"nbs": "*.ipynb", "project": "*.py", "tests": "*.py"}
    files = [p for top, kind in kinds.items() for p in (root / top).rglob(kind)]
    helpers = {p.stem for p in (root / "tests").glob("*.py")}
    found = {}
    for path in sorted(p for p in files if ".ipynb_checkpoints" not in p.parts):
        name = path.relative_to(root).as_posix()
        module = module_of(path, root) if name.startswith("project/") else ""
        names = {n for source in sources(path) for n in imported(source, module)}
        if name.startswith("tests/"):
            names |= {n for n in _imports(sources(path)[0]) if n in helpers}
        found[name] = names
    return found


def _imports(source):
    """The names of modules that a test imports at any place."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def choose(root, changed):
    """The notebooks and test files to run -> why."""
    edges, why = graph(root), {}
    exports = {p: module_of(root / p, root) for p in edges if p.endswith(".ipynb")}
    books = {module: p for p, module in exports.items() if module}
    modules, helpers = {}, {}  # name -> the file that changed
    for name in changed:
        if name not in edges:
            continue
        if name.endswith(".ipynb") or name.startswith("tests/test_"):
            why[name] = "changed"
        if module := exports.get(name) or (module_of(root / name, root) if name.startswith("project/") else ""):
            modules[module] = name
            if module in books:
                why.setdefault(books[module], f"exports {module}")
        if name.startswith("tests/"):
            helpers[Path(name).stem] = name
    for name, names in edges.items():
        if name.startswith("project/"):
            module = module_of(root / name, root)
            if (hit := sorted(names & modules.keys())) and module in books:
                why.setdefault(books[module], f"{module} imports {hit[0]}")
    more = dict(helpers)
    while more:  # a helper may be imported by another one
        hit = {Path(n).stem: n for n, names in edges.items() if n.startswith("tests/") and names & more.keys()}
        more = {stem: n for stem, n in hit.items() if stem not in helpers}
        helpers |= more
    for name, names in edges.items():
        if not name.startswith("tests/test_"):
            continue
        if hit := sorted(names & {*modules, *helpers}):
            why.setdefault(name, f"imports {hit[0]}")
    return why


def main():
    """Say or run it; the exit status is that of ruff or pytest."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--since", default="", metavar="REV", help="what changed since a revision, instead of since main"
    )
    options.add_argument("--list", action="store_true", help="print what would be run, and why")
    asked = options.parse_args()
    changed = changed_files(ROOT, asked.since)
    why = choose(ROOT, changed)
    if asked.list:
        print(*(f"{name}: {reason}" for name, reason in sorted(why.items())), sep="\n")
        print(f"{HABITS[0]}: always, its cheap part")
        return 0
    code = [n for n in changed if n.endswith((".py", ".ipynb")) and (ROOT / n).exists()]
    bin_ = Path(sys.executable).parent
    for words in (["check"], ["format", "--check"]) if code else ():
        if status := subprocess.run(
            [bin_ / "ruff", *words, "--force-exclude", *code], cwd=ROOT, check=False
        ).returncode:
            return status
    for call in ([*sorted(why)] if why else None, HABITS):
        if call and (status := subprocess.run([bin_ / "pytest", "-q", *call], cwd=ROOT, check=False).returncode):
            return status if status != NOTHING else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
