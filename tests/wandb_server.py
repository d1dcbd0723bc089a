"""A stand-in for the W&B server: enough of its protocol for online sessions, and it keeps all that arrives.

A real `wandb` (0.31) talks to it over HTTP: GraphQL for runs and artifacts, `file_stream` for metric rows, and one
address for each file it uploads. Artifacts lie in collections: in a project, where they were logged, and in a registry
of the organization, where they are linked. In a collection an alias is one version's, and the same content is one
version. What the stand-in has no answer for is noted in `unknown` and answered with nothing.
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
        self.refused = set()  # operations that are answered with an error; "everything"; "files": uploads
        self.collections = {}  # (entity, project, collection) -> {"members": ids of artifacts, "aliases": alias -> id}
        self.organization = "org"  # what the entity `us` belongs to; None: it is somebody's own account
        self.asked = []  # operations, in the order they came
        self.silent = threading.Event()  # set: a request is never answered
        self.closing = threading.Event()

    def __enter__(self):
        self.http = _Quiet(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
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
        where = (input["entityName"], input["projectName"], input["artifactCollectionName"])
        same = [k for k, a in self.artifacts.items() if (a["where"], a["digest"]) == (where, input["digest"])]
        at = same[0] if same else f"a{len(self.artifacts)}"
        if not same:
            self.artifacts[at] = {**input, "files": {}, "state": "PENDING", "where": where}
        elif self.artifacts[at]["state"] == "COMMITTED":
            self._name(at, input["aliases"], where)
        made = {"id": at, "state": self.artifacts[at]["state"], "artifactSequence": {"latestArtifact": None}}
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
        artifact = self.artifacts[artifactID]
        artifact["state"] = "COMMITTED"
        self._collection(artifact["where"])["members"].append(artifactID)
        self._name(artifactID, artifact["aliases"], artifact["where"])
        return {"commitArtifact": {"artifact": {"id": artifactID, "digest": "d"}}}

    # what is asked without a run

    def GetDefaultEntity(self):  # noqa: N802
        return {"viewer": {"id": "u1", "entity": "us"}}

    def ServerFeaturesQuery(self):  # noqa: N802
        feature = {"name": "ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE", "isEnabled": True}
        return {"serverInfo": {"features": [feature]}}

    def FetchOrgInfoFromEntity(self, entity):  # noqa: N802
        found = self.organization and {"name": self.organization, "orgEntity": {"name": f"{self.organization}-entity"}}
        return {"entity": {"organization": found, "user": None}}

    def ProjectArtifacts(self, entity, project, collection, **_):  # noqa: N802
        where = (entity, project, collection)
        if where not in self.collections:
            return {"project": {"artifactType": None}}
        members = self.collections[where]["members"]
        edges = [{"version": f"v{n}", "node": self._artifact(at)} for n, at in enumerate(members)]
        page = {"totalCount": len(edges), "pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": edges}
        kind = "ArtifactSequence" if entity == "us" else "ArtifactPortfolio"
        return {"project": {"artifactType": {"artifactCollection": {"__typename": kind, "artifacts": page}}}}

    def ArtifactByID(self, id, **_):  # noqa: N802, A002
        return {"artifact": self._artifact(id)}

    def UpdateArtifact(self, input, **_):  # noqa: N802, A002
        changed = {k: input[k] for k in ("description", "metadata") if input.get(k) is not None}
        self.artifacts[input["artifactID"]].update(changed)
        return {"result": {"artifact": self._artifact(input["artifactID"])}}

    def AddAliases(self, input):  # noqa: N802, A002
        for name in input["aliases"]:
            self._name(input["artifactID"], [name], self._where(name))
        return {"result": {"success": True}}

    def DeleteAliases(self, input):  # noqa: N802, A002
        for name in input["aliases"]:
            held = self.collections[self._where(name)]["aliases"]
            if held.get(name["alias"]) == input["artifactID"]:
                del held[name["alias"]]
        return {"result": {"success": True}}

    def IsProjectReadOnly(self, **_):  # noqa: N802
        return {"project": {"id": "p1", "readOnly": False}}

    def LinkArtifact(self, input, **_):  # noqa: N802, A002
        where = (input["entityName"], input["projectName"], input["artifactPortfolioName"])
        members, at = self._collection(where)["members"], input["artifactID"]
        if at not in members:
            members.append(at)
        self._name(at, [{"alias": "latest"}, *input["aliases"]], where)
        about = {"id": f"{at}/{where[2]}", "versionIndex": members.index(at), "createdAt": "2026-01-01T00:00:00"}
        aliases = [a for a in self._aliases(at) if a["artifactCollection"]["project"]["name"] == where[1]]
        more = {"aliases": aliases, "artifactCollection": self._about(where), "artifact": self._artifact(at)}
        link = {"__typename": "ArtifactCollectionMembership", **about, **more}
        return {"result": {"versionIndex": members.index(at), "artifactMembership": link}}

    # collections

    def shown(self, *where):
        """A collection as people see it: alias -> the version in our registry that has it."""
        held = self.collections[where]["aliases"]
        return {alias: json.loads(self.artifacts[at]["metadata"])["version"] for alias, at in held.items()}

    def _collection(self, where):
        return self.collections.setdefault(where, {"members": [], "aliases": {}})

    def _where(self, alias):
        return alias["entityName"], alias["projectName"], alias["artifactCollectionName"]

    def _name(self, at, aliases, where):
        self._collection(where)["aliases"].update({a["alias"]: at for a in aliases})

    def _about(self, where):
        entity, project, name = where
        kind = "ArtifactSequence" if entity == "us" else "ArtifactPortfolio"
        own = {"id": f"p-{project}", "internalId": f"i-{project}", "name": project, "entity": {"name": entity}}
        return {"__typename": kind, "name": name, "project": own}

    def _aliases(self, at):
        held = [(a, where) for where, c in self.collections.items() for a, to in c["aliases"].items() if to == at]
        alias = {"__typename": "ArtifactAlias"}
        return [{**alias, "id": f"{w}/{a}", "alias": a, "artifactCollection": self._about(w)} for a, w in held]

    def _artifact(self, at):
        artifact = self.artifacts[at]
        about = {k: artifact.get(k) for k in ("description", "metadata", "state", "digest")}
        index = self._collection(artifact["where"])["members"].index(at)
        never = {"ttlDurationSeconds": -2, "ttlIsInherited": True, "historyStep": None, "commitHash": None}
        files = artifact["files"]
        sizes = {"size": sum(map(len, files.values())), "fileCount": len(files), "tags": []}
        times = {"createdAt": "2026-01-01T00:00:00", "updatedAt": None}
        kind = {"artifactType": {"name": artifact["artifactTypeName"]}, "aliases": self._aliases(at)}
        own = {"artifactSequence": self._about(artifact["where"]), "versionIndex": index}
        return {"__typename": "Artifact", "id": at, **own, **about, **never, **sizes, **times, **kind}

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
        if server.silent.is_set():
            server.closing.wait()
            self.close_connection = True
            return None
        if "everything" in server.refused:
            return self._reply({}, 503)
        if not self.path.endswith(("/graphql", "/file_stream")):  # what wandb measures about itself
            return self._reply({})
        body = json.loads(body)
        if self.path == "/graphql":
            operation = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])[1]
            server.asked.append(operation)
            if operation in server.refused:
                return self._reply({"errors": [{"message": "permission denied"}]}, 403)
            answer = getattr(server, operation, None)
            if answer is None:
                server.unknown.append(operation)
            return self._reply({"data": answer(**(body.get("variables") or {})) if answer else {}})
        run = self.path.split("/")[-2]
        if history := body.get("files", {}).get("wandb-history.jsonl"):
            rows, at = server.rows.setdefault(run, []), history["offset"]
            rows[at : at + len(history["content"])] = map(json.loads, history["content"])
        for row in body.get("files", {}).get("wandb-summary.json", {}).get("content", []):
            server.runs[run].setdefault("summary", {}).update(json.loads(row))
        if body.get("complete"):
            server.ends[run] = body["exitcode"]
        return self._reply({})

    def do_PUT(self):  # noqa: N802
        if "files" in self.server_.refused:
            self._body()
            return self._reply({}, 503)
        _, _, owner, *path = self.path.split("/")
        where = self.server_.files if owner == "run" else self.server_.artifacts[owner]["files"]
        where["/".join(path)] = self._body()
        return self._reply({})

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
