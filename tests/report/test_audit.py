"""The audit finds what was planted in a folder of images."""

import numpy as np
import pytest
from PIL import Image

from triptych.data.sources import open_source
from triptych.report.audit import audit, difference_hash


def photo(seed: int, size=(64, 48)) -> Image.Image:
    """Smooth random colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """12 images of two classes; a copy, a lighter version, a grey one, an even one and a damaged one among them."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for i in range(6):
        photo(i).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "b" / "copy.png").write_bytes((tmp_path / "a" / "0.png").read_bytes())
    photo(1).point(lambda v: min(255, v + 12)).save(tmp_path / "b" / "lighter.jpg", quality=90)
    photo(20, (200, 50)).convert("L").save(tmp_path / "b" / "grey.png")
    Image.new("RGB", (10, 10), "red").save(tmp_path / "b" / "even.png")
    Image.new("RGB", (30, 90), "blue").save(tmp_path / "b" / "tall.webp")
    (tmp_path / "b" / "damaged.jpg").write_bytes((tmp_path / "b" / "lighter.jpg").read_bytes()[:200])
    return tmp_path


def test_it_finds_what_was_planted(folder):
    found = audit(open_source(folder))
    assert (found.images, found.decoded, found.hashed) == (12, 12, 12)
    assert found.classes == [("a", 6), ("b", 6)]
    assert found.duplicates == [["a/0.png", "b/copy.png"]]
    assert [pair[:2] for pair in found.near] == [("a/1.png", "b/lighter.jpg")]
    assert found.near[0][2] <= 4
    assert [line.split(":")[0] for line in found.unreadable] == ["b/damaged.jpg"]
    assert dict(found.modes) == {"RGB": 10, "L": 1}
    assert dict(found.formats) == {"PNG": 9, "JPEG": 1, "WEBP": 1}
    assert found.flat == 2
    assert found.by_area() == ((10, 10), (64, 48), (200, 50))
    assert found.aspects() == (pytest.approx(1 / 3), pytest.approx(4 / 3), 4.0)


def test_a_sample_is_what_the_seed_says(folder):
    source = open_source(folder)
    few = audit(source, decode=5, compare=3, seed=1)
    assert (few.decoded, few.hashed, len(few.sides) + len(few.unreadable)) == (5, 3, 5)
    assert few == audit(source, decode=5, compare=3, seed=1)
    assert few.sides != audit(source, decode=5, compare=3, seed=3).sides


def test_drawn_images_have_pixels_and_no_files():
    found = audit(open_source("scenes:16"), decode=8)
    assert found.formats == [("pixels", 8)]
    assert found.hashed == 8
    assert not found.duplicates


def test_a_difference_hash_outlives_size_and_brightness_but_not_another_image():
    one = difference_hash(photo(3))
    same = difference_hash(photo(3, (300, 200)).point(lambda v: v * 0.8))
    other = difference_hash(photo(4))
    assert (one != same).sum() <= 4 < (one != other).sum()
    assert difference_hash(Image.new("RGB", (50, 50), "green")) is None
