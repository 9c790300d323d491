"""SimCLR -- Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020.

    L = mean_b ℓ(z(1), z(2))_b + mean_b ℓ(z(2), z(1))_b                                                        (1)
    ℓ(z, z')_b = −log  exp(z_b·z'_b/τ) / ( Σ_{b'} exp(z_b·z'_b'/τ) + Σ_{b' ≠ b} exp(z_b·z_b'/τ) )

z = projector ∘ encoder, of unit length, of both views of every image of the batch over all processes.  No teacher.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from triptych.data.views import Views, ViewSpec
from triptych.distributed import all_gather_grad, rank
from triptych.encoders.base import Encoder
from triptych.heads import MLP
from triptych.losses import similarity, unit
from triptych.methods.base import Method, Step, Tower
from triptych.schedules import Progress
from triptych.tokens import Tokens


class SimCLRConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["simclr"] = "simclr"
    hidden: int = Field(default=2048, ge=1)
    embedding: int = Field(default=128, ge=1)  # P
    layers: int = Field(default=3, ge=2)  # of the projector
    temperature: float = Field(default=0.1, gt=0)  # τ


class SimCLR(Method):
    @staticmethod
    def view_spec(config: SimCLRConfig) -> ViewSpec:
        return ViewSpec(local_crops=False)

    def __init__(self, encoder: Encoder, config: SimCLRConfig):
        super().__init__()
        self.config = c = config
        sizes = [encoder.width, *[c.hidden] * (c.layers - 1), c.embedding]
        head: dict[str, Any] = {"activation": "relu", "norm": True, "joint": True, "bias": False, "last_bias": False}
        self.student = Tower(encoder, projector=MLP(*sizes, **head, last_norm="scale", init="torch"))
        self.predictor = nn.Identity()

    @property
    def teacher(self) -> Tower:
        """It is its own."""
        return self.student

    @property
    def encoder(self) -> Encoder:
        return self.student.encoder

    def forward(self, views: Views, t: Progress) -> Step:
        S, _ = self.encode(views, t)
        z = self.student.project(S)
        return self.global_loss(z, z, t)

    def encode(self, views: Views, t: Progress, *, patches: bool = False) -> tuple[list[Tokens], list[Tokens]]:
        S = self.student.encode(views.global_crops, patches=patches)
        return S, S

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """q_s (2, B, P): anchors; z_t (2, B, P): what they are compared with, the same tensor in plain SimCLR."""
        z, keys = unit(q_s), all_gather_grad(unit(z_t), dim=1)  # (2, B, P), (2, images of all processes, P)
        own = torch.arange(z.shape[1], device=z.device) + z.shape[1] * rank()
        loss = z.new_zeros(())
        for v in (0, 1):
            other, same = (similarity(z[v], keys[u]) / self.config.temperature for u in (1 - v, v))
            itself = F.one_hot(own, keys.shape[1]).bool()
            loss = loss + F.cross_entropy(torch.cat([other, same.masked_fill(itself, -torch.inf)], 1), own)
        return Step(loss, {"simclr": loss})

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        return Step(0.0, {})

    def momentum(self, t: Progress) -> float:
        return 0.0
