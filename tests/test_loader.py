"""Batches: what a notebook would tell badly."""

import mmap
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from project.data.loader import (
    Augment,
    Batches,
    TextBatches,
    augment_batch,
    colour_batch,
    cutout_batch,
    draw_changes,
    erase_batch,
    flip_batch,
    gather_rows,
    mixup_batch,
    random_cuts,
    random_holes,
    random_mix,
    resample_batch,
    resize_batch,
    shift_batch,
)

EVERYTHING = {"flip": "random", "crop": 7, "rotate": 20, "shift": 1, "colour": 0.5, "erase": 0.5, "cutout": 2}


def arrays(n=10, shape=(4, 4)):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n)


def labels_of(batches):
    return [y.tolist() for _, y in batches]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": True}, "batch_size: expected a whole number"),
        ({"batch_size": 2.0}, "batch_size: expected a whole number"),
        ({"shift": -1}, "shift: expected a whole number of at least 0"),
        ({"cutout": -1}, "cutout"),
        ({"limit": -1}, "limit"),
        ({"small": -1}, "small"),
        ({"small": 5}, "small: expected at most 4, the edge of the images, got 5"),
        ({"small_batches": 1.5}, "small_batches: expected a whole number"),
        ({"seed": -1}, "seed"),
        ({"flip": "always"}, "flip: expected one of none, random, alternate"),
        ({"crop": 17}, "crop: expected at most 16, four times the images' edge, got 17"),
        ({"crop": 3, "small": 4}, "small: expected at most 3, the edge of the images, got 4"),
        ({"crop": 2.5}, "crop: expected a whole number"),
        ({"crop_scale": 0}, "crop_scale: expected a number from 0.01 to 1, got 0"),
        ({"rotate": -1}, "rotate: expected a number from 0 to 180"),
        ({"colour": float("nan")}, "colour: expected a number from 0 to 1, got nan"),
        ({"erase": True}, "erase: expected a number from 0 to 1, got True"),
        ({"mixup": "0.2"}, "mixup: expected a number from 0 to 100, got '0.2'"),
        ({"mixup": 0.2}, "classes: expected a whole number of at least 2, got 0"),
        ({"mixup": 0.2, "classes": 9}, "labels: expected 0 to 8 with mixup, got 0 to 9"),
        ({"rows": np.array([0.0, 1.0])}, "rows: expected whole numbers"),
        ({"rows": np.array([[0, 1]])}, "rows: expected whole numbers"),
        ({"rows": []}, "empty split"),
        ({"rows": np.array([0, 10])}, "rows: expected numbers from 0 to 9, got 0 to 10"),
        ({"rows": np.array([-1, 3])}, "rows: expected numbers from 0 to 9, got -1 to 3"),
        ({"batch_size": 11, "drop_last": True}, "at most the 10 rows"),
    ],
)
def test_arguments_that_cannot_give_a_batch(change, message):
    with pytest.raises(ValueError, match=message):
        Batches(*arrays(), **change)


@pytest.mark.parametrize(
    "images", [np.zeros((3, 4, 4)), np.zeros((3, 4), np.uint8), np.zeros((3, 4, 4, 1, 1), np.uint8)]
)
def test_images_of_the_wrong_kind(images):
    with pytest.raises(ValueError, match="unsigned bytes"):
        Batches(images, np.zeros(3, np.int64))


@pytest.mark.parametrize("labels", [np.zeros(3), np.zeros((3, 2), int), np.array(["a", "b", "c"]), [True, False, True]])
def test_labels_of_the_wrong_kind(labels):
    with pytest.raises(ValueError, match="labels: expected"):
        Batches(np.zeros((3, 4, 4), np.uint8), labels)


def test_colours_of_images_with_four_channels():
    with pytest.raises(ValueError, match="colour: expected images with 1 or 3 channels, got 4"):
        Batches(np.zeros((3, 4, 4, 4), np.uint8), np.zeros(3, int), colour=0.1)
    assert Batches(np.zeros((3, 4, 4, 4), np.uint8), np.zeros(3, int), crop=2).batch(0, 0)[0].shape == (3, 4, 2, 2)


@pytest.mark.parametrize("options", [{"flip": "random"}, {"small": 2}, {"mixup": 0.2, "classes": 3}, {"rotate": 1}])
def test_features_cannot_be_augmented(options):
    with pytest.raises(ValueError, match="expected no augmentation and small=0 for features"):
        Batches(np.zeros((3, 4), np.float32), np.arange(3), **options)


