"""What patch tokens share: within an image, between images, and with their position (experiment E2 of MMC)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.data.sources import Source
from triptych.errors import UserError
from triptych.evals.transform import EvalTransform, batches
from triptych.losses import unit


@dataclass(frozen=True)
class PatchesResult:
    """Mean cosine similarities of two different patches, and how well a linear map tells where a patch stands."""

    within: float  # of one image
    between: float  # of two images
    same_position: float  # of two images, at the same place
    position_top1: float  # percent, on held-out images
    chance: float  # percent: 100 / N
    images: int  # that the similarities are of
    held_out: int  # of them, a fifth: those that positions are told of


@torch.no_grad()
def patches(
    embed: Callable[[Tensor], Tensor],
    source: Source,
    transform: EvalTransform,
    *,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> PatchesResult:
    """embed: images (B, 3, H, W) -> patches (B, N, D), which are put to unit length.

    Similarities come from sums of vectors: no pairs are formed.  Positions: ridge regression of the one-hot position
    on the first four fifths of the images, in the source's order, which should be random; the most likely one of the
    others' patches.  Images that cannot be read are left out.
    """
    fit = len(source) - len(source) // 5
    if fit == len(source):
        raise UserError(f"{source.name} has {len(source)} images: telling positions takes at least 5")
    sums = _Sums()
    tests: list[Tensor] = []
    for index, images in batches(source, transform, batch=batch, device=torch.device(device), workers=workers):
        x = unit(embed(images)).double().cpu()  # (B, N, D)
        first = torch.tensor(index) < fit
        sums.add(x)
        sums.learn(x[first])
        tests.append(x[~first].float())
    held = torch.cat(tests)
    if not len(held) or not sums.learned:
        raise UserError(f"too few images of {source.name} can be read to tell positions")
    within, between, same = sums.similarities()
    linear = sums.regression()
    right = (held.double() @ linear[:-1] + linear[-1]).argmax(-1) == torch.arange(held.shape[1])
    top1 = 100 * right.double().mean().item()
    return PatchesResult(within, between, same, top1, 100 / held.shape[1], sums.images, len(held))


class _Sums:
    """Of unit vectors, by image, by position and over all; and the moments of the regression."""

    def __init__(self) -> None:
        self.images = self.learned = 0
        self.within = 0.0  # Σ over images of |Σ of its patches|²

    def add(self, x: Tensor) -> None:
        if not self.images:
            self.by_place = x.new_zeros(x.shape[1:])  # (N, D)
        self.images += len(x)
        self.by_place += x.sum(0)
        self.within += x.sum(1).square().sum().item()

    def learn(self, x: Tensor) -> None:
        if not len(x):
            return
        if not self.learned:
            self.moment = x.new_zeros(x.shape[-1] + 1, x.shape[-1] + 1)
            self.target = x.new_zeros(x.shape[-1] + 1, x.shape[1])
        self.learned += len(x)
        one = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        self.moment += one.flatten(0, 1).T @ one.flatten(0, 1)
        self.target += one.sum(0).T

    def similarities(self) -> tuple[float, float, float]:
        m, n = self.images, len(self.by_place)
        if m < 2 or n < 2:
            raise UserError("similarities between images and patches take at least two of each")
        total = self.by_place.sum(0).square().sum().item()
        of_places = self.by_place.square().sum().item()
        return (
            (self.within - m * n) / (m * n * (n - 1)),
            (total - self.within) / (m * (m - 1) * n * n),
            (of_places - m * n) / (m * (m - 1) * n),
        )

    def regression(self) -> Tensor:
        """(D + 1, N): weights, and the constant in the last row."""
        ridge = 1e-6 * self.moment.diagonal().mean() * torch.eye(len(self.moment), dtype=self.moment.dtype)
        return torch.linalg.solve(self.moment + ridge, self.target)
