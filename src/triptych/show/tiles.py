"""Single pictures (H, W, 3) uint8 that sheets are made of."""

import cv2
import numpy as np

from triptych.show.colours import ORDER, PALETTE, heat

COVER, CONTRAST = 0.8, 0.5
"""How much of a colour categories have; the rest is the grey image below, with so much of its contrast: dark blue over
white and light blue over black stay two colours."""


def enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of patches (rows, columns, ...) at (height, width) pixels, every patch an even field."""
    if values.dtype.kind in "bi":
        values = values.astype(np.uint8)
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_NEAREST)


def heat_tile(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (rows, columns) in 0..1."""
    return enlarged(heat(values), size)


def grey(pixels: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def classes_tile(pixels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Patches (rows, columns) of the categories 0 ... 7 over the grey image."""
    below = cv2.addWeighted(grey(pixels), CONTRAST, np.full_like(pixels, 128), 1 - CONTRAST, 0)
    colours = enlarged(np.array(ORDER, np.uint8)[classes], pixels.shape[:2])
    return cv2.addWeighted(colours, COVER, below, 1 - COVER, 0)


def mask_tile(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Patches (rows, columns) bool in orange over the grey image."""
    below, inside = grey(pixels), enlarged(mask, pixels.shape[:2])[..., None] > 0
    return np.where(inside, cv2.addWeighted(np.full_like(below, PALETTE["orange"]), 0.6, below, 0.4, 0), below)


def marked(pixels: np.ndarray, place: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """With a ring around the patch at (row, column)."""
    out, (height, width) = pixels.copy(), pixels.shape[:2]
    centre = [int((i + 0.5) * n / of) for i, of, n in zip(place, grid, (height, width), strict=True)]
    radius = max(4, min(height, width) // 32)
    for colour, thick in (((0, 0, 0), 5), ((255, 255, 255), 2)):  # seen on any ground
        cv2.circle(out, centre[::-1], radius, colour, max(1, thick * radius // 12), cv2.LINE_AA)
    return out


def matches_tile(
    first: np.ndarray,
    second: np.ndarray,
    grids: tuple[tuple[int, int], tuple[int, int]],
    places: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Two images side by side on white, a line from each patch to its counterpart.

    grids: rows and columns of patches of both; places: (n, 2) rows and columns of both, the most important first.
    """
    height, gap = max(first.shape[0], second.shape[0]), 12
    out = np.full((height, first.shape[1] + gap + second.shape[1], 3), 255, np.uint8)
    out[: first.shape[0], : first.shape[1]] = first
    out[: second.shape[0], first.shape[1] + gap :] = second
    shift, ends = (0, first.shape[1] + gap), []
    for image, grid, at, x in zip((first, second), grids, places, shift, strict=True):
        step = image.shape[0] / grid[0], image.shape[1] / grid[1]
        ends.append([(int((c + 0.5) * step[1]) + x, int((r + 0.5) * step[0])) for r, c in at.tolist()])
    colours = [colour for colour in ORDER if any(colour)]  # black is the lines' edge
    for i, (a, b) in reversed(list(enumerate(zip(*ends, strict=True)))):
        colour = colours[i % len(colours)]
        for paint, thick in (((0, 0, 0), 4), (colour, 2)):
            cv2.line(out, a, b, paint, thick, cv2.LINE_AA)
        for end in (a, b):
            cv2.circle(out, end, 5, (0, 0, 0), -1, cv2.LINE_AA)
            cv2.circle(out, end, 4, colour, -1, cv2.LINE_AA)
    return out
