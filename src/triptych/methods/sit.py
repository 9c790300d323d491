"""SiT -- Atito, Awais and Kittler, SiT: Self-supervised Vision Transformer, 2021.

    L = L_CLS + λ L_MIM
    L_MIM = Σ m |g_rec(f_s(x̃)) − x| / Σ m                          over pixels; m = 1 where x̃ replaces them
    L_CLS = −2τ mean_b log softmax_b'( c_b^v·k_b'^u / τ )[b], summed over the two pairs of crops v ≠ u

The student sees corrupted crops x̃, the teacher clean ones x; c and k are the class tokens' embeddings, unit length.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from triptych.data.corruption import HalfZeros
from triptych.data.views import Views, ViewSpec
from triptych.encoders.base import Encoder
from triptych.heads import PixelHead, sit_head
from triptych.losses import contrast, gathered_keys
from triptych.methods.base import Carry, Method, Step, Tower, ema_copy, ema_update, pixel_error
from triptych.schedules import Progress, cosine
from triptych.tokens import Tokens


class SiTConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["sit"] = "sit"
    weight_pixels: float = Field(default=1.0, gt=0)  # λ; the authors advise 5 on small sets
    corruption: HalfZeros = HalfZeros()
    temperature: float = Field(default=0.2, gt=0)  # τ
    hidden: int = Field(default=4096, ge=1)
    embedding: int = Field(default=256, ge=1)
    teacher_momentum: float = Field(default=0.996, ge=0, le=1)  # at step 0; cosine to 1


class SiT(Method):
    @staticmethod
    def view_spec(config: SiTConfig) -> ViewSpec:
        return ViewSpec(corruption=config.corruption, local_crops=False)

    def __init__(self, encoder: Encoder, config: SiTConfig):
        super().__init__()
        self.config = c = config
        self.student = Tower(encoder, projector=sit_head(encoder.width, c.hidden, c.embedding))
        self.teacher = ema_copy(self.student)
        self.predictor = nn.Identity()
        self.pixels = PixelHead(encoder.width, encoder.patch_size)  # g_rec
        self.momentum = cosine(c.teacher_momentum, 1.0)

    @property
    def encoder(self) -> Encoder:
        return self.teacher.encoder

    def forward(self, views: Views, t: Progress) -> Step:
        S, T = self.encode(views, t)
        z_t = self.teacher.project(T)
        return self.global_loss(self.student.project(S), z_t, t) + self.other_losses(S, T, z_t, views, t)

    def encode(self, views: Views, t: Progress, *, patches: bool = False) -> tuple[list[Tokens], list[Tokens]]:
        S = self.student.encode(views.global_crops, see="corrupted")
        return S, self.teacher.encode(views.global_crops, patches=patches)

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """q_s, z_t (2, B, P)"""
        tau, keys = self.config.temperature, gathered_keys(z_t)
        loss = 2 * tau * (contrast(q_s[0], keys[1], tau) + contrast(q_s[1], keys[0], tau))
        return Step(loss, {"class": loss})

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        loss = pixel_error(self.pixels, S, views)
        return Step(self.config.weight_pixels * loss, {"pixels": loss})

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        ema_update(self.teacher, self.student, self.momentum(t))