def test_features_are_read_as_images_are():
    features, labels = np.random.default_rng(0).random((23, 6), np.float32), np.arange(23)
    options = {"batch_size": 5, "shuffle": True, "seed": 3, "drop_last": True}
    batches, seen = Batches(features, labels, **options), []
    for x, y in batches:
        assert x.dtype == torch.float32 and np.array_equal(x.numpy(), features[y.numpy()])
        seen.append(y.tolist())
    assert seen == labels_of(Batches(np.zeros((23, 4, 4), np.uint8), labels, **options))
    with pytest.raises(ValueError, match="float32 features"):
        Batches(features.astype(np.float64), labels)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"batch_size": 4}, [4, 4, 2]),
        ({"batch_size": 4, "drop_last": True}, [4, 4]),
        ({"batch_size": 4, "limit": 1}, [4]),
        ({"batch_size": 4, "limit": 9}, [4, 4, 2]),
        ({"batch_size": 10}, [10]),
        ({"batch_size": 99}, [10]),
    ],
)
def test_length_is_what_comes(options, sizes):
    batches = Batches(*arrays(), **options)
    assert len(batches) == len(sizes)
    assert [len(y) for _, y in batches] == sizes


def test_colour_images_and_labels_of_another_type():
    images, labels = arrays(shape=(4, 5, 3))
    x, y = next(iter(Batches(images, labels.astype(np.int8), 10)))
    assert x.shape == (10, 3, 4, 5) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), images)


def test_memory_mapped_equals_in_memory(tmp_path):
    images, labels = arrays()
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    options = {
        "batch_size": 3,
        "rows": np.array([8, 1, 5, 2]),
        "shuffle": True,
        "flip": "random",
        "shift": 1,
        "cutout": 2,
    }
    for (x1, y1), (x2, y2) in zip(Batches(images, labels, **options), Batches(mapped, labels, **options), strict=True):
        assert torch.equal(x1, x2) and torch.equal(y1, y2)


def test_orders_differ_by_epoch_and_seed_and_repeat():
    first = Batches(*arrays(), 10, shuffle=True)
    one, two = labels_of(first), labels_of(first)
    assert one != two and sorted(one[0]) == sorted(two[0]) == list(range(10))
    again = Batches(*arrays(), 10, shuffle=True)
    assert labels_of(again) == one and labels_of(again) == two
    assert labels_of(Batches(*arrays(), 10, shuffle=True, seed=1)) != one


def test_looking_at_a_batch_changes_nothing():
    batches = Batches(*arrays(), 2, shuffle=True)
    expected = labels_of(Batches(*arrays(), 2, shuffle=True))
    next(iter(batches))
    iter(batches)
    assert labels_of(batches) == expected


@pytest.mark.parametrize("read", range(1, 11))
def test_resumed_at_any_batch(read):
    options = {"batch_size": 2, "shuffle": True, "flip": "random"}
    whole = Batches(*arrays(), **options)
    expected = labels_of(whole) + labels_of(whole)
    broken, seen = Batches(*arrays(), **options), []
    while len(seen) < read:
        for _, y in broken:
            seen.append(y.tolist())
            if len(seen) == read:
                break
    resumed = Batches(*arrays(), **options)
    resumed.load_state_dict(broken.state_dict())
    while len(seen) < len(expected):
        seen += labels_of(resumed)
    assert seen == expected


def test_a_state_of_other_batches_is_refused():
    with pytest.raises(ValueError, match="another batch size, split or limit"):
        Batches(*arrays(), 5).load_state_dict({"epoch": 0, "position": 3})


def test_random_flips_are_about_half():
    x = torch.arange(2, dtype=torch.uint8).expand(400, 1, 1, 2)
    x, _ = Batches(x[:, 0].numpy(), np.zeros(400, int), 400, flip="random").batch(0, 0)
    assert 0.4 < (x[:, 0, 0, 0] == 1).float().mean() < 0.6


def test_augmentation_does_not_touch_its_input():
    x = torch.randint(0, 256, (5, 1, 6, 6), dtype=torch.uint8)
    before = x.clone()
    flip_batch(x, torch.ones(5, dtype=torch.bool))
    shift_batch(x, torch.ones(5, 2, dtype=torch.long))
    cutout_batch(x, torch.ones(5, 2, dtype=torch.long), 3)
    augment = Augment(**EVERYTHING)
    augment_batch(x, draw_changes(augment, (0, 0, 0), 5, (6, 6)), augment)
    mixup_batch(x, torch.arange(5), torch.arange(5).flip(0), 0.5)
    assert torch.equal(x, before)


