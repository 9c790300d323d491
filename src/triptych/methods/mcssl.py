"""MC-SSL -- Atito et al., MC-SSL: Towards Multi-Concept Self-Supervised Learning, 2021.

    L = L_CLS + L_PAT + L_MIM
    L_CLS: DINO's, the student's global crops corrupted, the teacher's clean, local crops clean.
    L_PAT = mean_v,b,i H( P_t(x^v)_i, P_s(x̃^v)_i )                 all patches i of the same crop v
    L_MIM = Σ m (g_rec(f_s(x̃)) − x)² / Σ m                        over pixels; m = 1 where x̃ replaces them

P = softmax of prototypes ∘ unit length ∘ projector, the teacher's less a centre: one projector, but prototypes and
centres of their own for class token and patches.
"""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from triptych.data.corruption import HalfZeros
from triptych.data.views import Views, ViewSpec
from triptych.encoders.base import Encoder
from triptych.heads import MLP, PixelHead, Prototypes
from triptych.losses import both_probabilities, unit
from triptych.methods.base import Carry, Method, Step, Tower, carried_mean, ema_copy, ema_update, pixel_error
from triptych.prototype_loss import other_views, prototype_cross_entropy
from triptych.schedules import Progress, cosine, epoch_warmup
from triptych.tokens import Tokens

Weight = Annotated[float, Field(gt=0)]


class MCSSLConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["mcssl"] = "mcssl"
    weights: tuple[Weight, Weight, Weight] = (1.0, 1.0, 1.0)  # of L_MIM, L_PAT, L_CLS
    corruption: HalfZeros = HalfZeros()
    hidden: int = Field(default=2048, ge=1)  # width of the projector's two hidden layers
    embedding: int = Field(default=256, ge=1)  # P
    prototypes: int = Field(default=8192, ge=2)  # K, of class token and of patches
    student_temp: float = Field(default=0.1, gt=0)  # τ_s
    teacher_temp: float = Field(default=0.07, gt=0)  # τ_t, reached from ...
    teacher_temp_start: float = Field(default=0.04, gt=0)
    teacher_temp_warmup: int = Field(default=30, ge=0)  # ... in so many epochs
    center_momentum: float = Field(default=0.9, ge=0, le=1)
    teacher_momentum: float = Field(default=0.996, ge=0, le=1)  # at step 0; cosine to 1
    freeze_prototypes: float = Field(default=1, ge=0)  # epochs


class MCSSL(Method):
    center: Tensor
    patch_center: Tensor

    @staticmethod
    def view_spec(config: MCSSLConfig) -> ViewSpec:
        return ViewSpec(corruption=config.corruption)

    def __init__(self, encoder: Encoder, config: MCSSLConfig):
        super().__init__()
        self.config = c = config
        self.student = Tower(
            encoder,
            projector=MLP(encoder.width, c.hidden, c.hidden, c.embedding),
            prototypes=Prototypes(c.embedding, c.prototypes),
            patch_prototypes=Prototypes(c.embedding, c.prototypes),
        )
        self.teacher = ema_copy(self.student)
        self.predictor = nn.Identity()
        self.pixels = PixelHead(encoder.width, encoder.patch_size, layers=2)  # g_rec
        self.register_buffer("center", torch.zeros(c.prototypes))
        self.register_buffer("patch_center", torch.zeros(c.prototypes))
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
        """The student sees corrupted global crops and clean local crops, the teacher clean global crops."""
        S = self.student.encode(views.all, see="corrupted", patches=views.of_global(patches))
        return S, self.teacher.encode(views.global_crops)

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """q_s (Vs, B, P), z_t (Vt, B, P); teacher and student view v are one crop."""
        u_s, u_t = unit(q_s), unit(z_t)
        pairs = other_views(len(u_t), len(u_s), u_s.shape[1], like=u_s)
        loss = self._cross_entropy(u_s, u_t, "prototypes", self.center, t, pairs)
        return Step(self.config.weights[2] * loss, {"class": loss}, {"class": u_t.mean((0, 1))})

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        w_mim, w_pat, _ = self.config.weights
        u_s = unit(self.student.projector(torch.cat([x.patch for x in S[: len(T)]]))).flatten(0, 1)  # (VBN, P)
        u_t = unit(self.teacher.projector(torch.cat([x.patch for x in T]))).flatten(0, 1)
        each = torch.ones_like(u_s[None, None, :, 0]) / len(u_s)
        patch = self._cross_entropy(u_s[None], u_t[None], "patch_prototypes", self.patch_center, t, each)
        pixels = pixel_error(self.pixels, S[: len(T)], views, "l2")
        terms = {"patch": patch, "pixels": pixels}
        return Step(w_pat * patch + w_mim * pixels, terms, {"patch": u_t.mean(0)})

    def _cross_entropy(
        self, u_s: Tensor, u_t: Tensor, which: str, center: Tensor, t: Progress, weight: Tensor
    ) -> Tensor:
        return prototype_cross_entropy(
            u_s,
            getattr(self.student, which),
            u_t,
            getattr(self.teacher, which),
            center=center,
            student_temp=self.config.student_temp,
            teacher_temp=self.teacher_temp(t),
            weight=weight,
        )

    def after_backward(self, t: Progress) -> None:
        if t.step < self.config.freeze_prototypes * t.steps_per_epoch:
            for module in (self.student.prototypes, self.student.patch_prototypes):
                for p in module.parameters():
                    p.grad = None

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        # Logits are linear in the embedding: their mean is the prototypes' product with the mean embedding.
        rate = 1 - self.config.center_momentum
        self.center.lerp_(self.teacher.prototypes.of_mean(carried_mean(carries, "class")), rate)
        self.patch_center.lerp_(self.teacher.patch_prototypes.of_mean(carried_mean(carries, "patch")), rate)
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
