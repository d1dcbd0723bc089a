"""For every Python that the tests start: one import fewer.

jsonschema looks for a checker of international addresses (`format: iri`), which JupyterLab brings along: it compiles
a grammar as it is imported, for longer than papermill takes to start. No schema here has such a field. Without the
checker jsonschema is as it is where JupyterLab is not installed.
"""

import sys

sys.modules["rfc3987_syntax"] = None  # an ImportError, which jsonschema expects
