"""project.bundle.manifest where a lesson would be boring: every file, every field, hostile ONNX, kills."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from project.bundle import manifest as m
from project.bundle.manifest import (
    FORMAT,
    BundleError,
    check_images,
    onnx_session,
    open_bundle,
    run_bundle,
    staged,
    write_manifest,
)


def toy(shape=(4, 4), domain="", nodes=(), initializers=(), functions=()):
    """A model that calls an image bright or dark by its mean, with room for mischief."""
    value, tensor = helper.make_tensor_value_info, helper.make_tensor
    chain = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["rows"]),
        helper.make_node("ReduceMean", ["rows", "axis"], ["embedding"], keepdims=1),
        helper.make_node("Sub", ["embedding", "half"], ["above"]),
        helper.make_node("Mul", ["above", "sign"], ["logits"], domain=domain),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        *nodes,
    ]
    graph = helper.make_graph(
        chain,
        "toy",
        [value("images", TensorProto.UINT8, ["batch", *shape])],
        [
            value("probabilities", TensorProto.FLOAT, ["batch", 2]),
            value("embedding", TensorProto.FLOAT, ["batch", 1]),
        ],
        [
            tensor("half", TensorProto.FLOAT, [1], [127.0]),
            tensor("sign", TensorProto.FLOAT, [1, 2], [1.0, -1.0]),
            tensor("axis", TensorProto.INT64, [1], [1]),
            *initializers,
        ],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def fields(shape=(4, 4), layout="NHW", **changes):
    """A manifest's fields for the toy."""
    return {
        "task": "brightness",
        "kind": "image",
        "classes": ["bright", "dark"],
        "metrics": {"test/accuracy": 0.5},
        "input": {
            "name": "images",
            "dtype": "uint8",
            "layout": layout,
            "shape": [None, *shape],
            "channels": 1 if layout == "NHW" else shape[-1],
        },
        "outputs": {
            "probabilities": {"dtype": "float32", "shape": [None, 2]},
            "embedding": {"dtype": "float32", "shape": [None, 1]},
        },
    } | changes


@pytest.fixture
def folder(tmp_path):
    """A small bundle with three files."""
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "model.onnx").write_bytes(toy().SerializeToString())
    (path / "weights.safetensors").write_bytes(bytes(range(100)))
    (path / "notes.json").write_text('{"a": 1}', encoding="utf-8")
    write_manifest(path, **fields())
    return path


