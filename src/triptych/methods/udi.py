"""UDI -- Su and Ji, Unsqueeze [CLS] Bottleneck to Learn Rich Representations, ECCV 2024.

    L = w₁ H( p_t(z'_cls), p_s(z_cls) ) + w₂ H( p*_t(Z'), p_s(z_cls+) ) + w₃ mean_i H( p_t(ẑ'_i), p_s(ẑ_i) )      (1)
    ẑ_i = attention of sampled patch i over all patches Z of its view (SRS)                                     (2)
    p*_t(Z') = α mean_i p_t(ẑ'_i) + (1 − α) p_t(z'_cls)                  blend = "probs", the paper's target    (3)
    p*_t(Z') = softmax( (α mean_i g_t(ẑ'_i) + (1 − α) g_t(z'_cls) − c₊) / τ_t )   blend = "logits", released     (3')

i runs over one patch per window of the student view's grid (stratified random sampling) that the teacher's view
contains; Z' is read there bilinearly.  Local crops take part in the first two terms.  The last layer is linear, so
(3') and every centre are formed from embeddings: no logits of sampled patches of local crops ever exist.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from triptych.data.views import View, Views, ViewSpec, between
from triptych.distributed import all_mean
from triptych.encoders.base import Encoder
from triptych.encoders.blocks import attention
from triptych.heads import MLP, Prototypes, init_linear
from triptych.losses import teacher_probabilities, unit
from triptych.methods.base import Carry, Method, Step, Tower, carried_mean, ema_copy, ema_update
from triptych.prototype_loss import other_views, prototype_cross_entropy
from triptych.schedules import Progress, cosine, epoch_warmup
from triptych.tokens import Tokens, TokenSpec

CLASS, PLUS, PATCH = range(3)  # rows of the centre


class UDIConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["udi"] = "udi"
    hidden: int = Field(default=2048, ge=1)  # width of the projector's two hidden layers
    embedding: int = Field(default=256, ge=1)  # P
    prototypes: int = Field(default=65536, ge=2)  # K, one head for class, class+ and patches
    norm_last_layer: bool = False  # prototypes keep unit length
    blend: Literal["logits", "probs"] = "logits"  # (3') or (3)
    alpha: float = Field(default=0.5, ge=0, le=1)  # α, the patches' share of the multimodal target
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)  # w: class, class+, patch
    local_patch: bool = False  # patch loss on local crops too
    window_global: int = Field(default=3, ge=1)  # patches, side of a sampling window
    window_local: int = Field(default=2, ge=1)
    token_coords: Literal["centres", "ends"] = "centres"  # "ends": as released
    rank_weighting: Literal["count", "rank_mean"] = "count"  # over processes; "rank_mean": as released
    srs_heads: int | None = Field(default=None, ge=1)  # None = the encoder's
    student_temp: float = Field(default=0.1, gt=0)  # τ_s
    teacher_temp: float = Field(default=0.07, gt=0)  # τ_t, reached from ...
    teacher_temp_start: float = Field(default=0.04, gt=0)
    teacher_temp_warmup: int = Field(default=30, ge=0)  # ... in so many epochs
    center_momentum: float = Field(default=0.9, ge=0, le=1)
    teacher_momentum: float = Field(default=0.996, ge=0, le=1)  # at step 0; cosine to 1
    freeze_prototypes: float = Field(default=1, ge=0)  # epochs


class SRS(nn.Module):
    """(2): one attention layer whose queries are patches read at M places, keys and values all N patches.

    patch (B, N, D) before the encoder's final norm, at (B, M, N) rows of bilinear weights -> (B, M, D).
    An all-zero row of `at` (a place outside the view) gives a value that the caller must mask out.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_in, self.norm_out = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        init_linear(self)

    def forward(self, patch: Tensor, at: Tensor) -> Tensor:
        u = self.norm_in(patch)
        q, k, v = self.qkv(u).chunk(3, -1)
        q = at.to(q.dtype) @ q
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return self.norm_out(self.out(attention(q, k, v).transpose(1, 2).flatten(2)) + at.to(u.dtype) @ u)


