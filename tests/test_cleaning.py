"""What counts as blank, contradictory, a copy and nearly a copy; and what becomes of such rows."""

import io
import itertools
import time

import numpy as np
import pytest
from PIL import Image

from project.data.cleaning import (
    _EDGES,
    _alike,
    _edges,
    _groups,
    _hashes,
    _likeness,
    _link,
    _near_bits,
    _packed,
    _same_key,
    _text_pairs,
    _thumbnails,
    blank,
    clean,
    conflicts,
    group_split,
    identical,
    near_images,
    near_texts,
    words,
)
from project.data.readers import Texts
from project.data.sources import SourceError, find, read_idx
from project.data.tasks import Examples, get_task

PARTS = ("train", "test", "ood-other")


def photos(n, edge=96, seed=0, colour=False):
    """Images with shapes, edges and texture, no two alike: made, because a test needs to know all answers."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        noise = (Image.fromarray(rng.integers(0, 256, (k, k, 3), np.uint8)) for k in (6, 20))
        coarse, fine = (image.resize((edge, edge), Image.Resampling.BICUBIC) for image in noise)
        made.append(Image.blend(coarse, fine, 0.4).convert("RGB" if colour else "L"))
    return made


def saved_again(image, quality=60):
    """An image after another trip through JPEG."""
    image.save(file := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(file)


def cropped(image, by):
    """An image without its outermost pixels, in the old size."""
    return image.crop((by, by, image.width - by, image.height - by)).resize(image.size, Image.Resampling.BILINEAR)


def examples(inputs, labels, part, **more):
    """Rows of two classes in three parts."""
    return Examples(inputs, np.array(labels, np.int64), ("fake", "real"), np.array(part, np.int64), PARTS, **more)


def titles(*texts):
    """Texts of one field."""
    return Texts.from_rows([[text] for text in texts], ("title",))


def kinds(cleaned):
    """Row -> why it was left out."""
    return {r["row"]: r["kind"] for r in cleaned.rejects if "kind" in r}


# ---- blank, identical, contradictory


def test_blank_images_of_every_shape():
    grey = np.zeros((4, 5, 3), np.uint8)
    grey[1:3] = 200
    grey[2, 4, 2] = 199
    assert blank(grey).tolist() == [True, True, False, True]
    colour = np.zeros((2, 2, 2, 3), np.uint8)
    colour[1, ..., 0] = 9  # one colour all over, but a colour
    assert blank(colour).tolist() == [True, False]
    assert blank(np.zeros((3, 1, 1), np.uint8)).all() and blank(np.zeros((0, 2, 2), np.uint8)).shape == (0,)


@pytest.mark.parametrize("text", ["", " \n\t", "…!?", "\u200b", "— “” ’", "👍👍", "\x00"])
def test_texts_that_say_nothing(text):
    assert blank(titles(text, "a", "7", "日本")).tolist() == [True, False, False, False]


def test_words_are_compared_and_not_their_dress():
    same = ["Ｅxit poll: 5 % lead", "exit POLL — 5% lead!", "  exit\u00a0poll\n5 lead", "EXIT POLL 5 LEAD"]
    assert {words(text) for text in same} == {"exit poll 5 lead"}
    assert words("cafe\u0301") == words("CAFÉ") and words("straße") == words("STRASSE")
    assert words("5 lead exit poll") != words(same[0])


def test_identical_rows_and_those_with_two_labels():
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 6), np.uint8)
    images[[7, 20, 31]] = images[3]
    images[44] = images[12]
    images[49] = images[48]
    images[49, 5, 5] ^= 1
    labels = np.zeros(50, int)
    labels[31] = 1
    assert identical(images) == [[3, 7, 20, 31], [12, 44]] and conflicts(images, labels) == [[3, 7, 20, 31]]
    assert identical(images[::-1][:, ::-1]) == [[5, 37], [18, 29, 42, 46]]  # a view in another order
    rows = Texts.from_rows([("A", "b"), ("a b", ""), ("a", "c")], ("title", "text"))
    assert identical(rows) == [[0, 1]] and conflicts(rows, np.array([0, 0, 1])) == []


# ---- near images


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("edge", [24, 48, 200])
def test_what_happens_to_photographs_on_the_web(edge, colour):
    """Saved again, brighter, with less contrast, scaled and back, cropped by a hundredth: found, and nothing else."""
    made = [image.resize((edge, edge), Image.Resampling.LANCZOS) for image in photos(120, 192, edge, colour)]
    changed = [
        saved_again(made[3], 60 if edge > 40 else 90),
        made[10].point(lambda v: min(255, v * 1.15)),
        made[20].point(lambda v: 60 + v * 0.6),
        made[30].resize((edge * 2 // 3,) * 2).resize((edge, edge)),
        photos(120, 192, edge, colour)[40].crop((2, 2, 190, 190)).resize((edge, edge), Image.Resampling.LANCZOS),
        saved_again(made[50].point(lambda v: min(255, v * 1.1)), 75),
        made[60],
    ]
    groups = near_images(np.stack([np.asarray(image) for image in made + changed]))
    assert groups == [[row, 120 + i] for i, row in enumerate((3, 10, 20, 30, 40, 50, 60))]


def test_in_a_set_of_look_alikes_only_the_nearly_identical_count(samples):
    """Garments on black ground: other trousers are no duplicates; a noisy copy is."""
    clothes = read_idx(samples / "fashion_mnist" / "train-images-idx3-ubyte.gz")
    assert near_images(clothes) == []
    trousers = np.flatnonzero(read_idx(samples / "fashion_mnist" / "train-labels-idx1-ubyte.gz") == 1)
    pairs = np.array(list(itertools.combinations(trousers.tolist(), 2)))
    alike = _likeness(_thumbnails(clothes, np.arange(500)), pairs)
    assert (alike > 0.6).mean() > 0.1 and alike.max() < 0.985  # a limit for photographs would join them all
    noise = np.random.default_rng(0).normal(0, 2, (50, 28, 28))
    copies = np.clip(clothes[trousers] + noise, 0, 255).astype(np.uint8)
    found = near_images(np.concatenate([clothes, copies]))
    assert found == [[int(row), 500 + i] for i, row in enumerate(trousers)]


def test_chains_and_many_copies():
    one, two = (np.asarray(image, int) for image in photos(2, 48))
    rng = np.random.default_rng(0)
    many = np.clip(one + rng.normal(0, 1, (400, 48, 48)), 0, 255).astype(np.uint8)
    start = time.perf_counter()
    found = near_images(np.concatenate([many, two[None].astype(np.uint8), many[:3]]))
    assert found == [[*range(400), 401, 402, 403]]
    assert time.perf_counter() - start < 20
    assert _groups(np.array([[5, 4], [4, 3], [3, 2], [9, 8]])) == [[2, 3, 4, 5], [8, 9]]


@pytest.mark.parametrize(
    "shape", [(0, 28, 28), (1, 28, 28), (2, 28, 28), (5, 1, 1), (6, 1, 9), (7, 3, 200, 3), (4, 700, 500)]
)
def test_sets_and_images_of_odd_sizes(shape):
    images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    groups = near_images(np.concatenate([images, images[:1]]))
    if shape[0] and not blank(images).any():
        assert [0, shape[0]] in [[g[0], g[-1]] for g in groups]
    assert near_images(np.full(shape, 7, np.uint8)) == []


def test_order_changes_nothing():
    made = photos(60, 48)
    images = np.stack([np.asarray(i) for i in [*made, *(saved_again(i, 80) for i in made[:30])]])
    order = np.random.default_rng(0).permutation(len(images))
    back = [sorted(order[group].tolist()) for group in near_images(images[order])]
    assert sorted(back) == near_images(images) == [[i, 60 + i] for i in range(30)]


def test_each_pair_of_equal_keys_once():
    keys = np.random.default_rng(0).integers(0, 40, 300)
    pairs = [tuple(sorted(p)) for a, b in _same_key(keys) for p in zip(a.tolist(), b.tolist(), strict=True)]
    assert sorted(pairs) == [(a, b) for a in range(300) for b in range(a + 1, 300) if keys[a] == keys[b]]
    crowd = list(_same_key(np.zeros(2000, np.uint16)))
    assert len(crowd) == 64 and len(crowd[0][0]) == 1999  # bounded, and neighbours are linked


# ---- parts of images


def part_of(image, left, top, edge):
    """What somebody cut out of an image, in the image's size, saved as a JPEG."""
    size = round(edge * image.width)
    x, y = round(left * image.width), round(top * image.height)
    return saved_again(image.crop((x, y, x + size, y + size)).resize(image.size, Image.Resampling.BICUBIC), 75)


