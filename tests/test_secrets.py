"""Secrets: references, what a kernel lets out, Google's Secret Manager, and the scan."""

import base64
import hashlib
import json
import random
import string
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pytest_notebooks import ROOT

from project.runs import secrets
from project.runs.secrets import (
    check_reference,
    known_values,
    redact,
    redact_notebook,
    resolve,
    scan,
    scan_files,
)

VALUE = "p&ss'w\"rd-42/+<long enough to be cut by pandas> and then some"
PEM = "-----BEGIN PRIVATE KEY-----\n{}\n{}\n-----END PRIVATE KEY-----\n"
ODD = "abc-" + "12345678"
HUNTER = "hunter2" + "-hunter2"  # in two pieces: this file is scanned as well
ENDPOINT = "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """What a test resolves is not known to the next one."""
    monkeypatch.setattr(secrets, "_known", set())


def notebook(*sources, **metadata):
    """A notebook of these cells."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    return new_notebook(cells=[new_code_cell(s) for s in sources], metadata=kernel | metadata)


def letters(n, alphabet=string.ascii_letters + string.digits, seed=7):
    """Random letters: a key that no scanner finds in this file."""
    return "".join(random.Random(seed).choices(alphabet, k=n))


# What leaves a kernel

SOON = "\nimport time; time.sleep(0.5)"  # ipykernel reads what a subprocess writes in a thread
LEAKS = {
    "printed": "print(key, [key], {'k': key})",
    "error stream": "import sys; print(key, file=sys.stderr)",
    "displayed": "from IPython.display import HTML, JSON, display; display(key, HTML(key), JSON({key: [key]}))",
    "result": "{'a': [key], key: 1}",
    "updated": "h = display('x', display_id='d'); h.update(key)",
    "raised": "raise ValueError(f'bad key {key}')",
    "raised in a function, with its variables": "%xmode Verbose\ndef f(k):\n    return 1 / 0\nf(key)",
    "chained": "try:\n    {}[key]\nexcept KeyError as e:\n    raise RuntimeError('no') from e",
    "subprocess": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import sys; print(sys.argv)', key])"
    + SOON,
    "shell": "import os; os.environ['K'] = key; os.system('echo \"$K\"; echo \"$K\" >&2')" + SOON,
    "bang": "import os; os.environ['K'] = key\n!echo \"$K\"",
    "output of a shell": "import os; os.environ['K'] = key\nout = !echo \"$K\"\nout",
    "logged": "import logging; logging.basicConfig(force=True); logging.error('key %s', key)",
    "warned": "import warnings; warnings.warn(key)",
    "thread": "import threading; t = threading.Thread(target=print, args=(key,)); t.start(); t.join()",
    "json": "import json; print(json.dumps({'key': key}))",
    "url": "import urllib.parse; print(urllib.parse.urlencode({'key': key}), urllib.parse.quote(key))",
    "basic authorization": "import base64; print(base64.b64encode(f'user:{key}'.encode()).decode())",
    "bytes": "print(key.encode())",
    "markdown": "from IPython.display import Markdown; Markdown(key)",
    "help": "print(__import__('pprint').pformat({'key': key}, width=1000))",
    "comm": "from comm import create_comm; create_comm('t', data={'key': key})",
    "input of the next cell": "get_ipython().set_next_input(key)",
    "table": """
import html
class Frame:
    def _repr_html_(self): return f"<table><td>{html.escape(key[:47])}...</td><td>{html.escape(key)}</td></table>"
    def __repr__(self): return f"0  {key[:47]}...\\n1  {key}"
Frame()
""",
}
RESOLVE = "from project.runs.secrets import resolve\nkey = resolve('env:MY_KEY')\nlen(key)"


def shreds(value):
    """What of a value must not be seen: its pieces, in the shapes that they have in a notebook's file."""
    raw = value.encode()
    shapes = {value, repr(value)[1:-1], json.dumps(value)[1:-1], base64.b64encode(raw).decode()[:12], "rd-42"}
    return shapes | {json.dumps(shape)[1:-1] for shape in shapes}


