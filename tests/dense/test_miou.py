"""Intersection over union over a whole set."""

import math

import pytest
import torch

from triptych.data.annotated import IGNORE
from triptych.dense.miou import Confusion, constant_scores


def of_maps(labels, predicted, classes):
    confusion = Confusion(classes)
    for one, other in zip(labels, predicted, strict=True):  # image by image, as a data set comes
        confusion.add(one, other)
    return confusion


def numbers(values):
    return [math.nan if v is None else v / 100 for v in values]


def test_scores_are_mmsegmentations(golden):
    g = golden("seg_miou")
    found = of_maps(g["gt"], g["pred"], int(g["num_classes"])).scores()
    torch.testing.assert_close(torch.tensor(numbers(found.iou), dtype=torch.float64), g["iou"])
    torch.testing.assert_close(torch.tensor(numbers(found.accuracy), dtype=torch.float64), g["acc"], equal_nan=True)
    assert found.pixel_accuracy == pytest.approx(100 * float(g["acc_all"]))
    assert found.miou == pytest.approx(100 * float(g["miou_nanmean"]))


def test_labels_whose_zero_means_nothing_score_as_mmsegmentations(golden):
    """reduce_zero_label, which is the readers' work here: 0 is ignored, the others move down by one."""
    g = golden("seg_miou")
    labels = torch.where(g["rz_gt"] == 0, IGNORE, g["rz_gt"] - 1).where(g["rz_gt"] != IGNORE, IGNORE)
    found = of_maps(labels, g["rz_pred"], len(g["rz_iou"])).scores()
    torch.testing.assert_close(torch.tensor(numbers(found.iou), dtype=torch.float64), g["rz_iou"])
    assert found.pixel_accuracy == pytest.approx(100 * float(g["rz_acc_all"]))


def test_unions_are_of_all_images_not_means_of_each():
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, 3, (4, 5 + i), generator=generator) for i in range(3)]
    predicted = [torch.randint(0, 3, x.shape, generator=generator) for x in labels]
    labels[0][0] = IGNORE
    for c, iou in enumerate(of_maps(labels, predicted, 3).scores().iou):
        both = either = 0
        for label_map, found in zip(labels, predicted, strict=True):
            for label, own in zip(label_map.flatten().tolist(), found.flatten().tolist(), strict=True):
                if label != IGNORE:
                    both += label == c and own == c
                    either += c in (label, own)
        assert iou == pytest.approx(100 * both / either)


def test_a_class_that_is_nowhere_has_no_score_and_one_that_is_only_predicted_has_zero():
    found = of_maps([torch.tensor([0, 0, 1])], [torch.tensor([0, 2, 1])], 4).scores()
    assert found.iou == [50.0, 100.0, 0.0, None]
    assert found.accuracy == [50.0, 100.0, None, None]
    assert found.miou == 50.0
    assert found.mean_accuracy == 75.0


def test_the_floor_is_what_one_class_everywhere_scores():
    labels = torch.tensor([[0, 1, 1, 1], [2, 1, IGNORE, 1]])
    counts = of_maps([labels], [torch.zeros_like(labels)], 3).counts
    expected = of_maps([labels], [torch.ones_like(labels)], 3).scores()
    assert constant_scores(counts, 1) == expected
    assert expected.pixel_accuracy == pytest.approx(500 / 7)
    assert expected.miou == pytest.approx(500 / 7 / 3)
