"""A trained segmenter on whole images: windows, several scales, mirrored."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from triptych.dense.segment_data import TestTransform
from triptych.dense.segmenters import Segmenter
from triptych.dense.slide import class_map, slide


@dataclass(frozen=True)
class Inference:
    """How an image of any size becomes logits."""

    transform: TestTransform
    windows: tuple[int, int] | None  # side and stride in pixels; None = the whole image at once
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def inputs(self, image: np.ndarray) -> list[Tensor]:
        """(H, W, 3) uint8 -> the image at each scale, (3, h, w) float32."""
        return [self.transform(image, scale) for scale in self.scales]

    def logits(self, segmenter: Segmenter, inputs: list[Tensor]) -> Iterator[Tensor]:
        """(C, h, w) of each input, and after it those of its mirror image, mirrored back."""
        for pixels in inputs:
            yield self._of(segmenter, pixels)
            if self.flip:
                yield self._of(segmenter, pixels.flip(-1)).flip(-1)

    def _of(self, segmenter: Segmenter, pixels: Tensor) -> Tensor:
        if self.windows is None:
            return segmenter.full_size(pixels[None])[0]
        return slide(segmenter.full_size, pixels[None], *self.windows)[0]


@torch.no_grad()
def predict(segmenter: Segmenter, image: np.ndarray, inference: Inference) -> Tensor:
    """(H, W, 3) uint8 -> its class map (H, W) int64, on the segmenter's device; the segmenter is in eval mode."""
    device = next(segmenter.parameters()).device
    return of_inputs(segmenter, [x.to(device) for x in inference.inputs(image)], image.shape[:2], inference)


def of_inputs(segmenter: Segmenter, inputs: list[Tensor], size: tuple[int, ...], inference: Inference) -> Tensor:
    """The class map (H, W) int64 of an image of this size, from what `inputs` made of it."""
    height, width = size[:2]
    return class_map(inference.logits(segmenter, inputs), height, width)
