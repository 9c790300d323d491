"""Decoding and cutting: the same pixels as PIL's, whatever the file; reduced images show what whole ones show."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

from triptych.data.crops import Crop, random_crop
from triptych.data.images import UnreadableImage
from triptych.data.pixels import MARGIN, Picture, Pixels, cut, shrink_for
from triptych.data.scenes import scene
from triptych.data.sources import load_rgb, open_source

HEIGHT, WIDTH = 203, 317  # multiples of nothing that matters


def picture(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    checks = ((x // 9 + y // 7) % 2) * 255
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, checks], 2).astype(np.uint8))


def position(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Red is the row and green the column, 0..255."""
    y, x = np.mgrid[0:height, 0:width]
    colours = np.stack([(y + 0.5) / height, (x + 0.5) / width, np.zeros((height, width))], -1)
    return Image.fromarray((255 * colours).round().astype(np.uint8))


def source_of(folder: Path, image: Image.Image, name: str = "a.jpg", **options):
    image.save(folder / name, **options)
    return open_source(folder)


def opened(source) -> np.ndarray:
    one = Picture(source, 0)
    pixels = one.pixels()
    assert (pixels.shrink, pixels.start) == (1, (0, 0))
    assert pixels.values.shape == (one.height, one.width, 3)
    return pixels.values


PLAIN = {
    "4:2:0": {"quality": 90},
    "4:4:4": {"quality": 95, "subsampling": 0},
    "4:2:2": {"quality": 80, "subsampling": 1},
    "progressive": {"progressive": True},
    "stored as RGB": {"keep_rgb": True},
    "restarts": {"restart_marker_blocks": 3},
    "coarse": {"quality": 5},
}


@pytest.fixture
def forbid_pil(monkeypatch):
    """Pillow may read headers but decode nothing."""

    def refuse(*_):
        raise AssertionError("decoded by Pillow")

    monkeypatch.setattr("triptych.data.pixels.load_rgb", refuse)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_jpeg_is_bit_for_bit_what_pil_makes_of_it(kind, tmp_path, forbid_pil):
    source = source_of(tmp_path, picture(), **PLAIN[kind])
    np.testing.assert_array_equal(opened(source), np.asarray(load_rgb(source, 0)))


def test_a_grey_jpeg_too(tmp_path, forbid_pil):
    source = source_of(tmp_path, picture().convert("L"))
    np.testing.assert_array_equal(opened(source), np.asarray(load_rgb(source, 0)))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_orientation_is_applied_to_size_and_pixels(orientation, tmp_path, forbid_pil):
    source = source_of(tmp_path, picture(), exif=turned(orientation))
    np.testing.assert_array_equal(opened(source), np.asarray(load_rgb(source, 0)))