def test_shift_is_a_crop_of_the_padded_image():
    x = torch.randint(0, 256, (6, 3, 5, 5), dtype=torch.uint8)
    by = torch.tensor([[0, 0], [1, -1], [-2, 2], [2, 2], [0, 1], [-1, 0]])
    padded = torch.nn.functional.pad(x.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    for image, (down, right), full in zip(shift_batch(x, by), by.tolist(), padded, strict=True):
        assert torch.equal(image, full[:, 2 - down : 7 - down, 2 - right : 7 - right])


def test_resized_images_keep_kind_proportions_and_brightness():
    x = torch.randint(0, 256, (3, 3, 12, 18), dtype=torch.uint8)
    small = resize_batch(x, 9)
    assert small.shape == (3, 3, 6, 9) and small.dtype == torch.uint8
    assert abs(small.float().mean() - x.float().mean()) < 3
    assert torch.equal(resize_batch(x, 18), x)
    for value in (0, 255):  # rounding and the filter's edges go over neither end
        assert (resize_batch(torch.full((1, 1, 9, 9), value, dtype=torch.uint8), 4) == value).all()


def test_small_images_are_a_matter_of_position():
    options = {"batch_size": 3, "shuffle": True, "flip": "random", "shift": 1, "small": 3, "small_batches": 5}
    batches = Batches(*arrays(), **options)
    sizes = [x.shape[-1] for _ in range(2) for x, _ in batches]
    assert sizes == [3] * 5 + [4] * 3
    resumed = Batches(*arrays(), **options)
    resumed.load_state_dict({"epoch": 1, "position": 0})
    x, y = next(iter(resumed))
    assert torch.equal(x, batches.batch(1, 0)[0]) and torch.equal(y, batches.batch(1, 0)[1]) and x.shape[-1] == 3


def pictures(n=23, shape=(9, 8, 3)):
    return np.random.default_rng(1).integers(0, 256, (n, *shape), np.uint8)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True, "crop": 6, "rotate": 10},
        {"colour": 0.5, "erase": 0.5, "rotate": 30},
        {"shuffle": True, "mixup": 0.5, "classes": 23, "small": 4, "small_batches": 3, **EVERYTHING},
        {"mixup": 1.0, "classes": 23, "flip": "alternate", "crop": 8},
    ],
)
def test_the_parts_of_augmented_batches_are_the_whole(world, shape, options, monkeypatch):
    alone = Batches(pictures(shape=shape), np.arange(23), 5, seed=1, **options)
    monkeypatch.setattr("project.data.loader._AT_ONCE", 200)  # a few images at a time
    parts = [Batches(pictures(shape=shape), np.arange(23), 5, seed=1, **options) for _ in range(world)]
    for rank, one in enumerate(parts):
        one.shard(rank, world)
    for _ in range(2):  # epochs
        for (x, y), *shards in zip(alone, *parts, strict=True):
            assert torch.equal(torch.cat([s[0] for s in shards]), x)
            assert torch.equal(torch.cat([s[1] for s in shards]), y)


def test_augmented_batches_are_resumed():
    options = {"batch_size": 4, "shuffle": True, "mixup": 0.3, "classes": 23, **EVERYTHING}
    whole, broken = (Batches(pictures(), np.arange(23), **options) for _ in range(2))
    expected = list(whole)
    for _ in zip(range(3), broken, strict=False):
        pass
    resumed = Batches(pictures(), np.arange(23), **options)
    resumed.load_state_dict(broken.state_dict())
    for (x1, y1), (x2, y2) in zip(expected[3:], resumed, strict=True):
        assert torch.equal(x1, x2) and torch.equal(y1, y2)
    assert not torch.equal(whole.batch(1, 0)[0], expected[0][0])


def test_an_option_changes_nothing_about_what_others_draw():
    all_of_them = draw_changes(Augment(**EVERYTHING), (1, 2, 3), 9, (8, 8))
    assert set(all_of_them) == {"flip", "cut", "shift", "colour", "erase", "cutout"}
    for name in ("flip", "shift", "colour"):
        alone = draw_changes(Augment(**{name: EVERYTHING[name]}), (1, 2, 3), 9, (8, 8))
        assert list(alone) == [name] and torch.equal(alone[name], all_of_them[name])
    assert draw_changes(Augment("alternate", mixup=1), (1, 2, 3), 9, (8, 8)) == {}


