"""What a build leaves behind when it is killed, raced, starved or given nonsense; and that it always makes the same."""

import csv
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from project.core import read_json, write_json
from project.data import store
from project.data.cleaning import near_texts
from project.data.readers import Texts
from project.data.sources import SourceError, find, read_content, read_idx
from project.data.store import DataError, build, open_data
from project.data.tasks import stratified_split

NAMES = ("images.npy", "labels.npy", "splits.json", "manifest.json")


@pytest.fixture
def sample(samples):
    """The folder with the four files of the sample."""
    return samples / "fashion_mnist"


@pytest.fixture
def out(tmp_path):
    """Where the data goes."""
    return tmp_path / "data" / "fashion_mnist"


def contents(folder):
    """Name and bytes of each file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def publication(folder, train, test, seed=0):
    """Write files in the published format, of random pixels: test material of any size, not a stand-in for a source."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for part, n in (("train", train), ("t10k", test)):
        pixels = rng.integers(0, 256, n * 784, np.uint8).tobytes()
        labels = (np.arange(n) % 10).astype(np.uint8).tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, n, 28, 28) + pixels)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, n) + labels)
    return folder


# ---- one and the same


def test_the_same_bytes_from_packed_and_unpacked_files(sample, out, tmp_path):
    for path in sample.glob("*.gz"):
        (tmp_path / path.stem).write_bytes(read_content(path))
    packed = build("fashion_mnist", out, source=sample)
    unpacked = build("fashion_mnist", tmp_path / "other", source=tmp_path)
    assert contents(packed.path) == contents(unpacked.path)
    assert set(contents(out)) == set(NAMES)
    assert "PROJECT_SOURCE" not in (out / "manifest.json").read_text(encoding="utf-8")


def test_a_second_build_touches_nothing_and_force_makes_the_same(sample, out):
    build("fashion_mnist", out, source=sample)
    before = {path: path.stat() for path in out.iterdir()}
    assert build("fashion_mnist", out, source=sample).origin == ""
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == {p: s.st_mtime_ns for p, s in before.items()}
    bytes_before = contents(out)
    assert build("fashion_mnist", out, source=sample, force=True).origin == "PROJECT_SOURCE"
    assert contents(out) == bytes_before
    assert any(path.stat().st_ino != before[path].st_ino for path in out.iterdir()) or os.name == "nt"


def test_other_files_make_other_data(sample, out, tmp_path):
    first = build("fashion_mnist", out, source=sample).hash
    second = build("fashion_mnist", out, source=publication(tmp_path / "p", 120, 20))
    assert second.hash != first and len(second.labels) == 140 and second.origin == "PROJECT_SOURCE"


def test_rows_are_in_published_order_and_splits_hold(sample, out):
    data = build("fashion_mnist", out, source=sample)
    source = find("fashion_mnist", source=sample)
    raw = (
        read_content(source.files["train-images-idx3-ubyte"])[16:]
        + read_content(source.files["t10k-images-idx3-ubyte"])[16:]
    )
    assert data.images.tobytes() == raw
    train, val, test = (data.splits[name] for name in ("train", "val", "test"))
    assert sorted([*train, *val]) == list(range(500)) and test.tolist() == list(range(500, 600))
    images, labels = data.split("val")
    assert np.array_equal(images, data.images[val]) and np.array_equal(labels, data.labels[val])
    assert np.bincount(data.split("test")[1]).tolist() == [10] * 10
    scaled = data.split("train")[0] / 255
    assert data.manifest["pixels"]["mean"] == pytest.approx(scaled.mean(), rel=1e-12)
    assert data.manifest["pixels"]["std"] == pytest.approx(scaled.std(), rel=1e-12)
    assert isinstance(data.images, np.memmap) and not data.images.flags.writeable
    with pytest.raises(ValueError, match="expected one of train, val, test, got 'tran'. Did you mean 'train'"):
        data.split("tran")


