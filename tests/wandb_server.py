"""A stand-in for the W&B server: enough of its protocol for one online session, and it keeps all that arrives.

A real `wandb` (0.31) talks to it over HTTP: GraphQL for runs and artifacts, `file_stream` for metric rows, and one
address for each file it uploads. What the stand-in has no answer for is noted in `unknown` and answered with nothing.
"""

import gzip
import json
import re
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer:
    """Runs, metric rows, files and artifacts, as they came in."""

    def __init__(self):
        self.runs, self.rows, self.files, self.artifacts = {}, {}, {}, {}
        self.ends, self.unknown, self.failures, self.keys = {}, [], [], set()
        self.refused = set()  # operations that are answered with an error; "everything": nothing is answered well

    def __enter__(self):
        self.http = _Quiet(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def config(self, run):
        """The configuration of a run, as its page would show it."""
        return {k: v["value"] for k, v in self.runs[run]["config"].items() if k != "_wandb"}

    # what GraphQL is asked for, by the name of the operation

    def Viewer(self):  # noqa: N802
        viewer = {"id": "u1", "username": "me", "entity": "us", "email": "me@us", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def UpsertBucket(self, name, project, config=None, **more):  # noqa: N802
        new = name not in self.runs
        run = self.runs.setdefault(name, {"project": project, "config": {}})
        run["config"].update(json.loads(config or "{}"))
        run.update({k: v for k, v in more.items() if v is not None})
        return {"upsertBucket": {"bucket": self._bucket(name), "inserted": new}}

    def RunResumeStatus(self, name, project, **_):  # noqa: N802
        bucket = self._bucket(name) if name in self.runs else None
        return {"model": {"id": "p1", "name": project, "entity": {"id": "e1", "name": "us"}, "bucket": bucket}}

    def CreateRunFiles(self, run, files, **_):  # noqa: N802
        found = [{"name": f, "uploadUrl": f"{self.url}/put/run/{run}/{f}"} for f in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": found}}

    def ArtifactType(self, **_):  # noqa: N802
        return {"project": {"artifact": None}}

    def CreateArtifact(self, input):  # noqa: N802, A002
        at = f"a{len(self.artifacts)}"
        self.artifacts[at] = {**input, "files": {}, "state": "PENDING"}
        made = {"id": at, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": made}}

    def CreateArtifactManifest(self, artifactID, name, **_):  # noqa: N802, N803
        manifest = {"id": f"m-{artifactID}", "file": self._file(artifactID, name)}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def UpdateArtifactManifest(self, artifactManifestID, **_):  # noqa: N802, N803
        file = self._file(artifactManifestID.removeprefix("m-"), "wandb_manifest.json")
        return {"updateArtifactManifest": {"artifactManifest": {"id": artifactManifestID, "file": file}}}

    def CreateArtifactFiles(self, input):  # noqa: N802, A002
        found = [{"node": self._file(f["artifactID"], f["name"])} for f in input["artifactFiles"]]
        return {"createArtifactFiles": {"files": {"edges": found}}}

    def CommitArtifact(self, artifactID, **_):  # noqa: N802, N803
        self.artifacts[artifactID]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifactID, "digest": "d"}}}

    def _bucket(self, name):
        run = self.runs[name]
        project = {"id": "p1", "name": run["project"], "entity": {"id": "e1", "name": "us"}}
        rows = self.rows.get(name, [])
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": run.get("displayName"),
            "description": None,
            "config": json.dumps(run["config"]),
            "sweepName": None,
            "project": project,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(run.get("summary", {})),
            "wandbConfig": json.dumps({"t": 1}),  # what tells a run that was begun from one that was only planned
            "tags": [],
        }

    def _file(self, artifact, name):
        file = {"id": f"{artifact}/{name}", "storagePath": name, "artifact": {"id": artifact}}
        upload = {"uploadUrl": f"{self.url}/put/{artifact}/{name}", "uploadHeaders": [], "uploadMultipartUrls": None}
        return file | upload


class _Quiet(ThreadingHTTPServer):
    """Says nothing about connections that wandb drops when it ends."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.RequestHandlerClass.server_.failures.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    """One request of wandb's."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing on the tests' output."""

    def do_POST(self):  # noqa: N802
        server = self.server_
        server.keys.add(self.headers.get("Authorization"))
        body = self._body()
        if "everything" in server.refused:
            return self._reply({}, 503)
        if not self.path.endswith(("/graphql", "/file_stream")):  # what wandb measures about itself
            return self._reply({})
        body = json.loads(body)
        if self.path == "/graphql":
            operation = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])[1]
            if operation in server.refused:
                return self._reply({"errors": [{"message": "permission denied"}]}, 403)
            answer = getattr(server, operation, None)
            if answer is None:
                server.unknown.append(operation)
            return self._reply({"data": answer(**(body.get("variables") or {})) if answer else {}})
        run = self.path.split("/")[-2]
        for row in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            server.rows.setdefault(run, []).append(json.loads(row))
        for row in body.get("files", {}).get("wandb-summary.json", {}).get("content", []):
            server.runs[run].setdefault("summary", {}).update(json.loads(row))
        if body.get("complete"):
            server.ends[run] = body["exitcode"]
        return self._reply({})

    def do_PUT(self):  # noqa: N802
        _, _, owner, *path = self.path.split("/")
        where = self.server_.files if owner == "run" else self.server_.artifacts[owner]["files"]
        where["/".join(path)] = self._body()
        self._reply({})

    def _body(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