def edit(folder, change):
    """Change the manifest behind the library's back."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content = change(content) or content
    path.write_text(json.dumps(content), encoding="utf-8")


# --- what is written


def test_same_files_same_hashes(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "manifest.json").unlink()
    assert write_manifest(other, **fields()).manifest["files"] == open_bundle(folder).manifest["files"]
    assert set(open_bundle(folder).manifest["files"]) == {"model.onnx", "weights.safetensors", "notes.json"}


def test_hash_covers_fields_and_files(folder):
    first = write_manifest(folder, **fields(created="then"))
    assert write_manifest(folder, **fields(created="then")).hash == first.hash
    assert write_manifest(folder, **fields(created="then", metrics={"test/accuracy": 0.6})).hash != first.hash
    (folder / "notes.json").write_text('{"a": 2}', encoding="utf-8")
    assert write_manifest(folder, **fields(created="then")).hash != first.hash


def test_manifest_says_when_and_with_what(folder):
    written = open_bundle(folder).manifest
    assert written["format"] == FORMAT
    assert written["created"].endswith("+00:00")
    assert written["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "onnxruntime" in written["versions"]


def test_write_refuses_without_model(tmp_path):
    with pytest.raises(BundleError, match=r"expected model\.onnx .* found no file"):
        write_manifest(tmp_path, **fields())


@pytest.mark.parametrize("metrics", [{"test/accuracy": float("nan")}, {"test/accuracy": np.float32(1)}])
def test_write_refuses_what_json_does_not_know(folder, metrics):
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="JSON"):
        write_manifest(folder, **fields(metrics=metrics))
    assert (folder / "manifest.json").read_bytes() == before


BAD_FIELDS = [
    ({"task": " "}, "task: expected a name"),
    ({"kind": "sound"}, "kind: expected one of image, text, found 'sound'"),
    ({"classes": ["one"]}, "classes: expected a list of two names"),
    ({"classes": ["a", ""]}, "classes: expected a list of two names"),
    ({"classes": ["a", "a"]}, r"expected each name once, found \['a'\]"),
    ({"classes": "ab"}, "classes: expected a list"),
    ({"classes": ["a", "b", "c"]}, "found 2 probabilities and 3 names"),
    ({"metrics": [1]}, "metrics: expected"),
    ({"temperature": 0}, "temperature: expected a number above 0, found 0"),
    ({"temperature": True}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"outputs": {}}, "outputs: expected probabilities and embedding"),
    ({"outputs": None}, "outputs: expected probabilities and embedding"),
    ({"input": None}, "input: expected name"),
    ({"input": fields()["input"] | {"dtype": "float32"}}, "input: expected dtype and channels"),
    ({"input": fields()["input"] | {"layout": "NCHW"}}, "input: expected layout"),
    ({"input": fields()["input"] | {"layout": "NHWC"}}, "input: expected layout"),
    ({"input": fields()["input"] | {"channels": 3}}, "input: expected dtype and channels"),
    ({"input": fields()["input"] | {"shape": [4, 4, 4]}}, "input: expected name"),
    ({"input": fields()["input"] | {"shape": [None, 4, -4]}}, "input: expected name"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS)
def test_bad_fields_refused_at_both_ends(folder, change, message):
    with pytest.raises(BundleError, match=message):
        write_manifest(folder, **fields(**change))
    edit(folder, lambda found: found | change)
    with pytest.raises(BundleError, match=message):
        open_bundle(folder)


def test_text_bundles_have_another_input(folder):
    tokens = {"name": "tokens", "dtype": "int64", "layout": "NT", "shape": [None, 128]}
    assert write_manifest(folder, **fields(kind="text", input=tokens)).kind == "text"


def test_a_file_is_added_later(folder):
    before = open_bundle(folder)
    (folder / "notebook.ipynb").write_text("{}", encoding="utf-8")
    after = write_manifest(folder, **before.manifest)
    assert set(after.manifest["files"]) - set(before.manifest["files"]) == {"notebook.ipynb"}
    assert {k: v for k, v in after.manifest.items() if k != "files"} == {
        k: v for k, v in before.manifest.items() if k != "files"
    }
    assert open_bundle(folder) == after


# --- what is opened


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "notes.json"])
def test_each_file_tampered(folder, name):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=rf"{name}: expected sha256 \w{{64}}, found \w{{64}}"):
        open_bundle(folder)
    path.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=rf"{name}: expected {len(content)} bytes, found {len(content) - 1}"):
        open_bundle(folder, verify=False)
    path.unlink()
    with pytest.raises(BundleError, match=rf"{name}: expected in the folder, as the manifest lists it, found nothing"):
        open_bundle(folder)
    path.write_bytes(content)
    assert open_bundle(folder).task == "brightness"


def test_verify_false_reads_no_file(folder):
    content = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(content[::-1])
    assert open_bundle(folder, verify=False).classes == ["bright", "dark"]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("entry", [None, [], {}, {"bytes": 100}, {"bytes": "100", "sha256": "0"}])
def test_entries_that_say_nothing(folder, entry, verify):
    edit(folder, lambda found: found["files"].update({"weights.safetensors": entry}))
    with pytest.raises(BundleError, match=r"weights\.safetensors: expected"):
        open_bundle(folder, verify=verify)


@pytest.mark.parametrize("value", ["many", None, 10**400, {}, {"rows": "x"}])
def test_strange_facts_are_shown_all_the_same(folder, value):
    edit(folder, lambda found: found | {"model": "m", "parameters": value, "parity": value, "metrics": {"x": value}})
    assert "| **model** | m |" in open_bundle(folder)._repr_markdown_()


def test_unlisted_file(folder):
    (folder / "more.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError, match=r"more\.json: expected only files that the manifest lists"):
        open_bundle(folder)


def test_folder_inside(folder):
    (folder / "sub").mkdir()
    with pytest.raises(BundleError, match="'sub', a folder"):
        open_bundle(folder)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
def test_links_refused(folder, tmp_path, name):
    target = tmp_path / "elsewhere"
    (folder / name).rename(target)
    (folder / name).symlink_to(target)
    with pytest.raises(BundleError, match="a link"):
        open_bundle(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_pipe_does_not_block(folder):
    os.mkfifo(folder / "notes.txt")
    with pytest.raises(BundleError, match="a device or pipe"):
        open_bundle(folder)


@pytest.mark.parametrize(
    "name", ["../weights.safetensors", "/etc/passwd", "a/b", "C:\\x", "", ".hidden", "a\n", "a" * 101]
)
def test_names_that_leave_the_folder(folder, name):
    edit(folder, lambda found: found["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="not a plain file name"):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["model.pt", "model.PKL", "last.ckpt", "pytorch_model.bin", "x.joblib"])
def test_pickles_refused_at_both_ends(folder, name):
    (folder / name).write_bytes(b"\x80\x04.")
    for act in (lambda: write_manifest(folder, **fields()), lambda: open_bundle(folder)):
        with pytest.raises(BundleError, match="pickle"):
            act()


@pytest.mark.parametrize("version", [None, "1", True, 0, 1.0])
def test_format_that_is_none(folder, version):
    edit(folder, lambda found: found | {"format": version})
    with pytest.raises(BundleError, match="expected format 1"):
        open_bundle(folder)


def test_newer_format(folder):
    # the future may change everything else: the format is looked at first
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT + 1}), encoding="utf-8")
    with pytest.raises(BundleError, match=rf"found {FORMAT + 1}. Update the package"):
        open_bundle(folder)


def test_fields_of_a_newer_version_are_kept(folder):
    edit(folder, lambda found: found | {"something_new": 1})
    assert open_bundle(folder).manifest["something_new"] == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"format": 1, "format": 1}', b"[" * 100_000]
)
def test_manifest_that_is_none(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(folder)


def test_manifest_too_large(folder, monkeypatch):
    monkeypatch.setattr(m, "_MANIFEST_LIMIT", 100)
    with pytest.raises(BundleError, match="larger than 100 B"):
        open_bundle(folder)


@pytest.mark.parametrize("listed", [None, [], {}, {"notes.json": {}}, "model.onnx"])
def test_files_that_are_no_list(folder, listed):
    edit(folder, lambda found: found | {"files": listed})
    with pytest.raises(BundleError, match=r"expected files with model\.onnx among them"):
        open_bundle(folder)


def test_no_bundle_at_all(folder, tmp_path):
    for path, found in [
        (tmp_path / "none", "no such folder"),
        (folder / "model.onnx", "a file"),
        (tmp_path, "a folder"),
    ]:
        with pytest.raises(BundleError, match=f"expected a bundle .* found {found}"):
            open_bundle(path)


# --- looking into ONNX


def outside(tensor):
    """The same tensor, said to lie in another file."""
    tensor.external_data.add(key="location", value="other.bin")
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def number(name="number"):
    """A tensor."""
    return helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0])


def branch(*initializers):
    """A graph for one side of an If."""
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
    return helper.make_graph([helper.make_node("Identity", ["number"], ["out"])], "branch", [], [out], initializers)


def hostile():
    """ONNX models that lead outside themselves, and how."""
    sparse = helper.make_sparse_tensor(outside(number()), helper.make_tensor("i", TensorProto.INT64, [1], [0]), [4])
    same, opset = helper.make_node("Identity", ["a"], ["b"]), [helper.make_opsetid("", 20)]
    yield "operator", toy(domain="my.plugin"), "my.plugin"
    yield "initializer", toy(initializers=[outside(number())]), "external data"
    yield "constant", toy(nodes=[helper.make_node("Constant", [], ["c"], value=outside(number()))]), "external data"
    yield "sparse constant", toy(nodes=[helper.make_node("Constant", [], ["c"], sparse_value=sparse)]), "external data"
    inside = helper.make_node("If", ["c"], ["o"], then_branch=branch(outside(number())), else_branch=branch(number()))
    yield "branch", toy(nodes=[inside]), "external data"
    yield "function's domain", toy(functions=[helper.make_function("mine", "f", ["a"], ["b"], [same], opset)]), "mine"
    strange = helper.make_node("Steal", ["a"], ["b"], domain="theirs")
    yield "in a function", toy(functions=[helper.make_function("", "f", ["a"], ["b"], [strange], opset)]), "theirs"
    location_only = toy()
    location_only.graph.initializer[0].data_location = TensorProto.EXTERNAL
    yield "location alone", location_only, "external data"
    imported = toy()
    imported.opset_import.append(helper.make_opsetid("imported", 1))
    yield "import", imported, "imported"


@pytest.mark.parametrize(("model", "found"), [pytest.param(*case[1:], id=case[0]) for case in hostile()])
def test_onnx_that_leads_outside(folder, model, found):
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        BundleError, match=rf"model\.onnx: expected a model that is complete in itself, found .*{found}"
    ):
        write_manifest(folder, **fields())
    content = (folder / "model.onnx").read_bytes()
    entry = {"bytes": len(content), "sha256": m.sha256(content)}
    edit(folder, lambda listed: listed["files"].update({"model.onnx": entry}))
    with pytest.raises(BundleError, match=found):
        open_bundle(folder)


def test_onnxruntime_operators_are_welcome(folder):
    model = toy()
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(folder, **fields())
    assert run_bundle(open_bundle(folder), np.zeros((1, 4, 4), np.uint8))[0].argmax() == 1


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"PK\x03\x04 not a model", toy().SerializeToString()[:-3], b"\xff" * 40]
)
def test_onnx_that_is_none(folder, content):
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx: expected an ONNX model, found something else"):
        write_manifest(folder, **fields())


def test_scan_survives_any_bytes():
    rng, good = random.Random(0), toy().SerializeToString()
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        with contextlib.suppress(IndexError):  # the one way in which it says that the bytes are no model
            assert isinstance(m._scan_onnx(bytes(bad)), str)


def test_scan_knows_all_of_onnx():
    """Each way in onnx.proto3 from a model to a tensor or a domain is in the table: no skipped field can hide one."""
    import onnx.onnx_ml_pb2 as schema

    leads = {"TensorProto", "OperatorSetIdProto", "NodeProto", "FunctionProto"}
    messages = schema.DESCRIPTOR.message_types_by_name
    parts = {n: {f.number: f.message_type.name for f in d.fields if f.message_type} for n, d in messages.items()}
    for _ in parts:
        leads |= {name for name, inner in parts.items() if leads & set(inner.values())}
    for name, table in m._ONNX.items():
        assert {v for v in table.values() if v in messages} <= set(m._ONNX)
        wanted = {number: inner for number, inner in parts[name].items() if inner in leads}
        assert {k: v for k, v in table.items() if v in messages} == wanted, name
        known = {f.name: f.number for f in messages[name].fields}
        if name != "ModelProto" and "domain" in known:
            assert table[known["domain"]] == "domain"
    tensor = {f.name: f.number for f in messages["TensorProto"].fields}
    assert m._ONNX["TensorProto"] == {tensor["external_data"]: "external", tensor["data_location"]: "external"}
    assert onnx.TensorProto.DEFAULT == 0


# --- running


@pytest.fixture
def colour(tmp_path):
    """A bundle that takes colour images."""
    path = tmp_path / "colour"
    path.mkdir()
    (path / "model.onnx").write_bytes(toy((4, 6, 3)).SerializeToString())
    return write_manifest(path, **fields((4, 6, 3), "NHWC"))


def test_answers_do_not_depend_on_the_batch(folder):
    bundle, images = open_bundle(folder), np.random.default_rng(0).integers(0, 256, (23, 4, 4), np.uint8)
    session = onnx_session(bundle, threads=1)
    probabilities, embedding = run_bundle(bundle, images, session=session)
    assert probabilities.dtype == embedding.dtype == np.float32
    np.testing.assert_allclose(embedding[:, 0], images.mean((1, 2)), rtol=1e-5)
    for size in (1, 2, 7, 23):
        np.testing.assert_array_equal(run_bundle(bundle, images, size, session)[0], probabilities)


def test_images_that_cannot_be_written_to(folder, tmp_path):
    np.save(tmp_path / "images.npy", np.full((3, 4, 4), 255, np.uint8))
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert (run_bundle(open_bundle(folder), images[::-1])[0].argmax(1) == 0).all()


def test_no_images_no_answers(folder):
    probabilities, embedding = run_bundle(open_bundle(folder), np.empty((0, 4, 4), np.uint8))
    assert (probabilities.shape, embedding.shape) == ((0, 2), (0, 1))


WRONG_GREY = [
    (np.zeros((2, 4, 4), np.float32), "dtype float32 .* raw pixels"),
    (np.zeros((4, 4), np.uint8), r"images\[None\]"),
    (np.zeros((2, 1, 4, 4), np.uint8), "squeeze"),
    (np.zeros((2, 4, 4, 1), np.uint8), "squeeze"),
    (np.zeros((2, 5, 4), np.uint8), r"shape \(2, 5, 4\)"),
    ([[1, 2], [3, 4]], "dtype list and shape"),
]


@pytest.mark.parametrize(("images", "hint"), WRONG_GREY)
def test_wrong_images(folder, images, hint):
    with pytest.raises(BundleError, match=rf"expected images of dtype uint8 and shape \(N, 4, 4\), found .*{hint}"):
        run_bundle(open_bundle(folder), images)


def test_channels_first_are_turned_round(colour):
    assert run_bundle(colour, np.full((2, 4, 6, 3), 255, np.uint8))[0].argmax(1).tolist() == [0, 0]
    with pytest.raises(BundleError, match=r"channels come last: images\.transpose\(0, 2, 3, 1\)"):
        check_images(colour, np.zeros((2, 3, 4, 6), np.uint8))


def test_batch_size_zero(folder):
    with pytest.raises(BundleError, match="batch_size: expected 1 or more, found 0"):
        run_bundle(open_bundle(folder), np.zeros((1, 4, 4), np.uint8), batch_size=0)


def test_graph_and_manifest_disagree(folder):
    bundle = write_manifest(folder, **fields(input=fields()["input"] | {"name": "pixels"}))
    with pytest.raises(BundleError, match=r"expected inputs \['pixels'\] .* found \['images'\]"):
        onnx_session(bundle)


def test_graph_that_onnxruntime_refuses(folder):
    broken = helper.make_node("NoSuchOperator", ["rows"], ["x"])
    (folder / "model.onnx").write_bytes(toy(nodes=[broken]).SerializeToString())
    with pytest.raises(BundleError, match=r"model\.onnx: onnxruntime .* cannot load it"):
        onnx_session(write_manifest(folder, **fields()))


def test_shown_as_a_table(folder):
    names = [f"a|{i}" for i in range(20)]
    outputs = fields()["outputs"] | {"probabilities": {"dtype": "float32", "shape": [None, 20]}}
    extra = {"model": "toy", "parameters": 1234, "run": "r1", "parity": {"rows": 5, "largest_difference": 1e-7}}
    bundle = write_manifest(folder, **fields(classes=names, outputs=outputs, **extra))
    table = bundle._repr_markdown_()
    for text in (
        "a\\|0",
        "… (20)",
        "toy, 1,234 parameters",
        "images uint8 NHW (N, 4, 4)",
        "test/accuracy",
        "5 images",
        "| **run** | r1 |",
    ):
        assert text in table
    assert repr(bundle) == f"Bundle(brightness: 20 classes, toy, {m.human_bytes(402 + 108)}, {bundle.hash[:8]})"
    assert (bundle.run, bundle.metrics, bundle.weights.name) == ("r1", {"test/accuracy": 0.5}, "weights.safetensors")
    assert hash(bundle) == hash(write_manifest(folder, **fields()))  # by path; equality looks at the manifest too


# --- all or nothing


def test_error_on_the_way_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "a" / "bundle") as new:
        (new / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []


def test_old_one_stays_until_the_new_is_complete(folder):
    with pytest.raises(BundleError, match="expected a new place"), staged(folder):
        pass
    with pytest.raises(RuntimeError), staged(folder, replace=True) as new:
        (new / "model.onnx").write_bytes(b"half")
        raise RuntimeError
    assert open_bundle(folder).task == "brightness"
    with staged(folder, replace=True) as new:
        (new / "model.onnx").write_bytes(toy().SerializeToString())
        write_manifest(new, **fields(task="other"))
        assert open_bundle(folder).task == "brightness"
    assert open_bundle(folder).task == "other"
    assert [p.name for p in folder.parent.iterdir() if "bundle" in p.name] == ["bundle"]


def test_old_one_comes_back_when_the_new_cannot_take_its_place(folder, monkeypatch):
    rename = Path.rename

    def stubborn(self, target):
        if self.name.endswith(".tmp"):
            raise PermissionError("in use")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stubborn)
    with pytest.raises(PermissionError), staged(folder, replace=True) as new:
        (new / "model.onnx").write_bytes(b"new")
    assert open_bundle(folder).task == "brightness"
    assert [p.name for p in folder.parent.iterdir() if "bundle" in p.name] == ["bundle"]


def test_kill_leaves_nothing_that_looks_like_a_bundle(tmp_path):
    code = """
import os, sys
from project.bundle.manifest import staged
with staged(sys.argv[1]) as new:
    (new / "model.onnx").write_bytes(b"half")
    os._exit(9)
"""
    place = tmp_path / "bundle"
    assert subprocess.run([sys.executable, "-c", code, place], check=False).returncode == 9
    with pytest.raises(BundleError, match="no such folder"):
        open_bundle(place)
    (left,) = tmp_path.glob(".bundle.*.tmp")
    with staged(place) as new:  # what another process may still be filling is left alone
        (new / "x").write_bytes(b"")
    assert left.exists()
    hour_ago = time.time() - 3700
    os.utime(left, (hour_ago, hour_ago))
    with staged(place, replace=True):
        pass
    assert not left.exists()


def test_import_is_light():
    code = "import sys, project.bundle.manifest; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "onnx", "onnxruntime", "pandas", "lightning", "pytorch_lightning"} & set(loaded)
