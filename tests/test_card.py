"""What is shown of a model: its card, its notebook and its lineage are of what was loaded, and say what is missing."""

import json
import re
import sys
import tomllib
import warnings

import pytest
from pytest_notebooks import ROOT
from serve_process import Server, image_bundle, make_registry, png

from project.bundle.manifest import WORDS, BundleError, card_words, open_bundle, write_manifest
from project.bundle.registry import Registry
from project.data.tasks import get_task, task_names
from project.serve.card import card_html
from project.serve.limits import Settings
from project.serve.models import changed_files, load_model

PARTS = [
    *(WORDS[part] for part in ("use", "limits", "data", "licence")),
    "How often it is right",
    "By class",
    "On data of another origin",
    "How sure it may be taken to be",
    "Size and speed",
    "Contact",
    "What stands behind this",
]
WHOLE = {
    "card": {"use": "To tell **bright** from dark.", "limits": "- No colours", "data": "Walls", "contact": "Ada"},
    "measured": {
        "by_class": [
            {"class": "bright", "n": 1200, "recall": 0.9, "precision": 0.8, "f1": 0.85, "taken for": "dark (120)"},
            {"class": "dark", "n": 800, "recall": 0.5, "precision": 0.7, "f1": 0.58, "taken for": ""},
        ],
        "elsewhere": [
            {"set": "ood-night", "n": 40, "accuracy": 0.25, "balanced": 0.3, "mean confidence": 0.99},
            {"set": "ood-cats", "n": 7, "mean confidence": 0.5},
        ],
        "rows": {"train": 5000, "test": 2000},
        "data": {"title": "Walls by day", "licence": "CC0 1.0"},
    },
    "metrics": {"test/acc": 0.74, "test/acc_low": 0.72, "test/acc_high": 0.76, "test/n": 2000, "test/ece": 0.031},
    "speed": {"ms": 0.0512, "rows": 90, "cpu": "Abacus 9"},
    "parameters": 12345,
}


def with_card(folder, **changes):
    """A bundle whose manifest says all that a card needs."""
    bundle = image_bundle(folder)
    write_manifest(bundle.path, **bundle.manifest | WHOLE | changes)
    return open_bundle(bundle.path)


def plain(page):
    """The text of a page."""
    text = re.sub(r"<[^>]+>", " ", page.partition("<main>")[2])
    return " ".join(text.replace("\u00a0", " ").split())


# --- the words


@pytest.mark.parametrize("task", task_names())
def test_the_tasks_have_words_of_their_own(task):
    words = card_words(task, ROOT / "tasks")
    assert list(words) == ["use", "limits", "data", "licence", "contact"]
    assert all(len(text) > 80 for text in words.values())
    unclear = "for research" in get_task(task).licence or "their authors'" in get_task(task).licence
    assert ("unclear" in words["licence"].lower()) == unclear, "what nobody knows about a licence is said"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[card\n", "expected TOML"),
        ("[card]\nlicense = 'MIT'", "there is no such part. Did you mean 'licence'?"),
        ("[card]\nuse = 1", "expected texts"),
        ("card = 'x'", "expected texts"),
        (f"[card]\nuse = '{'x' * 20_001}'", "at most 20,000 characters"),
        (b"[card]\nuse = '\xff'", "expected TOML"),
    ],
)
def test_words_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "lamps.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BundleError, match=re.escape(message)):
        card_words("lamps", tmp_path)


