"""MoCo v3 -- Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers, ICCV 2021.

    L = ctr(q₁, k₂) + ctr(q₂, k₁)                                                                     (algorithm 1)
    ctr(q, k) = −2τ mean_b log  exp(q_b·k_b/τ) / Σ_{b'} exp(q_b·k_b'/τ)                                           (1)

q = predictor ∘ projector ∘ encoder (student), k = projector ∘ encoder (teacher), both of unit length; the negatives
are the keys of the other images of the batch, over all processes.  The authors' recipe freezes the patch projection
and uses fixed sine-cosine positions: settings of the encoder.
"""

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from triptych.data.views import Views, ViewSpec
from triptych.encoders.base import Encoder
from triptych.heads import MLP
from triptych.losses import contrast, gathered_keys
from triptych.methods.base import Carry, Method, Step, Tower, ema_copy, ema_update
from triptych.schedules import Progress, ahead, cosine
from triptych.tokens import Tokens


class MoCoV3Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["mocov3"] = "mocov3"
    hidden: int = Field(default=4096, ge=1)
    embedding: int = Field(default=256, ge=1)  # P
    temperature: float = Field(default=0.2, gt=0)  # τ
    teacher_momentum: float = Field(default=0.99, ge=0, le=1)  # at step 0; cosine to 1


class MoCoV3(Method):
    @staticmethod
    def view_spec(config: MoCoV3Config) -> ViewSpec:
        return ViewSpec(local_crops=False)

    def __init__(self, encoder: Encoder, config: MoCoV3Config):
        super().__init__()
        self.config = c = config
        head: dict[str, Any] = {"activation": "relu", "norm": True, "bias": False, "last_bias": False}
        head |= {"last_norm": "plain", "init": "torch"}
        self.student = Tower(encoder, projector=MLP(encoder.width, c.hidden, c.hidden, c.embedding, **head))
        self.teacher = ema_copy(self.student)
        self.predictor = MLP(c.embedding, c.hidden, c.embedding, **head)
        # The authors move the teacher before the next step's keys, with that step's momentum: the same recursion.
        self.momentum = ahead(cosine(c.teacher_momentum, 1.0))

    @property
    def encoder(self) -> Encoder:
        return self.teacher.encoder

    def forward(self, views: Views, t: Progress) -> Step:
        S, T = self.encode(views, t)
        q_s = self.predictor(self.student.project(S))
        return self.global_loss(q_s, self.teacher.project(T), t)

    def encode(self, views: Views, t: Progress, *, patches: bool = False) -> tuple[list[Tokens], list[Tokens]]:
        S, T = (tower.encode(views.global_crops, patches=patches) for tower in (self.student, self.teacher))
        return S, T

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """q_s (2, B, P) after the predictor, z_t (2, B, P)."""
        tau, keys = self.config.temperature, gathered_keys(z_t)
        loss = 2 * tau * (contrast(q_s[0], keys[1], tau) + contrast(q_s[1], keys[0], tau))  # (1)
        return Step(loss, {"mocov3": loss})

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        return Step(0.0, {})

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        ema_update(self.teacher, self.student, self.momentum(t))
