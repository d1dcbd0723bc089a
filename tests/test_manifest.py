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
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from project.bundle import manifest as m
from project.bundle.manifest import (
    FORMAT,
    BundleError,
    bundle_tokenizer,
    check_images,
    check_texts,
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
    ({"calibration": 1.5}, "calibration: expected"),
    ({"checkpoint": "best.ckpt"}, "checkpoint: expected"),
    ({"checkpoint": ["epoch", 3]}, "checkpoint: expected"),
    ({"temperature": 0}, "temperature: expected a number above 0, found 0"),
    ({"temperature": True}, "temperature"),
    ({"partial": "5 batches an epoch"}, "partial: expected a list of texts"),
    ({"partial": [5]}, "partial: expected a list of texts"),
    ({"partial": [""]}, "partial: expected a list of texts"),
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


def test_a_bundle_says_that_it_was_trained_in_part(folder):
    part = write_manifest(folder, **fields(partial=["5 batches an epoch, as in a smoke test", "2 epochs | of 4"]))
    assert open_bundle(folder).manifest["partial"][0].startswith("5 batches")
    assert (
        "| **trained in part** | 5 batches an epoch, as in a smoke test; 2 epochs \\| of 4 |" in part._repr_markdown_()
    )
    assert "trained in part" not in write_manifest(folder, **fields(partial=[]))._repr_markdown_()


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


def bare(number, content):
    """One protobuf field, with a number that may be written longer than it need be."""
    head = b""
    for n in (number << 3 | 2, len(content)):
        while n > 127:
            head, n = head + bytes([n & 127 | 128]), n >> 7
        head += bytes([n])
    return head + content


@pytest.mark.parametrize("high", [0, 1 << 29, 7 << 29])
def test_field_numbers_that_only_protobuf_understands(folder, high):
    """onnxruntime drops a field number's upper bits: with them, external data would pass by as an unknown field."""
    import onnxruntime

    model = toy()
    sign = model.graph.initializer[1]
    sign.ClearField("float_data")
    np.array([1.0, -1.0], np.float32).tofile(folder / "outside")
    location = bare(13 | high, bare(1, b"location") + bare(2, b"outside"))
    tensor = sign.SerializeToString() + location + b"\x70\x01"
    del model.graph.initializer[1]
    graph = model.graph.SerializeToString() + bare(5, tensor)
    model.ClearField("graph")
    content = model.SerializeToString() + bare(7, graph)
    (folder / "model.onnx").write_bytes(content)
    assert onnxruntime.InferenceSession(folder / "model.onnx"), "it reads the file outside, so the refusal matters"
    (folder / "outside").unlink()
    with pytest.raises(BundleError, match=r"external data|a field number that is too long"):
        write_manifest(folder, **fields())


def test_operator_that_reads_files(folder):
    node = helper.make_node(
        "EPContext", ["pixels"], ["c"], domain="com.microsoft", ep_cache_context="../c", embed_mode=0
    )
    (folder / "model.onnx").write_bytes(toy(nodes=[node]).SerializeToString())
    with pytest.raises(BundleError, match="the operator EPContext, which reads other files"):
        write_manifest(folder, **fields())
    known = {f.name: f.number for f in onnx.NodeProto.DESCRIPTOR.fields}
    assert m._ONNX["NodeProto"][known["op_type"]] == "operator"


def test_a_model_that_was_not_verified_is_looked_at_before_it_is_loaded(folder):
    content = toy(initializers=[outside(number())]).SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    edit(folder, lambda found: found["files"]["model.onnx"].update(bytes=len(content)))
    with pytest.raises(BundleError, match="external data"):
        onnx_session(open_bundle(folder, verify=False))


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
        "5 rows",
        "| **run** | r1 |",
    ):
        assert text in table
    assert repr(bundle) == f"Bundle(brightness: 20 classes, toy, {m.human_bytes(402 + 108)}, {bundle.hash[:8]})"
    assert (bundle.run, bundle.metrics, bundle.weights.name) == ("r1", {"test/accuracy": 0.5}, "weights.safetensors")
    assert hash(bundle) == hash(write_manifest(folder, **fields()))  # by path; equality looks at the manifest too


# --- texts

