"""GMML -- Atito, Awais and Kittler, GMML Is All You Need, 2022.

    L = Σ m |g_rec(f(x̃)) − x| / Σ m                over the pixels of both crops; m = 1 where x̃ replaces them
    f(x̃) = LayerNorm( mean of the patch tokens after blocks 6, 8, 10, 12 )

One network, no teacher.  What is evaluated is the encoder's usual output, after the last block.
"""

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from triptych.data.corruption import CorruptionConfig
from triptych.data.views import Views, ViewSpec
from triptych.encoders.base import Encoder
from triptych.errors import UserError
from triptych.heads import PixelHead
from triptych.methods.base import Method, Step, pixel_error, seen
from triptych.schedules import Progress


class GMMLConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["gmml"] = "gmml"
    corruption: CorruptionConfig = CorruptionConfig()  # three quarters noise, or 30 % of another image
    blocks: tuple[int, ...] = Field(default=(6, 8, 10, 12), min_length=1)  # that are read, counted from 1; the last too

    @model_validator(mode="after")
    def _replaces(self) -> Self:
        c = self.corruption
        if not c.share * (1 - c.replace) + c.replace_share * c.replace:
            raise ValueError("corruption replaces nothing, and nothing is learned: share or replace_share above 0")
        return self


class GMML(Method):
    @staticmethod
    def view_spec(config: GMMLConfig) -> ViewSpec:
        return ViewSpec(corruption=config.corruption, local_crops=False)

    def __init__(self, encoder: Encoder, config: GMMLConfig):
        super().__init__()
        encoder.check_blocks(config.blocks)
        if max(config.blocks) < encoder.depth:
            raise UserError(f"blocks up to {max(config.blocks)} leave block {encoder.depth} untrained: add it")
        self.config, self.backbone = config, encoder
        self.pixels = PixelHead(encoder.width, encoder.patch_size)  # g_rec

    @property
    def encoder(self) -> Encoder:
        return self.backbone

    def forward(self, views: Views, t: Progress) -> Step:
        images: Tensor = torch.cat([seen(v) for v in views.global_crops])
        tokens = self.backbone.mixed(images, self.config.blocks).chunk(len(views.global_crops))
        loss = pixel_error(self.pixels, tokens, views)
        return Step(loss, {"pixels": loss})
