"""Pairs of patches of one object, and of different ones."""

from typing import NamedTuple

import numpy as np

MIXED, BACKGROUND = -2, -1
"""Labels of patches that are of no object: left out; and in no region, where that counts as different."""


class Drawn(NamedTuple):
    """Rows of patches, (number,) int64 each; empty where there is no such pair."""

    of_one: tuple[np.ndarray, np.ndarray]
    of_two: tuple[np.ndarray, np.ndarray]


def patch_labels(coverage: np.ndarray, labels: list[int], unmarked: np.ndarray | None) -> np.ndarray:
    """The object that at least half of a patch lies in: coverage (n, N), label of each object -> (N,) int64.

    MIXED where that is none or more than one.  unmarked (N,): shares in no region, BACKGROUND from one half on.
    """
    half = coverage >= 0.5
    found = np.where(half.sum(0) == 1, np.array(labels)[half.argmax(0)], MIXED)
    return found if unmarked is None else np.where(~half.any(0) & (unmarked >= 0.5), BACKGROUND, found)


def draw_pairs(labels: np.ndarray, number: int, rng: np.random.Generator) -> Drawn:
    """Pairs of different patches of one image, uniform over all that there are, with replacement: labels (n,).

    Two patches of BACKGROUND are no pair.
    """
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    _, start, of, count = np.unique(ordered, return_index=True, return_inverse=True, return_counts=True)
    start, count = start[of], count[of]  # where each patch's object begins in `ordered`, and its patches
    first = _choose((count - 1) * (ordered != BACKGROUND), number, rng)
    second = start[first] + rng.integers(count[first] - 1)
    second += second >= first
    one = order[first], order[second]
    first = _choose(len(labels) - count, number, rng)
    second = rng.integers(len(labels) - count[first])
    second += count[first] * (second >= start[first])
    return Drawn(one, (order[first], order[second]))


def draw_across(labels: np.ndarray, images: np.ndarray, image: int, number: int, rng: np.random.Generator) -> Drawn:
    """Pairs of a patch of this image and one of another image, uniform over all that there are: (n,), (n,) int64."""
    own, elsewhere = np.flatnonzero(images == image), images != image
    found = []
    for same in (True, False):
        pools = {c: np.flatnonzero(elsewhere & ((labels == c) == same)) for c in np.unique(labels[own])}
        if same:
            pools[BACKGROUND] = own[:0]
        first = own[_choose(np.array([len(pools[c]) for c in labels[own]]), number, rng)]
        second = np.zeros_like(first)
        for c in np.unique(labels[first]):
            of = labels[first] == c
            second[of] = rng.choice(pools[c], int(of.sum()))
        found.append((first, second))
    return Drawn(*found)


def _choose(weight: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Positions, with replacement, by weight (n,); none where all weights are 0."""
    total = weight.sum()
    return rng.choice(len(weight), number, p=weight / total) if total else np.zeros(0, np.int64)