def test_the_split_is_the_one_recorded_here():
    """These numbers were written down once; a change means that nobody's validation set is comparable any more."""
    labels = np.arange(60_000) % 10
    rest, held = stratified_split(labels, 1 / 12, seed=0)
    assert (len(rest), len(held)) == (55_000, 5_000) and np.bincount(labels[held]).tolist() == [500] * 10
    assert hashlib.sha256(held.astype("<i8").tobytes()).hexdigest()[:16] == "55dbeb61edf52012"
    assert not np.array_equal(held, stratified_split(labels, 1 / 12, seed=1)[1])


def test_the_split_shares_by_size_and_keeps_what_it_must():
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    assert np.bincount(labels[stratified_split(labels, 11)[1]]).tolist() == [8, 2, 1]  # 7.7, 2.2, 1.1
    keep = np.zeros(100, bool)
    keep[:60] = True
    assert stratified_split(labels, 0.1, keep=keep)[1].min() >= 60
    for wrong in (2, 98, 0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="held_out: expected 3 to 97 of the 100 rows"):
            stratified_split(labels, wrong)
    with pytest.raises(
        ValueError, match="class 0: expected enough rows to hold out 7 and keep one, found 70, of which 5"
    ):
        stratified_split(labels, 10, keep=np.arange(100) < 65)


def test_copies_and_contradictions_leave_training_and_are_listed(out, tmp_path):
    folder = publication(tmp_path / "p", 240, 20)
    path = folder / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    image = content[16 : 16 + 784]
    for row in range(10, 200, 10):  # the same label, for most of class 0
        content[16 + row * 784 : 16 + (row + 1) * 784] = image
    content[16 + 239 * 784 : 16 + 240 * 784] = content[16 + 238 * 784 : 16 + 239 * 784]  # labels 8 and 9
    content[16 + 77 * 784 : 16 + 78 * 784] = bytes(784)
    path.write_bytes(content)
    test = folder / "t10k-images-idx3-ubyte"
    test.write_bytes(test.read_bytes()[:-784] + content[16 + 9 * 784 : 16 + 10 * 784])  # row 9 again, as row 259
    data = build("fashion_mnist", out, source=folder)
    twins = data.manifest["duplicates"]["identical"]
    assert twins["list"] == [list(range(0, 200, 10)), [9, 259], [238, 239]]
    assert (twins["groups"], twins["rows"], twins["with_two_labels"], twins["in_train_and_test"]) == (3, 24, 1, 1)
    kinds = {r["row"]: r["kind"] for r in data.manifest["rejects"]}
    gone = {9: "copy", 77: "blank", 238: "conflict", 239: "conflict"} | dict.fromkeys(range(10, 200, 10), "copy")
    assert kinds == gone and len(data.labels) == 260  # they are stored, and used for nothing
    used = np.concatenate(list(data.splits.values())).tolist()
    assert sorted(used) == [row for row in range(260) if row not in gone]
    assert sum(data.manifest["counts"]["train"].values()) == len(data.splits["train"])
    assert data.splits["test"].tolist() == list(range(240, 260))


# ---- the published files themselves, where they can be had from a package


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The published files: the Debian package, installed or downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROJECT_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            yield find("fashion_mnist", source="", places=("package", "apt"))
        except SourceError as e:
            pytest.skip(f"the published files can't be had here: {e}")


def test_the_sample_is_drawn_from_the_published_files(real, sample):
    for part, each in (("train", 50), ("t10k", 10)):
        images, labels = (read_idx(real.files[f"{part}-{kind}-ubyte"]) for kind in ("images-idx3", "labels-idx1"))
        rows = stratified_split(labels, each * 10, seed=20170828)[1]
        assert np.array_equal(read_idx(sample / f"{part}-images-idx3-ubyte.gz"), images[rows])
        assert np.array_equal(read_idx(sample / f"{part}-labels-idx1-ubyte.gz"), labels[rows])


