"""RoI heads in stages: Cascade R-CNN (Cai and Vasconcelos 2018) with masks; one stage is Mask R-CNN's (He et al. 2017).

    b_0 = proposals;  for stage s = 1 ... S, on 512 boxes of b_{s-1} and the objects themselves, IoU threshold u_s:
        l_s, d_s = head_s( RoIAlign(maps, b_{s-1}) )        logits of classes and background, deltas for each class
        L_s = w_s ( cross-entropy(l_s, label where IoU >= u_s else background) + box loss + mask loss )
        b_s = decode_s(d_s of the label; of the likeliest class where that is background), without gradient
    box loss, summed over boxes on an object, / number of all boxes:
        "l1":    |d_s - encode_s(object)|                   Mask R-CNN
        "giou":  10 (1 - GIoU(decode_s(d_s), object))       iBOT's cascade
    test: class scores softmax(mean_s l_s), boxes b_S, masks mean_s sigmoid(m_s)

The pieces are torchvision's: matcher, sampler, box coder, heads, non-maximum suppression.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss, remove_small_boxes, roi_align

from triptych.dense.layers import BatchNorm2d

GIOU_WEIGHT = 10.0
CELLS = 14
"""Side, in cells of the first map, from which on boxes are read there; of twice that and more, on the second; ..."""
BOX_CELLS, MASK_CELLS = 7, 14  # sides of what a head reads of a box
SMALLEST = 1e-2  # pixels: boxes of a later stage that are smaller are not trained on
Shape = tuple[int, int]


@dataclass(frozen=True)
class StageConfig:
    """One stage.  Boxes are coded as (Δcentre / size, log ratio) divided by `stds`."""

    iou: float  # u: a box with at least this overlap with an object has its label
    stds: tuple[float, float, float, float]  # of x, y, width, height
    weight: float = 1.0  # w


MASK_RCNN = (StageConfig(0.5, (0.1, 0.1, 0.2, 0.2)),)
CASCADE = (
    StageConfig(0.5, (0.1, 0.1, 0.2, 0.2)),
    StageConfig(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    StageConfig(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)


@dataclass(frozen=True)
class HeadsConfig:
    """Of all stages."""

    stages: tuple[StageConfig, ...] = MASK_RCNN
    box_head: Literal["2fc", "4conv1fc"] = "2fc"  # before classes and boxes; convolutions have BatchNorm
    box_loss: Literal["l1", "giou"] = "l1"
    channels: int = 256  # of the maps, and of the heads' convolutions
    hidden: int = 1024  # of the linear layers
    rois: int = 512  # boxes that are trained on, of each image ...
    positive: float = 0.25  # ... and the share of them that may lie on objects
    score: float = 0.05  # detections: above this ...
    nms: float = 0.5  # ... after non-maximum suppression at this IoU, by class ...
    detections: int = 100  # ... and the best so many of an image


class RoIPool(nn.Module):
    """RoIAlign from the map that suits a box's size: maps, boxes per image -> (n, C, size, size) float32.

    Level: floor(log2(side / (14 strides[0]))), side = sqrt(area), as FPN's with 56 px for stride 4.  Cells are aligned
    (half-pixel centres) and averaged over as many samples as they cover: mmdet's.
    """

    def __init__(self, strides: Sequence[float], size: int):
        super().__init__()
        self.strides, self.size = list(strides), size

    def level(self, boxes: Tensor) -> Tensor:
        """(n, 4) pixels -> (n,) int64 in [0, number of maps)."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
        level = torch.log2(side / (CELLS * self.strides[0]) + 1e-6).floor()
        return level.clamp(0, len(self.strides) - 1).long()

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        rois = torch.cat([torch.cat([b.new_full((len(b), 1), i), b], 1) for i, b in enumerate(boxes)]).float()
        level = self.level(rois[:, 1:])
        out = rois.new_zeros(len(rois), maps[0].shape[1], self.size, self.size)
        for i, (x, stride) in enumerate(zip(maps, self.strides, strict=True)):
            at = torch.where(level == i)[0]
            # Also where there is no box: every map then has its gradient, on every process.
            out = out.index_copy(0, at, roi_align(x.float(), rois[at], self.size, 1 / stride, aligned=True))
        return out


