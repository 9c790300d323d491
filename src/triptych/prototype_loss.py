"""Cross-entropy between teacher and student over K prototypes, without a matrix of all rows and prototypes.

    s = z_s·w_s / τ_s,   p_t = softmax( (z_t·w_t − c) / τ_t ),   L = Σ_{t,s,b} weight_tsb H( p_t, softmax(s) )
      = Σ_sb n_sb lse(s_sb) − Σ_sbk q_sbk s_sbk,                 n = Σ_t weight_t,  q = Σ_t weight_t p_t
    ∂L/∂s = n softmax(s) − q                                     of which z_s and w_s get their parts

A first pass over the prototypes, a chunk at a time, gathers the log-sum-exps; a second one has the scores of a chunk
again, from memory where they fit and by another product where not, and adds up the loss and both gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triptych.compiling import compilable
from triptych.distributed import all_gather
from triptych.heads import Prototypes
from triptych.losses import full_precision

# By kind of device: (prototypes at a time, scores held at a time).  The CPU's are measured (docs/log.md): a chunk stays
# near the core; the GPU's keep the number of kernels small.
SIZES = {"cpu": (1 << 10, 1 << 22), "cuda": (1 << 15, 1 << 26)}
LEAST = 512  # rows of a block below which moving prototypes costs more than a second product


def prototype_cross_entropy(
    z_s: Tensor,
    prototypes_s: Tensor | Prototypes,
    z_t: Tensor,
    prototypes_t: Tensor | Prototypes,
    *,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    weight: Tensor,
    chunk: int | None = None,
    block: int | None = None,
) -> Tensor:
    """Σ_{t,s,b} weight[t,s,b] · H(p_t(z_t[t,b]), p_s(z_s[s,b])), the loss of every prototype method.

    z_s (S, B, P), z_t (T, B, P): embeddings as they meet the prototypes (DINO: unit length; UDI: also blends of such).
    prototypes_s, prototypes_t: K of them, as a tensor (K, P) or as the module, which is put to unit length chunk by
    chunk; center (K,), or (T, K) of every teacher view; weight broadcasts to (T, S, B).  -> scalar

    The teacher's side, centre and weight get no gradient.  Products run in autocast's dtype, sums and exponentials in
    fp32.  chunk: prototypes at a time, block: scores held at a time; by default what suits the device.
    """
    kind, default = z_s.device.type, _sizes(z_s)
    cast_down = torch.is_autocast_enabled(kind) and z_s.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if cast_down else z_s.dtype
    temps, training = (student_temp, teacher_temp), torch.is_grad_enabled()
    plan = _Plan(temps, dtype, chunk or default[0], block or default[1], training)
    return cast(
        Tensor,
        _CrossEntropy.apply(z_s, *_parts(prototypes_s), z_t, *_parts(prototypes_t), center, weight, plan),
    )


def masked_cross_entropy(
    z_s: Tensor,
    prototypes_s: Tensor | Prototypes,
    z_t: Tensor,
    prototypes_t: Tensor | Prototypes,
    mask: Tensor,
    hidden: Tensor,
    **options: Any,
) -> Tensor:
    """Mean over views and images of the mean of H(p_t, p_s) over the image's masked patches; none masked counts as 0.

    mask (V, B, N) bool; hidden (H,) the places in V·B·N where it holds, given so that no GPU has to be asked; z_s
    (H, P) of the student's masked patches only, in that order; z_t (V, B, N, P) of all.  options: as for
    `prototype_cross_entropy`.
    """
    share = mask.to(full_precision(z_s))  # a quotient of integers would be fp32
    weight = (share / share.sum(-1, keepdim=True).clamp(min=1) / mask[..., 0].numel()).flatten()[hidden]
    z_t = z_t.flatten(0, 2)[hidden]
    return prototype_cross_entropy(z_s[None], prototypes_s, z_t[None], prototypes_t, weight=weight, **options)


def other_views(teachers: int, students: int, images: int, like: Tensor) -> Tensor:
    """(T, S, 1) weights of the mean over images and over pairs of different views.

    Teacher view v and student view v are the same crop; students beyond the teachers are local crops.
    """
    pairs = 1 - torch.eye(teachers, students, device=like.device, dtype=full_precision(like).dtype)
    return (pairs / (pairs.sum() * images))[..., None]


@torch.no_grad()
def sinkhorn_center(
    z: Tensor, prototypes: Tensor | Prototypes, temperature: float, iterations: int, chunk: int | None = None
) -> Tensor:
    """The centre c (K,) with which softmax( (z·w − c) / τ ) are Sinkhorn-Knopp's codes of the rows z (R, P).

    Over the rows of all processes: each code sums to 1, and each prototype's share is (nearly) that of any other.
    With t = z·w/τ an iteration is b_k = −lse_r(t_rk + a_r), then a_r = −lse_k(t_rk + b_k), and c = −τ b.
    """
    with torch.autocast(z.device.type, enabled=False):  # a small temperature would make much of bf16's rounding
        side = _Side(z[None], *_parts(prototypes), temperature, full_precision(z).dtype)
        a, b = torch.zeros_like(side.z[..., :1]), side.z.new_zeros(side.count)
        for _ in range(iterations):
            lse = torch.full_like(a, -torch.inf)
            for k in _slices(side.count, chunk or _sizes(z)[0]):
                scores = side.scores(slice(None), side.prototypes(k))
                b[k] = -all_gather((scores + a).logsumexp((0, 1))[None]).logsumexp(0)
                lse = _absorb(lse, scores, b[k])
            a = -lse
        return -temperature * b


@dataclass(frozen=True)
class _Plan:
    temps: tuple[float, float]  # the student's, the teacher's
    dtype: torch.dtype  # of products
    chunk: int
    block: int
    training: bool

    def rows(self, images: int, views: int, prototypes: int) -> tuple[int, bool]:
        """Images at a time, and whether all their scores are held between the passes."""
        held = self.block // (views * prototypes)
        if held >= images or held * views >= LEAST:
            return max(1, held), True
        return max(1, self.block // (4 * views * self.chunk)), False  # 4: what one chunk's arithmetic has at once


class _Side:
    """The student's or teacher's embeddings and prototypes: scores z·w/τ, of some rows and some prototypes."""

    def __init__(self, z: Tensor, direction: Tensor, gain: Tensor | None, temperature: float, dtype: torch.dtype):
        self.z, self.direction, self.count = (full_precision(z) / temperature).to(dtype), direction, len(direction)
        self.norm = None
        if gain is not None:  # w = gain · direction / |direction|
            lengths = torch.linalg.vector_norm(full_precision(direction), dim=-1, keepdim=True).clamp(min=1e-12)
            self.norm = gain / lengths, lengths  # (K, 1) each

    def prototypes(self, k: slice) -> Tensor:
        """w (k, P)"""
        w = self.direction[k] if self.norm is None else full_precision(self.direction[k]) * self.norm[0][k]
        return w.to(self.z.dtype)

    def scores(self, b: slice, w: Tensor) -> Tensor:
        """(V, b, k), of prototypes w (k, P)"""
        return self.z[:, b] @ w.T

    def through_norm(self, dw: Tensor, k: slice) -> Tensor:
        """The gradient for w (k, P) becomes in place that for direction.  -> the one for gain (k, 1)"""
        assert self.norm is not None
        return _through_norm(dw, self.direction[k], *(x[k] for x in self.norm))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, plan = inputs
        needs = [plan.training and need for need in ctx.needs_input_grad[:3]]
        loss, ctx.gradients = _evaluate(*tensors, plan=plan, needs=needs)
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.needs = plan, needs
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward: the first one's were scaled in place and given away
            gradients = _evaluate(*ctx.saved_tensors, plan=ctx.plan, needs=ctx.needs)[1]
        scaled = [None if g is None else g.mul_(grads[0]) for g in gradients]
        return *scaled, *[None] * 6


@torch.no_grad()
def _evaluate(
    z_s: Tensor,
    direction_s: Tensor,
    gain_s: Tensor | None,
    z_t: Tensor,
    direction_t: Tensor,
    gain_t: Tensor | None,
    center: Tensor,
    weight: Tensor,
    *,
    plan: _Plan,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and its gradients for z_s, direction_s and gain_s where `needs` says so."""
    with torch.autocast(z_s.device.type, enabled=False):
        (S, B), T, K = z_s.shape[:2], len(z_t), len(direction_s)
        student = _Side(z_s, direction_s, gain_s, plan.temps[0], plan.dtype)
        teacher = _Side(z_t, direction_t, gain_t, plan.temps[1], plan.dtype)
        loss = full_precision(z_s.new_zeros(()))  # its dtype is that of all sums
        bias = center.view(-1, 1, K).to(loss) / -plan.temps[1]  # (1 or T, 1, K)
        weight = weight.to(loss).expand(T, S, B)[..., None]
        dz = torch.zeros_like(z_s, dtype=loss.dtype) if needs[0] else None
        dw = torch.zeros_like(direction_s, dtype=loss.dtype) if any(needs[1:]) else None
        dgain = None if dw is None or gain_s is None else torch.zeros_like(gain_s)
        rows, hold = plan.rows(B, S + T, K)
        for b in _slices(B, rows):
            lse_s, lse_t, held = _log_sums(student, teacher, bias, b, plan.chunk, hold)
            loss += (weight[:, :, b].sum(0) * lse_s).sum()
            z = student.z[:, b].flatten(0, 1)
            for k in _slices(K, plan.chunk):
                w = student.prototypes(k)
                s, t = held.pop(k.start) if hold else (student.scores(b, w), teacher.scores(b, teacher.prototypes(k)))
                g, agreement = _gradient(s, t, bias[..., k], lse_s, lse_t, weight[:, :, b], plan.dtype)
                loss -= agreement
                if dz is not None:
                    dz[:, b].add_(g @ w)
                if dw is not None:
                    dw[k].add_(g.flatten(0, 1).T @ z)
                    if dgain is not None and b.stop == B:  # the last rows: dw is whole, and still near the core
                        dgain[k] = student.through_norm(dw[k], k)
        if dz is not None:
            dz /= plan.temps[0]
        return loss, [dz, dw if needs[1] else None, dgain if needs[2] else None]