def test_the_published_data_is_the_recorded_one(real, root, out):
    """`data.dvc` holds the hash of what a build makes, here computed without DVC."""
    data = build("fashion_mnist", out, source=real.files["train-images-idx3-ubyte"].parent)
    assert data.manifest["published"]
    assert {name: sum(c.values()) for name, c in data.manifest["counts"].items()} == {
        "train": 55000,
        "val": 5000,
        "test": 10000,
    }
    listing = [{"md5": hashlib.md5(c).hexdigest(), "relpath": name} for name, c in contents(out).items()]
    recorded = hashlib.md5(json.dumps(listing).encode()).hexdigest()  # DVC's hash of a folder
    assert f"md5: {recorded}.dir\n" in (root / "data.dvc").read_text(encoding="utf-8")


def test_dvc_is_clean_after_a_build_and_sees_a_changed_byte(sample, tmp_path, monkeypatch, root):
    pytest.importorskip("dvc")
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in (".dvcignore", ".gitignore", "settings.ini"):
        shutil.copy(root / name, repository)
    (repository / ".dvc").mkdir()
    shutil.copy(root / ".dvc" / "config", repository / ".dvc")
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    monkeypatch.setenv("PROJECT_ROOT", str(repository))
    monkeypatch.setenv("PROJECT_DATA", str(repository / "data"))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    record = repository / "data.dvc"

    def dvc(*words):
        command = [sys.executable, "-m", "dvc", *words]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout

    record.write_text("outs:\n- path: data/fashion_mnist\n", encoding="utf-8")
    assert build("fashion_mnist", source=sample).dvc.startswith("not as recorded in data.dvc")
    dvc("commit", "--force", "data.dvc")
    recorded = record.read_text(encoding="utf-8")
    shutil.rmtree(repository / "data")
    shutil.rmtree(repository / ".dvc" / "cache")  # as in a fresh clone
    data = build("fashion_mnist", source=sample)
    assert data.dvc == "as recorded in data.dvc" and record.read_text(encoding="utf-8") == recorded
    assert "up to date" in dvc("status")
    with (data.path / "images.npy").open("r+b") as f:
        f.seek(5000)
        f.write(bytes([data.images.flat[5000 - 128] ^ 1]))
    assert "modified:" in dvc("status") and "data/fashion_mnist" in dvc("status").replace(os.sep, "/")


# ---- texts, sets of another origin, drawn test sets


NEWS = ("election", "storm", "budget", "court", "border", "virus", "senate", "strike", "police", "island", "energy")


def article(i):
    """Some forty words, unlike those of any other number."""
    rng = np.random.default_rng(i)
    return f"Report {i}: " + " ".join(f"{rng.choice(NEWS)}{rng.integers(50)}" for _ in range(40)) + "."


def table(path, header, rows):
    """Write a CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])


def news(folder, real=90, other=True):
    """ISOT's two files, and articles of another origin: made, with duplicates of each kind."""
    columns = ("title", "text", "subject", "date")
    fakes = [(f"WOW {i}", article(i), "News", "") for i in range(60)]
    fakes += [("wow 3", article(3).upper(), "News", ""), ("WOW 500", article(400) + " again", "News", "")]
    trues = [(f"Report {i}", f"PARIS (Reuters) - {article(i)}", "politicsNews", "") for i in range(400, 400 + real)]
    trues += [("WOW 5", article(5), "politicsNews", ""), ("Empty", " ", "politicsNews", "")]
    trues += [(f"Report {i}", article(i) + " Update", "politicsNews", "") for i in (410, 411, 412)]
    table(folder / "fake_news" / "Fake.csv", columns, fakes)
    table(folder / "fake_news" / "True.csv", columns, trues)
    if other:
        rows = [("Celebrity", f"{i}.txt", f"T {i}", article(900 + i), ("fake", "real")[i % 2]) for i in range(6)]
        rows += [
            ("Horne2017-Random", "s", "S", article(950), "satire"),
            ("Celebrity", "x", "A", article(7), "fake"),
        ]
        table(folder / "fake_news" / "ood_articles.csv", ("dataset", "file", "title", "text", "label"), rows)
    return folder


