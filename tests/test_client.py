"""project.serve.client against the real registry, predictor and service."""

import csv
import gzip
import io
import json
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from served import HOSTILE, SHADES, Service, news, registry, shades

from project.serve import client
from project.serve.client import Answer, ClientError, connect, predict_csv, predict_files, write_answers
from project.serve.limits import new_key

TEXTS = [
    ("1", "Shocking, miracle", 'He said: "no",\nthen left'),
    ("2", "The minister said no", "on monday"),
    ("3", "ünïcode – Straße 😀", ""),
    ("4", "", "said the minister"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A registry with three tasks, images and a table."""
    folder = tmp_path_factory.mktemp("client")
    titles = news(folder / "titles", fields=("title",), task="fake_titles")
    registry(folder / "registry", shades(folder / "shades"), news(folder / "news"), titles)
    (folder / "images").mkdir()
    for i, grey in enumerate((250, 3, 200, 128)):
        Image.fromarray(np.full((20 + i, 16), grey, np.uint8)).save(folder / "images" / f"{i}.png")
    write(folder / "news.csv", [("id", "title", "text"), *TEXTS])
    return folder


@pytest.fixture(scope="module")
def service(place):
    with Service(place) as running:
        yield running


@pytest.fixture(autouse=True)
def home(place, monkeypatch):
    monkeypatch.setenv("PROJECT_REGISTRY", str(place / "registry"))


def write(path, rows):
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


def read(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


@pytest.mark.parametrize("task", ["shades", "fake_news"])
def test_here_and_over_http_give_the_same(place, service, task):
    files = sorted((place / "images").iterdir()) if task == "shades" else [place / "news.csv"]
    here, there = (list(predict_files(files, task, url=url, batch=3)) for url in ("", service.url))
    assert [(a.name, a.row, a.source) for a in here] == [(a.name, a.row, a.source) for a in there]
    assert not any(a.error for a in [*here, *there])
    assert here[0].prediction["class"] == {"shades": "bright", "fake_news": "fake"}[task]
    for a, b in zip(here, there, strict=True):
        assert a.prediction["class"] == b.prediction["class"]
        assert a.prediction["model_version"] == b.prediction["model_version"]
        assert a.prediction["probabilities"] == pytest.approx(b.prediction["probabilities"], abs=1e-4)
    ids = {a.prediction["id"] for a in there}
    assert len(ids) == len(there) and service.get(f"/predictions/{ids.pop()}")["task"] == task


@pytest.mark.parametrize("remote", [False, True])
def test_csv_in_csv_out(place, service, tmp_path, remote):
    url, out = service.url if remote else "", tmp_path / "out.csv"
    found = predict_csv([place / "news.csv"], out, "fake_news", url, probabilities=True, batch=3)
    assert found == {"rows": 4, "errors": 0}
    head, *rows = read(out)
    added = ["predicted", "confidence", "model_version", "prediction_id", "error", "p(fake)", "p(real)"]
    assert head == ["id", "title", "text", *added]
    assert [tuple(row[:3]) for row in rows] == TEXTS  # as they were, in their order
    assert [row[3] for row in rows] == ["fake", "real", rows[2][3], "real"]
    assert all(float(row[8]) + float(row[9]) == pytest.approx(1, abs=1e-5) for row in rows)
    assert all(bool(row[6]) == remote and not row[7] for row in rows)


def test_each_file_and_row_fails_alone_and_in_words(place, service, tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = (place / "images" / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    names = ("page.png", "empty.png", "cut.png", "gone.png")
    files = [place / "images" / "0.png", *(tmp_path / name for name in names), place / "images" / "1.png"]
    for url in ("", service.url):
        answers = list(predict_files(files, "shades", url=url, batch=4))
        assert [a.name for a in answers] == [str(f) for f in files]
        assert [a.prediction["class"] if a.prediction else "" for a in answers] == ["bright", *[""] * 4, "dark"]
        words = [a.error for a in answers[1:5]]
        assert "web page" in words[0] and "empty" in words[1] and "expected" in words[2], words
        assert words[3] == "there is no such file"
        assert not any("Traceback" in w or "Error(" in w for w in words)


def test_rows_of_a_table_fail_alone(place, service, tmp_path):
    rows = [("title", "text"), ("Shocking", "it is"), ("one",), ("", "  "), ("a", "b", "c"), ("said", "minister")]
    path = write(tmp_path / "rows.csv", rows)
    for url in ("", service.url):
        answers = list(predict_files([path], "fake_news", url=url))
        assert [a.row for a in answers] == [2, 3, 4, 5, 6]
        assert [bool(a.error) for a in answers] == [False, True, True, True, False]
        assert "expected 2 fields, found 1" in answers[1].error and "some text" in answers[2].error
        assert answers[4].prediction["class"] == "real"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"titel,text\na,b\n", "expected a column 'title', found 'titel', 'text'. Did you mean 'titel'?"),
        (b"title,text,title\na,b,c\n", "'title' more than once"),
        (b"", "an empty file"),
        (b"title,text\nab\xff,c\n", "expected UTF-8"),
        (b"title,text\na\0b,c\n", "NUL"),
        (b'title,text\n"a"b,c\n', "row 2: expected a comma or the end of the row after a quote"),
        (b'title,text\na,b\n"never closed', "row 3: expected a quote at the end of a text, found the end of the file"),
    ],
)
def test_a_table_that_is_none_is_told_before_anything_is_asked(place, tmp_path, content, words):
    (tmp_path / "bad.csv").write_bytes(content)
    answers = list(predict_files([tmp_path / "bad.csv", place / "news.csv"], "fake_news"))
    assert len(answers) == 1 + len(TEXTS)
    assert words in answers[0].error and "bad.csv" in answers[0].error
    assert not any(a.error for a in answers[1:])
    found = write_answers(answers, out := io.StringIO())
    assert found == {"rows": 5, "errors": 1}
    assert out.getvalue().startswith("id,title,text,predicted,")


def test_folders_packed_tables_texts_and_json(place, tmp_path):
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "a.txt").write_text("Shocking miracle\nThey said\n", encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(json.dumps({"title": "minister", "text": "said"}))
    (tmp_path / "c.json").write_text(json.dumps({"titel": "minister"}))
    (tmp_path / "d.json").write_text("[1]")
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress((place / "news.csv").read_bytes()))
    answers = list(predict_files([tmp_path], "fake_news"))
    assert [a.name.rpartition(".")[0][-1] for a in answers[:5]] == list("abcde") and len(answers) == 9
    assert [a.prediction["class"] for a in answers[:2]] == ["fake", "real"]
    assert "Did you mean 'title'?" in answers[2].error
    assert "expected an object" in answers[3].error and "expected UTF-8" in answers[4].error
    (one,) = predict_files([tmp_path / "a.txt"], "fake_titles")  # one field: all of the file
    assert one.prediction["class"] == "fake"


def test_a_table_of_images(place, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes((place / "images" / "0.png").read_bytes())
    path = write(tmp_path / "list.csv", [("file", "label"), ("in/x.png", "bright"), ("in/y.png", "dark")])
    out = tmp_path / "out.csv"
    assert predict_csv([path], out, "shades") == {"rows": 2, "errors": 1}
    assert [row[:3] for row in read(out)[1:]] == [["in/x.png", "bright", "bright"], ["in/y.png", "dark", ""]]
    assert "there is no file" in read(out)[2][-1]


def test_names_of_classes_and_files_are_only_text(place, service, tmp_path):
    name = '../we ird"; x=".png'.replace("/", "_")
    (tmp_path / name).write_bytes((place / "images" / "0.png").read_bytes())
    (found,) = predict_files([tmp_path / name], "shades", url=service.url)
    assert found.prediction["class"] == "bright" and set(found.prediction["probabilities"]) == set(SHADES)
    write_answers([found], out := io.StringIO(), [HOSTILE])
    assert next(csv.reader(io.StringIO(out.getvalue())))[-1] == f"p({HOSTILE})"


def test_what_is_too_much_at_once_is_sent_in_halves(place, tmp_path):
    noise = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(noise.integers(0, 255, (80, 80), np.uint8)).save(tmp_path / f"{i}.png")
    Image.fromarray(noise.integers(0, 255, (200, 200), np.uint8)).save(tmp_path / "huge.png")
    with Service(place, PROJECT_SERVE_MAX_BYTES=16_000) as service:
        answers = list(predict_files([tmp_path], "shades", url=service.url))
    assert [bool(a.error) for a in answers] == [False] * 6 + [True]
    assert "413" in answers[-1].error and "16" in answers[-1].error


def test_a_service_that_says_later_is_asked_later_and_a_key_opens(place, tmp_path):
    key, digest = new_key()
    path = write(tmp_path / "rows.csv", [("title", "text"), *[("said", str(i)) for i in range(4)]])
    settings = {"PROJECT_SERVE_RATE": 4, "PROJECT_SERVE_BURST": 2, "PROJECT_API_KEYS": digest}
    with Service(place, **settings) as service:
        for wrong in ("", "wrong", "ümlaut"):
            with pytest.raises(ClientError, match="401|expected an address and a key"):
                connect("fake_news", service.url, wrong)
        answers = list(predict_files([path], "fake_news", service.url, key, batch=1))
    assert [bool(a.prediction) for a in answers] == [True] * 4, [a.error for a in answers]


def test_what_a_service_answered_before_it_vanished_is_kept(place, tmp_path, monkeypatch):
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    path = write(tmp_path / "rows.csv", [("title", "text"), *[("said", str(i)) for i in range(5)]])
    with Service(place) as service:
        answers = predict_files([path], "fake_news", url=service.url, batch=2)
        kept = [next(answers), next(answers)]
    rest = list(answers)
    assert all(a.prediction for a in kept) and len(rest) == 3
    assert all(a.error.startswith("not asked: ") and "is the service running?" in a.error for a in rest)
    with pytest.raises(ClientError, match="is the service running?"):
        list(predict_files([path], "fake_news", url=service.url))


def test_whom_to_ask_is_told_in_words(place, service, tmp_path):
    for url in ("", service.url):
        with pytest.raises(ClientError, match="expected one of .*fake_news.*, got none"):
            connect("", url)
        with pytest.raises(ClientError, match="Did you mean 'fake_news'"):
            connect("fake_new", url)
    with pytest.raises(ClientError, match="expected none with a url"):
        connect("fake_news", service.url, version="v1")
    with pytest.raises(ClientError, match="found none"):
        connect(registry=tmp_path / "empty")
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ClientError, match="is this address the service's?"):
            connect("fake_news", f"127.0.0.1:{other.server_port}")
        other.shutdown()


def test_another_version_is_asked_by_its_name(place, tmp_path):
    store = registry(tmp_path / "registry", shades(tmp_path / "wrong", sign=-1.0))
    old = store.resolve("shades").name
    store.alias("shades", "production", store.add(place / "shades").name)
    file = place / "images" / "0.png"
    found = [next(predict_files([file], version=v, registry=tmp_path / "registry")) for v in ("production", old)]
    assert [a.prediction["class"] for a in found] == ["bright", "dark"]
    assert found[1].prediction["model_version"] == old


def test_the_bar_knows_the_end(place, monkeypatch):
    seen = []

    class Bar:
        def __init__(self, total, desc, unit):
            seen.append(total)

        def update(self, n, **info):
            seen.append(n)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(client, "progress", Bar)
    list(predict_files([place / "news.csv", place / "gone.csv", place / "gone.txt"], "fake_news", batch=2))
    assert seen[0] == len(TEXTS) + 2 == sum(seen[1:])


def test_nothing_is_left_of_an_attempt_that_failed(place, tmp_path):
    other = write(tmp_path / "other.csv", [("title", "text", "year"), ("a", "b", "2026")])
    with pytest.raises(ClientError, match="'year' too"):
        predict_csv([place / "news.csv", other], tmp_path / "out.csv", "fake_news")
    assert [p.name for p in tmp_path.iterdir()] == ["other.csv"]


def test_answers_as_a_sentence():
    assert str(Answer("a.csv", 3, error="no")) == "a.csv, row 3: no"
    assert str(Answer("a.png", prediction={"class": "Coat", "confidence": 0.5})) == "a.png: Coat, 50.0%"


def test_importing_it_is_light():
    code = "import sys, project.serve.client, project.serve.page; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert not {"torch", "pandas", "httpx", "fastapi", "onnxruntime", "sqlalchemy"} & set(found.stdout.split())
