"""The pipeline of semantic segmentation: every operation against its rule in plain loops (mmsegmentation 0.30)."""

import cv2
import numpy as np
import pytest
import torch

from triptych.data.annotated import IGNORE
from triptych.dense.segment_data import (
    TestTransform,
    TrainTransform,
    draw_crop,
    linear,
    photometric,
    resize_image,
    resize_mask,
    resized,
    saturate,
    turn_hue,
)

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # pixels stay v / 255


class Script:
    """A generator that says what it is told: integers in order, then uniforms in order."""

    def __init__(self, integers=(), uniforms=()):
        self._integers, self._uniforms = list(integers), list(uniforms)

    def integers(self, low, high=None):
        value = self._integers.pop(0)
        assert (0 if high is None else low) <= value < (low if high is None else high)
        return value

    def uniform(self, low, high):
        value = self._uniforms.pop(0)
        assert low <= value <= high
        return value


def noise(height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (2048, 512), (512, 683)),  # by the shorter side
        ((480, 640), (1024, 256), (256, 341)),
        ((100, 900), (2048, 512), (228, 2048)),  # by the longer side
        ((2, 900), (20, 20), (1, 20)),  # a side never vanishes
    ],
)
def test_an_image_fills_the_first_limit_that_it_meets(size, limits, expected):
    assert resized(np.empty(size), *limits) == expected


def test_a_mask_is_resized_without_new_classes():
    mask = np.random.default_rng(0).choice([0, 3, IGNORE], (31, 17)).astype(np.uint8)
    assert set(np.unique(resize_mask(mask, 77, 50))) <= {0, 3, IGNORE}


def test_an_image_that_shrinks_much_is_averaged_not_sampled():
    """Stripes of one pixel become grey; plain bilinear sampling at this ratio would keep them black and white."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[1::2] = 255
    small = resize_image(stripes, 16, 16)
    assert small.min() >= 127
    assert small.max() <= 128


def test_crops_of_one_class_are_drawn_again_and_the_eleventh_is_taken():
    mask = np.zeros((8, 20), np.uint8)
    mask[:, 10:] = 1
    one_class, both = [0, 0], [0, 6]  # top, left of 8 x 8 windows; the second has four columns of each
    assert draw_crop(mask, 8, Script([*one_class, *both])) == (0, 6)
    assert draw_crop(mask, 8, Script([*one_class * 10, 0, 2])) == (0, 2)


@pytest.mark.parametrize(("columns_of_the_other", "taken"), [(2, False), (3, True)])
def test_a_crop_is_refused_where_one_class_has_three_quarters(columns_of_the_other, taken):
    """Of 8 columns: 6/8 is exactly .75, which is too much; ignored pixels count for neither side."""
    mask = np.zeros((10, 12), np.uint8)
    mask[:, :columns_of_the_other] = 1
    mask[6:] = IGNORE
    assert (draw_crop(mask, 8, Script([0, 0, *[1, 1] * 10])) == (0, 0)) == taken


def test_colours_become_alpha_v_plus_beta_clipped_and_cut():
    image = noise()
    for alpha, beta in ((1.0, 31.7), (1.0, -32.0), (0.5, 0.0), (1.43, 0.0)):
        expected = np.clip(image.astype(np.float32) * np.float32(alpha) + np.float32(beta), 0, 255).astype(np.uint8)
        np.testing.assert_array_equal(linear(image, alpha, beta), expected)


def test_saturation_and_hue_change_one_channel_of_8_bit_hsv():
    image = noise()
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    more = hsv.copy()
    more[..., 1] = np.clip(hsv[..., 1].astype(np.float32) * 1.5, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(saturate(image, 1.5), cv2.cvtColor(more, cv2.COLOR_HSV2RGB))
    turned = hsv.copy()
    turned[..., 0] = (hsv[..., 0].astype(int) - 18) % 180
    np.testing.assert_array_equal(turn_hue(image, -18), cv2.cvtColor(turned, cv2.COLOR_HSV2RGB))
    np.testing.assert_array_equal(image, noise())  # left as it was


def test_distortions_come_in_the_order_that_was_drawn():
    image = noise()
    nothing = Script([0, 0, 0, 0, 0])  # brightness, contrast last, saturation, hue, contrast
    np.testing.assert_array_equal(photometric(image, nothing), image)
    first = photometric(image, Script([1, 1, 1, 1, 1, -18], [20.0, 1.5, 0.5]))
    expected = turn_hue(saturate(linear(linear(image, 1, 20), 1.5, 0), 0.5), -18)
    np.testing.assert_array_equal(first, expected)
    last = photometric(image, Script([1, 0, 1, 1, 17, 1], [20.0, 0.5, 1.5]))
    np.testing.assert_array_equal(last, linear(turn_hue(saturate(linear(image, 1, 20), 0.5), 17), 1.5, 0))


def test_half_of_the_images_get_each_distortion():
    grey = np.full((2, 2, 3), 128, np.uint8)  # saturation and hue leave grey as it is
    rng = np.random.default_rng(0)
    same = np.mean([np.array_equal(photometric(grey, rng), grey) for _ in range(2000)])
    assert same == pytest.approx(0.25, abs=0.05)  # neither brightness nor contrast; small changes may round to none


def checkered(height, width):
    """An image whose red channel tells the class of each pixel: 4 x 4 regions, big enough to survive resizing."""
    rows, columns = np.indices((height, width))
    mask = (rows * 4 // height * 4 + columns * 4 // width).astype(np.uint8)
    return np.stack([mask * 16, mask * 0, mask * 0], -1).astype(np.uint8), mask


def test_image_and_mask_stay_together(monkeypatch):
    monkeypatch.setattr("triptych.dense.segment_data.photometric", lambda image, rng: image)
    transform, rng = TrainTransform(64, 400, 100, **PLAIN), np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        pixels, labels = transform(*checkered(120, 160), rng)
        assert pixels.shape == (3, 64, 64)
        assert pixels.dtype == torch.float32
        assert labels.shape == (64, 64)
        shown = (pixels[0] * 255 / 16).round()
        inside = labels != IGNORE
        assert (shown == labels)[inside].float().mean() > 0.9  # but at edges, where the image is interpolated
        seen.add(bool((labels[0].int().diff()[inside[0, 1:]] < 0).any()))  # mirrored: classes fall from left to right
    assert seen == {True, False}


def test_what_lies_outside_is_zero_after_normalisation_and_ignored():
    image, mask = np.full((20, 40, 3), 200, np.uint8), np.zeros((20, 40), np.uint8)
    pixels, labels = TrainTransform(32, 40, 20, (0.5, 0.5))(image, mask, np.random.default_rng(0))
    assert pixels[:, 10:].eq(0).all()
    assert pixels[:, :, 20:].eq(0).all()
    assert pixels[:, :10, :20].ne(0).all()
    assert labels[:10, :20].eq(0).all()
    assert labels.eq(0).sum() == 200
    assert labels.ne(0).eq(labels.eq(IGNORE)).all()


def test_an_example_is_a_function_of_its_generator():
    transform = TrainTransform(32, 200, 50)
    first, again, other = (transform(*checkered(60, 80), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_test_images_are_resized_and_normalised_only():
    image = noise(60, 80)
    pixels = TestTransform(400, 30, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))(image)
    expected = (torch.from_numpy(resize_image(image, 30, 40)) / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor(
        [0.2, 0.3, 0.4]
    )
    torch.testing.assert_close(pixels, expected.permute(2, 0, 1))
    assert TestTransform(400, 30)(image, 1.75).shape == (3, 52, 69)