def stacked(images):
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("colour", [False, True])
def test_a_photograph_that_was_cut_more_tightly_is_found(colour):
    made = photos(150, 128, 7, colour)
    parts = [
        part_of(made[3], 0, 0, 0.85),
        part_of(made[20], 0.3, 0.1, 0.7),
        part_of(made[40], 0.25, 0.1, 0.7),
        part_of(made[60].point(lambda v: min(255, v * 1.15)), 0.05, 0.1, 0.9),
        part_of(made[80].transpose(Image.Transpose.FLIP_LEFT_RIGHT), 0.2, 0.2, 0.75),  # mirrored
        made[100].transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    ]
    groups = near_images(stacked(made + parts))
    assert groups == [[row, 150 + i] for i, row in enumerate((3, 20, 40, 60, 80, 100))]


def test_strangers_are_no_parts_of_each_other():
    assert near_images(stacked(photos(300, 96, 11))) == []


def test_the_training_row_goes_and_the_test_row_stays():
    made = photos(60, 96, 5)
    rows = stacked([*made, part_of(made[4], 0.1, 0.1, 0.75), part_of(made[50], 0.2, 0.0, 0.8)])
    part = [0] * 50 + [1] * 10 + [1, 0]  # 60: a part of training row 4; 61: of test row 50
    cleaned, report = clean(examples(rows, [0, 1] * 31, part))
    assert kinds(cleaned) == {4: "near", 61: "near"}
    assert cleaned.part[[60, 50]].tolist() == [1, 1] and cleaned.part[[4, 61]].tolist() == [-1, -1]
    near = report["near"]
    assert near["pairs"] == {"whole": 0, "part": 2} and near["left_out"] == 2 and near["in_train_and_test"] == 2
    kept, report = clean(examples(rows, [0, 1] * 31, part), near=False)
    assert kinds(kept) == {} and report["near"]["left_out"] == 0 and report["near"]["groups"] == 2


