"""Crops that know their box, and stratified sampling.  Plain integers and a numpy generator: this runs in workers.

Boxes here are pixel indices (y0, x0, y1, x1) of a crop's first and last row and column.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

Overlap = Literal["fixed", "official", "independent"]
LocalReference = Literal["union", "official"]


class Crop(NamedTuple):
    """Top row, left column, height, width (pixels)."""

    i: int
    j: int
    h: int
    w: int


class Box(NamedTuple):
    """First and last row and column (pixels); x0 > x1 when the crop was flipped."""

    y0: float
    x0: float
    y1: float
    x1: float

    @classmethod
    def of(cls, crop: Crop, flipped: bool) -> "Box":
        y0, x0, y1, x1 = crop.i, crop.j, crop.i + crop.h - 1, crop.j + crop.w - 1
        return cls(y0, x1, y1, x0) if flipped else cls(y0, x0, y1, x1)

    def unflipped(self) -> "Box":
        return Box(min(self.y0, self.y1), min(self.x0, self.x1), max(self.y0, self.y1), max(self.x0, self.x1))


def random_crop(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> Crop:
    """RandomResizedCrop's region: area fraction ~ U(scale), log-aspect ~ U(log 3/4, log 4/3), uniform position.

    Ten tries, then the largest centred crop whose aspect ratio is allowed.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w)
    h = min(height, round(width / low))
    w = min(width, round(height * high))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def _shift(start: int, extent: int, first: float, last: float, joint_start: float) -> int:
    """How far one axis of a crop moves towards the reference [first, last] (UDI spec 1.2)."""
    reach = last - first
    least = min(extent, reach)
    joint = max(start + extent - 1, last) - joint_start
    move = (joint - extent - reach if joint > extent + reach else 0) + (
        0.5 * least if joint >= extent + reach - 0.5 * least else 0
    )
    towards = (first + last) / 2 - (start + (extent - 1) / 2)
    return round(towards / (abs(towards) + 1e-5) * move)


def steer(crop: Crop, reference: Box, height: int, width: int, overlap: Overlap) -> Crop:
    """The crop moved so that it shares at least half of the smaller extent with the reference on each axis.

    "official" keeps the released code's slip: the joint interval of the width axis starts at the crop's *row*.
    """
    if overlap == "independent":
        return crop
    r = reference.unflipped()
    column = crop.i if overlap == "official" else crop.j
    i = crop.i + _shift(crop.i, crop.h, r.y0, r.y1, min(crop.i, r.y0))
    j = crop.j + _shift(crop.j, crop.w, r.x0, r.x1, min(column, r.x0))
    return Crop(min(max(i, 0), height - crop.h), min(max(j, 0), width - crop.w), crop.h, crop.w)


def local_reference(a: Box, b: Box, kind: LocalReference) -> Box:
    """What local crops are steered to, given the two global crops' boxes.

    "union": the joint bounding box.  "official": the released code's corner-wise minimum and maximum of boxes that
    may be flipped, which is the union, the intersection or one of the two, depending on the flips.
    """
    if kind == "union":
        a, b = a.unflipped(), b.unflipped()
    return Box(min(a.y0, b.y0), min(a.x0, b.x0), max(a.y1, b.y1), max(a.x1, b.x1)).unflipped()


def stratified_sample(grid: tuple[int, int], window: int, rng: np.random.Generator) -> np.ndarray:
    """(M,) int64: one token out of every window x window cell, as ascending row-major indices.

    Where the cells do not fill the grid, their block sits in one of its corners, each with probability 1/4.
    """
    rows, cols = grid[0] // window, grid[1] // window
    offset = rng.integers(0, window * window, (rows, cols))
    spare_y, spare_x = grid[0] - rows * window, grid[1] - cols * window
    corner = int(rng.integers(0, 4)) if spare_y or spare_x else 0
    y = np.arange(rows)[:, None] * window + offset // window + (corner // 2) * spare_y
    x = np.arange(cols)[None, :] * window + offset % window + (corner % 2) * spare_x
    return np.sort((y * grid[1] + x).ravel()).astype(np.int64)