def test_texts_are_stored_cleaned_and_split(tmp_path, out):
    data = build("fake_news", out, source=news(tmp_path / "n"))
    assert data.kind == "text" and data.images is None and isinstance(data.inputs, Texts) and data.inputs is data.texts
    assert {p.name for p in out.iterdir()} == {*NAMES[1:], "texts.npy", "offsets.npy", "ids.json"}
    assert data.manifest["fields"] == ["title", "text"] and data.manifest["shape"] == []
    assert isinstance(data.texts.blob, np.memmap) and not data.texts.blob.flags.writeable
    assert data.ood == ["ood-celebrity", "ood-satire"] and list(data.splits) == ["train", "val", "test", *data.ood]
    texts, labels = data.split("ood-satire")
    assert texts.column("title") == ["S"] and labels.tolist() == [-1]
    assert data.manifest["counts"]["ood-satire"]["none"] == 1
    assert [data.ids[row] for row in data.splits["ood-satire"]] == ["ood_articles.csv:8"]
    assert len(data.ids) == len(data.texts) == len(data.labels) == data.manifest["rows"]
    assert "(Reuters)" not in "".join(data.texts.joined()) and data.manifest["notes"]["datelines removed"] == 90
    assert "ood-celebrity" in data._repr_markdown_() and "| none |" in data._repr_markdown_()
    assert "title and text" in repr(data) and data.verify() is data


def test_texts_that_are_copies_or_nearly_so_stand_on_one_side(tmp_path, out):
    data = build("fake_news", out, source=news(tmp_path / "n"))
    why = {data.ids[r["row"]]: r["kind"] for r in data.manifest["rejects"] if "kind" in r}
    assert why == {"Fake.csv:7": "conflict", "True.csv:92": "conflict", "Fake.csv:62": "copy"}
    assert [r["reason"] for r in data.manifest["rejects"] if "kind" not in r] == ["an empty text"]
    near = data.manifest["duplicates"]["near"]
    assert near["groups"] == 4 and near["with_two_labels"] == 1
    where = {int(row): name for name, rows in data.splits.items() for row in rows}
    assert all(len({where[row] for row in group}) == 1 for group in near["list"])
    shared = data.manifest["duplicates"]["ood"]["ood-celebrity"]
    assert (shared["rows_in_train"], shared["rows_in_test"]) == (1, 0)
    texts = data.texts.joined()
    sides = [texts[row] for name in ("train", "val", "test") for row in data.splits[name]]
    ends = np.cumsum([len(data.splits[name]) for name in ("train", "val", "test")])
    for group in near_texts(sides):
        assert len(set(np.searchsorted(ends, group, side="right"))) == 1


def test_where_nothing_is_published_for_testing_a_share_is_drawn(tmp_path, out):
    data = build("fake_news", out, source=news(tmp_path / "n"))
    counts = data.manifest["counts"]
    known = 62 + 94 - 3
    assert sum(map(len, (data.splits[s] for s in ("train", "val", "test")))) == known
    assert len(data.splits["test"]) == round(known * 0.15) == sum(counts["test"].values())
    assert abs(counts["test"]["fake"] - 0.15 * 60) < 1
    other = build("fake_news", tmp_path / "other", source=news(tmp_path / "m", other=False))
    first, second = ({d.ids[i] for i in d.splits["test"]} for d in (data, other))
    assert first == second and not other.ood  # sets of another origin have no say in the split


def test_a_second_build_of_texts_reads_nothing_and_a_changed_source_is_noticed(tmp_path, out):
    source = news(tmp_path / "n")
    data = build("fake_news", out, source=source)
    start = time.perf_counter()
    assert build("fake_news", out, source=source).origin == "" and time.perf_counter() - start < 1
    assert build("fake_news", out, source="").hash == data.hash  # no source is named: what is there already
    before = contents(out)
    news(tmp_path / "n", real=91)
    changed = build("fake_news", out, source=source)
    assert changed.origin == "PROJECT_SOURCE" and changed.hash != data.hash
    assert len(changed.labels) == len(data.labels) + 1
    news(tmp_path / "n")
    assert build("fake_news", out, source=source).origin and contents(out) == before