class UDI(Method):
    center: Tensor

    @staticmethod
    def token_spec(config: UDIConfig) -> TokenSpec:
        return TokenSpec(cls_plus=1)

    @staticmethod
    def view_spec(config: UDIConfig) -> ViewSpec:
        return ViewSpec(window_global=config.window_global, window_local=config.window_local)

    def __init__(self, encoder: Encoder, config: UDIConfig):
        super().__init__()
        self.config = c = config
        self.student = Tower(
            encoder,
            projector=MLP(encoder.width, c.hidden, c.hidden, c.embedding),
            prototypes=Prototypes(c.embedding, c.prototypes, train_gain=not c.norm_last_layer),
            srs=SRS(encoder.width, c.srs_heads or encoder.heads),
        )
        self.teacher = ema_copy(self.student)
        self.predictor = nn.Identity()
        self.register_buffer("center", torch.zeros(3, c.prototypes))  # c: class, class+ (blend "logits"), patch
        self.teacher_temp = epoch_warmup(c.teacher_temp_start, c.teacher_temp, c.teacher_temp_warmup)
        self.momentum = cosine(c.teacher_momentum, 1.0)

    @property
    def encoder(self) -> Encoder:
        return self.teacher.encoder

    def forward(self, views: Views, t: Progress) -> Step:
        S, T = self.encode(views, t)
        z_t = self.teacher.project(T)
        return self.global_loss(self.student.project(S), z_t, t) + self.other_losses(S, T, z_t, views, t)

    def encode(self, views: Views, t: Progress, *, patches: bool = False) -> tuple[list[Tokens], list[Tokens]]:
        """The student sees every crop, the teacher the global ones, once."""
        patches = patches or self.config.local_patch
        S = self.student.encode(views.all, patches=views.of_global(patches))
        return S, self.teacher.encode(views.global_crops)

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """DINO's loss on class tokens.  q_s (Vs, B, P), z_t (Vt, B, P); teacher and student view v are one crop."""
        u_s, u_t = unit(q_s), unit(z_t)
        weight = other_views(len(u_t), len(u_s), u_s.shape[1], like=u_s)
        loss = self._cross_entropy(u_s, u_t, CLASS, weight, t)
        return Step(self.config.weights[0] * loss, {"class": loss}, {"class": u_t.mean((0, 1))})

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        """class+ and patches: per level (global, local) over all pairs of a student view and another teacher view."""
        u_cls, seen = unit(z_t), self.patches_seen(S, T, views)
        plus, patch, blends, places = [], [], [], []
        for students in (range(len(T)), range(len(T), len(S))):
            pairs = [(s, v) for s in students for v in range(len(T)) if v != s]
            if not pairs:
                continue
            # Rows: the level's student views x images.  Every student view has the same number V' of teacher views.
            u, inside = (
                _by_teacher([seen[p][i] for p in pairs], students) for i in (0, 1)
            )  # (V', R, M, P), (V', R, M)
            u_v = _by_teacher([u_cls[v] for _, v in pairs], students)  # (V', R, P)
            cls_plus = cast(list[Tensor], [S[s].cls_plus for s in students])  # `tokens` asks for them
            u_plus = unit(self.student.projector(torch.cat(cls_plus)))  # (R, P)
            loss, blend = self.class_plus_loss(u_plus, u_v, u, inside, t)
            plus.append((len(pairs), loss))
            blends += blend
            places.append((u, inside))
            if students.start == 0 or self.config.local_patch:
                u_s = unit(self.student.projector(torch.cat([self._sampled(S[s], views.all[s]) for s in students])))
                patch.append((len(pairs), self.patch_loss(u_s, u, inside, t)))
        l_plus, l_patch = _mean_over_pairs(plus), _mean_over_pairs(patch)
        carry = self._patch_statistics(places) | ({"class+": torch.cat(blends).mean(0)} if blends else {})
        loss = self.config.weights[1] * l_plus + self.config.weights[2] * l_patch
        return Step(loss, {"class+": l_plus, "patch": l_patch}, carry)

    def class_plus_loss(self, u_plus: Tensor, u_cls: Tensor, u: Tensor, inside: Tensor, t: Progress):
        """mean H(p*, p_s(class+)).  u_plus (R, P), u_cls (V', R, P), u (V', R, M, P), inside (V', R, M) bool.

        -> loss, [the blended embeddings (V'·R, P)] for the class+ centre; "probs" needs no such centre.
        """
        alpha, (V, R, M), w = self.config.alpha, inside.shape, inside.to(u.dtype)
        share = w / (w.sum(-1, keepdim=True) + 1e-5)  # 1e-5 as released: no valid place leaves (1 − α) g_t(z'_cls)
        if self.config.blend == "logits":  # (3')
            blend = alpha * (share[..., None] * u).sum(2) + (1 - alpha) * u_cls
            weight = blend.new_full((1, 1, 1), 1 / (V * R))
            return self._cross_entropy(u_plus[None], blend, PLUS, weight, t), [blend.flatten(0, 1).detach()]
        # (3): a cross-entropy is linear in its target, so the mixture is a weighted sum of cross-entropies.
        to_cls = torch.where(inside.any(-1), 1 - alpha, 1.0)  # (V', R): crops that do not meet keep the class target
        loss = self._cross_entropy(u_plus[None], u_cls, CLASS, to_cls[:, None] / (V * R), t)
        to_patches = alpha * share.movedim(2, 1).reshape(V * M, 1, R) / (V * R)
        return loss + self._cross_entropy(u_plus[None], u.movedim(2, 1).flatten(0, 1), PATCH, to_patches, t), []

    def patch_loss(self, u_s: Tensor, u: Tensor, inside: Tensor, t: Progress) -> Tensor:
        """H(p_t(ẑ'), p_s(ẑ)) pooled over all valid places.  u_s (R, M, P), u (V', R, M, P), inside (V', R, M) bool."""
        valid = inside.flatten(1).to(u.dtype)
        count = valid.sum()
        if self.config.rank_weighting == "count":
            count = all_mean(count)
        weight = (valid / count.clamp(min=1))[:, None]  # (V', 1, R·M); nothing valid -> loss 0, not 0/0
        return self._cross_entropy(u_s.flatten(0, 1)[None], u.flatten(1, 2), PATCH, weight, t)

    def patches_seen(self, S: list[Tokens], T: list[Tokens], views: Views) -> dict[tuple[int, int], tuple]:
        """(s, v) -> (u (B, M, P), inside (B, M)): student view s's sampled patches as teacher view v sees them, (2)."""
        seen = {}
        for v, tokens in enumerate(T):
            students = [s for s in range(len(S)) if s != v]
            coords = self.config.token_coords
            maps = [between(views.all[s], _grid(S[s]), views.global_crops[v], _grid(tokens), coords) for s in students]
            at = torch.cat([weights for weights, _ in maps], 1)  # one attention call for all places in this view
            u = unit(self.teacher.projector(self.teacher.srs(tokens.patch_raw, at)))
            for s, part, (_, inside) in zip(students, u.split([w.shape[1] for w, _ in maps], 1), maps, strict=True):
                seen[s, v] = part, inside
        return seen

    def after_backward(self, t: Progress) -> None:
        if t.step < self.config.freeze_prototypes * t.steps_per_epoch:
            for p in self.student.prototypes.parameters():
                p.grad = None

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        w_t, means = self.teacher.prototypes, {CLASS: carried_mean(carries, "class")}
        if "class+" in carries[0]:
            means[PLUS] = carried_mean(carries, "class+")
        count = carried_mean(carries, "patch_count")
        means[PATCH] = carried_mean(carries, "patch_sum") / count.clamp(min=1e-12)
        for level, mean in means.items():
            rate = (1 - self.config.center_momentum) * (
                torch.ones_like(count) if level != PATCH else (count > 0).to(count)
            )
            self.center[level].lerp_(w_t.of_mean(mean), rate)  # nothing valid anywhere leaves the patch centre
        ema_update(self.teacher, self.student, self.momentum(t))

    @torch.no_grad()
    def predictions(self, views: Views, t: Progress) -> tuple[Tensor, Tensor]:
        pair = (self.student, views.global_crops[-1:]), (self.teacher, views.global_crops[:1])
        S, T = (tower.encode(view, patches=False) for tower, view in pair)
        return self.probabilities(self.student.project(S)[0], self.teacher.project(T)[0], t)

    def probabilities(self, q_s: Tensor, z_t: Tensor, t: Progress) -> tuple[Tensor, Tensor]:
        """(B, P), (B, P) -> (teacher, student) probabilities (B, K)."""
        p_t = teacher_probabilities(unit(z_t), self.teacher.prototypes.weight, self.center[CLASS], self.teacher_temp(t))
        zero = torch.zeros_like(self.center[CLASS])
        return p_t, teacher_probabilities(unit(q_s), self.student.prototypes.weight, zero, self.config.student_temp)

    def _sampled(self, tokens: Tokens, view: View) -> Tensor:
        """(B, M, D): the view's own sampled patches through the student's SRS."""
        assert view.samples is not None, "the loader draws samples where `view_spec` asks for them"
        at = F.one_hot(view.samples, tokens.patch_raw.shape[1])
        return self.student.srs(tokens.patch_raw, at)

    def _patch_statistics(self, places: list[tuple[Tensor, Tensor]]) -> Carry:
        """Sum and number of valid teacher patches, of local crops too: what the patch centre is made of."""
        total = cast(Tensor, sum((inside[..., None] * u).sum((0, 1, 2)) for u, inside in places))
        count = cast(Tensor, sum(inside.sum() for _, inside in places)).to(total.dtype)
        if self.config.rank_weighting == "rank_mean":
            total, count = total / count.clamp(min=1), (count > 0).to(total.dtype)
        return {"patch_sum": total, "patch_count": count}

    def _cross_entropy(self, u_s: Tensor, u_t: Tensor, center: int, weight: Tensor, t: Progress) -> Tensor:
        """u_s (S, R, P), u_t (T, R, P), weight (T, S, R)"""
        return prototype_cross_entropy(
            u_s,
            self.student.prototypes,
            u_t,
            self.teacher.prototypes,
            center=self.center[center],
            student_temp=self.config.student_temp,
            teacher_temp=self.teacher_temp(t),
            weight=weight,
        )


def _grid(tokens: Tokens) -> tuple[int, int]:
    assert tokens.grid is not None, "UDI reads patches at places of the view: none may be dropped"
    return tokens.grid


def _by_teacher(pairs: list[Tensor], students: range) -> Tensor:
    """Tensors (B, ...) of (student, teacher) pairs, students outermost -> (V', students·B, ...)."""
    grouped = torch.stack(pairs).unflatten(0, (len(students), -1))  # (students, V', B, ...)
    return grouped.transpose(0, 1).flatten(1, 2)


def _mean_over_pairs(levels: list[tuple[int, Tensor]]) -> Tensor:
    return torch.stack([n * loss for n, loss in levels]).sum() / sum(n for n, _ in levels)
