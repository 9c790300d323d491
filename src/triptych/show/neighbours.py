"""Which images of a gallery are most like a given one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.evals.neighbours import index, nearest, similarity


@dataclass(frozen=True)
class NearestImages:
    """For each of T queries its k nearest images, nearest first."""

    indices: Tensor  # (T, k) int64 rows of the gallery
    cosine: Tensor  # (T, k) float32


def check_k(k: int, images: int) -> None:
    """Raises UserError where a gallery of so many images has no k neighbours."""
    if not 1 <= k <= images:
        raise UserError(f"--k {k}: the gallery has {images} images, give 1 to {images}")


@torch.no_grad()
def nearest_images(gallery: Tensor, queries: Tensor, k: int = 8) -> NearestImages:
    """gallery (M, D), queries (T, D): features of images.  Raises UserError unless 1 <= k <= M."""
    check_k(k, len(gallery))
    keys = torch.cat([found for _, (found,) in nearest([gallery], [queries], k)])
    return NearestImages(index(keys), similarity(keys))
