"""The ensemble inside one model: auxiliary tokens of an image, a head for each, one fused vector (MTE, section 3).

    â_i = TEN(c_i, X)                     i = 1..m   auxiliary class tokens, enhanced by the patches X (N, D)
    p_i = 1/N Σ_n F_i(X)[n] ⊙ X[n]        i = 1..k   adaptively pooled tokens; F_i = depth-wise ∘ GELU ∘ point-wise  (2)
    z_a = Φ( h_1(a_1), ..., h_M(a_M) )               Φ = mean                                                        (3)

Everything here reads the encoder's tokens and changes none of them: dropping it changes nothing else.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from triptych.depthwise import depthwise
from triptych.encoders.base import Encoder
from triptych.encoders.blocks import attention
from triptych.heads import init_linear
from triptych.losses import full_precision
from triptych.tokens import AuxSees, Tokens, TokenSpec


class EnsembleConfig(BaseModel):
    """Which auxiliary tokens there are and how they are made; every reading of the paper that is open is a setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    aux: int = Field(default=4, ge=0)  # m, auxiliary class tokens; 0 for Swin
    pooled: int = Field(default=6, ge=0)  # k, pooled tokens
    aux_sees: AuxSees = "all"  # what auxiliary class tokens attend to; "uncut" = removal is not lossless (Table 16)
    ten: bool = True  # enhance auxiliary class tokens (Table 13)
    ten_input: Literal["raw", "normed"] = "raw"  # tokens before or after the encoder's final norm
    ten_residual: bool = True
    pooling: Literal["adaptive", "average", "max"] = "adaptive"  # (Table 15)
    pool_input: Literal["normed", "raw"] = "normed"
    pool_kernel: int = Field(default=11, ge=1)  # patches, odd
    pool_pointwise: Literal["own", "shared"] = "own"  # a point-wise convolution per token, or one for all
    pool_gelu: bool = True
    pool_weights: Literal["channels", "map"] = "channels"  # a weight per channel and place, or per place
    pool_softmax: bool = False  # weights sum to N over places
    heads: Literal["own", "shared"] = "own"  # a head per token, or one for all (Table 2)
    fusion: Literal["mean", "unit"] = "mean"  # Φ: of raw outputs, or of unit-length ones

    @field_validator("pool_kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError("a kernel that keeps the grid's size is odd")
        return kernel

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec(cls=0, aux=self.aux, aux_sees=self.aux_sees)


class TEN(nn.Module):
    """One pre-norm cross-attention block: auxiliary class tokens (B, m, D) read the patches (B, N, D) -> (B, m, D)."""

    def __init__(self, width: int, heads: int, residual: bool):
        super().__init__()
        self.heads, self.residual = heads, float(residual)
        self.norm_q, self.norm_kv, self.norm_mlp, self.norm_out = (nn.LayerNorm(width, eps=1e-6) for _ in range(4))
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        init_linear(self)

    def forward(self, aux: Tensor, patch: Tensor) -> Tensor:
        q, (k, v) = self.q(self.norm_q(aux)), self.kv(self.norm_kv(patch)).chunk(2, -1)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        u = self.residual * aux + self.out(attention(q, k, v).transpose(1, 2).flatten(2))
        return self.norm_out(self.residual * u + self.mlp(self.norm_mlp(u)))


class AdaptivePooling(nn.Module):
    """(2): patches (B, N, D) on a grid -> k tokens (B, k, D).

    The k point-wise and the k depth-wise convolutions stand side by side in one convolution each.
    """

    def __init__(self, width: int, config: EnsembleConfig):
        super().__init__()
        c, k = config, config.pooled
        self.config, wide = c, width * k
        self.pointwise = nn.Conv2d(width, width if c.pool_pointwise == "shared" else wide, 1)
        self.depthwise = nn.Conv2d(wide, wide, c.pool_kernel, padding=c.pool_kernel // 2, groups=wide)
        self.to_map = nn.Conv2d(wide, k, 1, groups=k) if c.pool_weights == "map" else None

    def weights(self, patch: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, k, D or 1, N)"""
        c = self.config
        a = F.linear(patch, self.pointwise.weight.flatten(1), self.pointwise.bias)
        a = F.gelu(a) if c.pool_gelu else a
        if a.requires_grad:
            a.register_hook(Tensor.contiguous)  # of another layout, the gradient of GELU takes ten times as long
        a = a.transpose(1, 2).unflatten(2, grid).contiguous()
        a = a.repeat(1, c.pooled, 1, 1) if c.pool_pointwise == "shared" else a
        a = depthwise(a, self.depthwise.weight, cast(Tensor, self.depthwise.bias))
        a = a if self.to_map is None else self.to_map(a)
        a = a.unflatten(1, (c.pooled, -1)).flatten(3)
        return full_precision(a).softmax(-1).to(a.dtype) * a.shape[-1] if c.pool_softmax else a

    def forward(self, patch: Tensor, grid: tuple[int, int]) -> Tensor:
        return (self.weights(patch, grid) * patch.transpose(1, 2)[:, None]).mean(-1)


class Ensemble(nn.Module):
    """Tokens of V views -> the fused vectors z_a (V, B, P).  Thrown away after training.

    heads: one per token, or a single one for all of them.  extra: auxiliary tokens that the base method adds itself.
    """

    def __init__(self, encoder: Encoder, config: EnsembleConfig, heads: Sequence[nn.Module], extra: int = 0):
        super().__init__()
        self.config, self.count = config, config.aux + config.pooled + extra
        assert len(heads) in (1, self.count)
        self.heads = nn.ModuleList(heads)
        self.ten = TEN(encoder.width, encoder.heads, config.ten_residual) if config.aux and config.ten else None
        adaptive = config.pooled and config.pooling == "adaptive"
        self.pool = AdaptivePooling(encoder.width, config) if adaptive else None

    def names(self) -> list[str]:
        c = self.config
        own = [f"own {i}" for i in range(self.count - c.aux - c.pooled)]
        return [f"aux {i}" for i in range(c.aux)] + [f"pooled {i}" for i in range(c.pooled)] + own

    def tokens(self, x: Tokens) -> Tensor:
        """(M, B, D): auxiliary class tokens, pooled tokens, then the base's own."""
        c, parts = self.config, []
        if c.aux:
            aux = cast(Tensor, x.aux)[:, : c.aux]
            if self.ten is not None:
                raw = c.ten_input == "raw"
                aux = self.ten(cast(Tensor, x.aux_raw), x.patch_raw) if raw else self.ten(aux, x.patch)
            parts.append(aux)
        if c.pooled:
            parts.append(self._pooled(x.patch if c.pool_input == "normed" else x.patch_raw, x.grid))
        if self.count > c.aux + c.pooled:
            parts.append(cast(Tensor, x.aux)[:, c.aux :])
        return torch.cat(parts, 1).transpose(0, 1)

    def embeddings(self, tokens: Tensor) -> Tensor:
        """(M, ..., B, D) -> (M, ..., B, P)"""
        heads = list(self.heads) * (self.count if len(self.heads) == 1 else 1)
        return torch.stack([head(a) for head, a in zip(heads, tokens, strict=True)])

    def forward(self, views: list[Tokens]) -> Tensor:
        return self.fused(self.embeddings(torch.stack([self.tokens(x) for x in views], 1)))

    def fused(self, z: Tensor) -> Tensor:
        """(M, ..., B, P) -> (..., B, P), by (3)."""
        return (F.normalize(z, dim=-1) if self.config.fusion == "unit" else z).mean(0)

    def _pooled(self, patch: Tensor, grid: tuple[int, int] | None) -> Tensor:
        k = self.config.pooled
        if self.pool is not None:
            assert grid is not None, "adaptive pooling needs the whole grid"
            return self.pool(patch, grid)
        one = patch.mean(1) if self.config.pooling == "average" else patch.amax(1)
        return one[:, None].expand(-1, k, -1)
