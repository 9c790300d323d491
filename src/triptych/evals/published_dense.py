"""What the papers report of patch tokens: never measured here, shown apart from what was, for the sets they name.

From the UDI, MTE and MMC papers; "over" names the base that MTE wraps.
"""

from collections.abc import Sequence

import numpy as np

from triptych.data.annotated import Annotated
from triptych.data.davis import Video
from triptych.evals.published import Published, columns, rows

_CLICK = """
    SiT ViT-B/16 | 35.3
    DINO ViT-B/16 | 35.1
    iBOT ViT-B/16 | 36.2
    MC-SSL ViT-B/16 | 35.1
    MAE ViT-B/16 | 30.1
    MSN ViT-B/16 | 34.4
    MMC ViT-B/16 | 38.4
    random weights ViT-B/16 | 16.8
"""
_SIMILARITY = """
    DINO ViT-B/16 | .66 .20 .12
    iBOT ViT-B/16 | .56 .19 .05
    SiT ViT-B/16 | .63 .50 .46
    MAE ViT-B/16 | .76 .29 .17
    MC-SSL ViT-B/16 | .58 .47 .35
    MMC ViT-B/16 | .55 .48 .38
"""
_VIDEO = """
    supervised ViT-S/16, ImageNet-100 | 37.1 35.8 38.5
    MAE ViT-S/16, ImageNet-100 | 44.3 43.6 45.1
    MSN ViT-S/16, ImageNet-100 | 48.9 46.9 51.0
    DINO ViT-S/16, ImageNet-100 | 57.7 56.2 59.1
    iBOT ViT-S/16, ImageNet-100 | 59.7 57.9 61.4
    MMC ViT-S/16, ImageNet-100 | 60.3 58.6 62.0
    DINO ViT-B/16, ImageNet-1k | 62.3 60.7 63.9
    MC-SSL ViT-B/16, ImageNet-1k | 60.4 58.6 62.2
    MAE ViT-B/16, ImageNet-1k | 47.4 46.1 48.8
    MSN ViT-B/16, ImageNet-1k | 61.4 59.6 63.3
    MMC ViT-B/16, ImageNet-1k | 63.8 61.8 65.6
"""
_LINEAR = """
    random weights ViT-B/16 | 2.1 13.7 4.7
    MoCo v3 ViT-B/16 | 28.7 - 64.8
    SiT ViT-B/16 | 33.8 56.1 74.8
    DINO ViT-B/16 | 32.6 59.1 73.5
    iBOT ViT-B/16 | 34.7 60.7 75.6
    MAE ViT-B/16 | 24.3 44.2 58.4
    MC-SSL ViT-B/16 | 33.2 59.7 75.9
    MSN ViT-B/16 | 32.9 55.1 72.2
    MMC ViT-B/16 | 37.0 62.6 77.7
"""
_UPERNET = """
    iBOT ViT-B/16 100 ep | 47.9
    MTE over iBOT ViT-B/16 100 ep | 49.1
"""
_MASK_RCNN = """
    UDI ViT-S/16 | 43.2
    DINO ViT-S/16 | 41.6
    iBOT ViT-S/16 | 41.7
"""
_CASCADE = """
    iBOT ViT-B/16 100 ep | 50.1 43.2
    MTE over iBOT ViT-B/16 100 ep | 51.0 44.2
    iBOT ViT-B/16 400 ep | 51.2 44.2
"""
_SETS = {"coco": (80, 5000), "ade20k": (150, 2000), "cityscapes": (19, 500), "voc": (21, 1449)}
"""Classes and images of the parts that papers measure on."""

DENSE: tuple[Published, ...] = (
    *rows("click", "coco", ("mIoU %, best threshold",), _CLICK),
    *rows("similarity", "coco", ("overlap", "mean within", "mean between"), _SIMILARITY),
    *rows("video", "davis-2017", ("J&F %", "J %", "F %"), _VIDEO),
    *columns("segmentation", tuple((s, "mIoU %, linear") for s in ("ade20k", "cityscapes", "voc")), _LINEAR),
    *rows("segmentation", "ade20k", ("mIoU %, UPerNet",), _UPERNET),
    *rows("detection", "coco", ("AP box %, Mask R-CNN 1x",), _MASK_RCNN),
    *rows("detection", "coco", ("AP box %, Cascade Mask R-CNN 1x", "AP mask %"), _CASCADE),
)


def known_annotated(source: Annotated) -> str | None:
    """The name under which papers report on this set; None for all others, such as small cuts of them."""
    own = len(source.classes), len(source)
    return next((name for name, size in _SETS.items() if size == own), None)


def known_videos(videos: Sequence[Video]) -> str | None:
    """As `known_annotated`: the validation set of DAVIS-2017."""
    first = [video.mask(0) for video in videos] if len(videos) == 30 else []
    objects = sum(len(np.unique(mask)) - 1 for mask in first if mask is not None)
    return "davis-2017" if objects == 61 else None


def published_dense(data: str | None, protocol: str) -> list[Published]:
    """What papers report on this set under this protocol."""
    return [row for row in DENSE if row.data == data and row.protocol == protocol]