@pytest.mark.parametrize("name", ["texts.npy", "offsets.npy", "ids.json"])
def test_texts_that_are_cut_are_told(tmp_path, out, name):
    source = news(tmp_path / "n")
    build("fake_news", out, source=source)
    os.truncate(out / name, (out / name).stat().st_size - 8)
    with pytest.raises(DataError, match=f"{name}: expected"):
        open_data("fake_news", out)
    assert build("fake_news", out, source=source).verify().origin
    manifest = read_json(out / "manifest.json")
    offsets = np.load(out / "offsets.npy")
    offsets[3], offsets[4] = offsets[4], offsets[3]
    np.save(out / "offsets.npy", offsets)
    with pytest.raises(DataError, match="one after the other"):
        open_data("fake_news", out)
    write_json(out / "manifest.json", manifest | {"fields": ["title", "text", "date"]})
    with pytest.raises(DataError, match="expected whole arrays, found damage"):
        open_data("fake_news", out)


def test_a_split_of_unknown_classes_is_refused(tmp_path, out):
    build("fake_news", out, source=news(tmp_path / "n"))
    manifest, splits = read_json(out / "manifest.json"), read_json(out / "splits.json")
    for wrong in ({"test": splits["ood-satire"]}, {"val": []}):
        text = json.dumps({"train": splits["train"], **wrong})
        (out / "splits.json").write_text(text, encoding="utf-8")
        manifest["files"]["splits.json"]["size"] = len(text)
        write_json(out / "manifest.json", manifest)
        with pytest.raises(DataError, match="a split without rows or a row without a class"):
            open_data("fake_news", out)


def test_faces_with_a_near_copy_in_the_test_part(tmp_path, out):
    rng = np.random.default_rng(0)
    folder = tmp_path / "f" / "face_emotion"
    for part, n in (("train", 20), ("test", 6)):
        for name in ("Angry", "Happy"):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                small = Image.fromarray(rng.integers(0, 256, (12, 12), np.uint8))
                small.resize((48, 48), Image.Resampling.BICUBIC).save(folder / part / name / f"{i:02}.png")
    Image.open(folder / "test/Angry/03.png").save(folder / "train/Angry/07.jpg", quality=80)
    Image.fromarray(np.full((48, 48), 9, np.uint8)).save(folder / "train/Happy/30.png")
    shutil.copy(folder / "train/Happy/04.png", folder / "train/Happy/31.png")
    (folder / "train/Happy/32.png").write_bytes(b"nothing of the kind")
    data = build("face_emotion", out, source=tmp_path / "f")
    reasons = {r["file"]: r["reason"] for r in data.manifest["rejects"]}
    assert reasons.pop("train/Happy/32.png")
    assert reasons == {
        "train/Angry/07.jpg": "near duplicate of a test row: test/Angry/03.png",
        "train/Happy/30.png": "all pixels alike",
        "train/Happy/31.png": "copy: the same as train/Happy/04.png",
    }
    assert data.manifest["duplicates"]["near"]["left_out"] == 1 and data.manifest["cleaning"]["version"] == 2
    assert data.manifest["test_part"] == "test part of the files"
    assert data.classes == ["angry", "happy"] and data.manifest["counts"]["test"] == {"angry": 6, "happy": 6}
    assert len(data.splits["train"]) + len(data.splits["val"]) == 40
    assert [data.ids[i] for i in data.splits["test"]][:2] == ["test/Angry/00.png", "test/Angry/01.png"]


# ---- more than memory holds


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
from project.data.sources import Source
from project.data.store import _write, open_data
from project.data.tasks import Examples, get_task

def data_bytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmData:")).split()[1]) << 10

