"""The service as a client meets it: a real process, its routes, its answers, and what the log holds of them."""

import asyncio
import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from onnxruntime import InferenceSession
from serve_process import Server, image_bundle, make_registry, png, text_bundle
from starlette.responses import StreamingResponse

from project.serve import api, schemas
from project.serve.limits import Settings, new_key
from project.serve.log import PredictionLog

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with an image task and a text task."""
    folder = tmp_path_factory.mktemp("serve")
    registry, versions = make_registry(folder)
    with Server(folder, access=True) as server:
        server.registry, server.versions = registry, versions
        yield server


@pytest.fixture
def client(served):
    """Asks that server."""
    return served.client


def says(answer, status):
    """The detail of an error, which must be one of ours."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert set(found) == {"type", "title", "status", "detail", "instance", "request_id"}
    assert found["status"] == status and found["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text and 'File "' not in answer.text
    return found["detail"]


# --- predictions


def test_image_as_form_and_as_body(client, served):
    form = client.post("/predict/brightness", files={"file": ("a.png", png(250))})
    body = client.post("/predict/brightness", content=png(250), headers={"content-type": "image/png"})
    for answer in (form, body):
        found = schemas.Prediction.model_validate(answer.json())
        assert (found.task, found.class_, found.model_version) == ("brightness", "bright", served.versions[0])
        assert answer.headers["x-model-version"] == found.model_version
        assert list(found.probabilities) == ["bright", "dark"]  # the largest first
        assert found.confidence == max(found.probabilities.values())
        assert abs(sum(found.probabilities.values()) - 1) < 1e-5
        assert found.request_id == answer.headers["x-request-id"]
    assert form.json()["probabilities"] == body.json()["probabilities"]
    assert form.json()["id"] != body.json()["id"]
    assert client.post("/predict/brightness", files={"file": png(3)}).json()["class"] == "dark"


def test_probabilities_are_the_models_own(client, served, tmp_path):
    """Pixels arrive as training saw them, from 0 to 255, and the answer is no logits."""
    bundle = served.registry.get("brightness")
    session = InferenceSession(str(bundle.onnx))
    for value in (0, 1, 100, 128, 255):
        expected = session.run(["probabilities"], {"images": np.full((1, 28, 28), value, np.uint8)})[0][0]
        found = client.post("/predict/brightness", files={"file": png(value)}).json()["probabilities"]
        assert np.allclose([found["bright"], found["dark"]], expected, atol=1e-6)


def test_texts_whole(client):
    """Commas and line ends are part of a text; the text after the last comma is not all there is."""
    for row, said in [
        ({"title": "good , x", "text": "nothing , else"}, "real"),
        ({"title": "x", "text": "bad \n good , good\nx , y"}, "real"),
        ({"title": "bad", "text": "bad good , x"}, "fake"),
        ({"text": "bad"}, "fake"),
    ]:
        answer = client.post("/predict/news", json=row)
        assert answer.status_code == 200 and answer.json()["class"] == said, row
        assert client.post("/predict/news", data=row, files={}).status_code in (200, 415)
    form = client.post("/predict/news", files={"title": (None, "good"), "text": (None, "x")})
    assert form.json()["class"] == "real"


def test_same_image_in_any_format(client):
    import io

    from PIL import Image

    answers = []
    for mode, kind in [
        ("L", "PNG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("CMYK", "JPEG"),
        ("I;16", "PNG"),
        ("RGB", "BMP"),
    ]:
        out = io.BytesIO()
        Image.fromarray(np.full((28, 28), 65535, np.uint16)).save(out, kind) if mode == "I;16" else Image.new(
            "RGB", (28, 28), (255, 255, 255)
        ).convert(mode).save(out, kind)
        answers.append(client.post("/predict/brightness", files={"file": out.getvalue()}).json()["class"])
    assert answers == ["bright"] * 6


def test_request_id(client):
    given = client.get("/models", headers={"X-Request-ID": "my-id.1"})
    assert given.headers["x-request-id"] == "my-id.1"
    for odd in ("a b", "x" * 65, "<script>"):
        made = client.get("/models", headers={"X-Request-ID": odd}).headers["x-request-id"]
        assert made != odd and len(made) == 16


@pytest.mark.parametrize(
    ("path", "sent", "status", "text"),
    [
        ("/predict/nothing", {"files": {"file": b"x"}}, 404, "expected a task that is served (brightness, news)"),
        ("/predict/brigtness", {"files": {"file": b"x"}}, 404, "Did you mean 'brightness'?"),
        ("/predict/brightness", {"files": {"image": png()}}, 422, "`file`, found 'image'"),
        ("/predict/brightness", {"files": [("file", png()), ("file", png())]}, 422, "Several go to /batch"),
        ("/predict/brightness", {"json": {"title": "x"}}, 415, "expected an image"),
        ("/predict/brightness", {"files": {"file": b""}}, 400, "empty file"),
        ("/predict/brightness", {"files": {"file": b"hello"}}, 415, "expected an image"),
        ("/predict/brightness", {"content": b""}, 415, "no Content-Type"),
        ("/predict/news", {"json": {"title": ""}}, 422, "expected some text"),
        ("/predict/news", {"json": {"titel": "x"}}, 422, "title"),
        ("/predict/news", {"json": ["x"]}, 422, "object of texts"),
        ("/predict/news", {"json": {"title": 5}}, 422, "object of texts"),
        ("/predict/news", {"json": {"title": "x" * 100_001}}, 413, "at most 100,000 characters"),
        ("/predict/news", {"content": b"{", "headers": {"content-type": "application/json"}}, 400, "expected JSON"),
        ("/predict/news", {"files": {"file": b"x"}}, 422, "found a file"),
        ("/predict/news", {"content": png(), "headers": {"content-type": "image/png"}}, 415, "expected JSON"),
    ],
)
def test_errors_say_what_to_do(client, path, sent, status, text):
    assert text in says(client.post(path, **sent), status)


def test_errors_of_routes(client):
    assert says(client.get("/nothing"), 404)
    assert says(client.get("/predict/news"), 405)
    assert "none by this id" in says(client.get("/predictions/0000000000000000"), 404)
    assert says(client.post("/predictions/none/feedback", json={"label": "x"}), 404)
    assert "label" in says(client.post("/predictions/none/feedback", json={}), 422)
    assert "from 0 to 1" in says(client.get("/samples/brightness/2"), 404)
    assert says(client.get("/samples/brightness/-1"), 404)


def test_a_route_that_fails(tmp_path, caplog):
    app = api.create_app(Settings(log="off", access=False, metrics=str(tmp_path)))

    @app.get("/broken")
    async def broken():
        return 1 / 0

    @app.get("/half")
    async def half():
        async def parts():
            yield b"one"
            raise ZeroDivisionError

        return StreamingResponse(parts())

    async def ask(path):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(path)

    answer = asyncio.run(ask("/broken"))
    assert "It was logged" in says(answer, 500)
    (logged,) = (r for r in caplog.records if answer.headers["x-request-id"] in r.getMessage())
    assert logged.exc_info[0] is ZeroDivisionError
    with pytest.raises(ZeroDivisionError):  # what was begun cannot become an error: the connection ends
        asyncio.run(ask("/half"))


# --- batches


def test_batch_of_files(client):
    sent = [("files", (f"{v}.png", png(v))) for v in (250, 3)]
    sent.insert(1, ("files", ("../../bad.png", b"not an image")))
    answer = client.post("/predict/brightness/batch", files=sent)
    found = schemas.BatchAnswer.model_validate(answer.json())
    assert [row.row for row in found.rows] == [0, 1, 2]
    assert [row.name for row in found.rows] == ["250.png", "bad.png", "3.png"]
    assert [row.prediction and row.prediction.class_ for row in found.rows] == ["bright", None, "dark"]
    assert found.rows[1].error.status == 415


def test_batch_of_csv(client):
    """Titles stay with their rows, whatever is in them."""
    content = 'id,text,title\n1,"good, good","a ""quoted"" title"\n2,bad,"two\nlines"\n3,x\n4,,\n5,good,\n'
    for sent in (
        {"files": {"file": ("news.csv", content.encode())}},
        {"content": content.encode(), "headers": {"content-type": "text/csv; charset=utf-8"}},
    ):
        rows = client.post("/predict/news/batch", **sent).json()["rows"]
        assert [r.get("prediction", {}).get("class") for r in rows] == ["real", "fake", None, None, "real"]
        assert [r["error"]["status"] for r in rows if "error" in r] == [422, 422]
    assert "columns" in says(client.post("/predict/news/batch", files={"file": b"text\nx\n"}), 422)


def test_batch_of_json(client):
    rows = [{"title": "good"}, {"title": 5}, {"text": "bad"}]
    found = client.post("/predict/news/batch", json={"rows": rows}).json()["rows"]
    assert [r.get("prediction", {}).get("class") for r in found] == ["real", None, "fake"]
    assert "rows" in says(client.post("/predict/news/batch", json={"rows": []}), 422)
    assert says(client.post("/predict/news/batch", json={"rows": [{"title": "x"}] * 257}), 413)
    assert says(client.post("/predict/news/batch", json=[]), 422)


def test_batch_is_the_same_as_one_by_one(client):
    values = [*range(0, 250, 5)]
    sent = [("files", (f"{v}.png", png(v))) for v in values]
    rows = client.post("/predict/brightness/batch", files=sent).json()["rows"]
    for v, row in zip(values, rows, strict=True):
        alone = client.post("/predict/brightness", files={"file": png(v)}).json()
        assert row["prediction"]["class"] == alone["class"]
        assert abs(row["prediction"]["confidence"] - alone["confidence"]) < 1e-5


# --- where it comes from


def test_models(client, served):
    found = schemas.ModelList.model_validate(client.get("/models").json()).models
    assert [m.task for m in found] == ["brightness", "news"]
    one = client.get("/models/brightness").json()
    assert (one["version"], one["classes"], one["kind"]) == (served.versions[0], ["bright", "dark"], "image")
    assert one["commit"] == "c" * 40 and one["data_hash"] == "d" * 64
    assert says(client.get("/models/nothing"), 404)


def test_card_runs_nothing(client):
    for page, title in (("card", "<h1>Brightness"), ("notebook", "<h1>brightness</h1>")):
        answer = client.get(f"/models/brightness/{page}")
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert title in answer.text and "<script" not in answer.text
    assert client.get("/models/news/card").status_code == 200  # also without a notebook
    assert says(client.get("/models/news/notebook"), 404)


def test_lineage(client, served):
    found = client.get("/models/brightness/lineage").json()
    assert (found["version"], found["run"], found["commit"]) == (
        served.versions[0],
        "20261121-000000-toy-0000",
        "c" * 40,
    )
    content = (served.registry.get("brightness").path / "notebook.ipynb").read_bytes()
    assert found["notebook"]["sha256"] == hashlib.sha256(content).hexdigest()


def test_samples(client):
    found = client.get("/samples/brightness").json()["samples"]
    assert [(s["id"], s["label"]) for s in found] == [("0", "bright"), ("1", "dark")]
    picture = client.get(found[1]["url"])
    assert picture.headers["content-type"] == "image/png"
    assert client.post("/predict/brightness", files={"file": picture.content}).json()["class"] == "dark"
    for i, said in enumerate(("bright", "dark")):
        answer = client.post(f"/predict/brightness/samples/{i}").json()
        assert schemas.SamplePrediction.model_validate(answer).correct and answer["class"] == said
    texts = client.get("/samples/news").json()["samples"]
    assert texts[1] == {"id": "1", "label": "fake", "kind": "text", "title": "Bad, bad", "text": "bad"}
    assert client.get("/samples/news/0").json() == {"title": "Good", "text": "good"}
    assert client.post("/predict/news/samples/1").json()["correct"] is True


# --- log and feedback


def test_prediction_is_logged(client, served):
    content = png(200)
    answer = client.post("/predict/brightness", files={"file": content}, headers={"x-request-id": "logged-1"}).json()
    row = client.get(f"/predictions/{answer['id']}").json()
    assert row["probabilities"] == answer["probabilities"]
    assert (row["version"], row["predicted"], row["request_id"]) == (served.versions[0], "bright", "logged-1")
    assert row["input_sha256"] == hashlib.sha256(content).hexdigest() and row["input_bytes"] == len(content)
    assert 0.7 < row["features"]["brightness"] < 0.8 and row["features"]["contrast"] == 0
    assert row["lineage"]["commit"] == "c" * 40
    assert "input" not in row and "embedding" not in row


def test_feedback(client):
    id = client.post("/predict/brightness", files={"file": png(200)}).json()["id"]
    assert "expected a class" in says(client.post(f"/predictions/{id}/feedback", json={"label": "grey"}), 422)
    first = client.post(f"/predictions/{id}/feedback", json={"label": "dark"}).json()
    assert first == {"id": id, "label": "dark", "previous": None, "class": "bright"}
    second = client.post(f"/predictions/{id}/feedback", json={"label": "bright"}).json()
    assert second["previous"] == "dark"
    assert client.get(f"/predictions/{id}").json()["label"] == "bright"


# --- for those who look after it


def test_health_and_metrics(client, served):
    assert client.get("/health/live").json() == {"status": "live"}
    found = schemas.Health.model_validate(client.get("/health/ready").json())
    assert found.status == "ready" and found.models["brightness"] == served.versions[0]
    client.get("/some/odd/path/7")
    text = client.get("/metrics").text
    assert 'route="/predict/{task}"' in text and "/some/odd" not in text
    assert served.versions[0] in text


def test_access_log_is_json(client, served):
    client.post("/predict/news?secret=1", json={"title": "my words"}, headers={"x-request-id": "line-1"})

    def line():
        lines = served.out.read_text(encoding="utf-8").splitlines()
        return next((x for x in map(json.loads, lines) if x.get("request_id") == "line-1"), None)

    found = served.wait_for(line, 10)
    assert (found["route"], found["status"], found["task"]) == ("/predict/{task}", 200, "news")
    assert "secret" not in json.dumps(found) and "my words" not in json.dumps(found)


def test_page_and_documentation(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "brightness" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    document = client.get("/openapi.json").json()
    wanted = {"/predict/{task}", "/predict/{task}/batch", "/models/{task}/card", "/predictions/{id}/feedback"}
    assert wanted <= set(document["paths"])
    one = document["paths"]["/predict/{task}"]["post"]
    assert set(one["requestBody"]["content"]) == {"multipart/form-data", "application/json", "image/png"}
    assert one["responses"]["200"]["content"]["application/json"]["example"]["class"] == "Coat"
    assert "application/problem+json" in one["responses"]["413"]["content"]
    page = client.get("/docs").text
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert f'"docs/{name}"' in page and len(client.get(f"/docs/{name}").content) > 1000
    assert "//" not in page and client.get("/docs/..%2fcore.py").status_code == 404


# --- hot swap


def test_hot_swap_loses_nothing(served):
    """The alias moves back and forth under load: each answer is one model's, wholly."""
    expected = {}
    for version in served.versions:
        bundle = served.registry.get("brightness", version)
        p = InferenceSession(str(bundle.onnx)).run(["probabilities"], {"images": np.full((1, 28, 28), 200, np.uint8)})
        expected[version] = float(p[0].max())
    found, stop = [], threading.Event()

    def ask():
        with httpx.Client(base_url=served.url, timeout=30) as mine:
            while not stop.is_set():
                answer = mine.post("/predict/brightness", files={"file": png(200)})
                found.append((answer.status_code, answer.json()))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    try:
        for version in (*reversed(served.versions), *reversed(served.versions)):
            served.registry.alias("brightness", "production", version)
            served.wait_for(lambda v=version: served.client.get("/models/brightness").json()["version"] == v, 20)
            time.sleep(0.1)
    finally:
        stop.set()
        for asker in askers:
            asker.join()
    assert {status for status, _ in found} == {200}
    assert {a["model_version"] for _, a in found} == set(served.versions)
    for _, answer in found:
        assert abs(answer["confidence"] - expected[answer["model_version"]]) < 1e-5


def test_a_model_that_cannot_be_loaded_changes_nothing(tmp_path):
    registry, versions = make_registry(tmp_path)
    with Server(tmp_path) as server:
        folder = next(p for p in (tmp_path / "registry").rglob("model.onnx") if versions[1].split("-")[1] in str(p))
        folder.chmod(0o644)
        folder.write_bytes(b"broken")
        registry.alias("brightness", "production", versions[1])
        server.wait_for(lambda: "troubles" in server.client.get("/health/ready").json(), 20)
        answer = server.client.post("/predict/brightness", files={"file": png()})
        assert answer.json()["model_version"] == versions[0]
        assert server.is_ready()
        registry.rollback("brightness")
        server.wait_for(lambda: "troubles" not in server.client.get("/health/ready").json(), 20)


# --- beginning and end


def test_starts_without_a_model_and_takes_the_first(tmp_path):
    with Server(tmp_path, ready=False) as server:
        answer = server.client.get("/health/ready")
        assert answer.status_code == 503 and "no model is loaded" in answer.json()["reasons"]
        assert says(server.client.post("/predict/brightness", files={"file": png()}), 404)
        assert server.client.get("/").status_code == 200
        make_registry(tmp_path)
        server.wait_for(server.is_ready, 20)


def test_a_task_that_is_asked_for_must_be_there(tmp_path):
    make_registry(tmp_path)
    server = Server(tmp_path, tasks=["dresses"])
    with pytest.raises(AssertionError, match="cannot serve dresses"), server:
        pass


def test_bundles_without_a_registry(tmp_path):
    folder = image_bundle(tmp_path / "a").path
    with Server(tmp_path, bundles=[str(folder)], log="off") as server:
        answer = server.client.post("/predict/brightness", files={"file": png()}).json()
        assert answer["model_version"].startswith("v0-")
        assert server.client.get("/models/brightness/lineage").json()["commit"] == "c" * 40
        assert says(server.client.get(f"/predictions/{answer['id']}"), 404)


def test_sigterm_under_load_loses_nothing(tmp_path):
    """Each request that the server took is answered; readiness is refused before the end; the log has every answer."""
    make_registry(tmp_path)
    done, asked, stop = {}, set(), threading.Event()
    with Server(tmp_path, drain=1.0, access=True) as server:

        def ask(name):
            with httpx.Client(base_url=server.url, timeout=30) as mine:
                for i in range(100_000):
                    id = f"{name}-{i}"
                    asked.add(id)
                    try:
                        headers = {"x-request-id": id}
                        done[id] = mine.post("/predict/brightness", files={"file": png(200)}, headers=headers)
                    except httpx.HTTPError:  # nobody listens any more, or not for this connection
                        if stop.is_set():
                            return

        askers = [threading.Thread(target=ask, args=(f"asker{i}",)) for i in range(6)]
        for asker in askers:
            asker.start()
        time.sleep(0.5)
        os.kill(server.process.pid, signal.SIGTERM)
        refused = server.wait_for(lambda: server.client.get("/health/ready").status_code == 503, 10)
        code = server.process.wait(20)
        stop.set()
        for asker in askers:
            asker.join(20)
        lines = map(json.loads, server.out.read_text(encoding="utf-8").splitlines())
        taken = {line["request_id"] for line in lines if line["request_id"] in asked}
    assert refused and code in (0, -signal.SIGTERM)
    assert len(taken) > 20 and {answer.status_code for answer in done.values()} == {200}
    assert taken == set(done)  # what was taken was answered, and the answer arrived
    logged = {row["id"] for row in PredictionLog(tmp_path / "log.db").rows()}
    assert {answer.json()["id"] for answer in done.values()} <= logged


def test_a_killed_worker_is_replaced(tmp_path):
    make_registry(tmp_path)
    with Server(tmp_path, workers=2) as server:
        before = server.wait_for(lambda: pids if len(pids := server.children()) == 2 else None)
        os.kill(before[0], signal.SIGKILL)
        lost = 0
        for _ in range(20):
            try:
                with httpx.Client(base_url=server.url, timeout=30) as fresh:
                    assert fresh.post("/predict/brightness", files={"file": png()}).status_code == 200
            except httpx.TransportError:  # on its way into the worker that was killed
                lost += 1
            time.sleep(0.02)
        assert lost <= 2
        server.wait_for(lambda: len(set(server.children()) - {before[0]}) == 2, 30)
        text = server.client.get("/metrics").text
        assert (
            sum(float(x.split()[-1]) for x in text.splitlines() if x.startswith("project_requests_total{")) >= 20 - lost
        )


# --- keys, rates, production


def test_production_needs_a_key(tmp_path):
    make_registry(tmp_path)
    key, hashed = new_key()
    env = {"PROJECT_SERVE_MODE": "production", "PROJECT_API_KEYS": hashed}
    with Server(tmp_path, env=env, ready=False) as server:
        server.wait_for(server.is_ready)  # health is for everybody
        for path in (
            "/models",
            "/metrics",
            "/openapi.json",
            "/samples/news",
            "/models/news/card",
            "/predictions/abcdefgh",
        ):
            assert "key" in says(server.client.get(path), 401)
        assert server.client.get("/docs").status_code == 401
        assert server.client.get("/").status_code == 200
        assert says(server.client.post("/predict/news", json={"title": "x"}), 401)
        assert says(server.client.get("/models", headers={"x-api-key": key[:-1]}), 401)
        assert says(server.client.get("/models", headers={"x-api-key": "pk_\xe9".encode("latin-1")}), 401)
        for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}):
            assert server.client.get("/models", headers=headers).status_code == 200
        document = server.client.get("/openapi.json", headers={"x-api-key": key}).json()
        assert document["security"]
        said = server.client.post("/predict/news", json={"title": "Good", "text": "zebra good bad"}, headers=headers)
        assert said.status_code == 200
        assert key not in server.errors() and key not in server.out.read_text(encoding="utf-8")
        assert server.client.get("/docs", headers={"x-api-key": key}).status_code == 404
    (row,) = PredictionLog(tmp_path / "log.db").rows()
    assert row["client"] and hashed.startswith(row["client"])  # whose key it was, and not where they are
    assert row["features"]["unknown"] == 0.25  # one word of four


def test_production_without_keys_does_not_start(tmp_path):
    with (
        pytest.raises(AssertionError, match="PROJECT_API_KEYS: expected hashes"),
        Server(tmp_path, env={"PROJECT_SERVE_MODE": "production"}),
    ):
        pass
    with pytest.raises(ValueError, match="PROJECT_API_KEYS"):
        api.create_app(Settings.from_env({"PROJECT_SERVE_MODE": "production"}))


def test_production_with_none_hides_documents(tmp_path):
    env = {"PROJECT_SERVE_MODE": "production", "PROJECT_API_KEYS": "none"}
    make_registry(tmp_path)
    with Server(tmp_path, env=env, rate=5.0, burst=5.0) as server:
        for path in ("/docs", "/openapi.json", "/metrics"):
            assert says(server.client.get(path), 404)
        answers = [server.client.get("/models") for _ in range(12)]
        refused = [a for a in answers if a.status_code == 429]
        assert refused and answers[0].status_code in (200, 429)
        assert int(refused[0].headers["retry-after"]) >= 1 and "at most 5 requests" in says(refused[0], 429)
        assert server.client.get("/health/live").status_code == 200  # never limited


def test_vertex(tmp_path):
    import base64

    make_registry(tmp_path)
    env = {"AIP_HEALTH_ROUTE": "/ping", "AIP_PREDICT_ROUTE": "/vertex"}
    with Server(tmp_path, env=env, tasks=["news", "brightness"]) as server:
        assert server.client.get("/ping").status_code == 200
        found = server.client.post("/vertex", json={"instances": [{"title": "good"}, {"title": 5}]}).json()[
            "predictions"
        ]
        assert found[0]["class"] == "real" and found[1]["error"]["status"] == 422
        image = {
            "instances": [{"b64": base64.b64encode(png(3)).decode()}, {"b64": "!"}],
            "parameters": {"task": "brightness"},
        }
        found = server.client.post("/vertex", json=image).json()["predictions"]
        assert found[0]["class"] == "dark" and found[1]["error"]["status"] == 400
        assert says(server.client.post("/vertex", json={"instances": []}), 422)


# --- the module


def test_importing_does_nothing(tmp_path):
    import subprocess

    code = (
        "import sys, threading, os; import project.serve.api as a; "
        "slow = {'torch', 'transformers', 'pandas', 'pytorch_lightning', 'sqlalchemy'} & set(sys.modules); "
        "print([*slow], threading.active_count(), os.listdir('.'), 'app' in vars(a))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PROJECT_", "COVERAGE"))}
    env |= {"PYTHONPATH": str(Path.cwd()), "PROJECT_SERVE_MODE": "nonsense"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert out.stdout.split("\n")[0] == "[] 1 [] False"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = api.nothing


def test_uvicorn_serves_the_module(tmp_path):
    """`uvicorn project.serve.api:app`, without our command."""
    import subprocess

    make_registry(tmp_path)
    env = os.environ | {"PROJECT_REGISTRY": str(tmp_path / "registry"), "PROJECT_SERVE_LOG": "off"}
    with (tmp_path / "err").open("wb") as err:
        command = [sys.executable, "-m", "uvicorn", "project.serve.api:app", "--port", "0"]
        process = subprocess.Popen(command, env=env, stderr=err, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while "running on" not in (text := (tmp_path / "err").read_text(encoding="utf-8")):
            assert process.poll() is None and time.monotonic() < end, text
            time.sleep(0.05)
        url = text.partition("running on ")[2].split()[0]
        assert httpx.post(f"{url}/predict/news", json={"title": "good"}).json()["class"] == "real"
    finally:
        process.terminate()
        assert process.wait(20) in (0, -signal.SIGTERM)


def test_predictions_without_a_log(tmp_path):
    """A database that cannot be had stops nothing, and is not kept quiet."""
    make_registry(tmp_path)
    (tmp_path / "folder.db").mkdir()
    with Server(tmp_path, log=str(tmp_path / "folder.db")) as server:
        answers = [server.client.post("/predict/brightness", files={"file": png()}) for _ in range(5)]
        assert {a.status_code for a in answers} == {200}
        assert server.client.get(f"/predictions/{answers[0].json()['id']}").status_code == 200  # it waits in memory
        says(server.client.get("/predictions/0199c0de-7e57-7abc-8def-0123456789ab"), 503)
        says(server.client.post(f"/predictions/{answers[0].json()['id']}/feedback", json={"label": "dark"}), 503)
        server.wait_for(lambda: server.client.get("/health/ready").json()["log"]["ok"] is False, 10)


def test_two_tasks_of_one_kind(tmp_path):
    folders = [str(image_bundle(tmp_path / "a").path), str(image_bundle(tmp_path / "b", 0.5, 32, task="other").path)]
    folders.append(str(text_bundle(tmp_path / "c").path))
    with Server(tmp_path, bundles=folders, log="off") as server, contextlib.closing(server.client) as client:
        found = [client.post(f"/predict/{t}", files={"file": png(250)}).json() for t in ("brightness", "other")]
        assert found[0]["class"] == found[1]["class"] == "bright"
        assert found[0]["confidence"] > found[1]["confidence"]


# --- texts as they are published


PUBLISHED = [  # datelines and publishers of many agencies, as files have them and as people paste them
    ("Markets fall - The New York Times", "WASHINGTON (Reuters) - Markets fell on Monday, traders said."),
    (" Senate votes on taxes | Fox News ", " (CNN)The Senate voted on taxes in the night."),
    ("Storm reaches the coast", "LONDON, Dec. 3 (UPI) -- The storm reached the coast.\n\nPARIS (AFP) - Trains stand."),
    ("CNN Politics | A new law", "MOSCOW, December 5. /TASS/. The law (Reuters) was signed."),
    ("Leader’s speech", "(Corrects date) By Ann Lee and Bo Hu SEOUL (Reuters) – The leader spoke.\r\n"),
    ("", "Orlando, Florida (CNN) The rally began (AP Photo/Jane Doe)."),
    ("Who spoke? – Breitbart", ""),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data built from published rows, a network that reads it, and its bundle; with weights as they are born."""
    from project.bundle.export import export_bundle
    from project.data.store import build
    from project.models.text import NgramBag
    from project.train.fit import get_recipe
    from project.train.prepare import read_inputs

    folder = tmp_path_factory.mktemp("published")
    (folder / "fake_news").mkdir()
    for name, label in (("Fake.csv", "wrong"), ("True.csv", "right")):
        rows = [{"title": title, "text": text} for title, text in PUBLISHED if text] if label == "right" else []
        rows += [{"title": f"{label} {i}", "text": f"It is {label} {i} {7 * i} {11 * i}"} for i in range(40)]
        with (folder / "fake_news" / name).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ("title", "text"))
            table.writeheader()
            table.writerows(rows)
    data = build("fake_news", folder / "data", source=folder)
    recipe = get_recipe("fake_news", "fast")
    tokens, tokenizer = read_inputs(recipe, data)
    net = NgramBag(2, tokenizer.get_vocab_size(), buckets=1024).eval()
    about = {"task": "news", "classes": data.classes, "max_length": 512, "fields": data.texts.fields}
    bundle = export_bundle(net, folder / "bundle", tokens=list(tokens), tokenizer=tokenizer, **about)
    return data, tokens, net, bundle


def test_published_rows_are_read_by_bundle_and_service_as_training_reads_them(trained, tmp_path):
    from project.bundle.manifest import bundle_tokenizer, run_bundle
    from project.bundle.registry import Registry
    from project.serve.predictor import Predictor
    from project.train.prepare import predict

    data, tokens, net, bundle = trained
    where = [data.ids.index(f"True.csv:{i}") for i in range(2, 2 + sum(bool(text) for _, text in PUBLISHED))]
    raw = [{"title": title, "text": text} for title, text in PUBLISHED if text]
    stored = predict(net, tokens)[where]
    predictor, tokenizer = Predictor(bundle), bundle_tokenizer(bundle)
    for row, sent in zip(where, raw, strict=True):
        assert predictor.read_text(sent).tolist() == tokens[row].tolist()
        joined = "\n".join(value for value in sent.values() if value.strip())
        assert tokenizer.encode(joined).ids == tokens[row].tolist()
    np.testing.assert_allclose(run_bundle(bundle, raw)[0], stored, atol=1e-5)
    registry = Registry(tmp_path / "registry")
    registry.alias("news", "production", registry.add(bundle).name)
    with Server(tmp_path) as server:
        answers = [server.client.post("/predict/news", json=sent) for sent in raw]
        found = [[answer.json()["probabilities"][name] for name in data.classes] for answer in answers]
    np.testing.assert_allclose(found, stored, atol=1e-4)


def test_a_title_alone_is_read_without_its_publisher(trained):
    from project.serve.predictor import Predictor

    predictor = Predictor(trained[3])
    for title, plain in (
        ("Who spoke? – Breitbart", "Who spoke?"),
        ("Markets fall - The New York Times", "Markets fall"),
        ("Senate votes on taxes | Fox News", "Senate votes on taxes"),
    ):
        assert predictor.read_text({"title": title}).tolist() == predictor.read_text({"title": plain}).tolist()


def test_a_bundle_of_before_reads_as_it_did(trained, tmp_path):
    """What is taken out lies in the bundle's tokenizer.json: one with other steps goes on with those."""
    from project.bundle.manifest import write_manifest
    from project.serve.predictor import Predictor

    old = tmp_path / "old"
    shutil.copytree(trained[3].path, old)
    made = json.loads((old / "tokenizer.json").read_text(encoding="utf-8"))
    steps = made["normalizer"]["normalizers"]
    dateline = {"type": "Replace", "pattern": {"Regex": r"^[^\n]{0,200}?\(Reuters[^)\n]{0,20}\) - "}, "content": ""}
    made["normalizer"]["normalizers"] = [dateline, *steps[3:]]
    (old / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    before, now = Predictor(write_manifest(old, **trained[3].manifest)), Predictor(trained[3])
    same = {"title": "Storm", "text": "ROME (Reuters) - The storm"}
    assert before.read_text(same).tolist() == now.read_text(same).tolist()
    other = {"title": "Storm | Fox News", "text": "(CNN)The storm"}
    assert len(before.read_text(other)) > len(now.read_text(other))
