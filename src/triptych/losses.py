"""Pure functions that methods share: no parameters, no buffers, no side effects."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.distributed import all_gather, all_mean, rank
from triptych.errors import UserError


def full_precision(x: Tensor) -> Tensor:
    """fp32 for half-precision input, otherwise unchanged: softmax and log-sum-exp are not left to autocast."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unit(z: Tensor) -> Tensor:
    """z / |z| along the last axis, in full precision."""
    return F.normalize(full_precision(z), dim=-1)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """(..., A, P), (B, P) -> (..., A, B) in full precision: a small temperature would make much of bf16's rounding."""
    with torch.autocast(a.device.type, enabled=False):
        return full_precision(a) @ full_precision(b).T


def teacher_probabilities(z: Tensor, prototypes: Tensor, center: Tensor, temperature: float) -> Tensor:
    """p_t = softmax((z Wᵀ − c) / τ_t).  z (..., P), prototypes W (K, P), center c (K,) -> (..., K)"""
    return ((full_precision(z @ prototypes.T) - center) / temperature).softmax(-1)


def both_probabilities(
    z_t: Tensor, w_t: Tensor, z_s: Tensor, w_s: Tensor, center: Tensor, temps: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """(teacher, student) probabilities (B, K) of embeddings z (B, P) under prototypes w (K, P).

    temps: (teacher's, student's).  The student has no centre.
    """
    p_t = teacher_probabilities(z_t, w_t, center, temps[0])
    return p_t, teacher_probabilities(z_s, w_s, torch.zeros_like(center), temps[1])


def gathered_keys(z_t: Tensor) -> Tensor:
    """(V, B, P) -> (V, WB, P): the teacher's embeddings of all W processes, of unit length, without gradient."""
    return all_gather(unit(z_t), dim=1)


def contrast(q: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """InfoNCE: −mean_b log softmax_b'( q_b·k_b'/τ )[b].

    q (B, P) of this process, put to unit length here; keys (WB, P): one view of `gathered_keys`.
    """
    if len(keys) < 2:
        raise UserError("a contrast needs two images per forward pass, or there are no negatives: raise --batch")
    own = torch.arange(len(q), device=q.device) + len(q) * rank()
    return F.cross_entropy(similarity(unit(q), keys) / temperature, own)


def masked_error(x: Tensor, target: Tensor, pixel_mask: Tensor, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """Mean absolute or squared error over the replaced pixels of the batch on all processes; 0 where there are none.

    x, target (B, 3, H, W), pixel_mask (B, H, W) bool.  What a process returns is its share: their mean is the mean.
    """
    difference = full_precision(x) - target
    error = difference.abs() if kind == "l1" else difference.square()
    hidden = pixel_mask[:, None].to(error.dtype)
    return (error * hidden).sum() / (all_mean(hidden.sum()) * x.shape[1]).clamp(min=1)


@torch.no_grad()
def balanced(codes: Tensor, iterations: int) -> Tensor:
    """Codes (B, K) >= 0 scaled: rows to 1 and, over the batches of all processes, columns to B/K (Sinkhorn-Knopp)."""
    least = torch.finfo(codes.dtype).tiny
    codes = codes * (len(codes) / all_mean(codes.sum()))
    for _ in range(iterations):
        # Every prototype alike; the factor K/B cancels in the next line.  One that nothing comes near keeps its zeros.
        codes = codes / all_mean(codes.sum(0)).clamp(min=least)
        codes = codes / codes.sum(1, keepdim=True).clamp(min=least)
    return codes
