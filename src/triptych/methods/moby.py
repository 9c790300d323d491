"""MoBY -- Xie et al., Self-Supervised Learning with Swin Transformers, 2021: MoCo's queues, BYOL's asymmetric towers.

    L = ctr(q₁, k₂, Q₂) + ctr(q₂, k₁, Q₁)
    ctr(q, k, Q) = −mean_b log  exp(q_b·k_b/τ) / ( exp(q_b·k_b/τ) + Σ_{k' ∈ Q} exp(q_b·k'/τ) )

q = predictor ∘ projector ∘ encoder (student), k = projector ∘ encoder (teacher), of unit length; Q_v is a queue of the
last keys of view v.  After the step the keys replace the oldest entries.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from triptych.data.views import Views, ViewSpec
from triptych.distributed import all_gather
from triptych.encoders.base import Encoder
from triptych.heads import MLP
from triptych.losses import similarity, unit
from triptych.methods.base import Carry, Method, Step, Tower, ema_copy, ema_update
from triptych.schedules import Progress, ahead, cosine
from triptych.tokens import Tokens


class MoBYConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["moby"] = "moby"
    hidden: int = Field(default=4096, ge=1)
    embedding: int = Field(default=256, ge=1)  # P
    temperature: float = Field(default=0.2, gt=0)  # τ
    queue: int = Field(default=4096, ge=1)  # keys of each view
    teacher_momentum: float = Field(default=0.99, ge=0, le=1)  # at step 0; cosine to 1


class MoBY(Method):
    queue: Tensor
    oldest: Tensor

    @staticmethod
    def view_spec(config: MoBYConfig) -> ViewSpec:
        return ViewSpec(local_crops=False)

    def __init__(self, encoder: Encoder, config: MoBYConfig):
        super().__init__()
        self.config = c = config
        head: dict[str, Any] = {"activation": "relu", "norm": True, "init": "torch"}
        self.student = Tower(encoder, projector=MLP(encoder.width, c.hidden, c.embedding, **head))
        self.teacher = ema_copy(self.student)
        self.predictor = MLP(c.embedding, c.hidden, c.embedding, **head)
        self.register_buffer("queue", unit(torch.randn(2, c.queue, c.embedding)))  # (V, queue, P)
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # where the next key goes
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
        q, k = unit(q_s), unit(z_t)
        loss = self.contrast(q[0], k[1], self.queue[1]) + self.contrast(q[1], k[0], self.queue[0])
        return Step(loss, {"moby": loss}, {"keys": k.detach()})

    def contrast(self, q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        """q, k (B, P) of unit length, queue (Q, P)"""
        logits = torch.cat([(q * k).sum(-1, keepdim=True), similarity(q, queue)], 1) / self.config.temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        return Step(0.0, {})

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        keys = torch.cat([all_gather(c["keys"], dim=1) for c in carries], 1)  # (2, images of the step, P)
        at = (self.oldest + torch.arange(keys.shape[1], device=keys.device)) % self.config.queue
        self.queue[:, at] = keys
        self.oldest.add_(keys.shape[1]).remainder_(self.config.queue)
        ema_update(self.teacher, self.student, self.momentum(t))
