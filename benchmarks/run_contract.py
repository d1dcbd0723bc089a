"""What the engine, the contract and the receipts cost, against stock papermill.

    python benchmarks/run_contract.py            about three minutes
    python benchmarks/run_contract.py --quick    once each, to see that it works

Each execution is a process of its own, ours and stock papermill's in turn: a slow minute of the machine meets both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
STOCK = "import papermill.engines as e; e.papermill_engines.register(None, e.NBClientEngine); "
CALL = "import sys; from papermill.__main__ import papermill; sys.argv[0] = 'papermill'; papermill()"


def seconds(command, folder, status=0):
    """How long a command takes; it must end with this exit status."""
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PROJECT_RUNS": f"{folder}/runs"}
    )
    took = time.perf_counter() - start
    assert done.returncode == status, done.stderr[-2000:]
    return took


def twenty_cells(folder, work):
    """A notebook of 20 code cells that take `work` seconds each and import project, with prose between them."""
    first = new_code_cell("a: int = 1", metadata={"tags": ["parameters"]})
    code = [new_code_cell(f"import time, project.core\ntime.sleep({work})\nprint({i})") for i in range(19)]
    cells = [c for cell in [first, *code] for c in (new_markdown_cell("some words"), cell)]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), folder / "in.ipynb")


def overhead(folder, work, repeats):
    """Seconds of the notebook of 20 cells: stock, ours, in turn."""
    twenty_cells(folder, work)
    tail = ["in.ipynb", "out.ipynb", "--no-progress-bar"]
    pairs = [
        [seconds([sys.executable, "-c", code + CALL, *tail], folder) for code in (STOCK, "")] for _ in range(repeats)
    ]
    stock, ours = zip(*pairs, strict=True)
    return stock, ours, [b - a for a, b in pairs]


def refusal(folder, repeats):
    """Seconds of `papermill --version`, of a refusal by the shell's command, and of the difference."""
    train = str(ROOT / "nbs/train.ipynb")
    refuse = [BIN / "papermill", train, "out2.ipynb", "-p", "lr", "abc", "-p", "epoch", "3"]
    pairs = [[seconds([BIN / "papermill", "--version"], folder), seconds(refuse, folder, 1)] for _ in range(repeats)]
    alone, refused = zip(*pairs, strict=True)
    return alone, refused, [b - a for a, b in pairs]


def thousand_runs(folder, repeats):
    """Seconds of `project runs` over 1,000 records like those of a training."""
    record = {"schema": 1, "status": "finished", "reason": "", "task": "t", "notebook": "nbs/train.ipynb"}
    parameters = {f"p{i}": i for i in range(20)}
    for i in range(1000):
        run = folder / "runs" / f"20260101-{i:06d}-t-0000"
        run.mkdir(parents=True)
        cells = {"code_cells": ["0" * 16] * 20, "modules": {f"project.m{j}": "0" * 16 for j in range(20)}}
        full = {**record, "id": run.name, "parameters": {**parameters, "seed": i}, "metrics": {"test/acc": i / 1000}}
        full |= {"started": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "code": {}, "receipt": cells}
        (run / "run.json").write_text(json.dumps(full, indent=1))
    call = [BIN / "project", "runs", "--sort", "-test/acc", "--where", "seed>10"]
    return [seconds(call, folder) for _ in range(repeats)]


def large_notebook(folder, repeats):
    """Seconds of `project verify` on an executed notebook of 20 MB, the command's start included."""
    sys.path.insert(0, str(ROOT))
    from project.runs.receipt import make_receipt

    data = "iVBORw0KGgo" + "A" * 1_000_000
    code = [new_code_cell(f"print({i})", outputs=[new_output("display_data", {"image/png": data})]) for i in range(20)]
    nb = new_notebook(cells=code, metadata=KERNEL)
    nb.metadata["project"] = {"receipt": make_receipt(nb, "finished", notebook="none.ipynb")}
    nbformat.write(nb, folder / "large.ipynb")
    return [seconds([BIN / "project", "verify", "large.ipynb"], folder) for _ in range(repeats)]


def engine_import(repeats):
    """Seconds that `import project.runs.engine` adds to a Python that has papermill loaded."""
    code = "import papermill, sys, time\nfor m in [*sys.modules]: m.startswith('project') and sys.modules.pop(m)\n"
    code += "t = time.perf_counter(); import project.runs.engine; print(time.perf_counter() - t)"
    run = [sys.executable, "-c", code]
    return [
        float(subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout) for _ in range(repeats)
    ]


def row(what, values, unit, remark):
    """One line of the table: median and range."""
    low, mid, high = min(values), statistics.median(values), max(values)
    print(f"| {what} | {mid:.3f} ({low:.3f} to {high:.3f}) {unit} | {remark} |")
    return {"what": what, "median": mid, "low": low, "high": high, "unit": unit, "remark": remark}


def main():
    """Measure, print the table, keep the numbers."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="once each")
    options.add_argument("--json", default=str(ROOT / "benchmarks/results/run_contract.json"), help="where to write")
    asked = options.parse_args()
    n = 1 if asked.quick else 7
    print("| what | median (range) | remark |\n|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for work in (0, 0.1):
            stock, ours, more = overhead(folder, work, n)
            ratio = [b / a for a, b in zip(stock, ours, strict=True)]
            what = f"20 cells of {work} s"
            rows += [
                row(f"{what}: stock papermill", stock, "s", ""),
                row(f"{what}: with this engine", ours, "s", ""),
                row(f"{what}: more", more, "s", "goal 0.15"),
                row(f"{what}: ratio", ratio, "", "goal 1.02"),
            ]
        alone, refused, more = refusal(folder, n)
        rows += [
            row("`papermill --version`", alone, "s", "papermill's own imports"),
            row("two bad parameters refused", refused, "s", "goal 0.5"),
            row("refusal: more than the start of papermill", more, "s", ""),
            row("`import project.runs.engine` after papermill", engine_import(n), "s", "goal 0.15"),
            row("`project runs` over 1,000 runs", thousand_runs(folder, n), "s", "goal 1"),
            row("`project verify` on 20 MB", large_notebook(folder, n), "s", "goal 1"),
        ]
    if not asked.quick:
        Path(asked.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
