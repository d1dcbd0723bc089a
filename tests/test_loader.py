"""Batches: what a notebook would tell badly."""

import numpy as np
import pytest
import torch

from project.data.loader import Batches, augment_batch, cutout_batch, flip_batch, resize_batch, shift_batch


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
    flipped = (augment_batch(x, (0, 0, 0), flip=True)[:, 0, 0, 0] == 1).float().mean()
    assert 0.4 < flipped < 0.6


def test_augmentation_does_not_touch_its_input():
    x = torch.randint(0, 256, (5, 1, 6, 6), dtype=torch.uint8)
    before = x.clone()
    flip_batch(x, torch.ones(5, dtype=torch.bool))
    shift_batch(x, torch.ones(5, 2, dtype=torch.long))
    cutout_batch(x, torch.ones(5, 2, dtype=torch.long), 3)
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


def test_a_part_is_augmented_as_in_the_whole():
    x = torch.randint(0, 256, (9, 1, 6, 6), dtype=torch.uint8)
    whole = augment_batch(x, (1, 2, 3), True, 2, 3)
    for first, last in ((0, 4), (4, 5), (5, 9), (9, 9)):
        part = augment_batch(x[first:last], (1, 2, 3), True, 2, 3, first=first, whole=9)
        assert torch.equal(part, whole[first:last])
