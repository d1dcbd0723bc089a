#!/usr/bin/env bash
# papermill 2.7.0: a notebook whose cells all succeed fails when one of them has shown an old traceback.
#
# A cell that handles an exception and shows it for the reader (IPython's own `showtraceback`) ends well: nbclient goes on, and
# every later cell is executed. papermill then looks through the outputs, takes the shown error for a failure of that cell,
# puts its red banner on top and exits with 1. Jupyter's Run All and `jupyter execute` call the same notebook a success.
# Seen: exit status of `jupyter execute` 0, of papermill 1, with the last cell executed in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet papermill==2.7.0 nbclient==0.11.0 ipykernel==7.4.0
venv/bin/python - <<'P'
import nbformat
from nbformat.v4 import new_code_cell, new_notebook

cells = [
    "try:\n    1 / 0\nexcept ZeroDivisionError:\n    get_ipython().showtraceback()  # handled, and shown for the reader",
    "print('the end was reached')",
]
kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells], metadata=kernel), "in.ipynb")
P
plain=0; venv/bin/jupyter execute --output "$folder/plain.ipynb" in.ipynb >/dev/null 2>&1 || plain=$?
status=0; venv/bin/papermill --no-progress-bar in.ipynb out.ipynb >/dev/null 2>&1 || status=$?
reached=$(grep -c "the end was reached\\\\n" out.ipynb || true)
echo "jupyter execute exits with $plain, papermill with $status; papermill's output holds the last cell's output $reached time(s)"
test "$plain" = 0 && test "$status" = 1 && test "$reached" = 1
