"""Averages over what was measured on images, and how far other images would move them."""

import numpy as np


def average_ratio(a: np.ndarray, b: np.ndarray, image: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over groups of Σ a / Σ b, and half of its 95 % interval: (n, T), (n, T) > 0, (n,), (n,) -> (T,), (T,).

    image: which image a row is of; all of an image's rows come and go together, so that it is images that are drawn.
    The interval is that of the ratio's linear part: each image moves it by Σ over its rows of (a - r b) / Σ b.
    """
    _, group = np.unique(group, return_inverse=True)
    groups = int(group.max()) + 1
    top, bottom = (_sums(x, group, groups) for x in (a, b))
    ratio = top / bottom
    influence = (a - ratio[group] * b) / bottom[group] / groups
    _, image = np.unique(image, return_inverse=True)
    return ratio.mean(0), half_interval(_sums(influence, image, int(image.max()) + 1))


def half_interval(influence: np.ndarray) -> np.ndarray:
    """Half of the 95 % interval of a number that each of I images moves by so much: (I, ...) -> (...).

    For a mean of one number per image it is 1.96 standard errors.  NaN for a single image.
    """
    images = len(influence)
    if images < 2:
        return np.full(influence.shape[1:], np.nan)
    return 1.96 * np.sqrt(images / (images - 1) * np.square(influence).sum(0))


def _sums(x: np.ndarray, of: np.ndarray, count: int) -> np.ndarray:
    """Rows that belong together, added: (n, T), (n,) -> (count, T) float64."""
    out = np.zeros((count, *x.shape[1:]))
    np.add.at(out, of, x)
    return out
