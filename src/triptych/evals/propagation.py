"""Labels of one frame carried to the next ones by the similarity of tokens (Jabri et al. 2020, arXiv 2006.14613).

As DINO (arXiv 2104.14294) has it for DAVIS.  On plain tensors; `video` has the encoder, the files and the scores.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from triptych.data.annotated import IGNORE
from triptych.errors import UserError
from triptych.losses import full_precision

STEP = 64
"""Pixels: the longer side becomes a multiple of it, or of the most whole patches that fit in it."""

ROUNDING = 1e-6
"""Of a soft label, relative: what float32 leaves uncertain."""


@dataclass(frozen=True)
class Settings:
    """Defaults are those of the released scripts (DINO, iBOT, MSN, MMC)."""

    size: int = 480  # pixels of the shorter side, cut to whole patches
    n_last: int = 7  # frames before the present one that labels come from, beside the first
    radius: int = 12  # tokens up, down, left and right of the same place that labels come from; 0 = the whole frame
    topk: int = 5  # tokens, of all those frames, that a token's label is the mean of
    temperature: float = 0.1
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (
        0.228,
        0.224,
        0.225,
    )  # .228: the scripts' slip for .229, in all published numbers

    def __post_init__(self) -> None:
        least = {"size": 1, "n_last": 0, "radius": 0, "topk": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} {getattr(self, name)}: give {low} or more")
        if not 0 < self.temperature < float("inf") or not all(x > 0 for x in self.std):
            raise UserError(f"temperature {self.temperature}, std {self.std}: all must be above 0")


@torch.no_grad()
def propagate(
    features: Iterable[Tensor], first: Tensor, settings: Settings, *, memory_mb: int = 128
) -> Iterator[Tensor]:
    """features: (D, h, w) of frames 0, 1 ...; first: labels (C, h, w) of frame 0 -> soft labels (C, h, w) of 1, 2 ...

    For a token t of a frame and the tokens s within `radius` of its place in the first and the last n frames,

        a_ts = exp(cos(x_t, x_s) / temperature), and 0 where that is below the k-th largest of t,
        label_t = sum_s a_ts label_s / sum_s a_ts

    Equals of the k-th largest all count.  Soft labels become sources as they are.  Frames are taken one by one.  Peak
    memory: 4 (n_last + 2) (D + C) h w bytes and `memory_mb` MiB, or what one token needs (its window of n_last + 1
    frames) where that is more.  Runs on the device of the features, in float32 where they are of half precision.
    """
    frames = (F.normalize(full_precision(x), dim=0).permute(1, 2, 0).contiguous() for x in features)
    origin = (next(frames), first.permute(1, 2, 0))
    queue: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.n_last)
    for x in frames:
        with torch.autocast(x.device.type, enabled=False):
            labels = _labels_from(x, [origin, *queue], settings, memory_mb)
        queue.append((x, labels))
        yield labels.permute(2, 0, 1)


def _labels_from(
    target: Tensor, sources: Sequence[tuple[Tensor, Tensor]], settings: Settings, memory_mb: int
) -> Tensor:
    """The labels (h, w, C) of one frame, a tile of its tokens at a time against what these can see.

    target: (h, w, D) of unit length; sources: such features and labels (h, w, C) of each frame.
    """
    h, w, _ = target.shape
    labels = torch.empty_like(sources[0][1])
    reach = settings.radius or max(h, w)
    side = _tile(target, len(sources), labels.shape[2], reach, memory_mb)
    for top in range(0, h, side):
        for left in range(0, w, side):
            tile = slice(top, min(h, top + side)), slice(left, min(w, left + side))
            seen = tuple(slice(max(0, part.start - reach), part.stop + reach) for part in tile)
            keys, values = (
                torch.stack([of[*seen] for of in kind]).flatten(0, 2) for kind in zip(*sources, strict=True)
            )  # (sources seen, D), (sources seen, C)
            affinity = (target[*tile].flatten(0, 1) @ keys.T).div_(settings.temperature)  # (tile, sources seen)
            near = _near(tile, seen, (h, w), reach, target.device)
            affinity.unflatten(1, (len(sources), -1)).masked_fill_(~near[:, None], -torch.inf)
            affinity.sub_(affinity.amax(1, keepdim=True)).exp_()  # a common factor, so that none overflows
            least = affinity.topk(min(settings.topk, affinity.shape[1]), dim=1).values[:, -1:]
            affinity.masked_fill_(affinity < least, 0)
            label = (affinity @ values).div_(affinity.sum(1, keepdim=True))
            labels[*tile] = label.unflatten(0, [part.stop - part.start for part in tile])
    return labels


def _near(
    tile: tuple[slice, ...], seen: tuple[slice, ...], grid: tuple[int, int], reach: int, device: torch.device
) -> Tensor:
    """(tokens of the tile, tokens of one frame seen) bool: within reach?"""
    along = []
    for part, wide, length in zip(tile, seen, grid, strict=True):
        places = torch.arange(length, device=device)
        along.append((places[part, None] - places[wide]).abs() <= reach)
    rows, columns = along
    return (rows[:, None, :, None] & columns[None, :, None]).flatten(2).flatten(0, 1)


def _tile(target: Tensor, frames: int, channels: int, reach: int, memory_mb: int) -> int:
    """Rows and columns of tokens at a time, so that their affinities fit into the memory.

    Not more than the reach where there is choice: larger tiles would see more that is out of reach of each token.
    """
    h, w, width = target.shape
    number = target.element_size()

    def needed(side: int) -> int:
        seen = frames * min(h, side + 2 * reach) * min(w, side + 2 * reach)
        return seen * (number * (width + channels) + (2 * number + 2) * min(h, side) * min(w, side))

    side = max(8, min(reach, max(h, w)))
    while side > 1 and needed(side) > memory_mb * 2**20:
        side -= 1
    return side


def stretched(maps: Tensor) -> Tensor:
    """(C, H, W) with each channel from its minimum..maximum to 0..1, but for channels that are nowhere above 0.

    A channel above 0 that is constant up to rounding becomes 1.  The script divides by its spread: 0 / 0 where that is
    0, which then wins the arg-max, and where it is not, the rounding of single pixels decides.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    constant = high - low <= ROUNDING * high
    values = torch.where(constant, 1, (maps - low) / torch.where(constant, 1, high - low))
    return torch.where(high > 0, values, maps)


