"""COCO's average precision: of the ground truth itself, of what can be counted by hand, and of masks on images."""

import builtins
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from drawn_coco import draw_coco
from triptych.data.annotated import open_coco
from triptych.dense.coco_ap import coco_ap, encoded, evaluator, pasted
from triptych.errors import UserError

MINI = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_mini"


def as_detections(source, images=None):
    """The objects of images (all), but for crowds, as if they had been detected."""
    found = []
    for i in range(len(source)) if images is None else images:
        boxes, regions = source.boxes(i), source.regions(i)
        for xyxy, label, crowd, region in zip(boxes.xyxy, boxes.labels, boxes.crowd, regions, strict=True):
            if not crowd:
                left, top, right, bottom = map(float, xyxy)
                found.append(
                    {
                        "image_id": source.image_id(i),
                        "category_id": source.category_ids[label],
                        "bbox": [left, top, right - left, bottom - top],
                        "score": 1.0,
                        "segmentation": encoded(region.mask.astype(np.uint8)),
                    }
                )
    return found


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_ground_truth_as_detections_has_ap_100(tmp_path, kind):
    source = draw_coco(tmp_path)
    found = coco_ap(source.json_path, as_detections(source), kind)
    assert (found.ap, found.ap50, found.ap75) == pytest.approx((100, 100, 100))
    assert found.class_ap50 == pytest.approx({"red": 100, "blue": 100})
    assert found.small == pytest.approx(100)
    assert found.large is None  # no object of more than 96 x 96 px


@pytest.mark.skipif(not MINI.exists(), reason=f"{MINI} is not on this machine")
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_ground_truth_of_photographs_has_ap_100(kind):
    """Whatever order, run lengths or crowds its json has."""
    source = open_coco(MINI, split="val")
    part = range(0, len(source), 3)
    assert sum(source.boxes(i).crowd.sum() for i in part) > 0
    found = coco_ap(source.json_path, as_detections(source, part), kind, [source.image_id(i) for i in part])
    assert found.ap == pytest.approx(100, abs=1e-6)
    assert found.small == pytest.approx(100, abs=1e-6)


def truth(boxes):
    """One class; boxes of each image as [left, top, width, height]."""
    each = [(i, box) for i, of_image in enumerate(boxes, 1) for box in of_image]
    return {
        "images": [{"id": i, "height": 100, "width": 100} for i in range(1, len(boxes) + 1)],
        "annotations": [{"id": n, "image_id": i, "category_id": 1, "bbox": b} for n, (i, b) in enumerate(each, 1)],
        "categories": [{"id": 1, "name": "cell"}],
    }


def at(image, box, score):
    return {"image_id": image, "category_id": 1, "bbox": box, "score": score}


def test_a_wrong_detection_above_a_right_one_halves_precision():
    """Two objects, the best-scored detection hits none: precision 1/2, then 2/3, at every recall up to 1."""
    objects = truth([[[10, 10, 20, 20], [60, 60, 20, 20]]])
    given = [at(1, [40, 5, 10, 10], 0.9), at(1, [10, 10, 20, 20], 0.8), at(1, [60, 60, 20, 20], 0.7)]
    assert coco_ap(objects, given, "bbox").ap == pytest.approx(100 * 2 / 3)  # precision is made non-increasing


def test_thresholds_run_from_50_to_95():
    """A box of IoU 0.72 is right at .50, .55, .60, .65 and .70: half of the ten thresholds."""
    found = coco_ap(truth([[[0, 0, 50, 50]]]), [at(1, [0, 0, 50, 36], 0.9)], "bbox")
    assert (found.ap, found.ap50, found.ap75) == pytest.approx((50, 100, 0))


def test_no_detection_at_all_has_ap_0():
    found = coco_ap(truth([[[0, 0, 50, 50]]]), [], "bbox")
    assert (found.ap, found.class_ap50) == (0, {"cell": 0})


def test_images_that_were_not_looked_at_do_not_count():
    objects = truth([[[0, 0, 50, 50]], [[0, 0, 50, 50]]])
    given = [at(1, [0, 0, 50, 50], 0.9)]
    assert coco_ap(objects, given, "bbox").ap50 == pytest.approx(100 * 51 / 101)  # recall 1/2
    assert coco_ap(objects, given, "bbox", images=[1]).ap50 == pytest.approx(100)


def test_a_set_without_objects_has_no_ap():
    found = coco_ap(truth([[]]), [at(1, [0, 0, 50, 50], 0.9)], "bbox")
    assert (found.ap, found.class_ap50) == (None, {"cell": None})


def test_sizes_of_masks_are_those_of_masks():
    """A thin diagonal in a large box is a small detection: where it is wrong, it halves the precision of small ones."""
    block, diagonal = np.zeros((100, 100), np.uint8), np.eye(100, dtype=np.uint8)[::-1].copy()
    block[:10, :10] = 1
    objects = truth([[[0, 0, 10, 10]]])
    objects["annotations"][0] |= {"segmentation": encoded(block), "area": 100}
    given = [
        at(1, [0, 0, 100, 100], 0.9) | {"segmentation": encoded(diagonal)},
        at(1, [0, 0, 10, 10], 0.8) | {"segmentation": encoded(block)},
    ]
    assert coco_ap(objects, given, "segm").small == pytest.approx(50)
    assert coco_ap(objects, given, "bbox").small == pytest.approx(100)  # a large box, when boxes are measured


def test_detections_of_an_unknown_image_are_a_users_mistake():
    with pytest.raises(UserError, match="image 7"):
        coco_ap(truth([[[0, 0, 50, 50]]]), [at(7, [0, 0, 50, 50], 0.9)], "bbox")


def test_a_missing_evaluator_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("faster_coco_eval"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "faster_coco_eval", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'pip install "triptych\[coco\]"'):
        evaluator()


def test_a_mask_is_pasted_where_its_box_is():
    full = pasted(np.ones((28, 28)), np.array([10.0, 4.0, 30.0, 12.0]), 20, 40)
    wanted = np.zeros((20, 40), np.uint8)
    wanted[4:12, 10:30] = 1
    np.testing.assert_array_equal(full, wanted)
    left = np.zeros((28, 28))
    left[:, :14] = 1
    np.testing.assert_array_equal(pasted(left, np.array([10.0, 4.0, 30.0, 12.0]), 20, 40)[:, 20:], 0)
    outside = pasted(np.ones((28, 28)), np.array([-5.0, -5.0, 5.0, 60.0]), 20, 40)
    assert outside[:, :4].all()
    assert not outside[:, 5:].any()
    assert not pasted(np.ones((28, 28)), np.array([50.0, 0.0, 60.0, 5.0]), 20, 40).any()


def test_an_object_seen_through_its_box_comes_back():
    """A disc read into 28 x 28 cells of its box, then pasted: nearly the same pixels."""
    y, x = np.mgrid[:60, :80]
    disc = ((y - 30) ** 2 + (x - 40) ** 2 < 400).astype(np.uint8)
    rows = np.clip((np.arange(28) + 0.5) / 28 * 40 + 10, 0, 59).astype(int)
    columns = np.clip((np.arange(28) + 0.5) / 28 * 40 + 20, 0, 79).astype(int)
    back = pasted(disc[np.ix_(rows, columns)].astype(float), np.array([20.0, 10.0, 60.0, 50.0]), 60, 80)
    assert (back & disc).sum() / (back | disc).sum() > 0.95


def test_run_lengths_can_be_written_as_json():
    code = encoded(np.eye(5, dtype=np.uint8))
    assert json.loads(json.dumps(code)) == code
    assert code["size"] == [5, 5]
