"""iBOT -- Zhou et al., Image BERT Pre-Training with Online Tokenizer, ICLR 2022.

    L = λ₁ L_[CLS] + λ₂ L_MIM
    L_[CLS]: DINO's (3), the student's global crops masked, the teacher's not.
    L_MIM = mean_u mean_b  1/|m_b| Σ_{i ∈ m_b} H( P_t^patch(u)_i, P_s^patch(masked u)_i )        same crop u, masked i
    c_patch <- m c_patch + (1 − m) mean over all patches of the teacher

One projector for class token and patches; the prototypes are shared too unless `patch_prototypes` is set.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from triptych.data.views import MaskSpec, View, Views, ViewSpec
from triptych.encoders.base import Encoder
from triptych.heads import MLP, Prototypes
from triptych.losses import both_probabilities, unit
from triptych.methods.base import (
    Carry,
    Method,
    Step,
    Tower,
    carried_mean,
    ema_copy,
    ema_update,
    hidden_patches,
    unmasked,
)
from triptych.prototype_loss import masked_cross_entropy, other_views, prototype_cross_entropy
from triptych.schedules import Progress, cosine, delayed, epoch_warmup
from triptych.tokens import Tokens, TokenSpec


class iBOTConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["ibot"] = "ibot"
    hidden: int = Field(default=2048, ge=1)  # width of the projector's two hidden layers
    embedding: int = Field(default=256, ge=1)  # P, the bottleneck before the prototypes
    prototypes: int = Field(default=8192, ge=2)  # K, of class token and patches
    patch_prototypes: int | None = Field(default=None, ge=2)  # a second set for patches; None = shared head
    norm_last_layer: bool = False  # prototypes keep unit length
    weights: tuple[float, float] = (1.0, 1.0)  # λ: class token, masked patches
    mask_ratios: tuple[float, ...] = (0.0, 0.3)  # one is drawn per image and crop ...
    mask_variations: tuple[float, ...] = (0.0, 0.2)  # ... uniform within so much of it
    mask_shape: Literal["block", "random"] = "block"
    mask_start: float = Field(default=0, ge=0)  # epochs before any masking
    student_temp: float = Field(default=0.1, gt=0)  # τ_s
    teacher_temp: float = Field(default=0.07, gt=0)  # τ_t of the class token, reached from ...
    teacher_patch_temp: float = Field(default=0.07, gt=0)  # of patches, likewise
    teacher_temp_start: float = Field(default=0.04, gt=0)
    teacher_temp_warmup: int = Field(default=30, ge=0)  # ... in so many epochs
    center_momentum: float = Field(default=0.9, ge=0, le=1)  # m
    teacher_momentum: float = Field(default=0.996, ge=0, le=1)  # at step 0; cosine to 1
    freeze_prototypes: float = Field(default=1, ge=0)  # epochs


class iBOT(Method):
    center: Tensor
    patch_center: Tensor

    @staticmethod
    def token_spec(config: iBOTConfig) -> TokenSpec:
        return TokenSpec(mask=True)

    @staticmethod
    def view_spec(config: iBOTConfig) -> ViewSpec:
        return ViewSpec(mask=MaskSpec(config.mask_ratios, config.mask_variations, config.mask_shape))

    def __init__(self, encoder: Encoder, config: iBOTConfig):
        super().__init__()
        self.config = c = config
        heads = {"prototypes": Prototypes(c.embedding, c.prototypes, train_gain=not c.norm_last_layer)}
        if c.patch_prototypes is not None:
            more = Prototypes(c.embedding, c.patch_prototypes, train_gain=not c.norm_last_layer)
            heads["patch_prototypes"] = more
        self.student = Tower(encoder, projector=MLP(encoder.width, c.hidden, c.hidden, c.embedding), **heads)
        self.teacher = ema_copy(self.student)
        self.predictor = nn.Identity()
        self.register_buffer("center", torch.zeros(c.prototypes))
        self.register_buffer("patch_center", torch.zeros(c.patch_prototypes or c.prototypes))
        self.teacher_temp = epoch_warmup(c.teacher_temp_start, c.teacher_temp, c.teacher_temp_warmup)
        self.patch_temp = delayed(
            epoch_warmup(c.teacher_temp_start, c.teacher_patch_temp, c.teacher_temp_warmup), c.mask_start
        )
        self.momentum = cosine(c.teacher_momentum, 1.0)

    @property
    def encoder(self) -> Encoder:
        return self.teacher.encoder

    def forward(self, views: Views, t: Progress) -> Step:
        S, T = self.encode(views, t)
        z_t = self.teacher.project(T)
        return self.global_loss(self.student.project(S), z_t, t) + self.other_losses(S, T, z_t, views, t)

    def encode(self, views: Views, t: Progress, *, patches: bool = False) -> tuple[list[Tokens], list[Tokens]]:
        """The student sees masked global crops and local crops, the teacher whole global crops."""
        crops = self._masked(views, t) + views.local_crops
        S = self.student.encode(crops, see="masked", patches=views.of_global(patches))
        return S, self.teacher.encode(views.global_crops)

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """DINO's loss on class tokens.  q_s (Vs, B, P), z_t (Vt, B, P); teacher and student view v are one crop."""
        u_s, u_t = unit(q_s), unit(z_t)
        loss = prototype_cross_entropy(
            u_s,
            self.student.prototypes,
            u_t,
            self.teacher.prototypes,
            center=self.center,
            student_temp=self.config.student_temp,
            teacher_temp=self.teacher_temp(t),
            weight=other_views(len(u_t), len(u_s), u_s.shape[1], like=u_s),
        )
        return Step(self.config.weights[0] * loss, {"class": loss}, {"class": u_t.mean((0, 1))})

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        u_t = unit(self.teacher.projector(torch.stack([x.patch for x in T])))  # (V, B, N, P)
        mask, hidden = hidden_patches(self._masked(views, t))
        patches = torch.stack([x.patch for x in S[: len(T)]])
        loss = masked_cross_entropy(
            unit(self.student.projector(patches.flatten(0, 2)[hidden])),
            patch_prototypes(self.student),
            u_t,
            patch_prototypes(self.teacher),
            mask,
            hidden,
            center=self.patch_center,
            student_temp=self.config.student_temp,
            teacher_temp=self.patch_temp(t),
        )
        return Step(self.config.weights[1] * loss, {"patch": loss}, {"patch": u_t.mean((0, 1, 2))})

    def after_backward(self, t: Progress) -> None:
        if t.step < self.config.freeze_prototypes * t.steps_per_epoch:
            for module in {self.student.prototypes, patch_prototypes(self.student)}:
                for p in module.parameters():
                    p.grad = None

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        # Logits are linear in the embedding: their mean is the prototypes' product with the mean embedding.
        rate = 1 - self.config.center_momentum
        self.center.lerp_(self.teacher.prototypes.of_mean(carried_mean(carries, "class")), rate)
        self.patch_center.lerp_(patch_prototypes(self.teacher).of_mean(carried_mean(carries, "patch")), rate)
        ema_update(self.teacher, self.student, self.momentum(t))

    @torch.no_grad()
    def predictions(self, views: Views, t: Progress) -> tuple[Tensor, Tensor]:
        pair = (self.student, views.global_crops[-1:]), (self.teacher, views.global_crops[:1])
        S, T = (tower.encode(view, patches=False) for tower, view in pair)
        return self.probabilities(self.student.project(S)[0], self.teacher.project(T)[0], t)

    def probabilities(self, q_s: Tensor, z_t: Tensor, t: Progress) -> tuple[Tensor, Tensor]:
        """(B, P), (B, P) -> (teacher, student) probabilities (B, K)."""
        w_t, w_s = self.teacher.prototypes.weight, self.student.prototypes.weight
        temps = self.teacher_temp(t), self.config.student_temp
        return both_probabilities(unit(z_t), w_t, unit(q_s), w_s, self.center, temps)

    def _masked(self, views: Views, t: Progress) -> list[View]:
        """The global crops, before `mask_start` with nothing hidden."""
        if t.step < self.config.mask_start * t.steps_per_epoch:
            return unmasked(views.global_crops)
        return views.global_crops


def patch_prototypes(tower: Tower) -> Prototypes:
    """Of patches: their own, or those of the class token."""
    return getattr(tower, "patch_prototypes", tower.prototypes)
