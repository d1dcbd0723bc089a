"""Who may read a logged prediction, and what is kept of whoever gave feedback."""

import re
import sqlite3
import sys

import pytest
from serve_process import Server, make_registry, png

from project.serve.limits import new_key
from project.serve.log import PredictionTable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")
ADDRESS = re.compile(rb"127\.0\.0\.1|::1")


def asked(client, **headers):
    """The id of a prediction."""
    return client.post("/predict/brightness", files={"file": png()}, headers=headers).json()["id"]


def test_without_keys_who_has_the_id_may_read_and_nobody_is_named(tmp_path):
    make_registry(tmp_path)
    with Server(tmp_path) as server:
        id = asked(server.client)
        for label in ("dark", "bright"):
            assert server.client.post(f"/predictions/{id}/feedback", json={"label": label}).status_code == 200
        row = server.client.get(f"/predictions/{id}").json()
        assert [list(said) for said in row["feedback"]] == [["label", "time"]] * 2 and row["label"] == "bright"
        assert not {"client", "label_source", "source"} & row.keys() and "127.0.0.1" not in str(row)
        log = server.settings["log"]
    with sqlite3.connect(log) as db:
        assert db.execute("select distinct source from feedback").fetchall() == [("",)]
        assert db.execute("select distinct client from predictions").fetchall() == [(None,)]
    assert not any(ADDRESS.search(p.read_bytes()) for p in tmp_path.glob("log.db*")), (
        "an address is nowhere in the file"
    )


def test_with_keys_only_the_key_that_asked_may_read_and_correct(tmp_path):
    make_registry(tmp_path)
    (ada, ada_hash), (bob, bob_hash) = new_key(), new_key()
    mine, his = {"x-api-key": ada}, {"authorization": f"Bearer {bob}"}
    with Server(tmp_path) as server:  # before there were keys
        old = asked(server.client)
        server.wait_for(lambda: server.client.get("/health/ready").json()["log"]["written"] == 1)
    with Server(tmp_path, env={"PROJECT_API_KEYS": f"{ada_hash},{bob_hash}"}) as server:
        get, post = server.client.get, server.client.post
        id = asked(server.client, **mine)
        unknown = get(f"/predictions/{'0' * 32}", headers=his).json()
        for answer in (
            get(f"/predictions/{id}", headers=his),
            post(f"/predictions/{id}/feedback", json={"label": "dark"}, headers=his),
            post(f"/predictions/{id}/feedback", json={"label": "no class"}, headers=his),
        ):
            assert answer.status_code == 404 and answer.json()["detail"] == unknown["detail"], (
                "it seems not to be there"
            )
        assert get(f"/predictions/{id}").status_code == 401
        assert post(f"/predictions/{id}/feedback", json={"label": "dark"}, headers=mine).status_code == 200
        row = get(f"/predictions/{id}", headers=mine).json()
        assert row["label"] == "dark" and ada_hash[:12] not in str(row) and ada not in str(row)
        assert get(f"/predictions/{old}", headers=his).json()["predicted"] == "bright"  # nobody's: its id opens it
        log = server.settings["log"]
    (kept,) = [r for r in PredictionTable(log).rows() if r["id"] == id]
    assert kept["label_source"] == kept["client"] == ada_hash[:12]  # for those who can open the database


def test_addresses_of_an_earlier_version_are_deleted_and_nothing_else_is(tmp_path):
    make_registry(tmp_path)
    sources = ["127.0.0.1", "2001:db8::/64", "10.1.2.3", "ada", "1a2b3c4d5e6f", "page"]
    with Server(tmp_path) as server:
        id = asked(server.client)
        server.wait_for(lambda: server.client.get("/health/ready").json()["log"]["written"] == 1)
        table = PredictionTable(server.settings["log"])
    for source in sources:
        table.feedback(id, "dark", source)
    with Server(tmp_path) as server:
        server.wait_for(lambda: "addresses of 3 words of feedback were deleted" in server.errors(), 20)
    assert [said["source"] for said in table.get(id)["feedback"]] == ["", "", "", "ada", "1a2b3c4d5e6f", "page"]
