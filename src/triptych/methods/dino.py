"""DINO -- Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021.

    P_s(x) = softmax( g_s(x) / τ_s ),     P_t(x) = softmax( (g_t(x) − c) / τ_t )                 (1)
    min_s  Σ_{x in global crops} Σ_{x' ≠ x}  H( P_t(x), P_s(x') ),   H(a, b) = −Σ a log b        (3)
    c <- m c + (1 − m) mean_B g_t(x)                                                             (4)
    θ_t <- λ θ_t + (1 − λ) θ_s

g = prototypes ∘ unit length ∘ projector ∘ encoder's class token.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from triptych.data.views import Views
from triptych.encoders.base import Encoder
from triptych.heads import MLP, Prototypes
from triptych.losses import both_probabilities, unit
from triptych.methods.base import Carry, Method, Step, Tower, carried_mean, ema_copy, ema_update
from triptych.prototype_loss import other_views, prototype_cross_entropy
from triptych.schedules import Progress, cosine, epoch_warmup
from triptych.tokens import Tokens


class DINOConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["dino"] = "dino"
    hidden: int = Field(default=2048, ge=1)  # width of the projector's two hidden layers
    embedding: int = Field(default=256, ge=1)  # P, the bottleneck before the prototypes
    prototypes: int = Field(default=65536, ge=2)  # K
    norm_last_layer: bool = True  # prototypes keep unit length; false is stabler to train with long ViT-S runs
    student_temp: float = Field(default=0.1, gt=0)  # τ_s
    teacher_temp: float = Field(default=0.07, gt=0)  # τ_t, reached from ...
    teacher_temp_start: float = Field(default=0.04, gt=0)
    teacher_temp_warmup: int = Field(default=30, ge=0)  # ... in so many epochs
    center_momentum: float = Field(default=0.9, ge=0, le=1)  # m
    teacher_momentum: float = Field(default=0.996, ge=0, le=1)  # λ at step 0; cosine to 1
    freeze_prototypes: float = Field(default=1, ge=0)  # epochs


class DINO(Method):
    center: Tensor

    def __init__(self, encoder: Encoder, config: DINOConfig):
        super().__init__()
        self.config = c = config
        self.student = Tower(
            encoder,
            projector=MLP(encoder.width, c.hidden, c.hidden, c.embedding),
            prototypes=Prototypes(c.embedding, c.prototypes, train_gain=not c.norm_last_layer),
        )
        self.teacher = ema_copy(self.student)
        self.predictor = nn.Identity()
        self.register_buffer("center", torch.zeros(c.prototypes))  # c
        self.teacher_temp = epoch_warmup(c.teacher_temp_start, c.teacher_temp, c.teacher_temp_warmup)
        self.momentum = cosine(c.teacher_momentum, 1.0)

    @property
    def encoder(self) -> Encoder:
        return self.teacher.encoder

    def forward(self, views: Views, t: Progress) -> Step:
        S, T = self.encode(views, t)
        return self.global_loss(self.student.project(S), self.teacher.project(T), t)

    def encode(self, views: Views, t: Progress, *, patches: bool = False) -> tuple[list[Tokens], list[Tokens]]:
        """The student sees every crop, the teacher the global ones."""
        S = self.student.encode(views.all, patches=patches)
        return S, self.teacher.encode(views.global_crops, patches=patches)

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """q_s (Vs, B, P), z_t (Vt, B, P) -> Step.  Teacher view v and student view v are the same crop."""
        u_s, u_t = unit(q_s), unit(z_t)
        loss = prototype_cross_entropy(  # (1), (3)
            u_s,
            self.student.prototypes,
            u_t,
            self.teacher.prototypes,
            center=self.center,
            student_temp=self.config.student_temp,
            teacher_temp=self.teacher_temp(t),
            weight=other_views(len(u_t), len(u_s), u_s.shape[1], like=u_s),
        )
        # g_t is linear in the embedding, so its mean is the prototypes' product with the mean embedding.
        return Step(loss, {"dino": loss}, carry={"u_t": u_t.mean((0, 1))})

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        return Step(0.0, {})

    def after_backward(self, t: Progress) -> None:
        if t.step < self.config.freeze_prototypes * t.steps_per_epoch:
            for p in self.student.prototypes.parameters():
                p.grad = None

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        g_t = self.teacher.prototypes.of_mean(carried_mean(carries, "u_t"))
        self.center.lerp_(g_t, 1 - self.config.center_momentum)  # (4)
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