class Stage(RoIHeads):
    """torchvision's heads, of which matching, sampling, coder and test serve; the losses are ours."""

    def __init__(self, config: HeadsConfig, stage: StageConfig, strides: Sequence[float], classes: int, masks: bool):
        c = config.channels
        super().__init__(
            RoIPool(strides, BOX_CELLS),
            _box_head(config),
            _box_predictor(config.hidden, classes),
            stage.iou,
            stage.iou,
            config.rois,
            config.positive,
            tuple(1 / s for s in stage.stds),
            config.score,
            config.nms,
            config.detections,
            RoIPool(strides, MASK_CELLS) if masks else None,
            MaskRCNNHeads(c, (c,) * 4, 1) if masks else None,
            MaskRCNNPredictor(c, c, classes + 1) if masks else None,
        )
        self.weight, self.box_loss = stage.weight, config.box_loss

    def predict(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (n, 1 + classes) and deltas (n, 1 + classes, 4) in float32; class 0 is background."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(maps, boxes)))
        return logits.float(), deltas.float().unflatten(1, (-1, 4))

    def mask_logits(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], labels: Tensor) -> Tensor:
        """(n, 28, 28) float32, each of its label's class."""
        head, predictor, pool = (cast(nn.Module, m) for m in (self.mask_head, self.mask_predictor, self.mask_roi_pool))
        logits = predictor(head(pool(maps, boxes))).float()
        return logits[torch.arange(len(labels), device=labels.device), labels]

    def box_losses(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, labels: Tensor, objects: Tensor
    ) -> dict[str, Tensor]:
        """Of boxes (n, 4) with labels (n,), 0 = background, and each one's object (n, 4)."""
        on = torch.where(labels > 0)[0]
        own = deltas[on, labels[on]]
        if self.box_loss == "giou":
            decoded = self.box_coder.decode_single(own, boxes[on])
            total = GIOU_WEIGHT * generalized_box_iou_loss(decoded, objects[on], reduction="sum")
        else:
            total = F.l1_loss(own, self.box_coder.encode_single(objects[on], boxes[on]), reduction="sum")
        return {"class": F.cross_entropy(logits, labels), "box": total / len(labels)}

    def mask_loss(
        self, maps: Sequence[Tensor], boxes: list[Tensor], labels: list[Tensor], matched: list[Tensor], targets: list
    ) -> Tensor:
        """Binary cross-entropy of the 28 x 28 mask of each box on an object."""
        on = [torch.where(x > 0)[0] for x in labels]
        boxes, labels, matched = ([x[i] for x, i in zip(xs, on, strict=True)] for xs in (boxes, labels, matched))
        logits = self.mask_logits(maps, boxes, torch.cat(labels))
        if not len(logits):
            return logits.sum()
        of_image = zip(targets, boxes, matched, strict=True)
        wanted = torch.cat([mask_targets(t["masks"], b, m, logits.shape[-1]) for t, b, m in of_image])
        return F.binary_cross_entropy_with_logits(logits, wanted)

    def refined(
        self, deltas: Tensor, boxes: Sequence[Tensor], labels: Tensor, sizes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        """The boxes (n, 4) per image moved by the deltas of (n,) labels, cut to the image; without gradient."""
        own = deltas.detach()[torch.arange(len(labels), device=labels.device), labels]
        moved = self.box_coder.decode_single(own, torch.cat(list(boxes))).split([len(b) for b in boxes])
        return tuple(clip_boxes_to_image(b, size) for b, size in zip(moved, sizes, strict=True))


class CascadeHeads(nn.Module):
    """maps, proposals -> losses in training, detections in evaluation."""

    def __init__(self, config: HeadsConfig, strides: Sequence[float], classes: int, masks: bool):
        super().__init__()
        self.masks = masks
        self.stages = nn.ModuleList(Stage(config, s, strides, classes, masks) for s in config.stages)

    def losses(
        self, maps: Sequence[Tensor], proposals: list[Tensor], sizes: Sequence[Shape], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """proposals (n, 4) per image, sizes of images (rows, columns), targets as of `detect_data.example`."""
        found: dict[str, Tensor] = {}
        for number, stage in enumerate(self._stages(), 1):
            boxes, matched, labels, _ = stage.select_training_samples(proposals, targets)
            pairs = list(zip(targets, boxes, matched, strict=True))
            objects = [t["boxes"][m] if len(t["boxes"]) else torch.zeros_like(b) for t, b, m in pairs]
            logits, deltas = stage.predict(maps, boxes)
            label = torch.cat(labels)
            terms = stage.box_losses(logits, deltas, torch.cat(boxes), label, torch.cat(objects))
            if self.masks:
                terms["mask"] = stage.mask_loss(maps, boxes, labels, matched, targets)
            prefix = f"stage{number}_" if len(self.stages) > 1 else ""
            found |= {f"{prefix}{name}": stage.weight * loss for name, loss in terms.items()}
            if number < len(self.stages):
                moved = stage.refined(deltas, boxes, torch.where(label > 0, label, likeliest(logits)), sizes)
                # The objects themselves go: the next stage has them from the targets.
                left = [(b != o).any(1) for b, o in zip(boxes, objects, strict=True)]
                moved = [m[keep] for m, keep in zip(moved, left, strict=True)]
                proposals = [m[remove_small_boxes(m, SMALLEST)] for m in moved]
        return found

    def detect(
        self, maps: Sequence[Tensor], proposals: list[Tensor], sizes: Sequence[Shape]
    ) -> list[dict[str, Tensor]]:
        """Per image: boxes (n, 4) in pixels, scores (n,), best first, labels (n,) from 1, masks (n, 28, 28) in 0..1."""
        boxes, total, stages = list(proposals), torch.zeros(()), self._stages()
        for number, stage in enumerate(stages, 1):
            logits, deltas = stage.predict(maps, boxes)
            total = logits + total.to(logits.device)
            if number < len(stages):
                boxes = list(stage.refined(deltas, boxes, likeliest(logits), sizes))
        last = stages[-1].postprocess_detections(total / len(stages), deltas.flatten(1), boxes, list(sizes))
        found: list[dict[str, Tensor]] = [{"boxes": b, "scores": s, "labels": x} for b, s, x in zip(*last, strict=True)]
        if self.masks:
            of, labels = [f["boxes"] for f in found], torch.cat([f["labels"] for f in found])
            masks = torch.stack([s.mask_logits(maps, of, labels).sigmoid() for s in stages]).mean(0)
            for f, m in zip(found, masks.split([len(b) for b in of]), strict=True):
                f["masks"] = m
        return found

    def _stages(self) -> list[Stage]:
        return cast(list[Stage], list(self.stages))


def likeliest(logits: Tensor) -> Tensor:
    """(n, 1 + classes) -> (n,): the class, from 1, that has the highest logit; never background."""
    return logits[:, 1:].argmax(1) + 1


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """masks (m, H, W), boxes (n, 4), each with its mask's position (n,) -> (n, size, size): 1 where half is object."""
    rois = torch.cat([matched[:, None].to(boxes), boxes], 1)
    return (roi_align(masks[:, None].float(), rois, size, aligned=True)[:, 0] >= 0.5).float()


def _box_head(config: HeadsConfig) -> nn.Module:
    c, linear = config.channels, config.hidden
    if config.box_head == "2fc":
        head: nn.Module = TwoMLPHead(c * BOX_CELLS**2, linear)
    else:
        norm: Any = BatchNorm2d  # over the boxes of all processes
        head = FastRCNNConvFCHead((c, BOX_CELLS, BOX_CELLS), [c] * 4, [linear], norm_layer=norm)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return head


def _box_predictor(hidden: int, classes: int) -> FastRCNNPredictor:
    predictor = FastRCNNPredictor(hidden, classes + 1)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return predictor