def test_no_output_of_a_kernel_holds_a_resolved_value(monkeypatch, tmp_path):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # where it is set, ipykernel leaves subprocesses to the terminal
    monkeypatch.setenv("MY_KEY", VALUE)
    nb = notebook(RESOLVE, *LEAKS.values())
    NotebookClient(nb, kernel_name="python3", allow_errors=True, timeout=120).execute()
    nbformat.write(nb, tmp_path / "out.ipynb")
    text = (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    assert nb.cells[0].outputs[0].data["text/plain"] == str(len(VALUE)), "the cell itself has the value"
    for name, cell in zip(LEAKS, nb.cells[1:], strict=True):
        shown = json.dumps(cell.outputs)
        leaked = [s for s in shreds(VALUE) if s in shown]
        assert not leaked, f"{name}: {shown}"
        assert "***" in shown or name in {"comm", "input of the next cell", "raised in a function, with its variables"}
    assert not [s for s in shreds(VALUE) if s in text]


def test_papermill_writes_and_says_nothing_of_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", VALUE)
    nb = notebook(
        "ref = 'env:MY_KEY'", "from project.runs.secrets import resolve\nkey = resolve(ref)", "raise OSError(key)"
    )
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nb, tmp_path / "in.ipynb")
    with pytest.raises(papermill.PapermillExecutionError, match=r"OSError: \*\*\*") as caught:
        papermill.execute_notebook(
            tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"ref": "env:MY_KEY"}, progress_bar=False
        )
    text = (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    assert not [s for s in shreds(VALUE) if s in text + str(caught.value)] and '"env:MY_KEY"' in text
    assert scan(tmp_path / "out.ipynb") == []


def test_a_value_in_two_pieces_is_found_in_the_notebook(monkeypatch):
    monkeypatch.setenv("MY_KEY", HUNTER)
    split = "import sys, time\nprint(key[:5], end='', flush=True)\nprint('!', file=sys.stderr)\nprint(key[5:])"
    nb = notebook(RESOLVE, split, "display(1)")
    client = NotebookClient(nb, kernel_name="python3", timeout=120)
    client.execute()
    n = len(nb.cells[1].outputs)
    assert redact_notebook(nb, known_values(["env:MY_KEY"])) == 1
    assert "".join(o.text for o in nb.cells[1].outputs if o.name == "stdout") == "***\n"
    assert len(nb.cells[1].outputs) == n, "a client that still runs the cell refers to outputs by their place"


def test_a_kernel_is_changed_once_and_knows_every_value(monkeypatch):
    monkeypatch.setenv("MY_KEY", HUNTER)
    monkeypatch.setenv("OTHER", "swordfish-1")
    again = """
import importlib, os
import project.runs.secrets as s
first = get_ipython().kernel.session.serialize
importlib.reload(s)
assert s.hide(s.resolve("env:OTHER"))
assert get_ipython().kernel.session.serialize is first
print(os.environ["MY_KEY"], os.environ["OTHER"])
x = ["swordfish-1"]
get_ipython().kernel.session.send(get_ipython().kernel.iopub_socket, "t", {"text": x})
x[0][:4]
"""
    nb = notebook(RESOLVE, again.replace("swordfish-1", '" + os.environ["OTHER"] + "'))
    NotebookClient(nb, kernel_name="python3", timeout=120).execute()
    assert nb.cells[1].outputs[0].text == "*** ***\n"
    assert nb.cells[1].outputs[1].data["text/plain"] == "'swor'", "the user's own objects stay as they are"


def test_messages_of_every_kind():
    sent = []
    serialize = secrets._Serialize(lambda msg, ident: sent.append(msg["content"]))
    serialize.hidden = frozenset([HUNTER])
    contents = [
        {"comm_id": HUNTER, "data": {"state": {"value": [HUNTER, 1]}}},
        {"status": "error", "ename": "E", "evalue": HUNTER, "traceback": [f"E: {HUNTER}"]},
        {
            "status": "ok",
            "payload": [{"source": "page", "data": {"text/plain": HUNTER}}],
            "user_expressions": {"a": HUNTER},
        },
        {"execution_state": "idle"},
        {"text": 1, "data": HUNTER.encode()},
        HUNTER.encode(),
    ]
    for content in contents:
        serialize({"header": {}, "content": content})
    assert sent[0] == {"comm_id": HUNTER, "data": {"state": {"value": ["***", 1]}}}, "an address is no text"
    assert HUNTER not in str(sent[1:3]) and sent[3:] == contents[3:]


def test_outside_a_kernel_there_is_nothing_to_change(monkeypatch):
    monkeypatch.setenv("MY_KEY", HUNTER)
    assert resolve("env:MY_KEY") == HUNTER and not secrets.hide("other-value")
    assert secrets._known == {HUNTER, "other-value"}


def test_importing_it_is_cheap():
    code = (
        "import sys, project.core\nold = set(sys.modules)\nimport project.runs.secrets\nprint(*set(sys.modules) - old)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"google.auth", "requests", "nbformat", "IPython", "papermill", "torch", "http.client"}
    assert not heavy & set(done.stdout.split())


# References


@pytest.mark.parametrize("value", ["env:A", "env:_a1", "gcp:s", "gcp:a-b_c", "gcp:projects/p-1/secrets/s/versions/2"])
def test_references(value):
    assert check_reference(value) == ""


@pytest.mark.parametrize(
    "value", ["sk-abcdef", "env:1A", "env:A s3cr3t", "gcp:", "gcp:a b", "gcp:projects/p/s", " env:A", "env:A\n"]
)
def test_what_is_no_reference_is_not_repeated(value):
    said = check_reference(value)
    assert said.startswith("expected") and "sk-abcdef" not in said and "s3cr3t" not in said
    with pytest.raises(ValueError, match="expected") as caught:
        resolve(value)
    assert str(caught.value) == said


def test_other_types_are_no_references():
    assert (
        "type int" in check_reference(3)
        and "an empty text" in check_reference("")
        and "NoneType" in check_reference(None)
    )


@pytest.mark.parametrize("value", ["", "abc", " abc\n"])
def test_short_values_are_refused(monkeypatch, value):
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ValueError, match="env:MY_KEY: a value of fewer than 4 characters"):
        resolve("env:MY_KEY")
    assert known_values(["env:MY_KEY"]) == [] and secrets._known == set()


# Google's Secret Manager


class SecretManager(BaseHTTPRequestHandler):
    """Answers as the published API does."""

    answers: dict = {}
    asked: list = []

    def do_GET(self):
        """One answer."""
        self.asked.append((self.path, self.headers.get("Authorization")))
        status, body = self.answers.get(self.path, (404, {"error": {"code": 404, "status": "NOT_FOUND"}}))
        if status is None:
            time.sleep(body)
            return
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""


def access(path, data):
    """Address and answer of a version."""
    body = {"name": path, "payload": {"data": base64.b64encode(data).decode(), "dataCrc32c": "0"}}
    return {f"/v1/{path}:access": (200, body)}


@pytest.fixture
def google(monkeypatch):
    """A local Secret Manager, and no other way to Google."""
    server = HTTPServer(("127.0.0.1", 0), type("Stub", (SecretManager,), {"answers": {}, "asked": []}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "demo-1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    yield server.RequestHandlerClass
    server.shutdown()
    server.server_close()
    thread.join()


def test_google_secrets(google):
    google.answers |= access("projects/demo-1/secrets/key/versions/latest", "schlüssel".encode())
    google.answers |= access("projects/demo-1/secrets/key/versions/3", b"third")
    google.answers |= access("projects/p-2/secrets/key/versions/latest", b"of another project")
    assert resolve("gcp:key") == "schlüssel" and resolve("gcp:key/versions/3") == "third"
    assert resolve("gcp:projects/p-2/secrets/key") == "of another project"
    assert {authorization for _, authorization in google.asked} == {None}, "no credentials for an emulator"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, {"error": {"code": 404, "status": "NOT_FOUND"}}), "there is no such secret"),
        ((403, {"error": {"code": 403, "message": "s3cr3t"}}), "Secret Manager Secret Accessor"),
        ((500, b"s3cr3t"), "Secret Manager refused .HTTP 500."),
        ((200, b"s3cr3t"), "not a text"),
        ((200, {"payload": {}}), "not a text"),
        ((200, {"payload": {"data": base64.b64encode(b"\xff\xfes3cr3t").decode()}}), "not a text"),
    ],
)
def test_what_google_refuses_is_said_without_the_answer(google, answer, said):
    path = "projects/demo-1/secrets/key/versions/latest"
    google.answers[f"/v1/{path}:access"] = answer
    with pytest.raises(RuntimeError, match=f"{path}: .*{said}") as caught:
        resolve("gcp:key")
    assert "s3cr3t" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_google_that_does_not_answer(google, monkeypatch):
    monkeypatch.setattr(secrets, "_SECONDS", 0.3)
    google.answers["/v1/projects/demo-1/secrets/key/versions/latest:access"] = (None, 1.0)
    with pytest.raises(RuntimeError, match="could not be asked .(ReadTimeout|ConnectionError)"):
        resolve("gcp:key")


