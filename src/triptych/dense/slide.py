"""From logits to class maps of whole images: in one piece or window by window (mmsegmentation's `slide_inference`)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""(B, 3, H, W) -> (B, C, H, W): a network whose logits are already brought to the size of its input."""
BAND = 2**24  # numbers at a time when logits are brought to an image's own size: 64 MiB


def windows(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Top and left of each window: every `stride` pixels, the last ones moved back into the image.

    Windows are min(crop, side) pixels high and wide.
    """
    tops, lefts = (_starts(side, crop, stride) for side in (height, width))
    return [(top, left) for top in tops for left in lefts]


def _starts(side: int, crop: int, stride: int) -> list[int]:
    count = max(side - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, side) - crop, 0) for i in range(count)]


def slide(logits: Logits, images: Tensor, crop: int, stride: int, *, batch: int = 8) -> Tensor:
    """(B, 3, H, W) -> (B, C, H, W) float: the mean of the logits of all windows over a pixel.

    batch: windows per call of the network.
    """
    b, _, height, width = images.shape
    places = windows(height, width, crop, stride)
    high, wide = min(crop, height), min(crop, width)
    cover = images.new_zeros(1, 1, height, width)
    total: Tensor | None = None
    at_once = max(1, batch // b)
    for first in range(0, len(places), at_once):
        part = places[first : first + at_once]
        cut = torch.cat([images[..., top : top + high, left : left + wide] for top, left in part])
        found = logits(cut)
        found = found if found.dtype == torch.float64 else found.float()  # lower precisions are not to be summed
        if total is None:
            total = found.new_zeros(b, found.shape[1], height, width)
        for (top, left), one in zip(part, found.split(b), strict=True):
            total[..., top : top + high, left : left + wide] += one
            cover[..., top : top + high, left : left + wide] += 1
    assert total is not None
    return total.div_(cover)


def class_map(logits: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Logits (C, h, w) of one image, at one or several sizes -> its classes (height, width) int64.

    Each is brought to the image's own size, bilinearly (align_corners False); of several, the mean of the softmax
    counts.  In bands of rows: 150 classes at full size would take gigabytes.
    """
    rows = max(1, BAND // (len(logits[0]) * width))
    bands = []
    for top in range(0, height, rows):
        band = range(top, min(top + rows, height))
        votes = _band(logits[0], band, height, width)
        if len(logits) > 1:
            votes = votes.softmax(0)
            for other in logits[1:]:
                votes += _band(other, band, height, width).softmax(0)
        bands.append(votes.argmax(0))
    return torch.cat(bands)


def _band(logits: Tensor, rows: range, height: int, width: int) -> Tensor:
    """Some rows of F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)."""
    y = (torch.arange(rows.start, rows.stop, device=logits.device) * 2 + 1) / height - 1
    x = (torch.arange(width, device=logits.device) * 2 + 1) / width - 1
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, width)], -1).to(logits.dtype)
    return F.grid_sample(logits[None], grid[None], padding_mode="border", align_corners=False)[0]
