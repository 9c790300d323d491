"""Class maps that a protocol predicts, against the labels of a whole set, and beside the floor."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triptych.data.annotated import IGNORE, Segmented
from triptych.data.images import UnreadableImage
from triptych.data.workers import default_workers, in_worker, unwrapped
from triptych.dense.miou import Confusion, constant_scores
from triptych.dense.segment_data import read_pair
from triptych.errors import UserError
from triptych.evals.outcome import Figure
from triptych.progress import progress

COUNTED = 1000  # train images, at most, that tell the most frequent class


@dataclass(frozen=True)
class MapScores:
    """Of class maps against the labels of all validation images, in percent (0 to 100).

    The floor: what predicting the most frequent class of the train images everywhere scores on the same images.
    """

    miou: float  # mean over classes of the intersection over union, which is of all pixels of the set
    pixel_accuracy: float
    mean_accuracy: float  # mean over classes
    iou: dict[str, float | None]  # by class; None: neither labelled nor predicted anywhere, not in the mean
    floor_class: str
    floor_miou: float
    floor_pixel_accuracy: float
    classes: int
    train_images: int
    val_images: int  # that were measured
    unreadable: int  # of the validation images, left out besides


def measure(
    predictor: Callable[[list[Tensor], tuple[int, int]], Tensor],
    inputs: Callable[[np.ndarray], list[Tensor]],
    val: Segmented,
    *,
    floor: int,
    train_images: int,
    device: torch.device,
    workers: int | None = None,
) -> MapScores:
    """inputs: an image (H, W, 3) uint8 -> what `predictor` makes a class map (H, W) of, given its size too.

    floor: the class that is predicted everywhere for comparison (`most_frequent` of the train images).
    One image at a time.  Images that cannot be read are left out.  Raises UserError where none can, or none is
    labelled.
    """
    classes, images = val.classes, 0
    assert classes is not None  # every Segmented has some
    confusion = Confusion(len(classes), device)
    loader = DataLoader(
        _Prepared(val, inputs),
        batch_size=None,
        num_workers=min(default_workers() if workers is None else workers, len(val)),
        worker_init_fn=in_worker,
    )
    for pair in progress(unwrapped(loader), "segmenting image", len(val)):
        if pair is None:
            continue
        tensors, labels = pair
        found = predictor([x.to(device, non_blocking=True) for x in tensors], tuple(labels.shape))
        confusion.add(labels.to(device), found)
        images += 1
    if not images or not confusion.counts.any():
        why = "no pixel has a class" if images else "no image can be read"
        raise UserError(f"{val.name}: {why}: there is nothing to measure")
    scores, constant = confusion.scores(), constant_scores(confusion.counts, floor)
    return MapScores(
        miou=scores.miou,
        pixel_accuracy=scores.pixel_accuracy,
        mean_accuracy=scores.mean_accuracy,
        iou=dict(zip(classes, scores.iou, strict=True)),
        floor_class=classes[floor],
        floor_miou=constant.miou,
        floor_pixel_accuracy=constant.pixel_accuracy,
        classes=len(classes),
        train_images=train_images,
        val_images=images,
        unreadable=len(val) - images,
    )


def most_frequent(source: Segmented) -> int:
    """The class of most labelled pixels, in at most COUNTED images that are spread evenly.

    Raises UserError where none is labelled.
    """
    chosen = np.linspace(0, len(source) - 1, min(COUNTED, len(source))).astype(int).tolist()
    counts = np.zeros(IGNORE + 1, np.int64)
    for index in progress(chosen, "counting the pixels of image", len(chosen)):
        try:
            counts += np.bincount(source.mask(index).ravel(), minlength=IGNORE + 1)
        except UnreadableImage:
            continue
    if not counts[:IGNORE].any():
        raise UserError(f"no pixel of {source.name} has a class")
    return int(counts[:IGNORE].argmax())


def figures(result: MapScores) -> list[Figure]:
    """The means, their floors and the IoU of every class; of `segmentation` and of `patch_probe`."""
    always = f"always {result.floor_class}"
    rows = [
        Figure("mIoU %", result.miou, detail=f"{always}: {result.floor_miou:.2f}"),
        Figure("pixel accuracy %", result.pixel_accuracy, detail=f"{always}: {result.floor_pixel_accuracy:.2f}"),
        Figure("mean class accuracy %", result.mean_accuracy, main=False),
        Figure("mIoU %, floor", result.floor_miou, note=always, main=False),
        Figure("pixel accuracy %, floor", result.floor_pixel_accuracy, note=always, main=False),
    ]
    return rows + [Figure(f"IoU %, {name}", v, main=False) for name, v in result.iou.items() if v is not None]


def check_classes(train: Segmented, val: Segmented) -> tuple[str, ...]:
    """Those of both.  Raises UserError."""
    if not train.classes or train.classes != val.classes:
        raise UserError(f"{train.name} and {val.name} do not have the same classes: labels would not fit")
    if len(train.classes) < 2:
        raise UserError(f"{train.name} has one class: telling classes apart takes two")
    return train.classes


@dataclass(frozen=True)
class _Prepared(Dataset):
    """index -> inputs and labels (H, W) uint8, or None for an image that cannot be read."""

    source: Segmented
    inputs: Callable[[np.ndarray], list[Tensor]]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor] | None:
        try:
            image, mask = read_pair(self.source, index)
        except UnreadableImage:
            return None
        return self.inputs(image), torch.from_numpy(np.array(mask))
