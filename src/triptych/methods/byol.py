"""BYOL -- Grill et al., Bootstrap Your Own Latent, NeurIPS 2020, here on vision transformers.

    L = mean_b Σ_{(v, v') = (1,2), (2,1)}  2 − 2 cos( q(z_s(v)), z_t(v') )                                   (2)
    θ_t <- τ θ_t + (1 − τ) θ_s

z = projector ∘ encoder's class token; q = predictor, of the student only.  BatchNorm in both heads of both networks,
in training mode, over one view at a time.
"""

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from triptych.data.views import Views, ViewSpec
from triptych.encoders.base import Encoder
from triptych.heads import MLP
from triptych.losses import full_precision
from triptych.methods.base import Carry, Method, Step, Tower, ema_copy, ema_update
from triptych.schedules import Progress, cosine
from triptych.tokens import Tokens


class BYOLConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["byol"] = "byol"
    hidden: int = Field(default=4096, ge=1)
    embedding: int = Field(default=256, ge=1)  # P
    teacher_momentum: float = Field(default=0.99, ge=0, le=1)  # τ at step 0; cosine to 1


class BYOL(Method):
    @staticmethod
    def view_spec(config: BYOLConfig) -> ViewSpec:
        return ViewSpec(local_crops=False)

    def __init__(self, encoder: Encoder, config: BYOLConfig):
        super().__init__()
        self.config = c = config
        head: dict[str, Any] = {"activation": "relu", "norm": True, "last_bias": False, "init": "torch"}
        self.student = Tower(encoder, projector=MLP(encoder.width, c.hidden, c.embedding, **head))
        self.teacher = ema_copy(self.student)
        self.predictor = MLP(c.embedding, c.hidden, c.embedding, **head)
        self.momentum = cosine(c.teacher_momentum, 1.0)

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
        u_s, u_t = (_unit(full_precision(x)) for x in (q_s, z_t))
        loss = (u_s - u_t.flip(0)).square().sum(-1).mean(1).sum()  # (2)
        return Step(loss, {"byol": loss})

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        return Step(0.0, {})

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        ema_update(self.teacher, self.student, self.momentum(t))


def _unit(x: Tensor) -> Tensor:
    """x / |x|; as in the authors' code, what guards against a length of 0 is inside the root."""
    return x * x.square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()