made, out = Path(sys.argv[1]), Path(sys.argv[2])
images = np.memmap(made, np.uint8, "r", shape=(1000, 256, 256, 3))
labels, part = np.arange(1000) % 4, np.repeat([0, 1], [900, 100])
examples = Examples(images, labels, ("a", "b", "c", "d"), part, ("train", "test"))
np.ones((64, 64)) @ np.ones((64, 64))  # BLAS takes its buffers
limit = data_bytes() + (44 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
assert images.nbytes > 4 * (44 << 20)
try:
    np.array(images)
    sys.exit("the set fits into memory: nothing is shown")
except MemoryError:
    pass
_write(get_task("dog_breeds"), Source("here", {}, {}, False), examples, out)
data = open_data("dog_breeds", out).verify()
seen = sum(int(data.images[rows].max()) > 0 for rows in np.array_split(data.splits["train"], 60))
assert seen == 60 and data.images.shape == images.shape and len(data.splits["test"]) == 100
assert data.manifest["duplicates"]["near"]["list"] == [[10, 890]]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on a process's memory")
def test_a_set_several_times_as_large_as_memory_is_cleaned_written_and_read(tmp_path):
    """197 MB of images, and 44 MB that a process may take."""
    images = np.memmap(tmp_path / "made", np.uint8, "w+", shape=(1000, 256, 256, 3))
    for i, small in enumerate(np.random.default_rng(0).integers(0, 256, (1000, 16, 16, 1), np.uint8)):
        images[i] = small.repeat(16, 0).repeat(16, 1)
    images[890] = images[10] // 2 + 60
    images.flush()
    (tmp_path / "dog_breeds").mkdir()
    command = [sys.executable, "-c", LARGE, tmp_path / "made", tmp_path / "dog_breeds"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- bad input


@pytest.mark.parametrize("name", NAMES)
def test_opening_names_what_is_missing_or_cut(sample, out, name):
    build("fashion_mnist", out, source=sample)
    os.truncate(out / name, (out / name).stat().st_size - 1 if name != "manifest.json" else 500)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        open_data("fashion_mnist", out)
    (out / name).unlink()
    with pytest.raises(DataError, match=r"Run: project data build fashion_mnist"):
        open_data("fashion_mnist", out)
    assert build("fashion_mnist", out, source=sample).verify().origin  # a build mends it


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": 3}, "expected data of format 2 or older, found 3"),
        ({"format": None}, "expected data of format 2, found no number of a format"),
        ({"format": "2"}, "found no number of a format"),
        ({"task": "other"}, "expected the task fashion_mnist, found other"),
        ({"rows": 599}, "expected images of \\(599, 28, 28\\)"),
        ({"classes": ["one"]}, "600 labels from 0 to 0"),
        ({"hash": ...}, "expected the key 'hash', found none"),
    ],
)
def test_opening_checks_the_manifest(sample, out, change, expected):
    manifest = {**build("fashion_mnist", out, source=sample).manifest, **change}
    write_json(out / "manifest.json", {key: value for key, value in manifest.items() if value is not ...})
    with pytest.raises(DataError, match=expected):
        open_data("fashion_mnist", out)


def test_older_data_is_read_and_a_build_renews_it(sample, out):
    manifest = build("fashion_mnist", out, source=sample).manifest
    old = {key: value for key, value in manifest.items() if key not in ("fields", "cleaning", "notes")} | {"format": 1}
    write_json(out / "manifest.json", old)
    data = open_data("fashion_mnist", out)
    assert len(data.split("val")[0]) == 42 and data.ids == [] and data.ood == [] and data.inputs is data.images
    assert build("fashion_mnist", out, source=sample).manifest == manifest


def test_opening_refuses_a_row_in_two_splits(sample, out):
    build("fashion_mnist", out, source=sample)
    path = out / "splits.json"
    splits = read_json(path)
    splits["val"][0] = splits["train"][0]
    text = json.dumps(splits)
    path.write_text(text, encoding="utf-8")
    manifest = read_json(out / "manifest.json")
    manifest["files"]["splits.json"]["size"] = path.stat().st_size
    write_json(out / "manifest.json", manifest)
    with pytest.raises(DataError, match="splits with each row at most once"):
        open_data("fashion_mnist", out)
    with pytest.raises(DataError, match="it is not what was built"):
        open_data_unchecked(out).verify()


