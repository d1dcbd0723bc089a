"""Say which library notebooks were changed and not exported: what runs is the package as it was. Never fails."""

import contextlib
import sys

with contextlib.suppress(ImportError):  # an environment that is being made
    from project.runs.receipt import not_exported

    if found := not_exported():
        print(f"changed and not exported: {', '.join(found)}; `make notebooks` exports them", file=sys.stderr)
