"""From logits to class maps of whole images: in one piece or window by window (mmsegmentation's `slide_inference`)."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.losses import full_precision

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


def class_map(logits: Iterable[Tensor], height: int, width: int) -> Tensor:
    """Logits (C, h, w) of one image, at one or several sizes -> its classes (height, width) int64.

    Each is brought to the image's own size, bilinearly (align_corners False); of several, the mean of the softmax
    counts.  Of one, in bands of rows, as 150 classes at full size would take gigabytes; of several one after the other
    is taken, and the sum of their probabilities is held: 4 C height width bytes.
    """
    logits = iter(logits)
    first, second = next(logits), next(logits, None)
    if second is not None:
        votes = first.new_zeros(len(first), height, width, dtype=full_precision(first[:0]).dtype)
        for one in itertools.chain([first, second], logits):
            for band in _bands(len(one), height, width):
                votes[:, band.start : band.stop] += _band(one, band, height, width).softmax(0)
        return votes.argmax(0)
    return torch.cat([_band(first, band, height, width).argmax(0) for band in _bands(len(first), height, width)])


def _bands(classes: int, height: int, width: int) -> Iterator[range]:
    rows = max(1, BAND // (classes * width))
    for top in range(0, height, rows):
        yield range(top, min(top + rows, height))


def _band(logits: Tensor, rows: range, height: int, width: int) -> Tensor:
    """Some rows of F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)."""
    y = (torch.arange(rows.start, rows.stop, device=logits.device) * 2 + 1) / height - 1
    x = (torch.arange(width, device=logits.device) * 2 + 1) / width - 1
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, width)], -1)
    logits = full_precision(logits)  # and so are the places: bfloat16 has 256 of them to 1
    return F.grid_sample(logits[None], grid[None].to(logits.dtype), padding_mode="border", align_corners=False)[0]