def open_data_unchecked(out):
    """Data whose manifest claims sizes that fit, as somebody who patched both would have it."""
    from project.data.store import Data

    return Data(out, read_json(out / "manifest.json"), np.zeros((1, 28, 28)), np.zeros(1), {})


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "t10k-images-idx3-ubyte",
            struct.pack(">4I", 0x803, 10, 28, 28) + bytes(7839),
            "10 x 28 x 28 values after the head",
        ),
        (
            "t10k-images-idx3-ubyte",
            struct.pack(">4I", 0x803, 20, 32, 32) + bytes(20480),
            "expected images of 28 x 28, found 32 x 32",
        ),
        ("t10k-labels-idx1-ubyte", struct.pack(">2I", 0x801, 19) + bytes(19), "found 20 images and 19 labels"),
        (
            "train-labels-idx1-ubyte",
            struct.pack(">2I", 0x801, 240) + bytes([10] * 240),
            "labels from 0 to 9, found 10 in row 0",
        ),
        (
            "train-labels-idx1-ubyte",
            struct.pack(">2I", 0x801, 240) + bytes([1] * 239 + [2]),
            "class Pullover: expected enough rows",
        ),
    ],
)
def test_bad_files_leave_the_old_data_and_nothing_half_written(sample, out, tmp_path, name, content, expected):
    build("fashion_mnist", out, source=sample)
    before = contents(out)
    folder = publication(tmp_path / "p", 240, 20)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        build("fashion_mnist", out, source=folder)
    assert contents(out) == before
    assert {p.name for p in out.parent.iterdir()} == {"fashion_mnist", ".fashion_mnist.lock"}


