"""Which patches are hidden from the student (iBOT, after BEiT's blockwise masking) or dropped (MAE, MSN).

Plain numpy: this runs in workers.  A grid is (rows, columns) of patches; masks are (H, W) bool, True = hidden.
"""

import math
from collections.abc import Sequence

import numpy as np

from triptych.data.views import MaskSpec

LEAST_ASPECT = 0.3  # of a block, height : width; the greatest is its inverse
ATTEMPTS = 10  # at each block, before the mask is left as it is


def draw_mask(spec: MaskSpec, grid: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(N,) bool: one crop's mask, row-major."""
    ratio = draw_ratio(spec.ratios, spec.variations, rng)
    mask = block_mask(grid, ratio, rng) if spec.shape == "block" else random_mask(grid, ratio, rng)
    return mask.ravel()


def draw_ratio(ratios: Sequence[float], variations: Sequence[float], rng: np.random.Generator) -> float:
    """Share of patches to hide: every r ± v becomes a draw from U(r - v, r + v), then one of those is drawn."""
    drawn = [rng.uniform(r - v, r + v) for r, v in zip(ratios, variations, strict=True)]
    return drawn[rng.integers(len(drawn))]


def block_mask(grid: tuple[int, int], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Overlapping rectangles until ratio·H·W patches are hidden or no further rectangle fits: never more than that."""
    mask = np.zeros(grid, bool)
    wanted = ratio * mask.size
    while (missing := wanted - mask.sum()) > 0 and _add_block(mask, missing, rng):
        pass
    return mask


def _add_block(mask: np.ndarray, missing: float, rng: np.random.Generator) -> bool:
    """Hides one rectangle with 1 to `missing` patches that were not hidden yet; False where none was found."""
    height, width = mask.shape
    least = (min(height, width) // 3) ** 2
    for _ in range(ATTEMPTS):
        # Not rng.uniform, which refuses a low above its high: near the end `least` exceeds what is missing, and the
        # areas drawn then lie between the two, as released.
        area = least + (missing - least) * rng.random()
        aspect = math.exp(rng.uniform(math.log(LEAST_ASPECT), -math.log(LEAST_ASPECT)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        block = mask[y : y + h, x : x + w]
        if 0 < h * w - block.sum() <= missing:
            block[:] = True
            return True
    return False


def random_mask(grid: tuple[int, int], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """ratio·H·W patches, rounded down, each set of them equally likely."""
    mask = np.zeros(grid[0] * grid[1], bool)
    mask[: int(ratio * mask.size)] = True
    return rng.permutation(mask).reshape(grid)


def draw_keep(patches: int, drop: float, rng: np.random.Generator) -> np.ndarray:
    """(n,) int64, ascending: the ⌊N(1 − drop)⌋ patches that stay, each set of them equally likely."""
    return np.sort(rng.permutation(patches)[: int(patches * (1 - drop))])
