"""What detectors are trained on: boxes and masks follow their pixels through every change."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from drawn_coco import draw_coco
from triptych.data.annotated import open_coco
from triptych.data.coco import open_file
from triptych.dense.detect_data import (
    Scene,
    Sizes,
    TrainScenes,
    at_test_size,
    augmented,
    cropped,
    example,
    flipped,
    read,
    resized,
    scaled_size,
)
from triptych.errors import UserError

SMALL = Sizes(short=(40, 48), longest=90, before_crop=(32, 64), crop=(24, 40), test_size=48)


def scene(height=40, width=60) -> Scene:
    """A bright rectangle, 20 wide and 10 high, and a mark of 2 px at the left border."""
    image = np.zeros((height, width, 3), np.uint8)
    masks = np.zeros((2, height, width), np.uint8)
    masks[0, 8:18, 30:50] = 1
    masks[1, 20:22, 0:2] = 1
    image[masks.any(0)] = 255
    boxes = np.array([[30, 8, 50, 18], [0, 20, 2, 22]], np.float32)
    return Scene(image, boxes, np.array([1, 0]), masks)


def extent(mask):
    """left, top, right, bottom of a mask."""
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_a_flip_takes_boxes_and_masks_along():
    given = flipped(scene())
    np.testing.assert_array_equal(given.boxes[0], [10, 8, 30, 18])
    for mask, box in zip(given.masks, given.boxes, strict=True):
        np.testing.assert_array_equal(extent(mask), box)
    np.testing.assert_array_equal(given.image[..., 0] == 255, given.masks.any(0))
    np.testing.assert_array_equal(flipped(given).image, scene().image)


def test_a_crop_cuts_boxes_and_drops_what_left_the_image():
    given = cropped(scene(), top=5, left=20, rows=30, columns=25)
    np.testing.assert_array_equal(given.boxes, [[10, 3, 25, 13]])
    np.testing.assert_array_equal(given.labels, [1])
    assert given.masks.shape == (1, 30, 25)
    np.testing.assert_array_equal(extent(given.masks[0]), given.boxes[0])


def test_a_crop_without_objects_is_a_training_image_too():
    given = cropped(scene(), top=25, left=5, rows=10, columns=10)
    parts = example(given)
    assert {name: tuple(x.shape) for name, x in parts.items()} == {
        "image": (3, 10, 10),
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 10, 10),
    }


def test_resizing_scales_boxes_and_masks_with_the_image():
    given = resized(scene(), 80, 1333)
    assert given.image.shape == (80, 120, 3)
    np.testing.assert_allclose(given.boxes, scene().boxes * 2)
    for mask, box in zip(given.masks, given.boxes, strict=True):
        np.testing.assert_array_equal(extent(mask), box)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((400, 1000), (533, 1333)), ((100, 100), (800, 800))],
)
def test_the_short_side_is_800_unless_the_long_one_would_pass_1333(size, wanted):
    assert scaled_size(*size, 800, 1333) == wanted


def test_training_images_have_the_sizes_of_the_protocol():
    """Without crop the aspect stays; every short side of the list occurs; nothing is longer than allowed."""
    rng = np.random.default_rng(0)
    found = [augmented(scene(40, 80), SMALL, rng) for _ in range(200)]
    shorter = [min(s.image.shape[:2]) for s in found]
    assert {40, 48} <= set(shorter)
    assert all(max(s.image.shape[:2]) <= 90 for s in found)
    whole = [s for s in found if s.image.shape[:2] in ((40, 80), (45, 90))]  # 48 x 96 is held at 90
    assert 70 < len(whole) < 130  # half of them are not cropped
    assert all((s.boxes[:, 2:] - s.boxes[:, :2] >= 1).all() for s in found)
    assert {len(s.boxes) for s in found} >= {1, 2}
    mirrored = [s for s in whole if s.boxes[s.labels == 0][0, 0] > s.image.shape[1] / 2]  # the mark on the left
    assert 0.3 < len(mirrored) / len(whole) < 0.7


def test_the_papers_sizes():
    assert Sizes().short == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (Sizes().longest, Sizes().before_crop, Sizes().crop, Sizes().test_size) == (
        1333,
        (400, 500, 600),
        (384, 600),
        800,
    )


def test_sizes_that_no_image_can_have_are_a_users_mistake():
    with pytest.raises(UserError, match="longest"):
        Sizes(test_size=2000)
    with pytest.raises(UserError, match=">= 1"):
        Sizes(short=(0,))
    with pytest.raises(UserError, match="crop"):
        Sizes(crop=(600, 384))


def test_an_example_depends_on_its_generator_alone(tmp_path):
    make = pickle.loads(pickle.dumps(TrainScenes(draw_coco(tmp_path), SMALL, True)))
    first, again, other = (make(1, np.random.default_rng(seed)) for seed in (3, 3, 4))
    for name in first:
        assert torch.equal(first[name], again[name])
    assert first["image"].shape != other["image"].shape or not torch.equal(first["image"], other["image"])
    assert first["image"].dtype == first["masks"].dtype == torch.uint8
    assert first["labels"].tolist() == [1, 2]  # 0 is background


def test_masks_are_left_out_where_they_are_not_wanted(tmp_path):
    assert "masks" not in TrainScenes(draw_coco(tmp_path), SMALL, False)(0, np.random.default_rng(0))


def test_crowds_are_not_trained_on(tmp_path):
    source = draw_coco(tmp_path)
    document = json.loads(source.json_path.read_text())
    document["annotations"][0]["iscrowd"] = 1
    source.json_path.write_text(json.dumps(document))
    source = open_file("crowd", source.json_path, tmp_path)
    assert source.boxes(0).crowd.tolist() == [True, False]
    found = read(source, 0, True)
    np.testing.assert_array_equal(found.boxes, source.boxes(0).xyxy[1:])
    assert found.masks.shape[0] == 1


def test_a_test_image_is_resized_alone(tmp_path):
    image, (fx, fy) = at_test_size(draw_coco(tmp_path, side=(48, 64)), 0, Sizes(short=(24,), longest=100, test_size=24))
    assert tuple(image.shape) == (3, 24, 32)
    assert (fx, fy) == (0.5, 0.5)


MINI = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_mini"


@pytest.mark.skipif(not MINI.exists(), reason=f"{MINI} is not on this machine")
def test_boxes_of_photographs_stay_around_their_masks():
    source, rng = open_coco(MINI, split="train"), np.random.default_rng(0)
    sizes = Sizes(short=(240, 320), longest=427, before_crop=(200, 300), crop=(150, 260), test_size=320)
    checked = 0
    for i in range(0, 40, 2):
        found = augmented(read(source, i, True), sizes, rng)
        for mask, box in zip(found.masks, found.boxes, strict=True):
            if mask.any():
                left, top, right, bottom = extent(mask)
                assert min(left - box[0], top - box[1], box[2] - right, box[3] - bottom) > -6  # pixels, enlarged
                checked += 1
    assert checked > 50
