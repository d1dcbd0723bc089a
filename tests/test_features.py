"""Features of inputs: the same for the log, for slices and for drift."""

import numpy as np

from project.data.features import add_features, features_of_images, grey_sample, image_slices, text_slices


def test_slices_of_pictures_and_texts():
    images = np.repeat(np.arange(8, dtype=np.uint8) * 30, 16).reshape(8, 4, 4)
    found = image_slices(images)
    assert found["brightness"] == sorted(found["brightness"]) and len(set(found["brightness"])) == 4
    assert len(set(found["contrast"])) == 1
    many = np.zeros((2500, 2, 2, 3), np.uint8)
    assert len(image_slices(many)["contrast"]) == 2500
    texts = text_slices(["", "123 !!", "ALL CAPITALS HERE", "no capital at all"])
    assert texts["share of capitals"][2].startswith("2") or texts["share of capitals"][2].startswith("3")
    assert len(texts["words"]) == 4


def test_a_logged_feature_is_the_one_of_the_slice():
    """Grey and colour, small and large: a row of the log and the table over a set say the same."""
    rng = np.random.default_rng(0)
    for shape in ((5, 28, 28), (5, 224, 224, 3), (3, 300, 40, 3), (2, 1, 1)):
        images = rng.integers(0, 256, shape).astype(np.uint8)
        logged: list[dict] = [{"raw": grey_sample(image)} for image in images]
        add_features(logged)
        table = features_of_images(images)
        assert {name: [row["features"][name] for row in logged] for name in table} == {
            k: list(v) for k, v in table.items()
        }
    assert features_of_images(images[:0]) == {}


def test_colours_are_as_bright_as_they_look():
    """All of red, green and blue count, and a grey picture is the same in one channel and in three."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (grey_sample(np.stack([grey] * 3, 2)) == grey).all()
    red, green, blue = (grey_sample(np.full((1, 1, 3), np.eye(3)[i] * 255, np.uint8))[0, 0] for i in range(3))
    assert 0 < blue < red < green < 255


def test_a_sample_of_a_large_image_is_small():
    assert max(grey_sample(np.zeros((9000, 127, 3), np.uint8)).shape) <= 127
