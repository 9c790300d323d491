"""Several encoders, trained independently, as one: their features side by side (MTE paper, Table 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.losses import unit


@torch.no_grad()
def concatenated(features: Sequence[Tensor]) -> Tensor:
    """M features (N, D_m) of the same images -> (N, Σ D_m) float32: each of unit length, side by side.

    The cosine of two rows is the mean of the encoders' cosines, so every encoder has the same say, whatever its width.
    A row of zeros stays one.  Raises UserError for none, or for unlike numbers of images.
    """
    shapes = [tuple(x.shape) for x in features]
    if not shapes or any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise UserError(
            f"features have shapes {shapes}; give (images, width) of at least one encoder, of the same images for all"
        )
    widths = [width for _, width in shapes]
    out = features[0].new_empty(shapes[0][0], sum(widths), dtype=torch.float32)
    for x, part in zip(features, out.split(widths, 1), strict=True):
        part.copy_(unit(x))
    return out
