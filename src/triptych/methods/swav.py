"""SwAV -- Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS 2020.

    L = mean_{i ∈ global crops} mean_{v ≠ i} mean_b  −Σ_k code(z(i))_bk log softmax_k( z_b(v)·w_k / τ )          (1)
    code = Sinkhorn-Knopp( z(i)·w / ε ) over the batch (and a queue of earlier embeddings): equally used prototypes (3)

z = projector ∘ encoder and w have unit length.  No teacher: the codes are constants of the same network.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from triptych.data.views import Views
from triptych.distributed import all_gather, rank, world_size
from triptych.encoders.base import Encoder
from triptych.heads import MLP
from triptych.losses import unit
from triptych.methods.base import Carry, Method, Step, Tower
from triptych.prototype_loss import other_views, prototype_cross_entropy, sinkhorn_center
from triptych.schedules import Progress
from triptych.tokens import Tokens


class SwAVConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["swav"] = "swav"
    hidden: int = Field(default=2048, ge=1)
    embedding: int = Field(default=128, ge=1)  # P
    prototypes: int = Field(default=3000, ge=2)  # K
    temperature: float = Field(default=0.1, gt=0)  # τ
    epsilon: float = Field(default=0.05, gt=0)  # ε
    iterations: int = Field(default=3, ge=1)  # of Sinkhorn-Knopp
    queue: int = Field(default=0, ge=0)  # embeddings per view that help small batches; 0 = none
    queue_start: float = Field(default=15, ge=0)  # epochs before it is filled
    freeze_prototypes: float = Field(default=1, ge=0)  # epochs


class UnitPrototypes(nn.Module):
    """K prototypes of unit length.  They are put there after each step, so gradients do not pass through the norm."""

    def __init__(self, embedding: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(unit(nn.Linear(embedding, count, bias=False).weight.detach()))


class SwAV(Method):
    queue: Tensor
    queued: Tensor

    def __init__(self, encoder: Encoder, config: SwAVConfig):
        super().__init__()
        self.config = c = config
        head = MLP(encoder.width, c.hidden, c.embedding, activation="relu", norm=True, joint=True, init="torch")
        self.student = Tower(encoder, projector=head, prototypes=UnitPrototypes(c.embedding, c.prototypes))
        self.predictor = nn.Identity()
        self.register_buffer("queue", torch.zeros(2, c.queue, c.embedding))  # newest first
        self.register_buffer("queued", torch.zeros((), dtype=torch.long))  # images that have passed through it ...
        self.known = 0  # ... and the same on the host, which must not wait for the GPU to know if the queue is full
        self.register_load_state_dict_post_hook(lambda *_: setattr(self, "known", int(self.queued)))

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
        return self.global_loss(z, z[: len(views.global_crops)], t)

    def encode(self, views: Views, t: Progress, *, patches: bool = False) -> tuple[list[Tokens], list[Tokens]]:
        S = self.student.encode(views.all, patches=patches)
        return S, S[: len(views.global_crops)]

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """q_s (V, B, P): what predicts; z_t (2, B, P): what is assigned; view i of both is the same crop."""
        w, u_s, u_t = self.student.prototypes.weight, unit(q_s), unit(z_t.detach())
        with torch.autocast(u_t.device.type, enabled=False):  # ε would make much of bf16's rounding
            loss = prototype_cross_entropy(  # (1)
                u_s,
                w,
                u_t,
                w,
                center=torch.stack([self.balance(u, i) for i, u in enumerate(u_t)]),
                student_temp=self.config.temperature,
                teacher_temp=self.config.epsilon,
                weight=other_views(len(u_t), len(u_s), u_s.shape[1], like=u_s),
            )
        return Step(loss, {"swav": loss}, {"u_t": u_t})

    def balance(self, u: Tensor, view: int) -> Tensor:
        """(3): the centre c (K,) with which the codes of one view's u (B, P) are softmax( (u·w − c) / ε )."""
        if self.config.queue and self.known >= self.config.queue:  # a full queue only
            # Every process brings its part of the queue: together they are one batch beside one queue.
            u = torch.cat([self.queue[view].tensor_split(world_size())[rank()].to(u), u])
        return sinkhorn_center(u, self.student.prototypes.weight, self.config.epsilon, self.config.iterations)

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        return Step(0.0, {})

    def momentum(self, t: Progress) -> float:
        return 0.0

    def after_backward(self, t: Progress) -> None:
        if t.step < self.config.freeze_prototypes * t.steps_per_epoch:
            for p in self.student.prototypes.parameters():
                p.grad = None

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        w = self.student.prototypes.weight
        w.copy_(unit(w))
        if self.config.queue and t.step >= self.config.queue_start * t.steps_per_epoch:
            new = torch.cat([all_gather(c["u_t"], dim=1) for c in carries], 1)
            self.queue.copy_(torch.cat([new.to(self.queue), self.queue], 1)[:, : self.config.queue])
            self.known += new.shape[1]
            self.queued.fill_(self.known)
