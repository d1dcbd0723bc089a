"""Tokenizers, token arrays and their cache, with texts nobody wishes for."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from project.core import cache_dir
from project.data.readers import Texts
from project.data.tokens import (
    PAD,
    UNKNOWN,
    Tokens,
    cached_tokens,
    encode,
    explain_words,
    pad,
    read_tokenizer,
    train_tokenizer,
)

TEXTS = [f"Word{i % 7} and word{i % 11}, the {i % 3} of {i % 5}00!" for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS)


def words(text, **settings):
    """The tokens of a text, under a tokenizer that knows all of its words; the ends left out."""
    return train_tokenizer([text.swapcase(), text], least=1, **settings).encode(text).tokens[1:-1]


# -- training


TRAIN = """
import hashlib, json, sys
from project.data.tokens import encode, train_tokenizer
texts = json.load(sys.stdin)
tokenizer = train_tokenizer(texts)
print(hashlib.sha256(tokenizer.to_str().encode() + encode(tokenizer, texts).ids.tobytes()).hexdigest())
"""


def test_the_same_texts_give_the_same_bytes_in_every_process(root, tokenizer):
    def elsewhere(**env):
        env = {**os.environ, "PYTHONPATH": str(root), **env}
        run = subprocess.run(
            [sys.executable, "-c", TRAIN], input=json.dumps(TEXTS), env=env, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    here = hashlib.sha256(tokenizer.to_str().encode() + encode(tokenizer, TEXTS).ids.tobytes()).hexdigest()
    assert elsewhere(PYTHONHASHSEED="1", TOKENIZERS_PARALLELISM="true") == here
    assert elsewhere(PYTHONHASHSEED="2", TOKENIZERS_PARALLELISM="false") == here


def test_nothing_heavy_is_imported(root):
    code = "import sys, project.data.tokens; print({'torch', 'tokenizers', 'transformers'} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_words_are_numbered_by_how_often_they_are_seen():
    tokenizer = train_tokenizer(["b b b a a c c d"], vocabulary=6)
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == [
        "[PAD]",
        "[UNK]",
        "[BOS]",
        "[EOS]",
        "b",
        "a",
    ]
    assert tokenizer.encode("a b c d").ids == [2, 5, 4, UNKNOWN, UNKNOWN, 3]
    assert train_tokenizer(["b b b a a c c d"], least=3).get_vocab_size() == 5
    assert train_tokenizer([]).encode("whatever").ids == [2, UNKNOWN, 3]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("WASHINGTON (Reuters) - Talks began", ["talks", "began"]),
        ("(Reuters) - Talks began", ["talks", "began"]),
        ("SEATTLE/WASHINGTON, D.C. (Reuters on Friday ) - Talks", ["talks"]),
        ("(Corrects a name) By Ann Lee NEW YORK (Reuters) - Talks", ["talks"]),
        ("Title\nPARIS (Reuters) - Talks", ["title", "talks"]),
        ("Talks began, Reuters said", ["talks", "began", ",", "reuters", "said"]),
        ("Title\nWashington (CNN)The talks", ["title", "the", "talks"]),
        ("Talks begin - The New York Times\nTalks began", ["talks", "begin", "talks", "began"]),
        ("Talks began (AP Photo)", ["talks", "began"]),
        ("far " * 60 + "(Reuters) - Talks", ["far"] * 60 + ["-", "talks"]),
        ("The caf\u00e9\u2019s \u201ccr\u00e8me\u201d \u2014", ["the", "cafe", "'", "s", '"', "creme", '"', "-"]),
        ("\U0001d400\U0001d401 na\u0131ve", ["ab", "na\u0131ve"]),
        ("１２３ 1,000 3rd ﬁne…", ["123", "1", ",", "000", "3rd", "fine", "..."]),
        ("한국 日本", ["한국", "日本"]),
        ("[PAD] [BOS]", ["[", "pad", "]", "[", "bos", "]"]),
        ("a\0b", ["a", "\0", "b"]),
        ("", []),
        (" \n\t\u00a0 ", []),
    ],
)
def test_what_is_read(text, tokens):
    assert words(text) == tokens


def test_what_tells_publishers_apart_can_be_left_in():
    assert words("ROME (Reuters) - It\u2019s", neutral=False) == ["ROME", "(", "Reuters", ")", "-", "It", "\u2019", "s"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one", "expected a list of texts, got a single one"),
        (["a", 5], r"text 1: expected text, got 5 \(int\)"),
        (["a", b"b"], r"text 1: expected text, got b'b' \(bytes\)"),
        ([None], "text 0: expected text, got None"),
        (["a", "b \ud800"], "text 1: expected text, found half of a character at position 2"),
    ],
)
def test_what_is_no_text(tokenizer, texts, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts)
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, texts)


@pytest.mark.parametrize("settings", [{"vocabulary": 4}, {"vocabulary": 1e4}, {"least": 0}, {"least": True}])
def test_settings_of_training(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected a whole number of at least"):
        train_tokenizer(TEXTS, **settings)


# -- reading


def test_a_tokenizer_is_the_same_after_a_file(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = read_tokenizer(tmp_path / "tokenizer.json")
    assert again.to_str() == tokenizer.to_str()
    assert np.array_equal(encode(again, TEXTS).ids, encode(tokenizer, TEXTS).ids)


def test_settings_of_its_own_go(tokenizer):
    own = Tokenizer.from_str(tokenizer.to_str())
    own.enable_padding(length=50, pad_id=0)
    own.enable_truncation(4)
    again = read_tokenizer(own.to_str().encode())
    assert again.padding is None and again.truncation is None
    assert [len(row) for row in encode(again, TEXTS[:3])] == [len(tokenizer.encode(t).ids) for t in TEXTS[:3]]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "None"}}', b"null"])
def test_what_is_no_tokenizer(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    for source in (content, tmp_path / "t.json"):
        with pytest.raises(ValueError, match="expected a tokenizer.json of `tokenizers`, found something else"):
            read_tokenizer(source)


def test_no_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="expected a tokenizer.json, which cannot be read"):
            read_tokenizer(path)


def test_padding_has_to_be_number_zero():
    other = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "<unk>": 2}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="whose number 0 is padding, found '<s>' there"):
        read_tokenizer(other.to_str().encode())
    other = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    other.enable_padding(pad_id=1, pad_token="<unk>")
    with pytest.raises(ValueError, match="whose number 0 is padding"):
        read_tokenizer(other.to_str().encode())


def test_a_given_tokenizer_without_a_normalizer_becomes_neutral():
    plain = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "it": 2, "'": 3, "s": 4}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    content = plain.to_str().encode()
    assert read_tokenizer(content).encode("ROME (Reuters) - IT\u2019s").ids == [1] * 5 + [1, 1, 4]
    assert read_tokenizer(content, neutral=True).encode("ROME (Reuters) - IT\u2019s").ids == [2, 3, 4]


# -- encoding


def test_batches_change_nothing(tokenizer):
    whole = encode(tokenizer, TEXTS)
    assert len(whole) == len(TEXTS) and whole.ids.dtype == np.int32 and whole.offsets.dtype == np.int64
    for size in (1, 7, 300):
        part = encode(tokenizer, TEXTS, batch_size=size)
        assert np.array_equal(part.ids, whole.ids) and np.array_equal(part.offsets, whole.offsets)
    assert whole[5].tolist() == tokenizer.encode(TEXTS[5]).ids


def test_long_texts_end_at_the_limit_and_with_the_end(tokenizer):
    row = encode(tokenizer, ["word1 " * 100_000], max_length=16)[0]
    assert len(row) == 16 and row[0] == 2 and row[-1] == 3
    assert tokenizer.truncation is None  # the given one is as it was


@pytest.mark.parametrize("limit", [2, 0, -1, 3.0, True, None])
def test_limits_that_leave_no_room(tokenizer, limit):
    with pytest.raises(ValueError, match="max_length: expected a whole number of at least 3"):
        encode(tokenizer, TEXTS, max_length=limit)


def test_no_texts_and_empty_texts(tokenizer):
    assert len(encode(tokenizer, [])) == 0
    assert [row.tolist() for row in encode(tokenizer, ["", " "])] == [[2, 3], [2, 3]]


def test_rows():
    tokens = Tokens(np.arange(6, dtype=np.int32), np.array([0, 2, 2, 6]))
    assert [row.tolist() for row in tokens] == [[0, 1], [], [2, 3, 4, 5]]
    assert tokens[-1].tolist() == [2, 3, 4, 5] and tokens.lengths.tolist() == [2, 0, 4]
    for i in (3, -4):
        with pytest.raises(IndexError):
            tokens[i]
    assert pad(list(tokens), 3).tolist() == [[0, 1, PAD], [PAD] * 3, [2, 3, 4]]
    assert pad([[]], 5).shape == (1, 1) and pad([], 5).shape == (0, 1)


@pytest.mark.parametrize(
    ("ids", "offsets"),
    [
        (np.zeros(3, np.int64), np.array([0, 3])),
        (np.zeros(3, np.int32), np.array([0, 3], np.int32)),
        (np.zeros(3, np.int32), np.array([0, 4])),
        (np.zeros(3, np.int32), np.array([1, 3])),
        (np.zeros(3, np.int32), np.zeros(0, np.int64)),
    ],
)
def test_arrays_that_do_not_fit(ids, offsets):
    with pytest.raises(ValueError, match="tokens: expected"):
        Tokens(ids, offsets)


# -- the cache


@pytest.fixture
def texts():
    return Texts.from_rows([[t, "more" if i % 2 else ""] for i, t in enumerate(TEXTS)], ("title", "text"))


def files():
    return sorted((cache_dir() / "tokens").glob("*"))


def test_cached_is_encoded_and_is_read_the_second_time(tokenizer, texts):
    first = cached_tokens(tokenizer, "h", texts, batch_size=7)
    wanted = encode(tokenizer, texts.joined())
    assert isinstance(first.ids, np.memmap) and not first.ids.flags.writeable
    assert np.array_equal(first.ids, wanted.ids) and np.array_equal(first.offsets, wanted.offsets)
    (file,) = files()
    written = file.stat().st_mtime_ns
    second = cached_tokens(tokenizer, "h", texts)
    assert file.stat().st_mtime_ns == written and np.array_equal(second.ids, wanted.ids)
    file.unlink()  # safe to delete, also while it is read
    assert np.array_equal(first.ids, wanted.ids)


def test_another_tokenizer_data_or_limit_is_another_file(tokenizer, texts):
    cached_tokens(tokenizer, "h", texts)
    cached_tokens(tokenizer, "other", texts)
    cached_tokens(tokenizer, "h", texts, max_length=5)
    cached_tokens(train_tokenizer(TEXTS[:5]), "h", texts)
    assert len(cached_tokens(tokenizer, "h", texts[:20])) == 20
    assert len(files()) == 5


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "foreign", "lengths"])
def test_a_damaged_file_is_written_again(tokenizer, texts, damage):
    wanted = cached_tokens(tokenizer, "h", texts).ids.copy()
    (file,) = files()
    content = bytearray(file.read_bytes())
    if damage == "lengths":
        content[-20:-16] = np.array([-5], "<i4").tobytes()
    changed = {"cut": content[:-4], "longer": content + b"1234", "empty": b"", "foreign": b"x" * 1001}
    file.unlink()
    file.write_bytes(changed.get(damage, content))
    assert np.array_equal(cached_tokens(tokenizer, "h", texts).ids, wanted)


def test_nothing_is_left_of_a_failure(tokenizer):
    broken = Texts(("text",), np.frombuffer(b"fine\xff", np.uint8), np.array([0, 4, 5]))
    with pytest.raises(ValueError):
        cached_tokens(tokenizer, "h", broken, batch_size=1)
    assert files() == []


def test_no_rows_and_rows_without_tokens(texts):
    bare = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    for few in (texts[:0], Texts.from_rows([[""], [" "]])):
        assert cached_tokens(bare, "h", few).lengths.tolist() == [0] * len(few)


CACHE = """
import sys
from project.data.readers import Texts
from project.data.tokens import cached_tokens, read_tokenizer
texts = Texts.from_rows([[f"word{i % 7}"] * 1 for i in range(20000)])
sys.stdin.readline()
print(int(cached_tokens(read_tokenizer(sys.argv[1]), "h", texts, batch_size=100).ids.sum()))
"""


def test_two_processes_at_once(tmp_path, root, tokenizer):
    tokenizer.save(str(tmp_path / "t.json"))
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", CACHE, str(tmp_path / "t.json")]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    sums = {process.communicate(timeout=60)[0] for process in both}
    assert len(sums) == 1 and int(sums.pop()) > 0 and [process.returncode for process in both] == [0, 0]
    assert len(files()) == 1


# -- explaining


def counting(tokenizer, word, weight):
    number = tokenizer.get_vocab()[word]

    def predict(ids):
        p = 1 / (1 + np.exp(-weight * (ids == number).sum(1)))
        return np.stack([1 - p, p], 1)

    return predict


def test_each_word_is_worth_what_it_adds(tokenizer):
    predict, text = counting(tokenizer, "word3", 2.0), "ROME (Reuters) - WORD3, word4 and Word3\u2026"
    found = explain_words(predict, tokenizer, text, 1)
    assert [word for word, _ in found] == ["WORD3", ",", "word4", "and", "Word3", "\u2026"]
    assert np.allclose([score for _, score in found], [2, 0, 0, 0, 2, 0], atol=1e-5)
    assert np.allclose(
        [score for _, score in explain_words(predict, tokenizer, text, 0)], [-2, 0, 0, 0, -2, 0], atol=1e-5
    )
    assert explain_words(predict, tokenizer, text, 1, batch_size=1) == found


def test_texts_that_explain_nothing(tokenizer):
    predict = counting(tokenizer, "word3", 2.0)
    assert explain_words(predict, tokenizer, "", 1) == []
    assert len(explain_words(predict, tokenizer, "word3 " * 100, 1, max_length=12)) == 10
    assert explain_words(lambda ids: np.tile([0.0, 1.0], (len(ids), 1)), tokenizer, "sure", 1) == [("sure", 0.0)]
    with pytest.raises(ValueError, match="text 0: expected text"):
        explain_words(predict, tokenizer, None, 1)