def test_a_cut_is_a_crop_that_is_resized():
    x = torch.from_numpy(pictures(4, (12, 16, 3))).permute(0, 3, 1, 2)
    top, left, height, width = 3, 4, 6, 10
    to_x = [width / 16, 0, (2 * left + width) / 16 - 1]
    to_y = [0, height / 12, (2 * top + height) / 12 - 1]
    got = resample_batch(x, torch.tensor([[to_x, to_y]]).repeat(4, 1, 1), (9, 14))
    crop = x[:, :, top : top + height, left : left + width].float()
    wanted = torch.nn.functional.interpolate(crop, (9, 14), mode="bilinear")
    inside = (got.float() - wanted)[:, :, 1:-1, 1:-1]  # at its border a crop knows nothing of its neighbours
    assert inside.abs().max() <= 0.51


def test_turning_is_what_pillow_does():
    """In pixels: the proportions of what is seen stay, whatever those of the image."""
    image = Image.fromarray(pictures(1, (8, 12))[0]).resize((120, 80), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.asarray(image).copy())[None, None]
    cuts = random_cuts(torch.tensor([[0.5], [0.5], [0.5], [0.5], [1.0]]), (80, 120), 1.0, 30)
    got = resample_batch(x, cuts, (80, 120))[0, 0].float()
    errors = [
        (got - torch.from_numpy(np.asarray(image.rotate(angle, Image.Resampling.BILINEAR)).copy()))[25:-25, 25:-25]
        for angle in (30, -30)
    ]
    assert min(e.abs().mean().item() for e in errors) < 0.6 and max(e.abs().mean().item() for e in errors) > 10


@pytest.mark.parametrize("shape", [(64, 64), (30, 90), (90, 30), (10, 1000)])
def test_cuts_lie_inside_and_keep_the_share_that_was_drawn(shape):
    draws = torch.rand(5, 2000, generator=torch.Generator().manual_seed(0))
    cuts = random_cuts(draws, shape, 0.35)
    wide, tall = cuts[:, 0, 0], cuts[:, 1, 1]
    assert (wide + cuts[:, 0, 2].abs() <= 1 + 1e-5).all() and (tall + cuts[:, 1, 2].abs() <= 1 + 1e-5).all()
    assert torch.allclose(wide * tall, 0.35 + 0.65 * draws[0], atol=1e-5)
    if shape == (64, 64):
        assert 0.74 < (wide / tall).min() < 0.8 and 1.25 < (wide / tall).max() < 1.34
    assert (random_cuts(draws, shape) == torch.tensor([[1.0, 0, 0], [0, 1, 0]])).all()  # all of it, unturned


@pytest.mark.parametrize("factors", [(0.6, 1, 1), (1, 0.5, 1), (1, 1, 0.3), (1, 1, 1.4), (0.8, 1.3, 0.7)])
@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
def test_colours_are_what_pillow_does(factors, shape):
    pixels = pictures(1, shape) // 2 + 50  # far from black and white, where Pillow clips after each step
    image = Image.fromarray(pixels[0])
    steps = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for step, factor in zip(steps, factors, strict=True):
        image = step(image).enhance(factor)
    wanted = torch.from_numpy(np.asarray(image).copy()).float()
    x = torch.from_numpy(pixels).reshape(1, 20, 30, -1).permute(0, 3, 1, 2)
    got = colour_batch(x, torch.tensor([factors]))[0].permute(1, 2, 0).reshape(shape).float()
    assert (got - wanted).abs().max() <= 3  # Pillow cuts off the fraction after each step


def test_colours_stay_bytes():
    x = torch.tensor([0, 255, 128], dtype=torch.uint8).reshape(1, 1, 1, 3)
    assert colour_batch(x, torch.tensor([[2.0, 2.0, 2.0]])).flatten().tolist() == [0, 255, 255]
    assert colour_batch(x, torch.tensor([[0.0, 1.0, 1.0]])).sum() == 0