def test_words_are_copied_into_the_bundle_and_bad_ones_cost_no_model(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    import numpy as np

    from project.bundle import export

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(1, 2)

        def embed(self, x):
            return x.float().mean((1, 2, 3))[:, None] / 255

        def forward(self, x):
            return self.head(self.embed(x))

    monkeypatch.setenv("PROJECT_ROOT", str(tmp_path))
    (tmp_path / "tasks").mkdir()
    words = tmp_path / "tasks" / "lamps.toml"
    words.write_text("[card]\nuse = 'To tell lamps.'\n", encoding="utf-8")
    given = {"task": "lamps", "classes": ["on", "off"], "images": np.zeros((3, 4, 4), np.uint8)}
    first = export.export_bundle(Net(), tmp_path / "a", **given)
    assert first.manifest["card"] == {"use": "To tell lamps."}
    assert first.manifest["speed"]["ms"] > 0 and first.manifest["speed"]["rows"] >= 5
    words.write_text("[card\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="the card has no words"):
        assert export.export_bundle(Net(), tmp_path / "b", **given).manifest["card"] == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        third = export.export_bundle(Net(), tmp_path / "c", **given, card={"use": "Said in the notebook."})
    assert third.manifest["card"]["use"].startswith("Said")


# --- the page


def test_a_whole_card(tmp_path):
    text = plain(card_html(with_card(tmp_path / "a").manifest, "v1-1a2b3c4d"))
    places = [text.index(part) for part in PARTS]
    assert places == sorted(places)
    for said in (
        "To tell bright from dark.",
        "74.0 % of the test set, 95 % interval 72.0 % to 76.0 %, 2,000 rows.",
        "bright 1,200 90.0 % 80.0 % dark (120)",
        "night 40 25.0 % 30.0 % 99.0 %",
        "cats 7 none of its classes 50.0 %",
        "off by 3.1 % on average (ECE",
        "12,345 parameters",
        "0.0512 ms a row on one thread of Abacus 9",
        "Rows: 5,000 train, 2,000 test.",
        "The data, as its task notes: CC0 1.0.",
        "Nobody has said.",  # of licences
        "the notebook that made it, as it was executed",
    ):
        assert said in text, said


def test_an_older_bundle_shows_what_can_be_said(tmp_path):
    text = plain(card_html(image_bundle(tmp_path / "a").manifest, "v1-1a2b3c4d"))
    assert all(part in text for part in PARTS) and "50.0 % of the test set." in text
    assert text.count("Nobody has said.") == 5 and "Nobody measured it: expect less than on the test set." in text
    assert "2 classes it is: bright, dark" in text and "c" * 40 in text


@pytest.mark.parametrize(
    "changes",
    [
        {"card": {"use": "<script>alert(1)</script><img src=x onerror=alert(1)>[x](javascript:alert(1))"}},
        {"measured": {"by_class": [{"class": "<b onclick=x>"}, 7], "elsewhere": "none", "rows": [], "data": 3}},
        {"measured": {"by_class": 5, "elsewhere": [{"set": None, "accuracy": "high"}], "rows": {"<b>": 1}}},
        {"metrics": {"test/acc": "high", "test/n": None, "test/<b>_alone_acc": 0.5}, "title": "</title><b>"},
        {"speed": {"ms": "fast", "cpu": "<b>"}, "partial": ["<b>"], "parameters": True, "temperature": 1e-9},
    ],
)
def test_a_strange_manifest_is_harmless(tmp_path, changes):
    page = card_html(with_card(tmp_path / "a", **changes).manifest, "v1-1a2b3c4d", ["<b>"])
    body = page.partition("<main>")[2]
    assert not re.search(r"<(script|img|b\b)|onclick=x>|href=.javascript", body), body
    assert all(f"<h2>{part}</h2>" in body for part in PARTS)


def test_words_of_a_later_version_are_kept(tmp_path):
    bundle = with_card(tmp_path / "a", card={"use": "Lamps", "ethics": "Later"})
    assert open_bundle(bundle.path).manifest["card"]["ethics"] == "Later"


# --- what is shown is what is served


def change(path):
    """Change a file that is read-only, keeping its size."""
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content.replace(b"brightness", b"br1ghtness") if b"brightness" in content else content[::-1])


def test_a_file_that_was_only_touched_was_not_changed(tmp_path):
    bundle, seals = image_bundle(tmp_path / "a"), {}
    assert changed_files(bundle, seals) == [] and len(seals) == 3
    (bundle.path / "notebook.ipynb").touch()
    assert changed_files(bundle, seals) == []
    change(bundle.path / "notebook.ipynb")
    (bundle.path / "samples.npz").unlink()
    assert changed_files(bundle, seals) == ["notebook.ipynb", "samples.npz"]


def test_what_changes_while_it_is_loaded_is_not_served(tmp_path):
    bundle = image_bundle(tmp_path / "a")
    change(bundle.path / "notebook.ipynb")
    with pytest.raises(BundleError, match="notebook.ipynb: changed while it was loaded"):
        load_model(bundle, "v1", Settings())


@pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")
@pytest.mark.parametrize("seen", [False, True])
def test_changed_text_is_not_shown(tmp_path, seen):
    """Whether the pages were asked for before or not."""
    registry, versions = make_registry(tmp_path)
    folder = registry.get("brightness").path
    with Server(tmp_path, env={"PROJECT_CACHE": str(tmp_path / "cache")}) as server:
        get = server.client.get
        if seen:
            assert "brightness" in get("/models/brightness/notebook").text
        assert get("/models/brightness/card").text.count('class="warn"') == 0
        before = get("/models/brightness/lineage").json()
        change(folder / "notebook.ipynb")
        change(folder / "manifest.json")
        notebook = get("/models/brightness/notebook")
        if seen:
            assert notebook.status_code == 200 and "br1ghtness" not in notebook.text
        else:
            assert notebook.status_code == 409 and "changed since it was loaded" in notebook.json()["detail"]
        found = get("/models/brightness/lineage").json()
        assert found["problems"] == [*before["problems"], *found["problems"][-1:]]
        assert found["problems"][-1].startswith("notebook.ipynb was changed on the disk since")
        assert found["notebook"] == before["notebook"] and found["commit"] == before["commit"]
        warned = get("/models/brightness/card").text
        assert "notebook.ipynb was changed on the disk" in warned and "br1ghtness" not in warned
        server.wait_for(lambda: "changed on the disk" in json.dumps(get("/health/ready").json()["reasons"]), 20)
        assert get("/health/ready").json()["troubles"] == {"brightness": "changed"}
        answer = server.client.post("/predict/brightness", files={"file": png()}).json()
        assert answer["model_version"] == versions[0]  # what was loaded answers
        row = get(f"/predictions/{answer['id']}").json()
        assert row["lineage"]["problems"] == found["problems"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")
def test_aliases_in_the_lineage_are_those_of_now(tmp_path):
    registry, versions = make_registry(tmp_path)
    with Server(tmp_path, env={"PROJECT_CACHE": str(tmp_path / "cache")}) as server:
        found = server.client.get("/models/brightness/lineage").json()
        assert found["aliases"] == ["production"] and found["added"] and found["removed"] is False
        registry.alias("brightness", "loved", versions[0])
        assert server.client.get("/models/brightness/lineage").json()["aliases"] == ["loved", "production"]
        answer = server.client.post("/predict/brightness", files={"file": png()}).json()
        registry.alias("brightness", "production", versions[1])
        server.wait_for(lambda: server.client.get("/models/brightness").json()["version"] == versions[1], 20)
        change(
            Registry(tmp_path / "registry").open(registry.resolve("brightness", versions[0])).path / "notebook.ipynb"
        )
        old = server.client.get(f"/predictions/{answer['id']}").json()["lineage"]
        assert old["version"] == versions[0] and "cannot tell" in old["problems"][0]
        assert "by" not in found and "by" not in old  # who added it is for the team


def test_the_notes_of_the_five_tasks_are_toml_with_a_card_alone():
    for file in sorted((ROOT / "tasks").glob("*.toml")):
        assert "card" in tomllib.loads(file.read_text(encoding="utf-8")), file.name
