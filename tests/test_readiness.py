"""Readiness, metric, log and page tell the same of a task, and a sound task is not taken down by a broken one."""

import asyncio
import json
import shutil
import sys

import pytest
from click.testing import CliRunner
from serve_process import Server, image_bundle, make_registry, png, text_bundle

from project.bundle.registry import Registry
from project.cli import app
from project.serve import api, models, swaps
from project.serve.limits import Settings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")


def ready(server):
    """What readiness says."""
    return server.client.get("/health/ready").json()


def answers(server):
    """Task -> version of those that answer a real request."""
    asked = {"brightness": {"files": {"file": png()}}, "news": {"json": {"title": "good", "text": "good"}}}
    found = {task: server.client.post(f"/predict/{task}", **sent) for task, sent in asked.items()}
    return {task: a.json()["model_version"] for task, a in found.items() if a.status_code == 200}


def lines(server, text):
    """The lines of the log with a text in them."""
    return [line for line in server.errors().splitlines() if text in line]


def told(server, task, state, words):
    """All four tell the same of a task; `words` stand in three of them."""
    server.wait_for(lambda: ready(server).get("troubles", {}).get(task) == state, 20)
    (reason,) = (r for r in ready(server)["reasons"] if r.startswith(f"{task}: "))
    assert words in reason, reason
    counts = server.client.get("/metrics").text
    if task == "registry":
        assert "project_registry_unreadable 1.0" in counts
    else:
        assert f'project_task_trouble{{state="{state}",task="{task}"}} 1.0' in counts
    assert words in server.client.get("/").text
    found = lines(server, words)
    assert len(found) == 1, found
    return reason


def break_version(folder, version):
    """Spoil a version's model where the registry keeps it, and give back how to mend it."""
    path = next(p for p in (folder / "registry").rglob("model.onnx") if version.split("-")[1] in str(p))
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-1] + b"!")
    return lambda: path.write_bytes(content)


@pytest.fixture
def cache(tmp_path):
    """The environment of a service with a cache of its own."""
    return {"PROJECT_CACHE": str(tmp_path / "cache")}


def test_a_version_that_cannot_be_loaded_is_told_once_and_mended_in_place(tmp_path, cache):
    registry, versions = make_registry(tmp_path)
    with Server(tmp_path, env=cache) as server:
        mend = break_version(tmp_path, versions[1])
        registry.alias("brightness", "production", versions[1])
        reason = told(server, "brightness", "unloadable", f"{versions[1]}, which is in production, cannot be loaded")
        assert f"{versions[0]} goes on" in reason and str(tmp_path) not in json.dumps(ready(server))
        assert "sha256" in lines(server, "cannot be loaded")[0]  # why, for those who read the log
        assert ready(server)["status"] == "degraded" and server.is_ready()
        assert answers(server)["brightness"] == versions[0] and "news" in answers(server)
        mend()
        server.wait_for(lambda: ready(server)["status"] == "ready", 20)
        assert answers(server)["brightness"] == versions[1]
        assert "project_task_trouble{" not in server.client.get("/metrics").text


@pytest.mark.parametrize("named", [(), ("brightness", "news")])
def test_a_restart_goes_on_with_what_worked(tmp_path, cache, named):
    registry, versions = make_registry(tmp_path)
    with Server(tmp_path, env=cache, tasks=named):
        pass
    break_version(tmp_path, versions[1])
    registry.alias("brightness", "production", versions[1])
    with Server(tmp_path, env=cache, tasks=named) as server:
        assert answers(server)["brightness"] == versions[0]
        assert f"{versions[0]} goes on" in told(server, "brightness", "unloadable", f"{versions[1]}, which is in prod")
        assert len(lines(server, f"{versions[0]}, which answered before the restart, goes on")) == 1
        registry.rollback("brightness")
        server.wait_for(lambda: ready(server)["status"] == "ready", 20)


def test_without_a_memory_the_sound_task_is_served(tmp_path, cache):
    _, versions = make_registry(tmp_path)
    break_version(tmp_path, versions[0])
    with Server(tmp_path, env=cache, tasks=["brightness", "news"]) as server:
        assert list(answers(server)) == ["news"]
        assert "nothing answers" in told(server, "brightness", "unloadable", f"{versions[0]}, which is in production")
        asked = server.client.post("/predict/brightness", files={"file": png()})
        assert asked.status_code == 503 and "cannot be loaded" in asked.json()["detail"]


