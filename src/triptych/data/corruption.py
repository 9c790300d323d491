"""GMML's corruption: rectangles of pixels replaced until a share of the crop is gone (Atito et al., GMML, 2022).

Used by MMC, SiT, GMML and MC-SSL.  Workers draw what is replaced and by what, from (seed, epoch, image), and copy
pixels of images; noise and zeros, which uint8 cannot hold, are filled in on the device (`View` in data/views.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Fill = Literal["noise", "zeros", "other", "self"]
# What stands in a pixel: itself, one copied from an image, noise N(0, 1) or 0 in normalised space.
KEPT, COPIED, NOISE, ZEROS = range(4)
CODES: dict[str, int] = {"noise": NOISE, "zeros": ZEROS, "other": COPIED, "self": COPIED}


class CorruptionConfig(BaseModel):
    """Each crop loses `share` of its pixels to one of `kinds` or, with probability `replace`, `replace_share` of them
    to another image of the batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kinds: tuple[Fill, ...] = Field(default=("noise",), min_length=1)  # one is drawn; "self" = from elsewhere in it
    share: float = Field(default=0.75, ge=0, le=1)  # ρ: what goes is drawn from U(min(½, ρ), ρ)
    replace: float = Field(default=0.5, ge=0, le=1)  # probability
    replace_share: float = Field(default=0.3, ge=0, le=1)  # ρ of crops that are filled from another image
    align: int = Field(default=1, ge=1)  # pixels; blocks start and end on multiples: 1, or the patch size
    largest: float = Field(default=0.3, ge=0.05, le=1)  # β: side of the largest block, as a share of the crop's


class HalfZeros(CorruptionConfig):
    """SiT's and MC-SSL's.  A class, so that a change of one setting leaves the others at these defaults."""

    kinds: tuple[Fill, ...] = Field(default=("zeros",), min_length=1)
    share: float = Field(default=0.5, ge=0, le=1)


@dataclass(frozen=True)
class Corruption:
    """What replaces the pixels of one crop."""

    kind: Fill
    blocks: np.ndarray  # (n, 4) int64: row, column, height, width in pixels; they overlap
    donor: float  # [0, 1): where in the batch the other image stands
    places: np.ndarray  # (n, 2) int64: row and column that each block of kind "self" is copied from


def draw_corruption(config: CorruptionConfig, height: int, width: int, rng: np.random.Generator) -> Corruption:
    """One crop's corruption.  Two crops of an image draw independently."""
    replaced = rng.random() < config.replace
    kind: Fill = "other" if replaced else config.kinds[rng.integers(len(config.kinds))]
    share = config.replace_share if replaced else config.share
    blocks = draw_blocks(share, height, width, rng, align=config.align, largest=config.largest)
    places = rng.integers(0, np.array([height, width]) - blocks[:, 2:] + 1)
    return Corruption(kind, blocks, rng.random(), places)


def draw_blocks(
    share: float, height: int, width: int, rng: np.random.Generator, *, align: int = 1, largest: float = 0.3
) -> np.ndarray:
    """(n, 4) int64: overlapping blocks until they cover U(min(½, share), share) of the pixels; the last one overshoots.

    height and width are multiples of `align`, so that every pixel can be reached and the loop ends.  (The released
    routine never starts a block in the last row and column of cells, and hangs where blocks are one cell high.)
    """
    assert height % align + width % align == 0, "the recipe is checked for this"
    wanted = rng.uniform(min(0.5, share), share) * height * width
    covered, blocks = np.zeros((height, width), bool), []
    count = 0
    while count < wanted:
        # In this order: row, column, height, width.
        r, c = (align * (int(rng.integers(0, side)) // align) for side in (height, width))
        h, w = (int(rng.integers(align, max(int(largest * side), align + 1))) for side in (height, width))
        h, w = (align * round(n / align) for n in (min(h, height - r), min(w, width - c)))
        block = covered[r : r + h, c : c + w]
        count += block.size - np.count_nonzero(block)
        block[:] = True
        blocks.append((r, c, h, w))
    return np.array(blocks, np.int64).reshape(-1, 4)


def block_cover(blocks: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) bool: True where any block lies."""
    covered = np.zeros((height, width), bool)
    for r, c, h, w in blocks:
        covered[r : r + h, c : c + w] = True
    return covered


def corrupt(images: Tensor, corruptions: Sequence[Corruption]) -> tuple[Tensor, Tensor]:
    """images (B, H, W, 3) -> images with copied pixels in their place (B, H, W, 3), what stands where (B, H, W) uint8.

    Noise and zeros are marked only.
    """
    out = images.clone()
    codes = torch.zeros(images.shape[:3], dtype=torch.uint8)
    for i, one in enumerate(corruptions):
        cover = torch.from_numpy(block_cover(one.blocks, *images.shape[1:3]))
        codes[i][cover] = CODES[one.kind]
        if one.kind == "other":
            out[i][cover] = images[int(one.donor * len(images))][cover]
        elif one.kind == "self":
            for (r, c, h, w), (y, x) in zip(one.blocks, one.places, strict=True):
                out[i, r : r + h, c : c + w] = images[i, y : y + h, x : x + w]
    return out, codes
