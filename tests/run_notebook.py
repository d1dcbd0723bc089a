"""Run one notebook the way nbdev_test does, with two differences: `run_notebook.py NOTEBOOK FILTERS SECONDS`.

A cell that is exported is compiled under the name and lines of the module it went to. So its coverage counts as the
module's, tracebacks show real files, and a module that is not what its notebook exports is found out. And warnings are
errors.

`run_notebook.py --serve MODULES FILTERS SECONDS` imports what many notebooks import, once, and forks a process for
each notebook that it is asked for: torch and Lightning alone take longer than most lessons. Of this package it imports
nothing.
"""

import ast
import builtins
import faulthandler
import importlib
import json
import os
import re
import sys
import warnings
from itertools import pairwise
from pathlib import Path

from execnb.shell import CaptureShell
from IPython.core.compilerop import CachingCompiler
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

EXPORTS = {"export", "exports", "exporti"}


class StaleModule(Exception):
    """The generated module does not hold what the notebook exports."""


class ModuleCompiler(CachingCompiler):
    """Compiles a cell as a piece of `module`, `shift` lines down, when these are set."""

    module = None
    shift = 0

    def cache(self, transformed_code, number=0, raw_code=None):
        """The name that the code is compiled under."""
        return self.module or super().cache(transformed_code, number, raw_code)

    def ast_parse(self, source, filename="<unknown>", symbol="exec"):
        """The cell's tree, with the line numbers of the module."""
        tree = super().ast_parse(source, filename, symbol)
        return ast.increment_lineno(tree, self.shift) if self.module else tree


def exported_cells(package, notebook):
    """What `nbs/floor/name.ipynb` exported: cell id -> the module, the header's line number, the lines below."""
    found = {}
    for module in sorted(package.rglob("*.py")):
        lines = module.read_text(encoding="utf-8").split("\n")
        headers = [i for i, line in enumerate(lines) if line.startswith("# %% ")]
        for start, end in pairwise([*headers, len(lines)]):
            source, _, cell_id = lines[start].removeprefix("# %% ").rpartition(" #")
            if source.endswith(f"/{notebook}"):
                found[cell_id] = (module, start + 1, lines[start + 1 : end])
    return found


def place(cell, exported):
    """Where an exported cell stands: the module's path, and how far its lines are moved; (None, 0) for other cells."""
    if not EXPORTS & set(cell.directives_):
        return None, 0
    if cell.id not in exported:
        raise StaleModule(f"The cell {cell.id} is exported, but no module holds it: run `make notebooks`.")
    module, header, below = exported[cell.id]
    lines = cell.source.rstrip().split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#|")), len(lines))
    for line, there in zip(lines[first:], below, strict=False):
        # nbdev makes imports of the own package relative, and changes nothing else
        if line.rstrip() != there.rstrip() and not re.match(r"\s*from \.", there):
            raise StaleModule(f"{module} holds {there!r} where the notebook exports {line!r}: run `make notebooks`.")
    return str(module), header - first


def add_filters(specs):
    """Apply pytest's `filterwarnings` lines (action:message:category:module)."""
    warnings.resetwarnings()
    for spec in specs:
        action, message, category, module = (*spec.split(":"), "", "", "")[:4]
        where, _, name = category.rpartition(".")
        kind = getattr(importlib.import_module(where) if where else builtins, name or "Warning")
        warnings.filterwarnings(action, message.strip(), kind, module.strip())


def skipped(cell, flags):
    """Whether nbdev_test would pass over the cell."""
    if cell.cell_type != "code" or "nbdev_export(" in cell.source:
        return True
    return cell.directives_.get("eval:", [""])[0].lower() == "false" or bool(flags & set(cell.directives_))


def serve(modules, filters, seconds):
    """For each line [notebook, log] of the input a process: its id is answered, and in the end its status."""
    add_filters(filters)  # a warning of an import is an error here as well
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        path, log = json.loads(line)
        if (pid := os.fork()) == 0:
            os.setsid()
            os.chdir(Path(path).parent)
            for number, file, how in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_APPEND)):
                os.dup2(os.open(file, how), number)
            os.dup2(1, 2)
            return main(path, filters, seconds)  # and this process ends as any other
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def main(path, filters, seconds):
    """Run the notebook; the first cell that fails is shown with its output, and ends the process with status 1."""
    faulthandler.dump_traceback_later(0.75 * seconds)  # says where it hangs, just before it is ended
    path = Path(path)
    config = get_config()
    os.environ["IN_TEST"] = "1"
    sys.path[0] = str(config.config_path)  # in place of this script's folder
    notebook = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    if str(getattr(notebook, "frontmatter_", {}).get("skip_exec", "")).lower() == "true":
        return
    shell = CaptureShell(path)
    shell.run_line_magic("colors", "nocolor")
    shell.compile = ModuleCompiler()
    add_filters(filters)
    exported = exported_cells(config.lib_path, path.resolve().relative_to(config.nbs_path.parent).as_posix())
    flags = set(config.tst_flags.split())
    for number, cell in enumerate(notebook.cells):
        if skipped(cell, flags):
            continue
        try:
            shell.compile.module, shell.compile.shift = place(cell, exported)
            shell.cell(cell)
            error = shell.exc
        except StaleModule as stale:
            error = stale
        if error is not None:
            report(path, number, cell, error)
            sys.exit(1)


def report(path, number, cell, error):
    """Show which cell failed, what it says, what it printed, and why it failed."""
    printed = "".join("".join(o.get("text", "")) for o in getattr(cell, "outputs", []))
    if type(error).__name__ not in printed:  # IPython has shown its own errors already
        printed += f"{type(error).__name__}: {error}"
    rule = "-" * 80
    print(f"{path.name}, cell {number} (id {cell.id}):", rule, cell.source, rule, printed, sep="\n")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2].split(), json.loads(sys.argv[3]), float(sys.argv[4]))
    else:
        main(sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3]))
