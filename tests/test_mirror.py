"""project.bundle.mirror against a stand-in for the W&B server: the client is the real one, in its own process."""

import json
import os
import signal
import threading
import time

import pytest
from click.testing import CliRunner
from test_registry import bucket, emulator, make, silent  # noqa: F401  fixtures
from wandb_server import WandbServer

from project.bundle import mirror as m
from project.bundle.registry import Registry, RegistryError
from project.cli import app
from project.core import sha256

HERE = ("us", "brightness", "brightness")
LINKED = ("org-entity", "wandb-registry-model", "brightness")
WRITES = {"CreateArtifact", "UpdateArtifact", "AddAliases", "DeleteAliases", "LinkArtifact", "UpsertBucket"}


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """None of the user's, or of the session's."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_PROJECT", "WANDB_ENTITY", "PROJECT_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(monkeypatch):
    """A W&B that keeps what it is sent, and a key for it."""
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        yield server
    assert server.failures == []


@pytest.fixture
def registry(tmp_path):
    """Two versions in a folder, the first in production."""
    found = Registry(tmp_path / "registry")
    for k in range(2):
        found.add(make(tmp_path / f"bundle-{k}", 100.0 + k))
    found.alias("brightness", "production", "v1")
    return found


def names(registry):
    """The names of all versions, oldest first."""
    return [v.name for v in registry.list("brightness", removed=True)]


def test_what_happens_to_a_registry_happens_in_wandb(registry, server, tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_MIRROR", "model")
    one, two = names(registry)
    (done,) = m.sync(registry)
    assert (done.added, done.told, done.moved, done.behind, done.why) == ([one, two], [], ["production"], [], "")
    assert f"{one}, {two} sent; production moved" not in str(done) and f"{one}, {two} sent, production moved" in str(
        done
    )
    assert done.url == f"{server.url}/us/brightness/artifacts/model/brightness"
    for version, artifact in zip(registry.list("brightness"), server.artifacts.values(), strict=True):
        bundle, told = registry.open(version), json.loads(artifact["metadata"])
        files = {k: v for k, v in artifact["files"].items() if k != "wandb_manifest.json"}
        assert files == {name: (bundle.path / name).read_bytes() for name in ("manifest.json", "model.onnx")}
        assert told["manifest"] == bundle.manifest and told["version"] == version.name and not told["removed"]
        assert told["manifest"]["files"]["model.onnx"]["sha256"] == sha256(files["model.onnx"])
        assert artifact["artifactTypeName"] == "model" and version.name in artifact["description"]
    for where in (HERE, LINKED):
        assert server.shown(*where) == {one: one, two: two, "production": one, "latest": two}
    ((run, ended),) = server.ends.items()
    assert ended == 0 and server.runs[run]["jobType"] == "mirror" and m.lag(registry) == {}

    before, notes = len(server.asked), m._last(registry, "brightness")
    (again,) = m.sync(registry)
    assert "nothing to do" in str(again) and not WRITES & set(server.asked[before:])
    assert m._last(registry, "brightness") == notes and len(server.runs) == 1

    with monkeypatch.context() as offline:
        offline.delenv("WANDB_API_KEY")
        three = registry.add(make(tmp_path / "bundle-2", 102.0)).name
        registry.alias("brightness", "production", three)
        registry.alias("brightness", "staging", three)
        said = m.follow(registry, "brightness")
        assert said.startswith(f"W&B lags behind brightness: {three} is missing, production is {three}, staging is")
        assert "WANDB_API_KEY is not set" in said and "`project models mirror` catches up" in said
        assert "\n" not in said and len(server.asked) > before
    server.collections[LINKED]["aliases"]["anns-favourite"] = "a0"
    said = m.follow(registry, "brightness")
    assert f"{three} sent, production, staging moved" in said and len(server.artifacts) == 3
    expected = {one: one, two: two, three: three, "production": three, "latest": three, "staging": three}
    assert server.shown(*HERE) == expected and server.shown(*LINKED) == expected | {"anns-favourite": one}

    registry.alias("brightness", "staging", None)
    registry.rollback("brightness")
    registry.alias("brightness", "production", three)
    registry.alias("brightness", "production", two)
    registry.gc("brightness", keep=1, dry=False)
    assert [v.number for v in registry.list("brightness")] == [2, 3]
    del server.collections[HERE]["aliases"][three]  # somebody was at it in W&B
    server.collections[HERE]["aliases"]["latest"] = "a0"
    assert m.lag(registry) == {"brightness": [f"{one} was cleared away", f"production is {two}", "staging is gone"]}
    (done,) = m.sync(registry, "brightness")
    assert (done.added, done.told, done.moved, done.behind) == ([], [one], ["production", "staging"], [])
    expected = {one: one, two: two, three: three, "production": two, "latest": three}
    assert server.shown(*HERE) == expected and server.shown(*LINKED) == expected | {"anns-favourite": one}
    gone = server.artifacts["a0"]
    assert json.loads(gone["metadata"])["removed"] and gone["description"].startswith("Cleared away")
    assert server.unknown == [] or set(server.unknown) <= {"OrganizationCoreWeaveOrganizationID"}


def test_without_a_key_or_a_wish_nothing_is_tried(registry, server, monkeypatch):
    for name, value in (("PROJECT_MIRROR", "off"), ("WANDB_MODE", "offline"), ("WANDB_API_KEY", "")):
        with monkeypatch.context() as setting:
            setting.setenv(name, value)
            assert m.follow(registry, "brightness") == ""
            (done,) = m.sync(registry)
            assert name in done.why and len(done.behind) == 3
    monkeypatch.setattr(m.importlib.util, "find_spec", lambda _: None)
    assert "wandb is not installed" in m.follow(registry, "brightness")
    assert server.asked == [] and server.keys == set()
    with pytest.raises(RegistryError, match="no versions of lamps"):
        m.sync(registry, "lamps")


@pytest.mark.parametrize("silence", ["no server", "no answer", "errors"])
def test_a_server_that_fails_costs_seconds(registry, server, monkeypatch, silence):
    monkeypatch.setattr(m, "_GRACE", 0.5)
    if silence == "no server":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    elif silence == "no answer":
        server.silent.set()
    else:
        server.refused.add("everything")
    started = time.monotonic()
    said = m.follow(registry, "brightness", patience=1.5)
    assert time.monotonic() - started < 10
    assert said.startswith("W&B lags behind brightness") and said.endswith("`project models mirror` catches up")
    assert "\n" not in said and server.artifacts == {} and m._last(registry, "brightness") == (0, {})


@pytest.mark.skipif(os.name == "nt", reason="there a signal is sent to nobody but a whole console")
def test_somebody_who_does_not_want_to_wait(registry, server):
    server.silent.set()
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    assert "interrupted" in m.follow(registry, "brightness")
    assert time.monotonic() - started < 8
    assert list(registry.aliases("brightness")) == ["production"]


def test_an_upload_that_is_refused(registry, server):
    server.refused.add("CreateArtifact")
    said = m.follow(registry, "brightness", patience=30)
    assert "is missing" in said and "permission denied" in said
    assert len(server.ends) == 1 and server.artifacts == {}, "the run was ended nevertheless"


def test_a_collection_of_others_and_an_account_without_an_organization(registry, server, monkeypatch):
    monkeypatch.setenv("PROJECT_MIRROR", "model")
    server.organization = None
    one, two = names(registry)
    assert m.mirror(registry, "brightness", "v2").added == [two]
    assert server.shown(*HERE) == {two: two, "latest": two}
    assert m.lag(registry)["brightness"] == [
        f"{one} is missing",
        f"production is {one}",
        "not linked into wandb-registry-model/brightness",
    ]
    told = json.loads(server.artifacts["a0"]["metadata"])
    server.artifacts["a0"]["metadata"] = json.dumps(told | {"registry": "somebody's"})
    (done,) = m.sync(registry)
    assert "is not of this registry: it holds brightness:v0" in done.why and "WANDB_PROJECT" in done.why
    assert len(server.artifacts) == 1 and server.shown(*HERE) == {two: two, "latest": two}


def test_a_bucket_that_two_mirror_at_once(bucket, server, tmp_path):  # noqa: F811
    registry = Registry(bucket)
    version = registry.add(make(tmp_path / "bundle", 100.0))
    registry.alias("brightness", "production", "v1")

    def other():
        while "CommitArtifact" not in server.asked and not server.closing.wait(0.02):
            pass
        said = {"url": "", "versions": {}, "aliases": {}, "linked": ""}
        found.append(m._write(Registry(bucket), "brightness", 0, said))

    found: list[bool] = []
    thread = threading.Thread(target=other)
    thread.start()
    (done,) = m.sync(registry)
    thread.join()
    assert found == [True] and server.asked.count("GetDefaultEntity") == 2, "the second looks again"
    assert (done.behind, done.why, done.note) == ([], "", "") and len(server.artifacts) == 1
    held = {version.name: version.name, "production": version.name, "latest": version.name}
    assert server.shown(*HERE) == held and server.shown(*LINKED) == held, "a bucket's versions are linked unasked"
    assert m.lag(Registry(bucket)) == {}, "others know as well"


def test_the_command_mirrors_and_says_what_lags(registry, server, tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_REGISTRY", str(tmp_path / "registry"))
    run = CliRunner().invoke
    (one, two), command = names(registry), ["models", "mirror"]
    done = run(app, [*command, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)[0]["added"] == [one, two]
    moved = run(app, ["models", "alias", "brightness", "v2", "--yes"])
    assert moved.exit_code == 0 and "production moved" in moved.stderr and f"production is {two}" in moved.stdout
    assert server.shown(*HERE)["production"] == two
    monkeypatch.delenv("WANDB_API_KEY")
    assert run(app, ["models", "rollback", "brightness"]).exit_code == 0
    lags = run(app, command)
    why = "WANDB_API_KEY is not set, and `wandb login` was not done"
    assert lags.exit_code == 1 and f"production is {one} ({why})" in lags.stdout
