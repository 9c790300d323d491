"""The colours of every picture, chosen so that colour-blind people read it too (docs/show.md)."""

import cv2
import numpy as np

PALETTE = {
    "blue": (0, 114, 178),
    "yellow": (240, 228, 66),
    "vermillion": (213, 94, 0),
    "sky": (86, 180, 233),
    "purple": (204, 121, 167),
    "black": (0, 0, 0),
    "green": (0, 158, 115),
    "orange": (230, 159, 0),
}
"""Okabe and Ito 2008, for categories.  In an order in which the first ones of any number differ most in all eyes."""
ORDER = tuple(PALETTE.values())


def heat(values: np.ndarray) -> np.ndarray:
    """(H, W) in 0..1 -> (H, W, 3) uint8, dark blue to yellow (viridis: lightness rises with the value)."""
    levels = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def three(values: np.ndarray) -> np.ndarray:
    """Three numbers in 0..1 as one colour: (H, W, 3) -> (H, W, 3) uint8.

    The first is lightness, the second goes from blue to yellow, the third from green to red: in CIE Lab, so that who
    cannot tell red from green misses the third alone.
    """
    lab = np.stack([30 + 55 * values[..., 0], 72 * values[..., 2] - 36, 88 * values[..., 1] - 44], -1)
    rgb = cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_Lab2RGB)
    return (rgb.clip(0, 1) * 255).round().astype(np.uint8)