def test_a_registry_that_is_gone_and_comes_back(tmp_path, cache):
    _, versions = make_registry(tmp_path)
    place, away = tmp_path / "registry", tmp_path / "away"
    with Server(tmp_path, env=cache) as server:
        before = answers(server)
        place.rename(away)
        told(server, "registry", "unreadable", "it cannot be read; what answered before goes on")
        assert answers(server) == before and ready(server)["status"] == "degraded"
    with Server(tmp_path, env=cache) as server:  # it starts from its copies
        assert answers(server) == before
        told(server, "registry", "unreadable", "it cannot be read; what answered before goes on")
        assert server.client.get("/models/brightness/lineage").json()["version"] == versions[0]
        away.rename(place)
        server.wait_for(lambda: ready(server)["status"] == "ready", 20)
        assert "project_registry_unreadable 0.0" in server.client.get("/metrics").text


def test_a_registry_that_cannot_be_reached_at_all(tmp_path, cache):
    make_registry(tmp_path)
    with Server(tmp_path, env=cache | {"PROJECT_REGISTRY": "ftp://nowhere/models"}, ready=False) as server:
        assert "no model is loaded" in ready(server)["reasons"] and not server.is_ready()
        told(server, "registry", "unreadable", "it cannot be read; what answered before goes on")


def test_an_alias_that_vanished_is_not_one_that_was_taken_away(tmp_path, cache):
    registry, versions = make_registry(tmp_path)
    with Server(tmp_path, env=cache) as server:
        shutil.rmtree(tmp_path / "registry" / "brightness" / "aliases")
        told(server, "brightness", "vanished", "its version in production has vanished from the registry")
        assert answers(server)["brightness"] == versions[0]
        (tmp_path / "registry" / "news" / "aliases" / "production" / "00000001.json").chmod(0o644)
        (tmp_path / "registry" / "news" / "aliases" / "production" / "00000001.json").write_text("{")
        told(server, "news", "unreadable", "what the registry notes of it cannot be read")
        assert len(answers(server)) == 2
        registry.alias("brightness", "production", versions[1])
        server.wait_for(lambda: "brightness" not in ready(server)["troubles"], 20)


def test_a_task_is_retired_without_a_restart_and_stays_so(tmp_path, cache):
    registry, versions = make_registry(tmp_path)
    with Server(tmp_path, env=cache) as server:
        registry.alias("brightness", "production", None, reason="nobody asks")
        told(server, "brightness", "retired", "it was retired on")
        assert (
            "nobody asks" in lines(server, "it was retired on")[0] and "nobody asks" not in server.client.get("/").text
        )
        assert ready(server)["status"] == "ready" and list(answers(server)) == ["news"]  # as somebody wanted it
        refused = server.client.post("/predict/brightness", files={"file": png()})
        assert refused.status_code == 404 and "it was retired on" in refused.json()["detail"]
        assert [m["task"] for m in server.client.get("/models").json()["models"]] == ["news"]
        assert f'version="{versions[0]}"' not in "".join(
            line for line in server.client.get("/metrics").text.splitlines() if line.startswith("project_model_info")
        )
    shutil.rmtree(tmp_path / "registry" / "brightness" / "aliases")
    with Server(tmp_path, env=cache) as server:
        assert list(answers(server)) == ["news"], "a restart does not bring it back"
        told(server, "brightness", "unset", "no version of it is in production")
        registry.alias("brightness", "production", versions[1])
        server.wait_for(lambda: answers(server).get("brightness") == versions[1], 20)


def test_the_last_task_may_be_retired_too(tmp_path, cache):
    registry = Registry(tmp_path / "registry")
    registry.alias("news", "production", registry.add(text_bundle(tmp_path / "text")).name)
    with Server(tmp_path, env=cache) as server:
        registry.alias("news", "production", None)
        server.wait_for(lambda: not server.is_ready(), 20)
        assert ready(server)["reasons"][0] == "no model is loaded" and ready(server)["status"] == "not ready"
        assert "it was retired on" in server.client.get("/").text
        assert not lines(server, '"warning"'), "what somebody wanted is no warning"
    with Server(tmp_path, env=cache, tasks=["news"], ready=False) as server:
        assert not server.is_ready() and ready(server)["troubles"] == {"news": "retired"}
        registry.alias("news", "production", "v1")
        server.wait_for(server.is_ready, 20)