def test_a_build_replaces_nothing_that_no_build_made(sample, tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable", encoding="utf-8")
    with pytest.raises(DataError, match="found 'thesis.txt'. Choose an empty folder"):
        build("fashion_mnist", tmp_path, source=sample, force=True)
    with pytest.raises(DataError, match="expected a folder or nothing, found a file"):
        build("fashion_mnist", tmp_path / "thesis.txt", source=sample)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "irreplaceable"
    with pytest.raises(ValueError, match="Did you mean 'fashion_mnist'"):
        build("fashion-mnist")


# ---- killed, raced, starved


def start(out, source, *words, code="build('fashion_mnist', sys.argv[1], source=sys.argv[2], force=True)"):
    """A build in a process of its own."""
    script = (
        f"import sys, resource\n{words[0]}\nfrom project.data.store import build\n{code}"
        if words
        else (f"import sys\nfrom project.data.store import build\n{code}")
    )
    return subprocess.Popen([sys.executable, "-c", script, out, source], stderr=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_the_old_data(sample, out, tmp_path):
    """Kill builds of a larger set at moments spread over their length; the old or the new data is there, whole."""
    old = build("fashion_mnist", out, source=sample).hash
    source = publication(tmp_path / "p", 400, 100)
    new = build("fashion_mnist", tmp_path / "new", source=source).hash
    seen = set()
    for attempt in range(12):
        process = start(out, source)
        writing = out.with_name(".fashion_mnist.new")
        while not writing.exists() and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(0.002 * attempt)  # writing takes some 20 ms
        process.kill()
        process.wait()
        process.stderr.close()
        data = open_data("fashion_mnist", out)
        seen.add(data.verify().hash)
        if data.hash == new:
            break
    assert seen <= {old, new} and old in seen
    assert build("fashion_mnist", out, source=source).hash == new
    assert {p.name for p in out.parent.iterdir()} == {"fashion_mnist", ".fashion_mnist.lock"}  # no litter


def test_a_kill_between_the_two_renames_is_mended(sample, out, tmp_path):
    old = build("fashion_mnist", out, source=sample).hash
    out.rename(out.with_name(".fashion_mnist.old"))  # the state that such a kill leaves
    assert open_data("fashion_mnist", out).hash == old
    out.rename(out.with_name(".fashion_mnist.old"))
    with pytest.raises(SourceError):  # a build that fails later must bring it back, too
        build("fashion_mnist", out, source=tmp_path / "nowhere")
    assert build("fashion_mnist", out, source=sample).origin == ""


def test_builds_at_once_give_one_result(sample, out):
    script = (
        "import sys; from project.data.store import build; print('ready', flush=True); input()\n"
        "data = build('fashion_mnist', sys.argv[1], source=sys.argv[2]).verify(); print(data.hash, data.origin)"
    )
    command = [sys.executable, "-c", script, out, sample]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    assert [p.stdout.readline() for p in processes] == ["ready\n"] * 3
    for process in processes:  # all start within a moment
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({line[0] for line in found}) == 1
    assert sorted(line[1:] for line in found) == [[], [], ["PROJECT_SOURCE"]]  # one built, two found it made


def test_a_reader_during_builds_sees_whole_data(sample, out, tmp_path):
    other = publication(tmp_path / "p", 500, 100)
    hashes = {build("fashion_mnist", out, source=other).hash, build("fashion_mnist", out, source=sample).hash}
    loop = "for i in range(20): build('fashion_mnist', sys.argv[1], source=sys.argv[2 + i % 2], force=True)"
    script = f"import sys\nfrom project.data.store import build\n{loop}"
    process = subprocess.Popen([sys.executable, "-c", script, out, sample, other])
    seen = set()
    while process.poll() is None:
        seen.add(open_data("fashion_mnist", out).hash)
    assert process.returncode == 0 and seen == hashes


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE is a limit of POSIX systems")
def test_a_disk_that_fills_up_leaves_the_old_data(sample, out, tmp_path):
    """A limit on file size stops the writing in the midst of images.npy, as a full disk would."""
    build("fashion_mnist", out, source=sample)
    before = contents(out)
    source = publication(tmp_path / "p", 400, 100)  # 392 kB of images
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    process = start(out, source, limit)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "OSError: [Errno 27]" in error and "Nothing was changed" in error
    assert contents(out) == before
    assert {p.name for p in out.parent.iterdir()} == {"fashion_mnist", ".fashion_mnist.lock"}


@pytest.mark.parametrize("small_disk", ["400k"], indirect=True)
def test_a_full_disk_is_told_before_anything_is_written(sample, small_disk):
    """A real, tiny file system where this process may mount one."""
    with pytest.raises(OSError, match="are needed and .* are free"):
        build("fashion_mnist", small_disk / "fashion_mnist", source=sample)
    assert {p.name for p in small_disk.iterdir()} == {".fashion_mnist.lock"}


def test_the_store_imports_little():
    """What the API image does without must not come in through here."""
    heavy = ("torch", "pandas", "lightning", "fsspec", "dvc", "matplotlib")
    script = f"import sys, project.data.store; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == "[]"


# ---- too small to split


@pytest.mark.parametrize(
    ("each", "takes", "part"),
    [
        ({"happy": 4, "sad": 4}, 15, "the 10.0% drawn for testing hold each of 2 classes, found 8 "),
        ({"happy": 4, "sad": 4, "fear": 4}, 26, "the 10.0% drawn for testing hold each of 3 classes, found 12 "),
        ({"happy": 8, "sad": 7}, 18, "the 8.3% drawn for validation hold each of 2 classes, found 13 "),
    ],
)
def test_a_set_too_small_to_split_says_what_it_would_take(tmp_path, out, each, takes, part):
    rng = np.random.default_rng(1)
    for name, n in each.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (48, 48), np.uint8)).save(tmp_path / "set" / name / f"{i}.png")
    with pytest.raises(SourceError) as told:
        build("face_emotion", out, source=tmp_path / "set")
    assert f"face_emotion: expected at least {takes} training rows, so that {part}" in str(told.value)
    assert "Add examples, or take classes away" in str(told.value) and not out.exists()


def test_a_class_too_small_to_split_is_named(tmp_path, out):
    rng = np.random.default_rng(1)
    for name, n in (("happy", 60), ("sad", 60), ("fear", 2)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (48, 48), np.uint8)).save(tmp_path / "set" / name / f"{i}.png")
    with pytest.raises(SourceError, match="face_emotion: rows for validation: class fear: expected enough rows"):
        build("face_emotion", out, source=tmp_path / "set")


def test_a_folder_that_is_mounted_by_itself_is_named(tmp_path, small_disk):
    (small_disk / "images.npy").write_bytes(b"old")
    with pytest.raises(store.DataError, match="mounted by itself"), store._replacing(small_disk) as new:
        (new / "images.npy").write_bytes(b"new")
    assert (small_disk / "images.npy").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["small"]
