"""Average precision as COCO defines it (Lin et al. 2014), by faster_coco_eval, a faster pycocotools.

AP: precision over 101 recall thresholds, mean over IoU thresholds .50, .55 ... .95 and over classes; at most 100
detections an image.  Crowds are ignored: detections on them count neither for nor against.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import cv2
import numpy as np

from triptych.errors import UserError


@dataclass(frozen=True)
class AP:
    """In percent, 0 to 100; None where the set has no such object."""

    ap: float | None
    ap50: float | None  # at IoU .5 alone
    ap75: float | None
    small: float | None  # objects of less than 32 x 32 px, by the json's areas
    medium: float | None
    large: float | None  # more than 96 x 96 px
    class_ap50: dict[str, float | None]  # by the class's name


def evaluator() -> ModuleType:
    """faster_coco_eval; raises UserError where it is not installed."""
    try:
        import faster_coco_eval
    except ImportError:
        raise UserError('COCO AP needs an evaluator that is not installed: pip install "triptych[coco]"') from None
    return faster_coco_eval


def coco_ap(
    truth: Path | dict[str, Any],
    detections: Sequence[dict[str, Any]],
    kind: Literal["bbox", "segm"],
    images: Sequence[int] | None = None,
) -> AP:
    """AP of boxes or of masks.

    truth: COCO's instances json.  detections: COCO's form of results, dicts of image_id, category_id, score, bbox
    [left, top, width, height] (pixels) and, for "segm", segmentation (`encoded`).  images: ids, None = all of them.
    Raises UserError for detections of images that the json does not have.
    """
    coco = evaluator()
    known = coco.COCO(_complete(json.loads(truth.read_text()) if isinstance(truth, Path) else truth))
    wrong = {d["image_id"] for d in detections} - set(known.getImgIds())
    if wrong:
        raise UserError(f"detections of image {min(wrong)}, which the ground truth does not have: give its json")
    # With a box, areas of masks would be those of boxes, and AP by size would be of other objects.
    drop = {"bbox"} if kind == "segm" else {"segmentation"}
    found = known.loadRes([{k: v for k, v in d.items() if k not in drop} for d in detections])
    run = coco.COCOeval_faster(known, found, kind, print_function=lambda *_: None)
    if images is not None:
        run.params.imgIds = sorted(images)
    run.evaluate()
    run.accumulate()
    return _averages(run, {c["id"]: c["name"] for c in known.loadCats(known.getCatIds())})


def _complete(truth: dict[str, Any]) -> dict[str, Any]:
    """With what the evaluator wants of every annotation and some files leave out."""
    annotations = [{"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a} for a in truth["annotations"]]
    return {**truth, "annotations": annotations}


def _averages(run: Any, names: dict[int, str]) -> AP:
    """From precision (IoU thresholds, recall thresholds, classes, sizes, numbers of detections); -1 = no such object"""
    precision = np.asarray(run.eval["precision"])[..., -1]
    sizes = list(run.params.areaRngLbl)

    def mean(iou: float | None = None, size: str = "all", category: int | None = None) -> float | None:
        part = precision[..., sizes.index(size)]
        part = part if iou is None else part[np.isclose(run.params.iouThrs, iou)]
        part = part if category is None else part[:, :, category]
        there = part[part > -1]
        return 100 * float(there.mean()) if there.size else None

    return AP(
        ap=mean(),
        ap50=mean(0.5),
        ap75=mean(0.75),
        small=mean(size="small"),
        medium=mean(size="medium"),
        large=mean(size="large"),
        class_ap50={names[c]: mean(0.5, category=i) for i, c in enumerate(run.params.catIds)},
    )


def pasted(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """A box's mask on its image: (M, M) probabilities, left, top, right, bottom -> (height, width) uint8, 1 >= .5.

    The mask's cells tile the box: pixel centres are looked up bilinearly between cell centres.
    """
    out = np.zeros((height, width), np.uint8)
    x0, y0, x1, y1 = (float(v) for v in box)
    left, top = max(0, int(np.floor(x0))), max(0, int(np.floor(y0)))
    right, bottom = min(width, int(np.ceil(x1))), min(height, int(np.ceil(y1)))
    if right <= left or bottom <= top:
        return out
    columns = ((np.arange(left, right) + 0.5 - x0) / (x1 - x0) * mask.shape[1] - 0.5).astype(np.float32)
    rows = ((np.arange(top, bottom) + 0.5 - y0) / (y1 - y0) * mask.shape[0] - 0.5).astype(np.float32)
    x, y = np.meshgrid(columns, rows)
    probability = mask.astype(np.float32)
    looked_up = cv2.remap(probability, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=[0])
    out[top:bottom, left:right] = looked_up >= 0.5
    return out


def encoded(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) uint8 -> COCO's run lengths {"size": [H, W], "counts": str}, which JSON can hold."""
    from faster_coco_eval.core import mask as rle

    code = rle.encode(np.asfortranarray(mask))
    counts = code["counts"]
    return {"size": [int(s) for s in code["size"]], "counts": counts.decode() if isinstance(counts, bytes) else counts}