def test_parts_within_training_stay_together():
    made = photos(40, 96, 6)
    rows = stacked([*made, part_of(made[8], 0.15, 0.1, 0.8)])
    assert clean(examples(rows, [0, 1] * 20 + [0], [0] * 41))[1]["together"] == [[8, 40]]


def test_the_search_for_parts_is_bounded():
    assert _edges(2_000) == _EDGES and _edges(18_000) == (32, 36) and _edges(40_000) == (32,)
    assert _edges(70_000) == _edges(1_000_000) == ()


# ---- no pair of hashes is missed


@pytest.mark.parametrize(("n", "radius"), [(1, 9), (2, 200), (400, 100), (333, 112)])
def test_all_pairs_of_hashes_are_those_of_a_plain_loop(n, radius):
    bits = np.random.default_rng(n).random((n, 256)) < 0.5
    words_ = _packed(bits)
    found = np.concatenate(list(_near_bits(words_, words_, radius))).tolist()
    pairs = itertools.combinations(range(n), 2)
    assert sorted(found) == [[a, b] for a, b in pairs if (bits[a] != bits[b]).sum() <= radius]
    other = _packed(bits[: n // 2])
    found = np.concatenate([np.zeros((0, 2), int), *_near_bits(other, words_, radius)]).tolist()
    assert sorted(found) == [[a, b] for a in range(n // 2) for b in range(n) if (bits[a] != bits[b]).sum() <= radius]


def test_a_crowd_is_one_group_without_all_of_its_pairs():
    one = np.asarray(photos(1, 48)[0], int)
    many = np.clip(one + np.random.default_rng(0).normal(0, 1, (600, 48, 48)), 0, 255).astype(np.uint8)
    thumbnails = _thumbnails(many, np.arange(600))
    hashes = _packed(_hashes(thumbnails))
    pairs = _alike(thumbnails, _near_bits(hashes, hashes, 64), 0.6)
    assert _groups(pairs) == [[*range(600)]] and len(pairs) < 600 * 90  # of 179,700


# ---- near texts


def jaccard(a, b):
    """The share of common runs of three words, by its definition."""
    a, b = ({tuple(t[i : i + 3]) for i in range(max(1, len(t) - 2))} for t in (words(a).split(), words(b).split()))
    return len(a & b) / len(a | b)


def test_near_texts_are_those_that_a_comparison_of_all_pairs_finds():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(300)]
    texts = [" ".join(rng.choice(vocabulary, rng.integers(2, 30))) for _ in range(150)]
    for text in texts[:120]:  # some words changed
        own = text.split()
        for at in rng.integers(0, len(own), rng.integers(0, 4)):
            own[at] = "other"
        texts.append(" ".join(own))
    pairs = {(a, b): jaccard(texts[a], texts[b]) for a, b in itertools.combinations(range(len(texts)), 2)}
    linked = {pair for group in near_texts(texts) for pair in itertools.combinations(group, 2)}
    alike = {pair for pair, share in pairs.items() if share >= 0.5}
    assert 40 < len(alike) < 120 and linked == alike


def test_no_pair_of_short_texts_is_missed():
    """Few words, so that runs are shared by many; every pair is compared by hand."""
    rng = np.random.default_rng(3)
    for letters in ("abcd", "abcdefgh", "abcdefghijklmnopqrstuvwxyz"):
        texts = sorted({" ".join(rng.choice(list(letters), n)) for n in range(1, 13) for _ in range(9)})
        pairs = itertools.combinations(range(len(texts)), 2)
        expected = {(a, b) for a, b in pairs if jaccard(texts[a], texts[b]) >= 0.5}
        assert {tuple(pair) for pair in _text_pairs(texts).tolist()} == expected


def test_near_articles_in_any_script():
    rng = np.random.default_rng(1)
    letters = [chr(c) for c in range(0x4E00, 0x4E80)]
    article = " ".join("".join(rng.choice(letters, 3)) for _ in range(400))
    other = " ".join("".join(rng.choice(letters, 3)) for _ in range(400))
    cut = " ".join(article.split()[40:])
    assert near_texts([article, other, cut, "…", other + " конец"]) == [[0, 2], [1, 4]]
    assert near_texts(["one", "One!", "two", "two words", "words two"]) == [[0, 1]]


def test_a_crowd_of_nearly_the_same_text_is_one_group():
    rng = np.random.default_rng(2)
    form = "dear customer your parcel number {} is waiting for you at the office in {} please pay the fee today".format
    texts = [form(rng.integers(10**6), f"town{rng.integers(500)}") for _ in range(1500)]
    groups = near_texts([*texts, "nothing of the kind at all"])
    assert [len(group) for group in groups] == [1500]


# ---- cleaning


def test_what_leaves_the_training_rows_and_what_stays():
    rows = [  # text, label, part
        ("Senate passes the budget after a long night of talks", 1, 0),
        ("senate passes the budget, after a long night of talks!", 1, 0),  # copy of 0
        ("You will not believe this", 0, 0),
        ("YOU WILL NOT BELIEVE THIS", 1, 0),  # contradiction
        ("Storm hits the coast", 1, 0),  # copy of a test row
        ("Storm hits the coast.", 1, 1),
        ("Markets fall as the bank raises its rate again: agency", 1, 0),  # near a test row
        ("Markets fall as the bank raises its rate again: minister", 0, 1),
        ("Minister of trade steps down over a loan in the spring", 1, 0),
        ("Minister of trade steps down over a loan in the autumn", 1, 0),  # near 8
        ("?!", 0, 0),  # blank
        ("...", 0, 1),  # blank, in the test part
        ("Aliens vote", 0, 0),  # contradicts a test row
        ("Aliens vote", 1, 1),
        ("Storm hits the coast", -1, 2),  # of another origin
        ("Minister of trade steps down over a loan in the winter", -1, 2),
        ("–", -1, 2),
    ]
    texts, labels, part = zip(*rows, strict=True)
    given = examples(titles(*texts), labels, part, ids=tuple(f"file:{i}" for i in range(len(rows))))
    cleaned, report = clean(given)
    left = {1: "copy", 2: "conflict", 3: "conflict", 4: "copy", 6: "near", 10: "blank", 11: "blank", 12: "conflict"}
    assert kinds(cleaned) == left | {16: "blank"}
    assert np.flatnonzero(cleaned.part == -1).tolist() == [*left, 16] and len(cleaned.labels) == len(rows)
    reasons = {r["file"]: r["reason"] for r in cleaned.rejects}
    assert reasons["file:4"] == "copy: the same as file:5"
    assert reasons["file:6"] == "near duplicate of a test row: file:7"
    assert reasons["file:3"] == "different labels for the same content: fake, real"
    assert report["identical"] == {
        "groups": 4,
        "rows": 8,
        "with_two_labels": 2,
        "in_train_and_test": 2,
        "list": [[0, 1], [2, 3], [4, 5], [12, 13]],
    }
    assert report["near"]["list"] == [[6, 7], [8, 9]] and report["near"]["in_train_and_test"] == 1
    assert report["near"]["with_two_labels"] == 1 and report["together"] == [[8, 9]]
    found = report["ood"]["ood-other"]
    assert (found["rows_in_train"], found["rows_in_test"]) == (2, 1)
    assert {tuple(pair) for pair in found["list"]} == {(14, 4), (15, 8), (15, 9)}
    assert given.part.tolist() == list(part)  # what was given is as it was


def test_a_published_set_can_stay_as_it_is():
    """Near duplicates are told, and training rows among them stay together."""
    made = [np.asarray(image) for image in photos(40, 48)]
    near = [np.asarray(saved_again(image)) for image in photos(40, 48)[:4]]
    given = examples(np.stack(made + near), [0, 1] * 22, [0] * 40 + [1, 1, 0, 0])
    cleaned, report = clean(given, near=False)
    assert not cleaned.rejects and report["near"]["in_train_and_test"] == 2
    assert report["together"] == [[0], [1], [2, 42], [3, 43]]
    cleaned, report = clean(given, near=True)
    assert kinds(cleaned) == {0: "near", 1: "near"} and report["together"] == [[2, 42], [3, 43]]


def test_a_copy_that_left_still_lets_its_twin_in_the_test_part_speak():
    """A test row whose first copy, in training, is left out must keep near rows out of training."""
    made = [np.asarray(image) for image in photos(12, 48)]
    near = np.asarray(saved_again(photos(12, 48)[0]))
    given = examples(np.stack([*made, near, made[0]]), [0, 1] * 7, [0] * 13 + [1])
    assert kinds(clean(given)[0]) == {0: "conflict", 12: "near"}
    assert _link(np.array([[0, 12]]), {0: [0, 13, 14]}, lambda i: i != 0) == [[12, 13, 14]]


def test_rejects_of_the_reader_come_first_and_lists_end():
    bad = ({"file": "x.csv", "row": 3, "reason": "an empty text"},)
    many = titles(*(f"headline number {i // 2} of the day" for i in range(5000)))
    cleaned, report = clean(examples(many, [0] * 5000, [0] * 5000, rejects=bad))
    assert cleaned.rejects[0] == bad[0] and len(cleaned.rejects) == 2501
    assert report["identical"]["groups"] == 2500 and len(report["identical"]["list"]) == 1000


# ---- splitting


def test_groups_stay_whole_and_singles_go_first():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    groups = [g.tolist() for g in np.split(rng.permutation(600)[:300], 60)]
    usable = rng.random(600) > 0.1
    stay, held = group_split(labels, 0.2, 3, groups, usable)
    assert sorted([*stay, *held]) == np.flatnonzero(usable).tolist() and len(held) == round(usable.sum() * 0.2)
    assert not set(held) & {i for group in groups for i in group}
    again = group_split(labels, 0.2, 3, groups, usable)
    assert np.array_equal(held, again[1]) and not np.array_equal(held, group_split(labels, 0.2, 4, groups, usable)[1])
    pairs = [[i, i + 1] for i in range(0, 100, 2)]
    held = set(group_split(np.arange(100) // 2 % 2, 20, 0, pairs)[1].tolist())
    assert len(held) == 20 and all((a in held) == (b in held) for a, b in pairs)


def test_a_rare_class_is_on_both_sides():
    labels = np.repeat([0, 1, 2], [500, 3, 2])
    assert np.bincount(labels[group_split(labels, 20)[1]]).tolist() == [18, 1, 1]


def test_cleaning_more_rows_moves_few():
    labels = np.arange(2000) % 10
    usable = np.ones(2000, bool)
    before = set(group_split(labels, 200)[1].tolist())
    usable[[5, 15, 25, 36]] = False
    after = set(group_split(labels, 200, usable=usable, groups=[[0, 1], [2, 3]])[1].tolist())
    assert len(before & after) >= 192


def test_what_cannot_be_split_is_told():
    labels = np.repeat([0, 1], [90, 10])
    with pytest.raises(
        ValueError, match="class 1: expected enough rows to hold out 2 and keep one, found 10, of which 0"
    ):
        group_split(labels, 20, groups=[range(90, 100)])
    with pytest.raises(ValueError, match="held_out: expected 2 to 98 of the 100 rows"):
        group_split(labels, 0.0)
    with pytest.raises(ValueError, match="held_out: expected 1 to 0 of the 1 rows"):
        group_split(labels, 0.5, usable=np.arange(100) == 3)


# ---- the real files, where somebody has them


@pytest.fixture
def real(pytestconfig):
    """A function that reads a task's real files, in the folder that PROJECT_SOURCE named before the tests began."""
    before = pytestconfig.environment_before
    folder = before.get("PROJECT_REAL_DATA") or before.get("PROJECT_SOURCE")
    if not folder:
        pytest.skip("set PROJECT_SOURCE or PROJECT_REAL_DATA to a folder with real files to test with them")

    def read(task):
        try:
            return get_task(task).read(find(task, source=folder, places=()))
        except SourceError as e:
            pytest.skip(f"no real files of {task}: {str(e).splitlines()[0]}")

    return read


def test_real_faces(real):
    """FER-2013 has the same photographs cut out twice; the equalised faces are those of the test part."""
    found = real("face_emotion")
    start = time.perf_counter()
    cleaned, report = clean(found)
    assert time.perf_counter() - start < 600  # a minute or two where nobody else calculates
    assert 1000 < report["near"]["groups"] < len(found.labels) / 10
    assert report["near"]["pairs"]["whole"] == 1757 and report["near"]["pairs"]["part"] > 2000
    assert set(kinds(cleaned).values()) <= {"near", "copy", "conflict", "blank"}
    for groups in (report["near"]["list"], report["together"]):  # nothing of a group is on the other side
        for group in groups:
            parts = {found.parts[p] for p in cleaned.part[group] if p >= 0}
            assert not {"train", "test"} <= parts
    if "ood-equalized" in report["ood"]:
        shared = report["ood"]["ood-equalized"]
        rows = (found.part == found.parts.index("ood-equalized")).sum()
        assert shared["rows_in_test"] > 0.7 * rows and shared["rows_in_train"] < 0.2 * rows


def test_real_headlines(real):
    found = real("fake_titles")
    start = time.perf_counter()
    report = clean(found)[1]
    assert time.perf_counter() - start < 30
    texts = found.inputs.joined()
    assert 10 < report["near"]["groups"] < 0.05 * len(texts)
    assert all(max(jaccard(texts[a], texts[b]) for b in g if b != a) >= 0.5 for g in report["near"]["list"] for a in g)


def test_real_dogs_that_were_cut_more_tightly(real):
    """Photographs of the test part that stand in training, cut more tightly; looked at one by one."""
    found = real("dog_breeds")
    report = clean(found)[1]
    near = report["near"]
    assert near["pairs"]["part"] >= 35 and near["pairs"]["whole"] == 17 and near["left_out"] >= 9
