"""What every network of semantic segmentation is to the rest, and the linear one (on a frozen encoder).

The decoders with a pyramid: `upernet.py`, `semantic_fpn.py`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.data.annotated import IGNORE
from triptych.dense.layers import BatchNorm2d, classifier, resized
from triptych.dense.maps import feature_maps, pad_to_multiple, scaled_blocks, to_train
from triptych.encoders import Encoder
from triptych.encoders.swin import Swin
from triptych.errors import UserError
from triptych.losses import full_precision

if TYPE_CHECKING:
    from triptych.evals.segmentation_presets import SegmentationPreset

Average = Literal["all", "labelled"]


class Segmenter(nn.Module, ABC):
    """images (B, 3, H, W) -> logits (B, C, h, w), h <= H; H and W are multiples of the encoder's patch size."""

    encoder: Encoder

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor: ...

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Scalars by name, whose sum is minimised.  labels: (B, H, W) int64, class or IGNORE."""
        return {"segmentation": pixel_loss(self(images), labels)}

    def full_size(self, images: Tensor) -> Tensor:
        """Images of any size (B, 3, H, W) -> logits (B, C, H, W); what lacks of a whole patch is filled with 0."""
        padded = pad_to_multiple(images, self.encoder.patch_size)
        logits = resized(full_precision(self(padded)), padded.shape[-2:])
        return logits[..., : images.shape[-2], : images.shape[-1]]


def pixel_loss(logits: Tensor, labels: Tensor, average: Average = "all") -> Tensor:
    """Cross-entropy of logits (B, C, h, w), brought to the labels' size (B, H, W) bilinearly (align_corners False).

    average "all": the sum over labelled pixels / all pixels, as mmsegmentation to 0.30; "labelled": / labelled ones.
    """
    logits = resized(full_precision(logits), labels.shape[-2:])
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels.numel() if average == "all" else (labels != IGNORE).sum().clamp(min=1))


class LinearSegmenter(Segmenter):
    """Patch tokens of some blocks side by side, BatchNorm, one linear layer (MMC, VICRegL; iBOT: without BatchNorm).

    The encoder is a frozen copy, in eval mode whatever the mode of the rest.  blocks: counted from 1.  norm: the
    encoder's final norm on the tokens of every block.  Maps of a Swin's stages are brought to the size of the finest.
    """

    def __init__(
        self, encoder: Encoder, classes: int, blocks: Sequence[int], *, norm: bool = True, batch_norm: bool = True
    ):
        super().__init__()
        wrong = [b for b in blocks if not 1 <= b <= encoder.depth]
        if wrong or not blocks:
            raise UserError(f"--blocks {wrong[0] if wrong else ''}: name some of this encoder's 1 to {encoder.depth}")
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.blocks, self.norm = [b - 1 for b in blocks], norm
        width = sum(x.shape[1] for x in self._maps(_blank(encoder)))  # a Swin's stages have widths of their own
        self.batch_norm = BatchNorm2d(width) if batch_norm else nn.Identity()
        self.classifier = classifier(width, classes, dropout=0.0)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        maps = self._maps(images)
        finest = max((x.shape[-2:] for x in maps), key=lambda size: size[0])
        maps = [x if x.shape[-2:] == finest else resized(x, finest) for x in maps]
        return self.classifier(self.batch_norm(torch.cat(maps, 1)))

    @torch.no_grad()
    def _maps(self, images: Tensor) -> list[Tensor]:
        return feature_maps(self.encoder, images, self.blocks, norm=self.norm)


def _blank(encoder: Encoder) -> Tensor:
    """One image of a few patches, of the encoder's device and precision."""
    like = next(encoder.parameters())
    return torch.zeros(1, 3, *[2 * encoder.patch_size] * 2, dtype=like.dtype, device=like.device)


def blocks_of(preset: "SegmentationPreset", encoder: Encoder) -> list[int] | None:
    """That the preset taps in this encoder, counted from 1: its own, or those as deep; a linear layer takes each once.

    None: the last block of each stage, a Swin's own pyramid.
    """
    if preset.head != "linear" and isinstance(encoder, Swin):
        return list(preset.blocks) if preset.blocks else None  # which `Pyramid` refuses
    blocks = list(preset.blocks or scaled_blocks(preset.of_twelve, encoder.depth))
    return list(dict.fromkeys(blocks)) if preset.head == "linear" else blocks


def build_segmenter(preset: "SegmentationPreset", encoder: Encoder, classes: int) -> Segmenter:
    """The preset's network on a copy of the encoder, which is frozen under a linear head and trained under others.

    What is initialised is drawn from torch's global generator.  Raises UserError for blocks that are not there.
    """
    blocks = blocks_of(preset, encoder)
    encoder = encoder if preset.prefix else encoder.without("prefix")
    if preset.head == "linear":
        assert blocks is not None
        return LinearSegmenter(encoder, classes, blocks, norm=preset.norm, batch_norm=preset.batch_norm)
    own = to_train(encoder, preset.drop_path)
    if preset.head == "upernet":
        from triptych.dense.upernet import UPerNet

        return UPerNet(own, classes, blocks, norm=preset.norm)
    from triptych.dense.semantic_fpn import SemanticFPN

    return SemanticFPN(own, classes, blocks, norm=preset.norm)