OTHERS = {
    "cmyk.jpg": picture().convert("CMYK"),
    "rgba.png": picture().convert("RGBA"),
    "palette.png": picture().quantize(16),
    "16bit.png": Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100),
    "plain.webp": picture(),
    "plain.bmp": picture(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_file_is_what_it_was(name, tmp_path):
    source = source_of(tmp_path, OTHERS[name], name)
    np.testing.assert_array_equal(opened(source), np.asarray(load_rgb(source, 0)))


def test_the_size_is_known_before_anything_is_decoded(tmp_path, monkeypatch, forbid_pil):
    source = source_of(tmp_path, picture(), exif=turned(6))
    monkeypatch.setattr(cv2, "imdecode", None)
    one = Picture(source, 0)
    assert (one.height, one.width) == (WIDTH, HEIGHT)


def test_sources_of_arrays_and_of_nothing_but_images_are_read(tmp_path):
    scenes = open_source("scenes:2")
    np.testing.assert_array_equal(opened(scenes), np.asarray(scenes.image(0)))

    class Bare:
        def image(self, index: int) -> Image.Image:
            return picture().convert("L")

    np.testing.assert_array_equal(opened(Bare()), np.asarray(picture().convert("L").convert("RGB")))


def outcome(read) -> str | bytes:
    try:
        return read().tobytes()
    except UnreadableImage as error:
        return str(error)


def test_damaged_files_give_pils_pixels_or_pils_message(tmp_path):
    """Cut off, without end mark, with a wrong byte, with a hole: each ends as it does without the fast way.

    With one exception, in the last two: what PIL finds broken behind the last row, libjpeg having made the lost rows
    grey by then, is not looked at.  (Where nothing is broken behind it, PIL too gives the rest in grey.)
    """
    whole = []
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
        data = io.BytesIO()
        picture().save(data, "JPEG", **options)
        whole.append(data.getvalue())
    rng, unreadable, excepted = np.random.default_rng(0), 0, 0
    source = source_of(tmp_path, picture())
    for number in range(240):
        data = bytearray(whole[number % 3])
        if number % 4 == 0:
            data = data[: rng.integers(2, len(data))]
        elif number % 4 == 1:
            data = data[:-2]
        elif number % 4 == 2:
            data[rng.integers(len(data))] = rng.integers(256)
        else:
            start, stop = sorted(rng.integers(0, len(data), 2))
            del data[start:stop]
        (tmp_path / "a.jpg").write_bytes(data)
        expected = outcome(lambda: np.asarray(load_rgb(source, 0)))
        ours = outcome(lambda: Picture(source, 0).pixels().values)
        unreadable += isinstance(expected, str)
        if number % 4 > 1 and str(expected).endswith("broken data stream when reading image file"):
            excepted += ours != expected
        else:
            assert ours == expected
    assert 60 < unreadable < 200
    assert excepted < 10


@pytest.mark.parametrize("kind", ["picture", "noise"])
@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_a_crop_is_pils_within_one_level(name, kind):
    """PIL is made to go along the rows first; of tall images, Pillow 13 goes along the columns first.

    Both orders cut values off at 0 and 255 in between, so that on white noise they differ by up to 25 levels.
    """
    rng = np.random.default_rng(0)
    image = (
        picture() if kind == "picture" else Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    )
    pixels, resampling = Pixels(np.array(image)), Image.Resampling[name.upper()]
    for side in (16, 96, 150):
        for scale in ((0.02, 0.1), (0.3, 1.0)):
            crop = random_crop(HEIGHT, WIDTH, scale, rng)
            ours = cut(pixels, crop, (side, side), name)
            box = image.crop((crop.j, crop.i, crop.j + crop.w, crop.i + crop.h))
            theirs = box.resize((side, crop.h), resampling).resize((side, side), resampling)
            assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1
            assert ours.flags.c_contiguous


def test_a_crop_is_torchvisions():
    image, crop = picture(), Crop(20, 31, 100, 140)
    theirs = resized_crop(pil_to_tensor(image), *crop, [96, 64], InterpolationMode.BICUBIC, antialias=True)
    ours = cut(Pixels(np.array(image)), crop, (96, 64), "bicubic")
    np.testing.assert_array_equal(ours, theirs.permute(1, 2, 0))


def test_an_image_is_decoded_at_the_size_that_the_neediest_crop_allows():
    ratio = {1: 2 * MARGIN - 1, 2: 2 * MARGIN, 4: 4 * MARGIN, 8: 50 * MARGIN}
    for shrink, times in ratio.items():
        assert shrink_for([(Crop(0, 0, 96 * times, 96 * times + 9), 96)]) == shrink
        big = (Crop(0, 0, 10**5, 10**5), 96)
        assert shrink_for([big, (Crop(0, 0, 3000, 224 * times), 224)]) == min(
            shrink, shrink_for([(Crop(0, 0, 3000, 3000), 224)])
        )


def waves(height: int, width: int, length: int) -> Image.Image:
    """Red waves from left to right and green ones from top to bottom, of so many pixels."""
    y, x = np.mgrid[0:height, 0:width] * (2 * np.pi / length)
    return Image.fromarray((128 + 120 * np.sin(np.stack([x, y, 0 * x], -1))).round().astype(np.uint8))


def moved(a: np.ndarray, b: np.ndarray, axis: int) -> float:
    """By how many pixels b lies further along the axis than a, to first order."""
    slope = np.gradient(a, axis=axis)
    return float(((a - b) * slope).sum() / (slope**2).sum())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_crop_of_a_reduced_image_shows_the_same_place(orientation, shrink, tmp_path, forbid_pil):
    """To a quarter of a pixel of the whole image, however many of those make one of the reduced image."""
    one = Picture(source_of(tmp_path, waves(603, 805, 24 * shrink), exif=turned(orientation), quality=98), 0)
    whole, reduced = one.pixels(), one.pixels(shrink)
    assert (whole.shrink, reduced.shrink) == (1, shrink)
    assert reduced.values.shape[:2] == (-(-one.height // shrink), -(-one.width // shrink))
    channels = (1, 0) if orientation < 5 else (0, 1)
    rng = np.random.default_rng(0)
    for _ in range(12):
        crop = random_crop(one.height, one.width, (0.1, 0.9), rng)
        side = min(crop.h, crop.w) // (2 * shrink)
        a, b = (cut(pixels, crop, (side, side), "bicubic").astype(float)[2:-2, 2:-2] for pixels in (whole, reduced))
        for axis, extent in ((0, crop.h), (1, crop.w)):
            channel = channels[axis]
            assert abs(moved(a[..., channel], b[..., channel], axis)) * extent / side < 0.25, crop


@pytest.mark.parametrize("corner", range(4))
def test_crops_at_the_borders_of_a_reduced_image(corner, tmp_path):
    one = Picture(source_of(tmp_path, position(), quality=98), 0)
    crop = Crop(
        *(start if corner & bit else end - 101 for bit, start, end in ((1, 0, HEIGHT), (2, 0, WIDTH))), 101, 101
    )
    a, b = (cut(one.pixels(shrink), crop, (12, 12), "bicubic").astype(int) for shrink in (1, 8))
    assert np.abs(a - b)[..., :2].max() <= 6


def test_crops_of_reduced_photographs_are_near_those_of_whole_ones(tmp_path):
    """With the margin that `shrink_for` keeps; drawn scenes have sharper edges than photographs."""
    rng, off = np.random.default_rng(0), []
    for number in range(2):
        one = Picture(source_of(tmp_path, Image.fromarray(scene(number, size=1500).image), quality=92), 0)
        whole = one.pixels()
        for shrink in (2, 4):
            reduced = one.pixels(shrink)
            for _ in range(4):
                side = int(rng.choice([64, 96]))
                extent = int(side * MARGIN * shrink * rng.uniform(1, 1.5))
                crop = Crop(*rng.integers(0, 1500 - extent, 2).tolist(), extent, extent)
                a, b = (cut(pixels, crop, (side, side), "bicubic").astype(int) for pixels in (whole, reduced))
                off.append((np.abs(a - b).mean(), np.percentile(np.abs(a - b), 99)))
    mean, tail = np.array(off).T
    assert mean.mean() < 0.8
    assert mean.max() < 1.5
    assert tail.mean() < 5