def test_bundles_given_as_folders_stand_alone_too(tmp_path, cache):
    good, bad = image_bundle(tmp_path / "good"), text_bundle(tmp_path / "bad")
    (bad.path / "model.onnx").write_bytes(b"x")
    with Server(tmp_path, env=cache, bundles=[str(bad.path), str(good.path)], log="off") as server:
        assert list(answers(server)) == ["brightness"]
        told(server, "bad", "unloadable", "its bundle cannot be loaded")
    with pytest.raises(AssertionError, match="cannot serve bad"), Server(tmp_path, bundles=[str(bad.path)], env=cache):
        pass


def test_what_is_damaged_in_a_bucket_is_fetched_once(tmp_path, monkeypatch, caplog):
    """However often the service looks: one download and one warning, and a mended object is taken."""
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    registry, fetched = Registry(f"memory://{tmp_path.name}/models"), []
    fetch = registry._place.fetch
    monkeypatch.setattr(registry._place, "fetch", lambda name, target: (fetched.append(name), fetch(name, target)))
    first, second = (registry.add(image_bundle(tmp_path / name, s)) for name, s in (("a", 4.0), ("b", 1.0)))
    registry.alias("brightness", "production", first.name)
    name = f"brightness/bundles/{second.folder}/model.onnx"
    content = registry._place.read([name])[0]
    registry._place.put(name, content[:-1] + b"!")
    service = models.Service(Settings(poll=0.01, access=False))
    service.registry = registry

    async def look(times, until=lambda: False):
        for _ in range(times):
            await swaps.refresh(service)
            if until():
                return
            await asyncio.sleep(0.02)

    async def life():
        await look(1)
        assert service.models["brightness"].version == first.name
        registry.alias("brightness", "production", second.name)
        await look(40)
        tries = service.waits["brightness"].tries
        assert tries >= 2 and fetched.count(name) == 1, "it was tried again, and not fetched again"
        assert len([r for r in caplog.records if "cannot be loaded" in r.getMessage()]) == 1
        assert service.models["brightness"].version == first.name
        registry._place.put(name, content)
        await look(600, lambda: service.models["brightness"].version == second.name)
        assert fetched.count(name) == 2 and not service.troubles
        await api.stop(service)

    asyncio.run(life())


def test_a_store_that_does_not_answer_is_one_line(tmp_path, monkeypatch, caplog):
    """Errors of a bucket's library are the registry's trouble, and not that of each task."""
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    registry = Registry(f"memory://{tmp_path.name}/models")
    for bundle in (image_bundle(tmp_path / "a"), text_bundle(tmp_path / "b")):
        registry.alias(bundle.task, "production", registry.add(bundle).name)
    service = models.Service(Settings(poll=0.01, access=False, tasks=("brightness", "news")))
    service.registry = registry

    async def life():
        await swaps.refresh(service)
        assert sorted(service.models) == ["brightness", "news"]
        with monkeypatch.context() as broken:
            broken.setattr(registry._place, "ask", lambda *_: (_ for _ in ()).throw(KeyError("token")))
            for _ in range(3):
                await swaps.refresh(service)
            assert {t: x.state for t, x in service.troubles.items()} == {"": "unreadable"}
            assert len([r for r in caplog.records if "it cannot be read" in r.getMessage()]) == 1
        await swaps.refresh(service)
        assert not service.troubles and sorted(service.models) == ["brightness", "news"]
        await api.stop(service)

    asyncio.run(life())


def test_the_command_retires_and_says_when_there_is_nothing_to_retire(tmp_path, monkeypatch):
    registry, versions = make_registry(tmp_path)
    monkeypatch.setenv("PROJECT_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("PROJECT_MIRROR", "off")
    done = CliRunner().invoke(app, ["models", "retire", "brightness", "--reason", "nobody asks", "--yes"])
    assert done.exit_code == 0 and f"production was {versions[0]}" in done.output, done.output
    assert registry.taken_away("brightness")["reason"] == "nobody asks" and not registry.aliases("brightness")
    again = CliRunner().invoke(app, ["models", "retire", "brightness", "--yes"])
    assert again.exit_code == 1 and "nothing to retire" in again.output
