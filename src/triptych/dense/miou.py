"""Intersection over union of class maps, over a whole set (mmsegmentation's `mIoU`; PASCAL VOC's measure).

IoU_c = Σ |predicted c and labelled c| / Σ |predicted c or labelled c|,  sums over all images
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.data.annotated import IGNORE


@dataclass(frozen=True)
class Scores:
    """In percent (0 to 100), over all labelled pixels of all images.

    iou, accuracy: by class; None for one that is neither labelled nor predicted anywhere (accuracy: not labelled),
    which the means leave out.
    """

    miou: float  # mean of iou
    pixel_accuracy: float  # of all labelled pixels (mmsegmentation's aAcc)
    mean_accuracy: float  # mean of accuracy (mAcc)
    iou: list[float | None]
    accuracy: list[float | None]  # share of a class's labelled pixels that are predicted as it


class Confusion:
    """Counts of pixels by (label, prediction), kept on the device: (C, C) int64."""

    def __init__(self, classes: int, device: torch.device | str = "cpu"):
        self.classes = classes
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, labels: Tensor, predicted: Tensor) -> None:
        """Class maps of one shape; labels: 0 ... C - 1 or IGNORE, predicted: 0 ... C - 1."""
        known = labels != IGNORE
        pairs = labels[known].long() * self.classes + predicted[known].long()
        self.counts += torch.bincount(pairs, minlength=self.classes**2).view_as(self.counts)

    def scores(self) -> Scores:
        return scores(self.counts)


def scores(counts: Tensor) -> Scores:
    """counts: (C, C), rows are labels."""
    counts = counts.double().cpu()
    both, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = 100 * both / (labelled + predicted - both)  # 0 / 0 is nan
    accuracy = 100 * both / labelled
    whole = 100 * both.sum() / counts.sum()
    means = float(iou.nanmean()), float(whole), float(accuracy.nanmean())
    by_class = ([None if math.isnan(v) else v for v in x.tolist()] for x in (iou, accuracy))
    return Scores(*means, *by_class)


def constant_scores(counts: Tensor, always: int) -> Scores:
    """What predicting one class everywhere would score on the same labels: the floor."""
    same = torch.zeros_like(counts)
    same[:, always] = counts.sum(1)
    return scores(same)
