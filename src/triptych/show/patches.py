"""What patch tokens have in common: principal components, clusters, similarity to one of them, correspondence.

All of the last block, after the final norm.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.encoders import Encoder
from triptych.errors import UserError
from triptych.losses import unit


@dataclass(frozen=True)
class PCA:
    """The first three principal components of some tokens, and where nearly all of these lie along them."""

    mean: Tensor  # (D,) float64
    directions: Tensor  # (D, 3), the strongest first; where tokens have fewer, the rest is 0
    low: Tensor  # (3,): 2 % of the tokens lie below
    high: Tensor  # (3,): 2 % above

    @classmethod
    def of(cls, tokens: Tensor) -> "PCA":
        """tokens (M, D).  The sign of a component is that of its largest weight, so it is the same every time."""
        x = tokens.double()
        mean = x.mean(0)
        x = x - mean
        _, directions = torch.linalg.eigh(x.T @ x)  # ascending
        directions = directions.flip(1)[:, :3]
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        directions = directions * torch.where(largest < 0, -1.0, 1.0)
        directions = torch.nn.functional.pad(directions, (0, 3 - directions.shape[1]))
        ends = torch.quantile(x @ directions, torch.tensor([0.02, 0.98], dtype=x.dtype, device=x.device), dim=0)
        return cls(mean, directions, ends[0], ends[1])

    def __call__(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., 3) float32 in 0..1: `low` is 0, `high` is 1."""
        y = (tokens.double() - self.mean) @ self.directions
        return ((y - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1).float()


@torch.no_grad()
def patch_pca(encoder: Encoder, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, rows, columns, 3) in 0..1: components that the images share, so equal means alike."""
    patch = encoder(images).patch
    return PCA.of(patch.flatten(0, 1))(patch).unflatten(1, encoder.grid(*images.shape[-2:]))


@dataclass(frozen=True)
class Clusters:
    """Centres (k, D) float32 of k-means, that of the most tokens first."""

    centres: np.ndarray
    normalise: bool  # tokens were put to unit length

    @classmethod
    def of(cls, tokens: Tensor, k: int = 3, *, normalise: bool = True, restarts: int = 10, seed: int = 0) -> "Clusters":
        """tokens (M, D): k-means++, the best of some restarts.  Raises UserError for k < 1 and for k > M."""
        if not 1 <= k <= len(tokens) or restarts < 1:
            raise UserError(f"{k} clusters, {restarts} restarts: give at least 1, and at most {len(tokens)} clusters")
        x = _vectors(tokens, normalise)
        from sklearn.cluster import KMeans

        found: Any = KMeans(k, init="k-means++", n_init=restarts, random_state=seed).fit(x)  # type: ignore[arg-type]
        order = np.argsort(-np.bincount(found.labels_, minlength=k), kind="stable")
        return cls(found.cluster_centers_[order], normalise)

    def __call__(self, tokens: Tensor) -> np.ndarray:
        """(M, D) -> (M,) int64: the nearest centre."""
        from sklearn.metrics import pairwise_distances_argmin

        return pairwise_distances_argmin(_vectors(tokens, self.normalise), self.centres)


def _vectors(tokens: Tensor, normalise: bool) -> np.ndarray:
    return (unit(tokens) if normalise else tokens).detach().float().cpu().numpy()


@torch.no_grad()
def patch_clusters(
    encoder: Encoder, images: Tensor, k: int = 3, *, normalise: bool = True, restarts: int = 10, seed: int = 0
) -> np.ndarray:
    """k-means of each image's own patches (MMC, Fig. 6): (B, 3, H, W) -> (B, rows, columns) int64, 0 is the largest.

    normalise: tokens of unit length, which the paper leaves open.
    """
    grid = encoder.grid(*images.shape[-2:])
    options = {"normalise": normalise, "restarts": restarts, "seed": seed}
    return np.stack([Clusters.of(x, k, **options)(x).reshape(grid) for x in encoder(images).patch])


def similarity(patch: Tensor, query: Tensor) -> Tensor:
    """Cosine in −1..1 of patches (..., N, D) with one token (..., D) -> (..., N)."""
    return (unit(patch) @ unit(query)[..., None])[..., 0]


@torch.no_grad()
def similarity_map(encoder: Encoder, images: Tensor, place: tuple[int, int]) -> Tensor:
    """`similarity` of an image's patches with its own at (row, column): (B, 3, H, W) -> (B, rows, columns)."""
    grid = encoder.grid(*images.shape[-2:])
    patch = encoder(images).patch
    return similarity(patch, patch[:, place[0] * grid[1] + place[1]]).unflatten(1, grid)


@dataclass(frozen=True)
class Correspondences:
    """Patches of two images that are each other's most similar one, the most similar pairs first."""

    first: Tensor  # (n, 2) int64: row and column in the first image
    second: Tensor  # (n, 2) in the second
    similarity: Tensor  # (n,) cosine, descending
    mutual: int  # so many pairs there are; n of them are here


@torch.no_grad()
def correspondences(encoder: Encoder, first: Tensor, second: Tensor, top: int = 30) -> Correspondences:
    """first, second: one image (3, H, W) each, of any two sizes.  At most `top` pairs; equal ones in reading order."""
    grids = [encoder.grid(*x.shape[-2:]) for x in (first, second)]
    a, b = (unit(encoder(x[None]).patch[0]) for x in (first, second))
    s = a @ b.T
    there, back = s.argmax(1), s.argmax(0)
    of_a = (back[there] == torch.arange(len(a), device=a.device)).nonzero()[:, 0]
    similarity, order = s[of_a, there[of_a]].sort(descending=True, stable=True)
    of_a = of_a[order[:top]]
    places = [torch.stack([i // g[1], i % g[1]], 1) for i, g in zip((of_a, there[of_a]), grids, strict=True)]
    return Correspondences(places[0], places[1], similarity[:top], len(order))