def test_google_without_a_project(google, monkeypatch):
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT")
    with pytest.raises(ValueError, match="gcp:key: no project is known; set GOOGLE_CLOUD_PROJECT"):
        resolve("gcp:key")


def test_credentials_go_to_no_plain_address(monkeypatch):
    monkeypatch.setenv(ENDPOINT, "http://localhost.example.com/")
    with pytest.raises(ValueError, match="expected https://"):
        resolve("gcp:key")


def test_google_without_credentials(monkeypatch, tmp_path):
    monkeypatch.delenv(ENDPOINT, raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(RuntimeError, match="none were found; run `gcloud auth application-default login`"):
        resolve("gcp:key")


def test_google_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.auth", None)
    with pytest.raises(RuntimeError, match="need google-auth and requests"):
        resolve("gcp:key")


def test_google_signs_its_requests(google, monkeypatch):
    """As with the real endpoint: credentials found by google-auth, and the project that they name."""
    import google.auth
    from google.oauth2.credentials import Credentials

    monkeypatch.setattr(google.auth, "default", lambda scopes: (Credentials("t0ken"), "found-1"))
    monkeypatch.delenv(ENDPOINT)
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT")
    session, endpoint, project = secrets._google()
    assert (endpoint, project) == ("https://secretmanager.googleapis.com", "found-1")
    assert session.credentials.token == "t0ken"


# Redaction of texts


def test_a_key_of_several_lines_is_redacted_line_by_line():
    key = PEM.format(letters(64), letters(40, seed=8))
    assert letters(64) not in redact(f"one line: {letters(64)}", [key])
    account = json.dumps({"type": "service_account", "client_email": "a@b.c", "private_key": key}, indent=1)
    shown = redact(f"{json.loads(account)['private_key']} {account} a@b.c service_account", [account])
    assert letters(64) not in shown and letters(40, seed=8) not in shown and shown.endswith("a@b.c service_account")


def test_values_that_are_no_text_of_utf8():
    assert redact("abc\udcffdef", ["abc\udcffdef"]) == "***"


def test_raw_notebooks_keep_their_shape():
    stream = {"output_type": "stream", "name": "stdout", "text": ["hunter2-\n", f"x {HUNTER}\n"]}
    picture = {
        "output_type": "display_data",
        "data": {"image/png": HUNTER, "text/plain": ["a", HUNTER]},
    }
    error = {"output_type": "error", "ename": "E", "evalue": HUNTER, "traceback": ["x", HUNTER]}
    cell = {
        "cell_type": "code",
        "metadata": {"tags": [HUNTER]},
        "source": ["a\n", "b"],
        "outputs": [stream, picture, error],
    }
    nb = {"cells": [cell], "metadata": {"papermill": {"parameters": {"key": HUNTER, "lr": 0.1}}}}
    assert redact_notebook(nb, [HUNTER]) == 6
    assert stream["text"] == "hunter2-\nx ***\n" and picture["data"] == {
        "image/png": HUNTER,
        "text/plain": "a***",
    }
    assert error["traceback"] == ["x", "***"] and cell["source"] == "a\nb"
    assert nb["metadata"]["papermill"]["parameters"] == {"key": "***", "lr": 0.1}


def test_redaction_costs_nothing_without_values():
    big = notebook("x")
    big.cells[0].outputs = [new_output("stream", name="stdout", text="line of text\n" * 1_600_000)]
    started = time.perf_counter()
    assert redact_notebook(big, []) == 0 and time.perf_counter() - started < 0.05


# The scan


BASE62, HEX = string.ascii_letters + string.digits, "0123456789abcdef"
POSITIVES = {
    "aws-access-key": "AKIA" + letters(16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
    "aws-secret-key": "aws_secret_access_key = " + letters(40),
    "gcp-service-account": json.dumps({"private_key": PEM.format(letters(64), letters(64))}),
    "gcp-api-key": "https://maps.example.com/?key=" + "AIza" + letters(35),
    "gcp-oauth": "ya29." + letters(60),
    "github-token": "git clone https://" + "ghp_" + letters(36) + "@github.com/a/b",
    "gitlab-token": "glpat-" + letters(20),
    "slack-token": "xoxb-" + "123456789012-" + letters(24),
    "slack-webhook": "https://hooks.slack.com/services/" + "T0123AB/B0123CD/" + letters(24),
    "stripe-key": "sk_live_" + letters(24),
    "anthropic-key": "sk-ant-" + "api03-" + letters(93) + "AA",
    "openai-key": "sk-proj-" + letters(74) + "T3BlbkFJ" + letters(74),
    "huggingface-token": "login('" + "hf_" + letters(34, string.ascii_letters) + "')",
    "wandb-key": "wandb.login(key='" + letters(40, HEX) + "')",
    "private-key": PEM.format(letters(64), letters(64)),
    "json-web-token": ".".join(("eyJ" + letters(33), "eyJ" + letters(40), letters(43))),
    "url-password": "postgresql://me:" + "pa55w0rd" + "@db.example.com/x",
    "bearer-token": "curl -H 'Authorization: Bearer " + letters(40) + "'",
    "named-secret": "password = '" + "corr3ct-h0rse" + "'",
}
MORE = {
    "github-token": "github_pat_" + letters(22) + "_" + letters(59),
    "openai-key": "sk-" + letters(20) + "T3BlbkFJ" + letters(20),
    "stripe-key": "whsec_" + letters(32),
    "wandb-key": "wandb_v1_" + letters(77),
    "named-secret": "%env MY_API_KEY=" + letters(20),
    "gitlab-token": "gldt-" + letters(20),
    "private-key": "-----BEGIN OPENSSH PRIVATE KEY-----\n" + letters(70) + "\n-----END OPENSSH PRIVATE KEY-----",
}
NAMED = [
    'password: str = "{}"',
    "connect(user='me', password='{}')",
    '{{"api_key": "{}"}}',
    "{{'client_secret': '{}', 'x': 1}}",
    'os.environ["WANDB_API_KEY"] = "{}"',
    'monkeypatch.setenv("SOME_TOKEN", "{}")',
    "access_token='{}'",
]


def test_every_rule_has_an_example():
    assert {rule.name for rule in secrets._RULES} | {secrets._NAMED.name} == set(POSITIVES)


@pytest.mark.parametrize(("rule", "text"), [*POSITIVES.items(), *MORE.items()])
def test_positives(rule, text, tmp_path):
    cell = new_code_cell(text, outputs=[new_output("stream", name="stdout", text=f"\x1b[32m{text}\x1b[0m\n")])
    nb = new_notebook(cells=[new_markdown_cell("a"), cell], metadata={"note": text})
    found = scan(nb)
    assert [(f.where, f.rule) for f in found] == [
        (where, rule) for where in ("metadata note", "cell 1 source", "cell 1 output 0")
    ]
    (tmp_path / "a.py").write_text(f"# one\n{text}\n")
    (finding,) = scan(tmp_path / "a.py")
    assert finding.rule == rule and finding.where.startswith("line ") and len(finding.excerpt) <= 7
    assert max(map(len, text.split())) < 8 or not [
        word for word in text.split() if len(word) > 7 and word in str(finding)[40:]
    ]


@pytest.mark.parametrize("text", NAMED)
def test_named_secrets(text):
    assert [f.rule for f in scan(notebook(text.format("corr3ct-h0rse")))] == ["named-secret"]


NEGATIVES = {
    "a hash": f"sha256 = '{hashlib.sha256(b'').hexdigest()}'",
    "a commit": f"commit {hashlib.sha1(b'').hexdigest()}",
    "a commit beside wandb": f"wandb: run of git commit {hashlib.sha1(b'').hexdigest()}",
    "a file in wandb's repository": f"https://github.com/wandb/wandb/blob/{hashlib.sha1(b'').hexdigest()}/a.py",
    "integrity": f'"integrity": "sha512-{letters(86)}=="',
    "a uuid": "token_id = '123e4567-e89b-12d3-a456-426614174000'",
    "special tokens": "pad_token = '<pad>'; mask_token='[MASK]'; eos = '</s>'; tokenizer = 'bert-base-uncased-v2'",
    "keys that are names": "df.sort_values(key='col_1abc'); sort_key = 'layer1.conv2'; key='train/acc_top5'",
    "placeholders": "password = 'changeme'; token = 'your-token-123'; key='sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'",
    "the environment": "token = os.environ['MY_TOKEN']; api_key = os.getenv('API_KEY_1')",
    "references": "key: Secret = 'env:MY_KEY_12'; token = 'gcp:projects/p-1/secrets/my-token1'",
    "a template": "url = f'postgres://{user}:{password}@{host}'; u = 'https://$USER:$PASS@x.y'",
    "an address with a port": "http://localhost:8888/lab?x=a@b.c and mailto://a@b.c",
    "an image by digest": f"docker://registry:tag1@sha256:{letters(64, HEX)}",
    "a public key": "-----BEGIN PUBLIC KEY-----\n" + letters(64) + "\n-----END PUBLIC KEY-----",
    "a mention": "begins with -----BEGIN PRIVATE KEY----- and AKIA, ghp_ or sk-ant-",
    "scikit-learn": '<div class="sk-top-container" id="sk-container-id-1"><label for="sk-estimator-id-1">',
    "a function": "from huggingface_hub import hf_hub_download, hf_raise_for_status_and_some_more_of_it",
    "AWS's example": "AKIA" + "IOSFODNN7EXAMPLE",
    "allowed": f"key = 'AIza{letters(35)}'  # pragma: allowlist secret",
    "stars": "password = '***********1a'",
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_negatives(name):
    text = NEGATIVES[name]
    nb = notebook(text)
    nb.cells[0].outputs = [new_output("display_data", data={"text/html": text, "application/json": {"a": text}})]
    assert scan(nb) == []


def test_pictures_and_blobs_are_no_alarms():
    blob = base64.b64encode(random.Random(1).randbytes(3_000_000)).decode()
    outputs = [
        new_output("display_data", data={"image/png": blob, "text/html": f'<img src="data:image/png;base64,{blob}">'})
    ]
    nb = notebook("plot()", widgets={"state": {"bytes": blob}})
    nb.cells[0].outputs = [
        *outputs,
        new_output("display_data", data={"application/vnd.plotly.v1+json": {"bdata": blob}}),
    ]
    assert scan(nb) == []


def test_this_repository_has_no_finding():
    assert (
        scan_files(
            [ROOT / "nbs", ROOT / "README.md", ROOT / "tests" / "test_secrets.py", *ROOT.glob("project/runs/*.py")]
        )
        == []
    )


def test_literal_parameters(tmp_path):
    nb = notebook("a = 1", f"password = 'swordfish'\nkey = 'label'\napi_key = 'env:A'\nsome_token: str = '{ODD}'")
    nb.cells[1].metadata["tags"] = ["injected-parameters"]
    given = {
        "password": "swordfish",
        "key": "label",
        "api_key": "env:A",
        "some_token": ODD,
        "lr": 1,
        "n": {"pwd": "x"},
    }
    nb.metadata["papermill"] = {"parameters": given}
    found = {(f.where, f.rule) for f in scan(nb)}
    assert found == {
        ("metadata papermill.parameters.password", "literal-parameter"),
        ("metadata papermill.parameters.some_token", "literal-parameter"),
        ("cell 1 source", "literal-parameter"),
        ("cell 1 source", "named-secret"),
    }


def test_values_that_are_known(monkeypatch):
    for name, value in {
        "MY_KEY": "swordfish",
        "DB_PASSWORD": HUNTER,
        "HOME_KEY": "/a/b/c/d/e/f/g/h1",
        "A_TOKEN": "x",
    }.items():
        monkeypatch.setenv(name, value)
    nb = notebook("key = 'env:MY_KEY'", "'/a/b/c/d/e/f/g/h1 x'")
    nb.cells[0].metadata["tags"] = ["parameters"]
    header = base64.b64encode(f"me:{HUNTER}".encode()).decode()
    error = new_output("error", ename="E", evalue="swordfish", traceback=["\x1b[31msword\x1b[0mfish"])
    nb.cells[1].outputs = [new_output("stream", name="stdout", text=t) for t in ("a sword", f"fish {header}")] + [error]
    assert [(f.where, f.rule) for f in scan(nb)] == [
        ("cell 1 output 2", "value of MY_KEY"),
        ("cell 1 output 0", "value of MY_KEY"),
        ("cell 1 output 0", "value of DB_PASSWORD"),
    ]
    assert [f.rule for f in scan(notebook("'xyzzy'"), ["xyzzy"])] == ["value of a known secret"]
    secrets._known.add("plugh")
    assert [f.rule for f in scan(notebook("'plugh'"))] == ["value of a known secret"]


@pytest.mark.parametrize("content", ['{"cells": [', "", "[]", '{"cells": 3}', '{"worksheets": []}', '{"cells": [1]}'])
def test_a_broken_notebook_is_named(tmp_path, content):
    (tmp_path / "broken.ipynb").write_text(content)
    with pytest.raises(ValueError, match=r"broken\.ipynb: expected"):
        scan_files([tmp_path / "broken.ipynb"])


def test_folders_and_missing_files(tmp_path):
    (tmp_path / "a").mkdir()
    nbformat.write(notebook(POSITIVES["github-token"]), tmp_path / "a" / "b.ipynb")
    (finding,) = scan_files([tmp_path])
    assert str(finding).endswith("b.ipynb: cell 0 source: github-token ghp_…" + letters(36)[-2:])
    with pytest.raises(FileNotFoundError):
        scan_files([tmp_path / "none.ipynb"])


@pytest.mark.parametrize(
    "text", ["token " * 3_300_000, "wandb: " * 300_000, letters(20_000_000, HEX + " \n"), "password='" * 300_000]
)
def test_large_notebooks_are_scanned_soon(text):
    nb = notebook("x")
    nb.cells[0].outputs = [new_output("stream", name="stdout", text=text)]
    started = time.perf_counter()
    assert scan(nb) == []
    assert time.perf_counter() - started < 20  # about 1 s; a pattern that backtracks takes minutes