@pytest.mark.parametrize("shape", [(48, 48), (5, 80), (1, 1)])
def test_holes_lie_inside(shape):
    holes = random_holes(torch.rand(6, 2000, generator=torch.Generator().manual_seed(0)), shape, 0.25)
    row, col, height, width, level = holes.T
    assert 0.2 < (height > 0).float().mean() < 0.3 and (level < 256).all() and (holes >= 0).all()
    assert (row + height <= shape[0]).all() and (col + width <= shape[1]).all()
    x = torch.full((2000, 1, *shape), 7, dtype=torch.uint8)
    erased = (erase_batch(x, holes) != 7).flatten(1).any(1)
    assert torch.equal(erased, (height > 0) & (level != 7))


def test_mixed_images_have_mixed_labels():
    labels = np.arange(40) % 5
    images = np.broadcast_to((labels * 50).astype(np.uint8)[:, None, None], (40, 6, 6))
    batches = Batches(images, labels, 8, shuffle=True, mixup=0.8, classes=5, flip="random", rotate=5)
    shares = set()
    for x, y in batches:
        assert y.shape == (8, 5) and y.dtype == torch.float32 and x.dtype == torch.uint8
        assert torch.allclose(y.sum(1), torch.ones(8))
        assert torch.allclose(x.float(), (50 * y @ torch.arange(5.0))[:, None, None, None].expand_as(x), atol=0.51)
        shares.add(round(y.max().item(), 4))
    assert len(shares) > 1  # one share for each batch


def test_shares_are_those_of_the_beta_distribution():
    shares = np.array([random_mix(0.4, (0, 0, i), 3)[0] for i in range(2000)])
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.var() - 1 / (4 * 1.8)) < 0.01
    assert sorted(random_mix(1.0, (5, 1, 2), 9)[1]) == list(range(9))


def test_small_after_a_crop():
    batches = Batches(pictures(8, (12, 12, 3)), np.arange(8), 4, crop=8, small=6, small_batches=1, mixup=0.5, classes=8)
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 6, 6), (4, 3, 8, 8)]


DEVICES = ["meta", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [EVERYTHING, {"flip": "alternate", "shift": 2}, {"mixup": 0.3, "classes": 23}])
def test_images_are_changed_where_they_are(device, options):
    here, there = (Batches(pictures(), np.arange(23), 23, device=d, **options).batch(0, 0) for d in ("cpu", device))
    for a, b in zip(here, there, strict=True):
        assert b.device.type == device and a.shape == b.shape and a.dtype == b.dtype
        if device != "meta":  # the draws are the same; the arithmetic may round otherwise
            assert (a.float() - b.cpu().float()).abs().mean() < 0.1


