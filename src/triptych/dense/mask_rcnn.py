"""Two-stage detectors on an encoder: maps -> proposals -> boxes, classes and masks (He et al. 2017; Lin et al. 2017).

    maps = FPN(Pyramid(images))           four, and every second cell of the last one
    proposals = RPN(maps)                 per cell 3 anchors of 8 x stride px, height / width 1/2, 1, 2
    losses or detections = CascadeHeads(maps, proposals)

One stage of heads is Mask R-CNN, Faster R-CNN for a set without masks; three are Cascade Mask R-CNN.  The pieces are
torchvision's, with the settings of mmdet's standard configs.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from triptych.dense.cascade import CascadeHeads, HeadsConfig
from triptych.dense.layers import fpn
from triptych.dense.pyramid import Pyramid
from triptych.errors import UserError

SCALE, RATIOS = 8, (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class DetectorConfig:
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    blocks: tuple[int, ...] | None = None  # of the pyramid, from 1; None: 4, 6, 8, 12 of 12 (dense/pyramid.py)
    norm: bool = False  # the encoder's final norm on the pyramid's blocks
    proposal_loss: str = "l1"  # of the RPN's boxes; "smooth_l1": β = 1/9
    anchors: int = 256  # of each image that the RPN is trained on, half of them on objects at most
    train_proposals: tuple[int, int] = (2000, 1000)  # of each map before suppression; of the image after it
    test_proposals: tuple[int, int] = (1000, 1000)

    def __post_init__(self) -> None:
        if self.proposal_loss not in ("l1", "smooth_l1"):
            raise UserError(f"proposal_loss is {self.proposal_loss!r}; it must be l1 or smooth_l1")


class Detector(nn.Module):
    """A batch of `detect_data.as_list` -> losses by name; `detect` gives boxes."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        pyramid: Pyramid,
        config: DetectorConfig,
        *,
        classes: int,
        masks: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        c, strides = config.heads.channels, pyramid.strides
        self.pyramid = pyramid
        self.multiple = math.lcm(*(round(s) for s in (strides[-1], pyramid.encoder.patch_size)))
        self.fpn = fpn(pyramid.channels, c, LastLevelMaxPool())
        self.rpn = _proposals(config, [*strides, 2 * strides[-1]])
        self.heads = CascadeHeads(config.heads, strides, classes, masks)
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses, to be summed: "objectness" and "proposal" of the RPN; "class", "box" and "mask" of each stage."""
        images, maps = self._maps([e["image"] for e in batch])
        proposals, found = self.rpn(images, maps, batch)
        terms = {"objectness": found["loss_objectness"], "proposal": found["loss_rpn_box_reg"]}
        return terms | self.heads.losses(self._of_pyramid(maps), proposals, images.image_sizes, batch)

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """images (3, H, W) uint8 -> what `CascadeHeads.detect` gives, in pixels of these images."""
        padded, maps = self._maps(images)
        proposals, _ = self.rpn(padded, maps)
        return self.heads.detect(self._of_pyramid(maps), proposals, padded.image_sizes)

    def _maps(self, images: list[Tensor]) -> tuple[ImageList, "OrderedDict[str, Tensor]"]:
        """Normalised, padded with 0 to one size that every map divides; through pyramid and FPN."""
        sizes = [(x.shape[1], x.shape[2]) for x in images]
        rows, columns = (-(-max(side) // self.multiple) * self.multiple for side in zip(*sizes, strict=True))
        pixels = [(x - self.mean) / self.std for x in images]
        batch = torch.stack([F.pad(x, (0, columns - x.shape[2], 0, rows - x.shape[1])) for x in pixels])
        maps = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.pyramid(batch))))
        return ImageList(batch, sizes), maps

    def _of_pyramid(self, maps: "OrderedDict[str, Tensor]") -> list[Tensor]:
        """Without the coarsest: proposals alone come from it."""
        return list(maps.values())[: len(self.pyramid.strides)]


class Anchors(nn.Module):
    """Boxes around the corner of every cell: side 8 x stride px at ratio (height / width) 1, of equal area at others.

    As mmdet's (torchvision's are rounded to whole pixels, and so are strides, which for patches of 14 px are not).
    """

    def __init__(self, strides: Sequence[float]):
        super().__init__()
        self.strides = list(strides)

    def forward(self, images: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        """Per image (n, 4) float32: left, top, right, bottom, which may lie outside; map by map, row by row."""
        found = torch.cat([self.of_map(x, stride) for x, stride in zip(maps, self.strides, strict=True)])
        return [found] * len(images.image_sizes)

    def of_map(self, x: Tensor, stride: float) -> Tensor:
        """(rows x columns x 3, 4)"""
        ratios = torch.tensor(RATIOS, device=x.device).sqrt()
        half = torch.stack([SCALE * stride / ratios, SCALE * stride * ratios], 1) / 2
        ys, xs = (torch.arange(n, device=x.device) * stride for n in x.shape[-2:])
        y, x_ = torch.meshgrid(ys, xs, indexing="ij")
        centres = torch.stack([x_, y], -1).reshape(-1, 1, 2)
        return torch.cat([centres - half, centres + half], -1).reshape(-1, 4)


class FloatHead(RPNHead):
    """torchvision's, whose scores and deltas are float32 under autocast too: anchors are in pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [s.float() for s in scores], [d.float() for d in deltas]


class L1Proposals(RegionProposalNetwork):
    """torchvision's with |x| for boxes, where that one has smooth L1 with β = 1/9."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Objectness: cross-entropy; boxes: sum over anchors on objects / number of sampled anchors."""
        on, off = (torch.where(torch.cat(x))[0] for x in self.fg_bg_sampler(labels))
        sampled, wanted = torch.cat([on, off]), torch.cat(regression_targets)
        boxes = F.l1_loss(pred_bbox_deltas[on], wanted[on], reduction="sum") / len(sampled)
        scores = objectness.flatten()[sampled]
        return F.binary_cross_entropy_with_logits(scores, torch.cat(labels)[sampled]), boxes


def _proposals(config: DetectorConfig, strides: Sequence[float]) -> RegionProposalNetwork:
    of: Any = L1Proposals if config.proposal_loss == "l1" else RegionProposalNetwork
    (before, after), (test_before, test_after) = config.train_proposals, config.test_proposals
    return of(
        Anchors(strides),
        FloatHead(config.heads.channels, len(RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=config.anchors,
        positive_fraction=0.5,
        pre_nms_top_n={"training": before, "testing": test_before},
        post_nms_top_n={"training": after, "testing": test_after},
        nms_thresh=0.7,
    )
