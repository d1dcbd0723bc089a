"""For every Python that the tests start: fewer imports.

jsonschema looks for a checker of international addresses (`format: iri`), which JupyterLab brings along: it compiles
a grammar as it is imported, for longer than papermill takes to start. No schema here has such a field. Without the
checker jsonschema is as it is where JupyterLab is not installed.

Tests that start papermill many times and have no bucket name more that papermill can do without.
"""

import os
import sys

for name in ["rfc3987_syntax", *os.environ.get("PROJECT_TEST_WITHOUT", "").split()]:
    sys.modules[name] = None  # an ImportError, which those who import it expect