POINTS = {
    "[PAD]": (0, 0),
    "[UNK]": (0, 0),
    "bad": (2, 0),
    "worse": (3, 0),
    "good": (0, 2),
    "[CLS]": (0, 0),
    "[SEP]": (0, 1),
}


def reader(table=None, average=False):
    """A model that adds up the points of each word, or forgets the rows."""
    value, tensor = helper.make_tensor_value_info, helper.make_tensor
    table = np.array([*POINTS.values()] if table is None else table, np.float32)
    chain = [
        helper.make_node("Gather", ["points", "ids"], ["each"]),
        helper.make_node("ReduceSum", ["each", "axis"], ["embedding"], keepdims=int(average)),
        helper.make_node("Softmax", ["embedding"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        chain,
        "reader",
        [value("ids", TensorProto.INT64, ["batch", "length"])],
        [value(name, TensorProto.FLOAT, None) for name in ("probabilities", "embedding")],
        [
            tensor("points", TensorProto.FLOAT, table.shape, table),
            tensor("axis", TensorProto.INT64, [1], [0 if average else 1]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def tokenizer(marks=False):
    """Words to ids; with marks at both ends if asked for."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(POINTS)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[PAD]"])
    if marks:
        pairs = [(mark, made.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
        made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pairs)
    return made


def text_fields(max_length=6, **changes):
    """A manifest's fields for the reader."""
    spec = {"name": "ids", "dtype": "int64", "layout": "NL", "shape": [None, None], "max_length": max_length}
    outputs = {name: {"dtype": "float32", "shape": [None, 2]} for name in ("probabilities", "embedding")}
    more = {"fields": ["title", "text"], "vocabulary": len(POINTS)}
    return fields(task="news", kind="text", classes=["fake", "real"], input=spec | more, outputs=outputs) | changes


def text_bundle(path, model=None, content=None, **about):
    """A text bundle of given parts."""
    path.mkdir(exist_ok=True)
    (path / "model.onnx").write_bytes(reader() if model is None else model)
    (path / "tokenizer.json").write_bytes(tokenizer().to_str().encode() if content is None else content)
    write_manifest(path, **text_fields(**about))
    return open_bundle(path)


@pytest.fixture
def news(tmp_path):
    """A small text bundle."""
    return text_bundle(tmp_path / "news")


def points(text, length=6):
    """What the reader's embedding of a text is, worked out by hand."""
    found = [POINTS.get(word, (0, 0)) for word in text.lower().split()[:length] if word != "[pad]"]
    return np.sum(found, 0) if found else np.zeros(2)


BAD_TEXT_INPUTS = [
    ({"dtype": "int32"}, "input: expected dtype, layout and shape"),
    ({"layout": "NT"}, "input: expected dtype, layout and shape"),
    ({"shape": [None, 128]}, "input: expected dtype, layout and shape"),
    ({"shape": None}, "input: expected dtype, layout and shape"),
    ({"max_length": 0}, "expected max_length, a whole number of 1 or more, found 0"),
    ({"max_length": None}, "max_length"),
    ({"max_length": True}, "max_length"),
    ({"max_length": 1.5}, "max_length"),
    ({"vocabulary": 1}, "expected vocabulary, a whole number of 2 or more, found 1"),
    ({"vocabulary": "many"}, "vocabulary"),
    ({"fields": "title"}, "expected fields, a list of names"),
    ({"fields": ["title", "title"]}, "each once"),
    ({"fields": ["title", 3]}, "expected fields, a list of names"),
    ({"name": ""}, "input: expected name"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TEXT_INPUTS)
def test_bad_text_inputs_refused_at_both_ends(news, change, message):
    spec = text_fields()["input"] | change
    with pytest.raises(BundleError, match=message):
        write_manifest(news.path, **text_fields(input=spec))
    edit(news.path, lambda found: found | {"input": spec})
    with pytest.raises(BundleError, match=message):
        open_bundle(news.path)


def test_images_that_claim_to_be_texts_and_the_other_way_round(folder, news):
    for path, kind in ((folder, "text"), (news.path, "image")):
        edit(path, lambda found, kind=kind: found | {"kind": kind})
        with pytest.raises(BundleError, match="input: expected"):
            open_bundle(path)
    spec = text_fields()["input"] | {"name": "images", "vocabulary": len(POINTS)}
    liar = text_bundle(folder.with_name("liar"), toy().SerializeToString(), input=spec, outputs=fields()["outputs"])
    with pytest.raises(BundleError, match=r"onnxruntime cannot run it on a batch of 1 x 1: .*uint8"):
        run_bundle(liar, ["good"])


def test_texts_need_their_tokenizer(news):
    (news.path / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json: expected in the folder"):
        open_bundle(news.path)
    with pytest.raises(BundleError, match=r"expected tokenizer\.json in the folder, found model\.onnx"):
        write_manifest(news.path, **text_fields())
    edit(news.path, lambda found: found["files"].pop("tokenizer.json") and None)
    with pytest.raises(BundleError, match=r"expected files with model\.onnx and tokenizer\.json among them"):
        open_bundle(news.path, verify=False)


def test_texts_come_back_in_the_order_given(news):
    rng = random.Random(0)
    texts = [" ".join(rng.choices([*POINTS, "else", ""], k=rng.randint(0, 12))) for _ in range(300)]
    session, made = onnx_session(news, threads=1), bundle_tokenizer(news)
    probabilities, embedding = run_bundle(news, texts, session=session, tokenizer=made)
    assert probabilities.dtype == embedding.dtype == np.float32
    np.testing.assert_array_equal(embedding, [points(text) for text in texts])
    for size in (1, 2, 7, 1000):
        np.testing.assert_array_equal(run_bundle(news, texts, size, session, made)[0], probabilities)
    assert [a.shape for a in run_bundle(news, [])] == [(0, 2), (0, 2)]


def test_texts_as_rows_of_fields(news):
    from project.data.readers import Texts

    rows = [("Bad", "good\ngood"), ("", "worse"), ("  ", ""), ("good", " ")]
    texts = Texts.from_rows(rows, ("title", "text"))
    dicts = [{"text": text, "title": title} for title, text in rows]
    assert check_texts(news, texts) == check_texts(news, dicts) == check_texts(news, tuple(texts.joined()))
    np.testing.assert_array_equal(run_bundle(news, texts)[0], run_bundle(news, dicts)[0])
    np.testing.assert_array_equal(run_bundle(news, texts)[1], [(2, 4), (3, 0), (0, 0), (0, 2)])
    with pytest.raises(BundleError, match="expected texts of title, text, found text, title"):
        run_bundle(news, Texts.from_rows(rows, ("text", "title")))


def test_ids_in_batches():
    rng = np.random.default_rng(0)
    for size in (1, 3, 64):
        rows = [rng.integers(1, 9, n) for n in rng.integers(1, 900, 100)]
        seen, longest = [], 0
        for which, ids in m._id_batches(rows, size):
            assert ids.dtype == np.int64 and len(ids) == len(which) <= size
            assert ids.shape[1] == max(len(rows[i]) for i in which) >= longest
            assert ids.size <= m._IDS
            for i, line in zip(which, ids, strict=True):
                assert line[: len(rows[i])].tolist() == rows[i].tolist() and not line[len(rows[i]) :].any()
            seen, longest = [*seen, *which], ids.shape[1]
        assert sorted(seen) == list(range(100))
    assert [len(which) for which, _ in m._id_batches([np.ones(m._IDS + 1, np.int64)] * 2, 8)] == [1, 1]


def test_marks_survive_the_cut(tmp_path):
    bundle = text_bundle(tmp_path / "b", content=tokenizer(marks=True).to_str().encode(), max_length=4)
    found = bundle_tokenizer(bundle).encode_batch(["good bad good bad", "", "good"])
    assert [e.ids for e in found] == [[5, 4, 2, 6], [5, 6], [5, 4, 6]]
    with pytest.raises(BundleError, match="expected max_length above 2, .* found 2"):
        bundle_tokenizer(text_bundle(tmp_path / "b", content=tokenizer(marks=True).to_str().encode(), max_length=2))


def test_settings_for_training_are_not_taken_over(tmp_path):
    made = tokenizer()
    made.enable_padding(length=50)
    made.enable_truncation(1)
    bundle = text_bundle(tmp_path / "b", content=made.to_str().encode())
    np.testing.assert_array_equal(run_bundle(bundle, ["good good bad", "good"])[1], [(2, 4), (0, 2)])


def test_texts_of_nothing_are_one_unknown_word(tmp_path):
    table = [*POINTS.values()]
    table[0], table[1] = (100, 100), (7, 7)
    made = tokenizer()
    made.normalizer = normalizers.Strip()  # capitals stay: the word [PAD] is in the vocabulary
    bundle = text_bundle(tmp_path / "b", reader(table), made.to_str().encode())
    np.testing.assert_array_equal(run_bundle(bundle, ["", " \n", "[PAD]", "[PAD] [PAD]"], 1)[1], [(7, 7)] * 4)


def test_marks_that_somebody_types_are_text(tmp_path):
    made = tokenizer(marks=True)
    made.add_special_tokens(["[CLS]", "[SEP]"])
    bundle = text_bundle(tmp_path / "b", content=made.to_str().encode())
    assert bundle_tokenizer(bundle).encode("good [SEP] bad").ids == [5, 4, 1, 2, 6]


def test_ids_are_those_of_training(tmp_path):
    from project.data.tokens import encode, read_tokenizer, train_tokenizer

    texts = ["Good “news” (Reuters) - said so", "", "worse [SEP] news\n" * 9, "Ünïcode ﬁt 漢字", "[PAD]"]
    for made in (train_tokenizer(texts, least=1), read_tokenizer(tokenizer(marks=True).to_str().encode())):
        spec = text_fields()["input"] | {"vocabulary": m._vocabulary(made)}
        bundle = text_bundle(tmp_path / "b", content=made.to_str().encode(), input=spec)
        expected = encode(made, texts, max_length=6)
        assert [e.ids for e in bundle_tokenizer(bundle).encode_batch_fast(texts)] == [r.tolist() for r in expected]


WRONG_TEXTS = [
    ("good", r"found str\. One text is a list of one"),
    ({"title": "a", "text": "b"}, r"found dict\. One text"),
    (np.zeros((2, 4, 4), np.uint8), r"found ndarray\. .* images go to"),
    (np.array(["good"]), r"\.tolist\(\)"),
    (None, "expected a list of texts, found NoneType"),
    (iter(["good"]), "expected a list of texts, found list_iterator"),
    ([b"good"], "row 0: expected a text or a dict, found bytes"),
    (["good", None], "row 1: expected a text or a dict, found NoneType"),
    ([float("nan")], "row 0: expected a text or a dict, found float"),
    (["a", "\ud800"], "row 1: expected text, found half of a character"),
    ([{"title": "a"}], "row 0: expected the fields title, text, .* found {title: str}"),
    ([{"title": "a", "text": None}], "found {title: str, text: NoneType}"),
    ([{"title": "a", "text": "b", "subject": "c"}], "expected the fields title, text"),
    ([{}], "expected the fields title, text, .* found {}"),
    ([["good"]], "row 0: expected a text or a dict, found list"),
]


@pytest.mark.parametrize(("texts", "message"), WRONG_TEXTS)
def test_wrong_texts(news, texts, message):
    with pytest.raises(BundleError, match=message):
        run_bundle(news, texts)


def test_a_bundle_without_fields_takes_strings(tmp_path):
    spec = text_fields()["input"]
    del spec["fields"], spec["vocabulary"]
    bundle = text_bundle(tmp_path / "b", input=spec)
    assert run_bundle(bundle, ["good"])[0].argmax() == 1
    with pytest.raises(BundleError, match="row 0: expected a text, found {title: str}"):
        run_bundle(bundle, [{"title": "good"}])


def test_texts_for_images_and_images_for_texts(folder, news):
    images = open_bundle(folder)
    for wrong in ("good", ["good"], None):
        with pytest.raises(BundleError, match="expected images of dtype uint8 .* texts go to"):
            run_bundle(images, wrong)
    for check in (
        lambda: check_texts(images, ["good"]),
        lambda: bundle_tokenizer(images),
        lambda: check_images(news, np.zeros((1, 4, 4), np.uint8)),
    ):
        with pytest.raises(BundleError, match="expected (images|texts), which this bundle was made for, found"):
            check()


def broken_template():
    """A tokenizer whose parts do not fit: its template names a mark that is not there. The library panics over it."""
    made = json.loads(tokenizer(marks=True).to_str())
    made["post_processor"]["special_tokens"].pop("[SEP]")
    return json.dumps(made).encode()


def without_unknown():
    """A tokenizer that cannot read a word it does not know."""
    made = json.loads(tokenizer().to_str())
    made["model"]["unk_token"] = "[NONE]"
    return json.dumps(made).encode()


BAD_TOKENIZERS = [
    (b"", "it cannot be used"),
    (b"not JSON", "it cannot be used"),
    (b"{}", "it cannot be used"),
    (b"\xff\xfe", "it cannot be used"),
    (b"[" * 100_000, "it cannot be used"),
    (tokenizer().to_str().encode()[:-9], "it cannot be used"),
    (
        b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "u"}}',
        "it cannot be used: .*padding",
    ),
    (broken_template(), "it cannot be used"),
    (without_unknown(), "it cannot be used: .*Missing"),
]


@pytest.mark.parametrize(("content", "message"), BAD_TOKENIZERS)
def test_tokenizers_that_are_none(tmp_path, content, message):
    bundle = text_bundle(tmp_path / "b", content=content)
    with pytest.raises(BundleError, match=rf"tokenizer\.json: .*{message}"):
        run_bundle(bundle, ["good"])


def test_tokenizer_too_large(news, monkeypatch):
    monkeypatch.setattr(m, "_TOKENIZER_LIMIT", 100)
    with pytest.raises(BundleError, match=r"tokenizer\.json: expected 100 B at most, found"):
        run_bundle(news, ["good"])


def test_tokenizer_that_vanished(news):
    news.tokenizer.unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json: .*No such file"):
        run_bundle(news, ["good"])


def test_tokenizer_of_another_model(tmp_path):
    bundle = text_bundle(tmp_path / "b", reader([*POINTS.values()][:4]))  # the manifest lies about the graph
    assert run_bundle(bundle, ["bad worse"])[0].argmax() == 0
    with pytest.raises(BundleError, match=r"model\.onnx: onnxruntime cannot run it on a batch of 1 x 2: .*out of"):
        run_bundle(bundle, ["bad good"])
    other = tokenizer()
    other.add_tokens(["more"])
    with pytest.raises(BundleError, match="expected 7 ids, as the model has, found 8"):
        run_bundle(text_bundle(tmp_path / "b", content=other.to_str().encode()), ["good"])


def test_model_that_forgets_rows(tmp_path):
    bundle = text_bundle(tmp_path / "b", reader(average=True))
    with pytest.raises(BundleError, match=r"expected one answer a row, shape \(3, 2\), found shape"):
        run_bundle(bundle, ["good", "bad", "worse"])


def test_a_keyboard_interrupt_stays_one():
    with pytest.raises(KeyboardInterrupt), m._in_words("x"):
        raise KeyboardInterrupt


def test_texts_shown_as_a_table(news):
    chosen = {"epoch": 3, "epochs": 20, "reason": "the latest that | is good"}
    calibration = {"ece": 0.0123456, "rows": 400}
    bundle = write_manifest(news.path, **text_fields(temperature=1.5, calibration=calibration, checkpoint=chosen))
    table = bundle._repr_markdown_()
    for row in (
        "| **input** | ids int64 NL (N, L) |",
        "| **reads** | title, text; up to 6 ids of a row |",
        "| **temperature** | 1.5 |",
        "| **calibration ece** | 0.01235 |",
        "| **epoch** | 3 of 20; the latest that \\| is good |",
        "| **tokenizer.json** |",
    ):
        assert row in table


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
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "pandas", "lightning", "pytorch_lightning"}
    assert not (heavy | {"tokenizers", "transformers"}) & set(loaded)


def test_a_link_to_a_bundle_stays_when_the_bundle_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").touch()
    (tmp_path / "link").symlink_to("there")
    with staged(tmp_path / "link", replace=True) as new:
        (new / "new").touch()
    assert (tmp_path / "link").is_symlink() and [p.name for p in (tmp_path / "there").iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "there"]