def label_map(soft: Tensor, pixels: tuple[int, int]) -> Tensor:
    """Soft labels (C, h, w) -> (H, W) int64 channel of each pixel: bilinear to that size, `stretched`, arg-max.

    A channel at a time, so that many objects in large frames need no more memory than one.
    """
    best = soft.new_full(pixels, -torch.inf)
    labels = torch.zeros(pixels, dtype=torch.int64, device=soft.device)
    for i, channel in enumerate(soft):
        large = F.interpolate(channel[None, None], size=pixels, mode="bilinear", align_corners=False)[0]
        (value,) = stretched(large)
        labels = torch.where(value > best, i, labels)  # equals: the first, as torch.max
        best = torch.maximum(value, best)
    return labels


def net_size(height: int, width: int, size: int, patch: int) -> tuple[int, int]:
    """Height and width (pixels) that a frame is resized to: the shorter side to `size`, the longer in proportion.

    Both downwards: the shorter one to whole patches, the longer one to a multiple of 64 px (patches that do not divide
    64: of as many as fit in 64 px).  Square frames count as wide ones.  Raises UserError where no patch fits.
    """
    if size < patch:
        raise UserError(f"size {size}: smaller than a patch of this encoder ({patch} px); use a larger one")
    step = max(patch, STEP // patch * patch)
    short = size // patch * patch
    long = max(step, short * max(height, width) // min(height, width) // step * step)
    return (long, short) if height > width else (short, long)


def first_labels(mask: np.ndarray, grid: tuple[int, int]) -> tuple[Tensor, np.ndarray]:
    """An index mask (H, W) uint8 -> labels (C, h, w) float32 of 0 or 1, and the ids (C,) uint8 of the channels.

    Nearest neighbour.  Background is channel 0; ids that the grid is too coarse for have no channel; pixels of IGNORE
    (255) have no label.
    """
    small = np.array(Image.fromarray(mask).resize((grid[1], grid[0]), Image.Resampling.NEAREST))
    ids = [0, *(i for i in np.unique(small).tolist() if i not in (0, IGNORE))]
    return torch.from_numpy(np.stack([small == i for i in ids])).float(), np.array(ids, np.uint8)
