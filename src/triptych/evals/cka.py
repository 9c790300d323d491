"""Linear centred kernel alignment: how alike what two encoders, layers or tokens know of the same images is.

Kornblith et al. 2019 (arXiv 1905.00414); unbiased: with the estimator of Song et al. 2012.  MTE's Figure 7.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.progress import progress

Table = list[list[float | None]]
"""Rows of numbers; None where there is nothing to measure."""

ROWS = 8192
"""Images that are centred at a time."""


@dataclass(frozen=True)
class CKAResult:
    """M features in the order of `names`."""

    names: list[str]
    cka: Table  # (M, M) 0 to 1 (unbiased: may fall below 0); None for features that are the same for all images
    unbiased: bool
    images: int


def cka(features: Mapping[str, Tensor], *, unbiased: bool = False) -> CKAResult:
    """Of M features (N, D_m) of the same N images, by name; see `cka_matrix`.

    Raises UserError for fewer than two features, unlike numbers of images, too few of them, NaN or infinity.
    """
    shapes, needed = {name: tuple(x.shape) for name, x in features.items()}, 4 if unbiased else 2
    if len(shapes) < 2 or any(len(shape) != 2 for shape in shapes.values()):
        given = "; ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(
            f"CKA compares two or more features, each (images, width): more tokens or models; given {given}"
        )
    if len({images for images, _ in shapes.values()}) > 1:
        raise UserError(f"CKA compares features of the same images; given: {shapes}")
    images = next(iter(shapes.values()))[0]
    if images < needed:
        raise UserError(f"CKA{' without bias' if unbiased else ''} needs {needed} images or more; given: {images}")
    for name, x in features.items():
        if not x.sum(dim=1, dtype=torch.float32).isfinite().all():
            raise UserError(f"features {name!r} hold NaN or infinity; check the encoder's weights")
    matrix = cka_matrix(list(features.values()), unbiased)
    return CKAResult(names=list(shapes), cka=as_table(matrix), unbiased=unbiased, images=images)


def linear_cka(x: Tensor, y: Tensor, unbiased: bool = False) -> float:
    """Of x (N, D) and y (N, E); see `cka_matrix`."""
    return float(cka_matrix([x, y], unbiased)[0, 1])


@torch.no_grad()
def cka_matrix(features: Tensor | Sequence[Tensor], unbiased: bool = False) -> Tensor:
    """(M, N, D), or M tensors (N, D_m) -> (M, M) float64: |XᵀY|² / (|XᵀX| |YᵀY|) of centred features.

    It does not see rotations, scales and offsets of the features.  Near 1 when N is not much larger than D, whatever
    the features hold: `unbiased`, which needs N >= 4, has expectation near 0 for unrelated ones.  NaN for features that
    are the same for all images.  Beside the inputs it needs room for one D x D matrix and ROWS centred images of two.
    """
    centres = [_centre(x) for x in features]
    h = centres[0][0].new_empty(len(centres), len(centres))
    pairs = list(combinations_with_replacement(range(len(centres)), 2))
    for i, j in progress(pairs, "pairs of features compared by CKA:", len(pairs)):
        h[i, j] = h[j, i] = _hsic(features[i], features[j], centres[i], centres[j], unbiased)
    size = h.diagonal().sqrt()
    return h / (size[:, None] * size)


def as_table(x: Tensor) -> Table:
    """NaN becomes None."""
    return [[None if value != value else value for value in row] for row in x.tolist()]


Centre = tuple[Tensor, Tensor]
"""The first row (D,), and the mean of what is left when it is taken off: equal rows become exact zeros that way."""


def _centre(x: Tensor) -> Centre:
    first = x[0].double()
    total = torch.zeros_like(first)
    for part in x.split(ROWS):
        total += (part.double() - first).sum(0)
    return first, total / len(x)


def _centred(part: Tensor, centre: Centre) -> Tensor:
    return (part.double() - centre[0]).sub_(centre[1])


def _hsic(x: Tensor, y: Tensor, of_x: Centre, of_y: Centre, unbiased: bool) -> Tensor:
    """Hilbert-Schmidt independence criterion of x (N, D), y (N, E), up to a factor that CKA cancels."""
    n, width = len(x), max(x.shape[1], y.shape[1])
    rows = ROWS if n > width else n
    product = of_x[0].new_zeros(x.shape[1], y.shape[1]) if n > width else None
    total, ab, a_sum, b_sum = of_x[0].new_zeros(4)
    for part_x, part_y in zip(x.split(rows), y.split(rows), strict=True):
        u, v = _centred(part_x, of_x), _centred(part_y, of_y)
        # Σ_ij (x_i·x_j)(y_i·y_j) = |XᵀY|²: of the two ways the one with the smaller matrix.
        if product is None:
            total = ((u @ u.T) * (v @ v.T)).sum()
        else:
            product.addmm_(u.T, v)
        a, b = u.square().sum(1), v.square().sum(1)
        ab, a_sum, b_sum = ab + a @ b, a_sum + a.sum(), b_sum + b.sum()
    if product is not None:
        total = product.square().sum()
    if not unbiased:
        return total
    # Song et al., equation 5, on Gram matrices whose diagonals a, b are removed.  Rows of a centred Gram matrix sum to
    # 0, so those of the hollow ones sum to −a and −b, and no N x N matrix is needed.
    return total - ab + a_sum * b_sum / ((n - 1) * (n - 2)) - 2 / (n - 2) * ab
