"""From one patch to a mask, and how well it fits: prompted segmentation on plain tensors.

N patches, P prompts (clicked patches), T thresholds.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from triptych.losses import similarity, unit


def clicked(coverage: np.ndarray, centroid: np.ndarray, columns: int, rule: str, rng: np.random.Generator) -> list[int]:
    """The clicked patches of a target, of the candidates, whose coverage (N,) is at least one half.

    rule: "random"; "max_coverage", the first of the largest; "centroid", whose centre is nearest to the target's
    centroid (row and column, in patches), the first of equals; "mean", all of them.
    """
    candidates = np.flatnonzero(coverage >= 0.5)
    if rule == "mean":
        return candidates.tolist()
    if rule == "random":
        return [int(rng.choice(candidates))]
    if rule == "max_coverage":
        return [int(coverage.argmax())]
    centres = np.stack([candidates // columns, candidates % columns], 1) + 0.5
    return [int(candidates[np.square(centres - centroid).sum(1).argmin()])]


def prompt_iou(
    tokens: Tensor,
    prompts: Tensor,
    inside: Tensor,
    total: Tensor,
    thresholds: Sequence[float],
    *,
    mapped: str = "cosine",
    connected: str = "none",
    columns: int = 1,
) -> tuple[Tensor, Tensor]:
    """Pixels in the intersection, and in the union, of a target and {i: S_i > θ}, S_i of patches i and the clicked one.

    tokens (N, D), prompts (P,) int64, inside (P, N) or (1, N): pixels of each patch in the target, total (N,): all of
    its pixels -> two tensors (P, T) float64.  With total = 1 and inside 0 or 1, patches are counted.
    mapped, connected: `ClickSettings.similarity` and `.connected`, for which patches lie in rows of `columns`.
    """
    x = unit(tokens)
    s = of_similarity(similarity(x[prompts], x), mapped)  # (P, N)
    target = inside.sum(-1, dtype=torch.float64)
    both, union = [], []
    for theta in thresholds:
        predicted = s > theta
        if connected != "none":
            predicted = around(predicted, prompts, columns, int(connected))
        both.append((predicted * inside).sum(-1, dtype=torch.float64))
        union.append((predicted * total).sum(-1, dtype=torch.float64) + target - both[-1])
    return torch.stack(both, 1), torch.stack(union, 1)


def of_similarity(s: Tensor, mapped: str) -> Tensor:
    """What is compared with θ, of cosines (P, N): themselves, by each map's minimum and maximum, or (1 + s) / 2."""
    if mapped == "shifted":
        return (1 + s) / 2
    if mapped == "minmax":  # written from the maximum: where all are equal, all are as similar as can be
        most, least = s.amax(-1, keepdim=True), s.amin(-1, keepdim=True)
        return 1 - (most - s) / (most - least).clamp(min=torch.finfo(s.dtype).tiny)
    return s


def around(predicted: Tensor, prompts: Tensor, columns: int, connectivity: int) -> Tensor:
    """The part of each mask (P, N) bool that is connected with its clicked patch; connectivity: 4 or 8."""
    kept = []
    for mask, prompt in zip(predicted.cpu().numpy(), prompts.tolist(), strict=True):
        parts = cv2.connectedComponents(mask.reshape(-1, columns).astype(np.uint8), connectivity=connectivity)[1]
        own = parts.reshape(-1)[prompt]
        kept.append((parts.reshape(-1) == own) & mask)
    return torch.from_numpy(np.stack(kept)).to(predicted.device)