@pytest.mark.parametrize("options", [{}, {"mixup": 0.5, "classes": 23}])
def test_advice_is_about_the_rows_that_come_next(options, tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", pictures(23, (50, 50)))
    mapped, told = np.load(tmp_path / "images.npy", mmap_mode="r"), []
    monkeypatch.setattr("project.data.loader._will_need", lambda images, rows: told.append(rows.tolist()))
    batches = Batches(mapped, np.arange(23), 6, rows=np.arange(20), shuffle=True, **options)
    batches.shard(1, 2)
    list(batches)
    assert told == []  # so small a set stays where it is
    batches.ahead = 0
    orders = [[batches.rows[batches.order(e)[i : i + 6]] for i in range(0, 20, 6)] for e in (1, 2)]
    parts = [[(rows if options else rows[len(rows) // 2 :]).tolist() for rows in order] for order in orders]
    for n, _ in enumerate(batches):
        assert told == parts[0][: n + 2]  # what is read now, and what is read next
    told.clear()
    batches.batch(2, 2)
    assert told == parts[1][2:4]


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="needs madvise")
def test_advice_is_taken(tmp_path):
    np.save(tmp_path / "images.npy", pictures(23, (50, 50)))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert isinstance(mapped.base, mmap.mmap)
    for images in (mapped, np.asarray(mapped), mapped[3:], pictures(23, (50, 50))):
        batches, calm = (Batches(images, np.arange(len(images)), 5, shuffle=True) for _ in range(2))
        batches.ahead = 0
        for (x1, y1), (x2, y2) in zip(batches, calm, strict=True):
            assert torch.equal(x1, x2) and torch.equal(y1, y2)


LARGE = """
import resource, sys
import numpy as np
from project.data.loader import Batches

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

images, labels = np.load(sys.argv[1], mmap_mode="r"), np.load(sys.argv[2])
Batches(images, labels, 32, crop=64).batch(0, 0)
limit = (kilobytes("VmData:") << 10) + (32 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
assert images.nbytes > 4 * (32 << 20)
try:
    np.array(images)
    sys.exit("the set fits into memory: nothing is shown")
except MemoryError:
    pass
before, seen = kilobytes("RssAnon:"), []
for ahead in (0, 2**30):
    batches = Batches(images, labels, 32, shuffle=True, flip="random", crop=64, seed=ahead)
    batches.ahead = ahead
    for x, y in batches:
        assert (x == y[:, None, None, None]).all()
        seen += y.tolist()
assert sorted(seen) == sorted([*labels.tolist()] * 2)
assert kilobytes("RssAnon:") - before < 32 << 10
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on a process's memory")
def test_a_set_several_times_as_large_as_memory(tmp_path):
    """Every image is as bright as its label; under a quarter of its size in memory, all are read, in random order."""
    labels = np.arange(2100) % 251
    images = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (len(labels), 256, 256))
    for i, label in enumerate(labels):
        images[i] = label
    del images
    np.save(tmp_path / "labels.npy", labels)
    command = [sys.executable, "-c", LARGE, str(tmp_path / "images.npy"), str(tmp_path / "labels.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


class Words:
    """Texts of these lengths; each word is the number of its text, and two more."""

    def __init__(self, lengths):
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.ids = np.repeat(np.arange(len(lengths), dtype=np.int32) + 2, lengths)

    def __len__(self):
        return len(self.offsets) - 1


def words(n=203, seed=0):
    return Words(np.random.default_rng(seed).geometric(0.1, n) - 1)


def texts(n=203, batch_size=8, **options):
    return TextBatches(words(n), np.arange(n), batch_size, **options)


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "bucket": False}, {"max_length": 7}])
def test_every_text_comes_once_with_its_words(options):
    source, batches = words(), texts(**options)
    for _ in range(2):  # epochs
        seen = []
        for ids, y in batches:
            for row, i in zip(ids.tolist(), y.tolist(), strict=True):
                inside = [i + 2] * min(source.offsets[i + 1] - source.offsets[i], options.get("max_length", 256)) or [1]
                assert row == inside + [0] * (len(row) - len(inside))
            assert (ids != 0).sum(1).max() == ids.shape[1]  # no wider than its longest
            seen += y.tolist()
        assert sorted(seen) == list(range(203)) and (seen == list(range(203))) == (not options.get("shuffle"))


def test_orders_of_texts_differ_by_epoch_and_seed_and_repeat():
    batches = texts(shuffle=True)
    one, two = labels_of(batches), labels_of(batches)
    assert one != two and sorted(map(sorted, one)) != sorted(map(sorted, two))
    again = texts(shuffle=True)
    assert labels_of(again) == one and labels_of(again) == two and labels_of(texts(shuffle=True, seed=1)) != one


@pytest.mark.parametrize("n", [1, 7, 8, 9, 400, 401, 805])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_of_texts_are_full(n, drop_last):
    if drop_last and n < 8:
        with pytest.raises(ValueError, match="at most the"):
            texts(n, shuffle=True, drop_last=True)
        return
    sizes = [len(y) for y in labels_of(texts(n, shuffle=True, drop_last=drop_last))]
    assert sizes == [8] * (n // 8) + ([n % 8] if n % 8 and not drop_last else [])


def test_bucketed_texts_are_of_about_one_length_and_come_in_no_order():
    batches = texts(2000, 10, shuffle=True)
    widths = [ids.shape[1] for ids, _ in batches]
    assert np.mean([(ids == 0).float().mean() for ids, _ in batches]) < 0.1
    assert len(set(widths)) > 5 and widths != sorted(widths) and widths[:50] != sorted(widths[:50])


def test_no_length_is_dropped_more_often():
    source = Words([1] * 8 + [50])
    dropped = []
    for epoch in range(40):
        batches = TextBatches(source, np.arange(9), 4, shuffle=True, drop_last=True)
        dropped += set(range(9)) - {i for p in range(2) for i in batches.batch(epoch, p)[1].tolist()}
    assert len(set(dropped)) > 6 and dropped.count(8) < 15


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_parts_of_texts_are_the_whole(world):
    options = {"shuffle": True, "dropout": 0.3, "max_length": 9, "seed": 4}
    alone, parts = texts(**options), [texts(**options) for _ in range(world)]
    for rank, one in enumerate(parts):
        one.shard(rank, world)
    for (ids, y), *shards in zip(alone, *parts, strict=True):
        assert torch.equal(torch.cat([s[0] for s in shards]), ids) and torch.equal(torch.cat([s[1] for s in shards]), y)


@pytest.mark.parametrize("read", [1, 5, 25, 26, 27, 40])
def test_texts_are_resumed_at_any_batch(read):
    options = {"shuffle": True, "dropout": 0.2}
    whole = texts(**options)
    expected = [(ids.tolist(), y.tolist()) for _ in range(2) for ids, y in whole]
    broken, seen = texts(**options), 0
    while seen < read:
        for _ in broken:
            seen += 1
            if seen == read:
                break
    resumed = texts(**options)
    resumed.load_state_dict(broken.state_dict())
    got = []
    while len(got) < len(expected) - read:
        got += [(ids.tolist(), y.tolist()) for ids, y in resumed]
    assert got == expected[read:]


def test_dropout_makes_words_unknown_and_nothing_else():
    source = Words([200] * 50)
    kept, dropped = (TextBatches(source, np.arange(50), 50, dropout=d).batch(0, 0)[0] for d in (0.0, 0.25))
    assert ((dropped == kept) | (dropped == 1)).all() and 0.23 < (dropped == 1).float().mean() < 0.27
    ids, _ = TextBatches(Words([3, 1, 0]), np.arange(3), 3, dropout=1.0).batch(0, 0)
    assert ids.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]


def test_texts_without_a_single_word():
    ids, y = TextBatches(Words([0, 0, 0]), np.arange(3)).batch(0, 0)
    assert ids.tolist() == [[1], [1], [1]] and y.tolist() == [0, 1, 2]


def test_rows_of_memory_mapped_texts(tmp_path):
    source = words()
    np.save(tmp_path / "ids.npy", source.ids)
    np.save(tmp_path / "offsets.npy", source.offsets)
    rows = np.array([200, 3, 3, 77, 9])
    expected = TextBatches(source, np.arange(203), 2, rows=rows, shuffle=True)
    source.ids = np.load(tmp_path / "ids.npy", mmap_mode="r")
    source.offsets = np.load(tmp_path / "offsets.npy", mmap_mode="r")
    got = TextBatches(source, np.arange(203), 2, rows=rows, shuffle=True)
    for (x1, y1), (x2, y2) in zip(expected, got, strict=True):
        assert torch.equal(x1, x2) and torch.equal(y1, y2) and x1.dtype == torch.int64
    assert gather_rows(source.ids, source.offsets, np.array([], int), 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1"),
        ({"max_length": 0}, "max_length: expected a whole number of at least 1"),
        ({"max_length": 9.5}, "max_length"),
        ({"dropout": 1.5}, "dropout: expected a number from 0 to 1, got 1.5"),
        ({"seed": -1}, "seed"),
        ({"rows": np.array([9])}, "rows: expected numbers from 0 to 8, got 9 to 9"),
        ({"rows": np.array([], int)}, "empty split"),
    ],
)
def test_arguments_that_cannot_give_texts(change, message):
    with pytest.raises(ValueError, match=message):
        TextBatches(words(9), np.arange(9), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": np.array([0, 5, 3, 4])},
        {"offsets": np.array([0, 1, 2, 99])},
        {"offsets": np.array([-1, 1, 2, 4])},
        {"offsets": np.array([0.0, 1, 2, 4])},
        {"ids": np.zeros((4, 1), int)},
        {"ids": np.zeros(4)},
    ],
)
def test_tokens_that_are_no_texts(change):
    tokens = Words([1, 2, 1])
    vars(tokens).update(change)
    with pytest.raises(ValueError, match="tokens: expected"):
        TextBatches(tokens, np.arange(3))


def test_a_part_is_augmented_as_in_the_whole():
    x = torch.randint(0, 256, (9, 1, 6, 6), dtype=torch.uint8)
    augment = Augment("random", 2, 3, rotate=9)
    changes = draw_changes(augment, (1, 2, 3), 9, (6, 6))
    whole = augment_batch(x, changes, augment)
    for first, last in ((0, 4), (4, 5), (5, 9), (9, 9)):
        part = augment_batch(x[first:last], {k: v[first:last] for k, v in changes.items()}, augment)
        assert torch.equal(part, whole[first:last])
