"""MSN -- Assran et al., Masked Siamese Networks for Label-Efficient Learning, ECCV 2022.

    L = mean over anchors H( p⁺, p )  +  λ ( ln K − H( mean p ) )
    p = softmax( z·q / τ )                        z, q of unit length; q_1 … q_K: prototypes, trained
    p⁺ = p_target^{1/T} / Σ p_target^{1/T}        sharpened, of the teacher; without gradient

Targets: the first global crop, whole.  Anchors: the second one with some patches dropped, and the "focal" local crops.
H(mean p), over all anchors, keeps every image from choosing the same prototype (me-max).
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from triptych.data.views import Views, ViewSpec
from triptych.distributed import all_mean_grad
from triptych.encoders.base import Encoder
from triptych.heads import MLP, Prototypes
from triptych.losses import balanced, similarity, unit
from triptych.methods.base import Carry, Method, Step, Tower, ema_copy, ema_update
from triptych.schedules import Progress, linear, stretched
from triptych.tokens import Tokens


class MSNConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["msn"] = "msn"
    hidden: int = Field(default=2048, ge=1)
    embedding: int = Field(default=256, ge=1)
    prototypes: int = Field(default=1024, ge=2)  # K
    temperature: float = Field(default=0.1, gt=0)  # τ
    sharpen: float = Field(default=0.25, gt=0)  # T
    sinkhorn: int = Field(default=0, ge=0)  # iterations on sharpened targets
    weight_memax: float = Field(default=1.0, ge=0)  # λ
    weight_entropy: float = Field(default=0.0, ge=0)  # of each anchor's own entropy
    smoothing: float = Field(default=0.0, ge=0, lt=1)  # of the prototypes' labels
    drop: float = Field(default=0.15, ge=0, lt=1)  # share of the second crop's patches
    shared_drop: bool = False  # the same patches of every image of a batch, as released
    teacher_momentum: float = Field(default=0.996, ge=0, le=1)  # at step 0; linear towards 1 ...
    momentum_horizon: float = Field(default=1.25, ge=1)  # ... which it would reach after so many runs


class MSN(Method):
    @staticmethod
    def view_spec(config: MSNConfig) -> ViewSpec:
        return ViewSpec(drop=config.drop or None)

    def __init__(self, encoder: Encoder, config: MSNConfig):
        super().__init__()
        self.config = c = config
        projector = MLP(encoder.width, c.hidden, c.hidden, c.embedding, norm=True, joint=True)
        self.student = Tower(encoder, projector=projector)
        self.teacher = ema_copy(self.student)
        self.predictor = nn.Identity()
        self.prototypes = Prototypes(c.embedding, c.prototypes, exempt=True)
        self.momentum = stretched(linear(c.teacher_momentum, 1.0), c.momentum_horizon)

    @property
    def encoder(self) -> Encoder:
        return self.teacher.encoder

    def forward(self, views: Views, t: Progress) -> Step:
        S, T = self.encode(views, t)
        return self.global_loss(self.student.project(S), self.teacher.project(T), t)

    def encode(self, views: Views, t: Progress, *, patches: bool = False) -> tuple[list[Tokens], list[Tokens]]:
        target, anchor = views.global_crops[0], views.global_crops[-1]  # one crop alone is both (`eval tokens`)
        if self.config.shared_drop and anchor.keep is not None:
            anchor = replace(anchor, keep=anchor.keep[:1].expand_as(anchor.keep))
        S = self.student.encode([anchor, *views.local_crops], see="kept", patches=patches)
        return S, self.teacher.encode([target], patches=patches)

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """q_s (Va, B, P) of the anchors, z_t (1, B, P) of the target."""
        c = self.config
        p, target = self.assign(q_s), self.targets(z_t[0])
        match = -(target * p.log()).sum(-1).mean()
        mean = all_mean_grad(p.mean((0, 1)))
        memax = math.log(c.prototypes) + (mean * mean.log()).sum()
        loss, terms = match + c.weight_memax * memax, {"match": match, "memax": memax}
        if c.weight_entropy:
            terms["entropy"] = -(p * p.log()).sum(-1).mean()
            loss = loss + c.weight_entropy * terms["entropy"]
        return Step(loss, terms)

    def assign(self, z: Tensor) -> Tensor:
        """(..., P) -> p (..., K)"""
        p = (similarity(unit(z), self.prototypes.weight) / self.config.temperature).softmax(-1)
        p = p.clamp(min=torch.finfo(p.dtype).tiny)  # a prototype that is never near: its logarithm stays finite
        off = self.config.smoothing
        return p * (1 - off) + off / self.config.prototypes if off else p

    @torch.no_grad()
    def targets(self, z: Tensor) -> Tensor:
        """(B, P) -> p⁺ (B, K)"""
        p = (self.assign(z).log() / self.config.sharpen).softmax(-1)  # a power of p itself could round to 0 everywhere
        return balanced(p, self.config.sinkhorn) if self.config.sinkhorn else p

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        return Step(0.0, {})

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        ema_update(self.teacher, self.student, self.momentum(t))
