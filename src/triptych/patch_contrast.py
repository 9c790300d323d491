"""Contrast of patches without a matrix of all pairs: MMC's L_PAT (Wu et al. 2023, eq. 2).

    ℓ_i = −log e^{s(p_i, t_i)} / ( e^{s(p_i, t_i)} + Σ_{j in N(i)} e^{s(p_i, t_j)} ),     s(a, b) = a·b/τ

Its gradient is ∂ℓ_i/∂p_i = ( Σ_j w_j t_j − t_i ) / τ with the softmax's weights w: what the backward pass needs is one
mean key per row, gathered with the same online log-sum-exp that gives the loss.  Memory is that of a block of scores.
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor

from triptych.distributed import all_gather, rank
from triptych.errors import UserError
from triptych.losses import full_precision

Negatives = Literal["same_position", "all_positions", "everything"]
BLOCK = 1 << 22  # scores that are held at a time


def patch_contrast(
    p: Tensor, t: Tensor, temperature: float, negatives: Negatives = "same_position", block: int = BLOCK
) -> Tensor:
    """ℓ (V, B, N) of the student's patches p against the teacher's t, both (V, B, N, P) of unit length.

    Negatives are patches of the same view, of all processes; t gets no gradient.  "same_position": of the other
    images, at the patch's own place; "all_positions": of the other images, anywhere; "everything": all others.
    """
    t = all_gather(full_precision(t), dim=1)  # (V, WB, N, P)
    p = full_precision(p)
    if t.shape[1] < 2 and negatives != "everything":
        raise UserError("a contrast needs two images per forward pass, or there are no negatives: raise --batch")
    first, (_, images, places, _) = rank() * p.shape[1], p.shape
    positive = (p * t[:, first : first + images]).sum(-1) / temperature
    if negatives == "same_position":  # one problem per view and place, whose keys are the images
        lse = log_sum_exp(p.transpose(1, 2).flatten(0, 1), t.transpose(1, 2).flatten(0, 1), temperature, block=block)
        return lse.unflatten(0, (len(p), places)).transpose(1, 2) - positive
    of_image = [torch.arange(n, device=p.device).repeat_interleave(places) for n in (images, t.shape[1])]
    others = None if negatives == "everything" else (of_image[0] + first, of_image[1])
    lse = log_sum_exp(p.flatten(1, 2), t.flatten(1, 2), temperature, others, block).unflatten(1, (images, places))
    return (lse if others is None else torch.logaddexp(lse, positive)) - positive


def log_sum_exp(
    q: Tensor, k: Tensor, temperature: float, groups: tuple[Tensor, Tensor] | None = None, block: int = BLOCK
) -> Tensor:
    """log Σ_j exp(q_i·k_j/τ): q (G, R, P), k (G, M, P) -> (G, R), a problem per entry of G.

    groups: numbers of the rows (R,) and keys (M,); keys of the row's own group are left out.  k gets no gradient.
    """
    return cast(Tensor, _LogSumExp.apply(q, k, temperature, groups, block))


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, temperature: float, groups, block: int) -> Tensor:
        G, R, P = q.shape
        M = k.shape[1]
        keys = min(M, max(1, block // min(R, 1024)))
        rows = min(R, max(1, block // keys))
        problems = max(1, block // (rows * keys))
        lse, mean = q.new_full((G, R), -torch.inf), q.new_zeros(G, R, P)
        with torch.autocast(q.device.type, enabled=False):
            for g in range(0, G, problems):
                for r in range(0, R, rows):
                    at = slice(g, g + problems), slice(r, r + rows)
                    for j in range(0, M, keys):
                        part = k[at[0], j : j + keys]
                        scores = q[at] @ part.transpose(1, 2) / temperature
                        if groups is not None:
                            scores.masked_fill_(groups[0][at[1], None] == groups[1][j : j + keys], -torch.inf)
                        new = torch.logaddexp(lse[at], scores.logsumexp(-1))
                        safe = new.clamp(min=torch.finfo(new.dtype).min)  # no key yet: exp(−inf − safe) is 0, not nan
                        weights = (scores - safe[..., None]).exp()
                        mean[at] = mean[at] * (lse[at] - safe).exp()[..., None] + weights @ part
                        lse[at] = new
        ctx.save_for_backward(mean)
        ctx.temperature = temperature
        return lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (mean,) = ctx.saved_tensors
        return grads[0][..., None] * mean / ctx.temperature, None, None, None, None