def _log_sums(
    student: _Side, teacher: _Side, bias: Tensor, b: slice, chunk: int, hold: bool
) -> tuple[Tensor, Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """Log-sum-exps (V, b, 1) of student and teacher, and if `hold` the scores of each chunk, by its first prototype."""
    lse_s, lse_t = (bias.new_full((len(x.z), 1, 1), -torch.inf) for x in (student, teacher))
    held = {}
    for k in _slices(student.count, chunk):
        s, t = (x.scores(b, x.prototypes(k)) for x in (student, teacher))
        lse_s, lse_t = _absorb(lse_s, s), _absorb(lse_t, t, bias[..., k])
        if hold:
            held[k.start] = s, t
    return lse_s, lse_t, held


@compilable
def _absorb(lse: Tensor, scores: Tensor, bias: Tensor | None = None) -> Tensor:
    """Log-sum-exp (V, b, 1) of a row so far, with another chunk (V, b, k)."""
    scores = full_precision(scores) if bias is None else full_precision(scores) + bias
    return torch.logaddexp(lse, scores.logsumexp(-1, keepdim=True))


@compilable
def _gradient(
    s: Tensor, t: Tensor, bias: Tensor, lse_s: Tensor, lse_t: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """∂L/∂s (S, b, k) in `dtype`, and Σ q s.  s (S, b, k), t (T, b, k), lse (V, b, 1), weight (T, S, b, 1).

    Scores s and t in full precision are overwritten.
    """
    p = full_precision(t).add_(bias).sub_(lse_t).exp_()
    target = weight[0] * p[0]  # q (S, b, k)
    for weight_v, p_v in zip(weight[1:], p[1:], strict=True):  # compiled, one loop over k does all of it
        target.addcmul_(weight_v, p_v)
    s = full_precision(s)
    agreement = torch.dot(target.flatten(), s.flatten())
    return s.sub_(lse_s).exp_().mul_(weight.sum(0)).sub_(target).to(dtype), agreement


@compilable
def _through_norm(dw: Tensor, direction: Tensor, scale: Tensor, lengths: Tensor) -> Tensor:
    """`_Side.through_norm`.  direction, dw (k, P), scale = gain/|direction| and lengths (k, 1)."""
    v = full_precision(direction)
    dgain = (dw * v).sum(-1, keepdim=True) / lengths
    dw.mul_(scale).addcmul_(v, dgain * scale / lengths, value=-1)
    return dgain


def _parts(prototypes: Tensor | Prototypes) -> tuple[Tensor, Tensor | None]:
    """direction (K, P) and gain (K, 1); a tensor has no gain: it is taken as it is."""
    return (prototypes, None) if isinstance(prototypes, Tensor) else (prototypes.direction, prototypes.gain)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, total)) for i in range(0, total, size))


def _sizes(x: Tensor) -> tuple[int, int]:
    return SIZES.get(x.device.type, SIZES["cuda"])
