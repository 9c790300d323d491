"""MAE -- He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022.

    L = Σ m |g(f(x without its patches m)) − x̂|² / Σ m            m: the patches dropped, three quarters of them
    x̂ = (x − mean) / √(var + 1e-6)                                of each patch's own pixels

The encoder f sees the kept patches only; the decoder g, a smaller transformer, gets its tokens and one learned vector
at every dropped place, with fixed sine-cosine positions.
"""

from typing import Literal, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from triptych.data.views import Views, ViewSpec
from triptych.encoders.base import Encoder
from triptych.encoders.vit_init import sincos_table
from triptych.losses import full_precision
from triptych.methods.base import Method, Step
from triptych.schedules import Progress


class MAEConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["mae"] = "mae"
    drop: float = Field(default=0.75, gt=0, lt=1)  # share of the patches
    norm_pixels: bool = True  # x̂; false: x itself
    decoder_width: int = Field(default=512, ge=4, multiple_of=4)
    decoder_depth: int = Field(default=8, ge=1)  # blocks
    decoder_heads: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.decoder_width % self.decoder_heads:
            raise ValueError(f"decoder_heads {self.decoder_heads} does not divide decoder_width {self.decoder_width}")
        return self


class Decoder(nn.Module):
    """Class token (B, D) and kept patches (B, n, D) -> pixels of all patches (B, N, p·p·3)."""

    positions: Tensor

    def __init__(self, encoder: Encoder, config: MAEConfig):
        super().__init__()
        width, self.native = config.decoder_width, encoder.grid(*encoder.native_size)
        self.read = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        blocks = [Block(width, config.decoder_heads, qkv_bias=True) for _ in range(config.decoder_depth)]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        self.write = nn.Linear(width, 3 * encoder.patch_size**2)
        self.register_buffer("positions", sincos_table(self.native, width, first="column").float(), persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, cls: Tensor, patch: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        # In full precision, as the encoder's residual stream is under autocast.
        x = full_precision(self.read(torch.cat([cls[:, None], patch], 1)))
        at = keep[..., None].expand(-1, -1, x.shape[-1])
        everywhere = self.mask_token.to(x.dtype).expand(len(x), grid[0] * grid[1], -1)
        placed = everywhere.scatter(1, at, x[:, 1:]) + self._positions(grid)
        x = torch.cat([x[:, :1], placed], 1)
        for block in self.blocks:
            x = block(x)
        return self.write(self.norm(x))[:, 1:]

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.native:
            return self.positions
        with self.positions.device:
            return sincos_table(grid, self.positions.shape[-1], first="column").to(self.positions)


class MAE(Method):
    @staticmethod
    def view_spec(config: MAEConfig) -> ViewSpec:
        return ViewSpec(drop=config.drop, global_crops=1, local_crops=False)

    def __init__(self, encoder: Encoder, config: MAEConfig):
        super().__init__()
        self.config, self.backbone, self.decoder = config, encoder, Decoder(encoder, config)

    @property
    def encoder(self) -> Encoder:
        return self.backbone

    def forward(self, views: Views, t: Progress) -> Step:
        view = views.global_crops[0]
        images, keep = view.images, cast(Tensor, view.keep)
        tokens = self.backbone(images, keep=keep)
        pixels = self.decoder(tokens.global_token, tokens.patch, keep, self.backbone.grid(*images.shape[-2:]))
        loss = self.error(pixels, images, keep)
        return Step(loss, {"pixels": loss})

    def error(self, pixels: Tensor, images: Tensor, keep: Tensor) -> Tensor:
        """pixels (B, N, p·p·3) of `forward`, images (B, 3, H, W), keep (B, n) -> mean error of the dropped patches."""
        target = patchify(images, self.backbone.patch_size)
        if self.config.norm_pixels:
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)  # unbiased, as released
            target = (target - mean) / (var + 1e-6).sqrt()
        error = (full_precision(pixels) - target).square().mean(-1)
        dropped = torch.ones_like(error).scatter(1, keep, 0.0)
        return (error * dropped).sum() / dropped.sum()


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, p·p·C): patches row-major; in each row, column, channel, the channel fastest."""
    p = patch_size
    x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`, for three channels: (B, N, p·p·3) -> (B, 3, H, W)."""
    p = round((patches.shape[-1] // 3) ** 0.5)
    x = patches.unflatten(2, (p, p, 3)).unflatten(1, grid)  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
