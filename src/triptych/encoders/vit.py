"""A timm vision transformer whose tokens have roles.

timm supplies the architecture and the names of the weights; the forward pass is ours, so that one encoder serves crops
of any size, hides patches, gives the tokens of any layer, and carries private tokens that leave the rest untouched.
class+ and registers live in timm's `reg_token` (class+ first): `encoder.vit.state_dict()` loads in timm as it is.
"""

from collections.abc import Sequence
from typing import Literal, cast

import timm
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from timm.layers import Attention, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from triptych.encoders.base import Encoder
from triptych.encoders.vit_init import Init, fix_positions, init_vit
from triptych.errors import UserError, nearest
from triptych.tokens import Tokens, TokenSpec


class ViTConfig(BaseModel):
    """Any plain ViT by timm's name, optionally at another size.  None = what the architecture says."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["vit"] = "vit"
    arch: str = "vit_small_patch16_224"  # timm's name
    image_size: int | tuple[int, int] | None = None  # pixels; fixes the native grid of the position table
    patch_size: int | None = Field(default=None, ge=1)  # pixels
    width: int | None = Field(default=None, ge=1)  # D
    depth: int | None = Field(default=None, ge=1)  # blocks
    heads: int | None = Field(default=None, ge=1)
    registers: int = Field(default=0, ge=0)
    drop_path: float = Field(default=0.0, ge=0, lt=1)  # stochastic depth of the last block; linear from 0; student only
    init: Init = "dino"  # linear weights σ 0.02, which suits widths from 384; or Xavier
    position_table: Literal["learned", "sincos", "sincos_mae"] = "learned"  # or fixed: MoCo v3's, MAE's
    freeze_patches: bool = False  # the patch projection keeps its random start (MoCo v3: training is stabler)
    positions: Literal["timm", "dino"] = "timm"  # how the position table is resampled for other grids
    weights: str | None = None  # to start from: a run, an export, or a file of timm, DINO, MAE, MSN or Triptych


class ViT(Encoder):
    """images (B, 3, H, W) -> Tokens.  H and W are any multiples of the patch size."""

    def __init__(self, vit: VisionTransformer, spec: TokenSpec, positions: Literal["timm", "dino"] = "timm"):
        super().__init__()
        _check_plain(vit)
        self.vit, self.spec, self.positions = vit, spec, positions
        width = self.width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if spec.mask else None
        self.aux_tokens = nn.Parameter(torch.empty(1, spec.aux, width)) if spec.aux else None
        if self.aux_tokens is not None:
            nn.init.trunc_normal_(self.aux_tokens, std=0.02)

    @property
    def trunk(self) -> VisionTransformer:
        return self.vit

    @property
    def width(self) -> int:
        return self.vit.embed_dim

    @property
    def depth(self) -> int:
        return len(self.vit.blocks)

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.vit.blocks))  # `_check_plain` made sure

    def block_parts(self) -> list[list[nn.Module]]:
        return [[block] for block in self.blocks]

    @property
    def heads(self) -> int:
        return _attn(self.blocks[0]).num_heads

    @property
    def patch_size(self) -> int:
        return self.vit.patch_embed.patch_size[0]

    @property
    def prefix(self) -> int:
        """Tokens before the patches: class, class+, registers."""
        return self.spec.cls + self.spec.cls_plus + self.spec.register

    @property
    def native_size(self) -> tuple[int, int]:
        return self.vit.patch_embed.img_size

    def layers(
        self, images: Tensor, blocks: Sequence[int], mask: Tensor | None = None, keep: Tensor | None = None
    ) -> list[Tokens]:
        """The tokens after each of the given blocks (0-based, negative from the end), each through the final norm."""
        wanted = [b % self.depth for b in blocks]
        x, aux, grid = self._embed(images, mask, keep)
        taps = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x, aux = self._run(block, x, aux)
            if i in wanted:
                taps[i] = self._roles(x, aux, grid)
        return [taps[b] for b in wanted]

    def last_attention(self, images: Tensor) -> Tensor:
        """(B, heads, T, T): attention of the last block; T = prefix tokens (class, class+, registers), then patches."""
        x, aux, _ = self._embed(images, None, None)
        for block in self.blocks[:-1]:
            x, aux = self._run(block, x, aux)
        last = self.blocks[-1]
        attn = _attn(last)
        q, k, _ = _heads_of(attn, last.norm1(x))
        return (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)

    def timm_arguments(self) -> tuple[str, dict]:
        vit, block = self.vit, self.blocks[0]
        arguments = {
            "img_size": list(vit.patch_embed.img_size),
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": cast(nn.Linear, block.mlp.fc1).out_features / self.width,
            "qkv_bias": cast(nn.Linear, block.attn.qkv).bias is not None,
            "init_values": 1.0 if hasattr(block.ls1, "gamma") else None,
            "class_token": vit.has_class_token,
            "no_embed_class": vit.no_embed_class,
            "reg_tokens": vit.num_reg_tokens,
            "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
            "global_pool": "token" if vit.has_class_token else "",
            "dynamic_img_size": True,
        }
        # Any plain ViT's name will do: the arguments say all that differs.
        return "vit_tiny_patch16_224", {k: v for k, v in arguments.items() if v is not None}

    def as_timm(self, tokens: Tokens) -> Tensor:
        """(B, T, D): class, class+, registers, patches."""
        single = [t[:, None] for t in (tokens.cls, tokens.cls_plus) if t is not None]
        return torch.cat([*single, *([tokens.register] if tokens.register is not None else []), tokens.patch], 1)

    def _embed(self, images: Tensor, mask: Tensor | None, keep: Tensor | None):
        """-> base tokens (B, T, D) = prefix then patches, private tokens (B, A, D) or None, grid or None"""
        vit, grid = self.vit, self.grid(*images.shape[-2:])
        x = vit.patch_embed.norm(vit.patch_embed.proj(images).flatten(2).transpose(1, 2))
        if mask is not None:
            assert self.mask_token is not None, "this encoder was built without a mask token"
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        position, prefix = self._positions(grid)
        x = x + position
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([prefix.expand(len(x), -1, -1).to(x.dtype), x], 1)
        x = vit.norm_pre(vit.pos_drop(x))
        aux = None if self.aux_tokens is None else self.aux_tokens.expand(len(x), -1, -1).to(x.dtype)
        return x, aux, grid if keep is None else None

    def _run(self, block: Block, x: Tensor, aux: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One block.  Base tokens x attend to base tokens, private tokens aux to what TokenSpec.aux_sees says.

        The two streams never share a tensor on the base side: the base stream runs the very calls that it would run
        without private tokens, and so gives the same bits, whatever the private tokens hold.
        """
        if aux is not None and self.spec.aux_sees == "uncut":
            joint, _ = self._run(block, torch.cat([x, aux], 1), None)
            return joint[:, : x.shape[1]], joint[:, x.shape[1] :]
        attn, y = _attn(block), block.norm1(x)
        q, k, v = _heads_of(attn, y)
        if aux is not None:
            first = 0 if self.spec.aux_sees == "all" else self.prefix
            groups = aux.split(1, 1) if self.spec.aux_sees == "patches" else [aux]
            aux = torch.cat([_run_private(block, group, k[:, :, first:], v[:, :, first:]) for group in groups], 1)
        return _rest_of_block(block, x, _attend(attn, y, q, k, v)), aux

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Position table of the patches on this grid (1, N, D), prefix tokens with their own slots added (1, p, D)."""
        vit = self.vit
        tokens: list[Tensor] = [t for t in (vit.cls_token, vit.reg_token) if t is not None]
        prefix = torch.cat(tokens, 1) if tokens else vit.patch_embed.proj.weight.new_zeros(1, 0, self.width)
        if vit.pos_embed is None:
            return prefix.new_zeros(1, 1, self.width), prefix
        slots = 0 if vit.no_embed_class else prefix.shape[1]
        table = vit.pos_embed[:, slots:]
        if slots:
            prefix = prefix + vit.pos_embed[:, :slots]
        native = vit.patch_embed.grid_size
        if grid != native:
            if self.positions == "timm":
                table = resample_abs_pos_embed(table, list(grid), list(native), num_prefix_tokens=0)
            else:
                table = _resample_dino(table, native, grid)
        return table, prefix

    def _roles(self, x: Tensor, aux: Tensor | None, grid: tuple[int, int] | None) -> Tokens:
        spec, p = self.spec, self.prefix
        y = self.vit.norm(x)
        return Tokens(
            patch=y[:, p:],
            patch_raw=x[:, p:],
            grid=grid,
            cls=y[:, 0] if spec.cls else None,
            cls_plus=y[:, spec.cls] if spec.cls_plus else None,
            register=y[:, spec.cls + spec.cls_plus : p] if spec.register else None,
            aux=None if aux is None else self.vit.norm(aux),
            aux_raw=aux,
        )


def _check_plain(vit: nn.Module) -> None:
    plain = type(vit) is VisionTransformer and all(type(b) is Block and type(b.attn) is Attention for b in vit.blocks)
    if not plain:
        raise UserError(f"{type(vit).__name__} is not a plain ViT: use a timm model made of VisionTransformer's Block")


def _attn(block: Block) -> Attention:
    """A block's attention, which timm types as any module; `_check_plain` made sure."""
    return cast(Attention, block.attn)


def _resample_dino(table: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """DINO's resampling: bicubic by the *factor* (n + 0.1)/native, which shifts the sampling grid slightly."""
    image = table.transpose(1, 2).unflatten(2, native)
    factor = tuple((n + 0.1) / m for n, m in zip(grid, native, strict=True))
    return F.interpolate(image, scale_factor=factor, mode="bicubic").flatten(2).transpose(1, 2)


def _heads_of(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values, each (B, heads, T, D/heads)."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ/√d) v.  (B, heads, T, d), (B, heads, T', d) -> (B, heads, T, d)"""
    half_on_cpu = q.device.type == "cpu" and q.dtype != torch.float32 and q.requires_grad and not dropout
    if half_on_cpu:  # the fused kernel's backward is 2-12 times slower there (measured with torch 2.15)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def _attend(attn: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = attention(q, k, v, attn.attn_drop.p if attn.training else 0.0)
    y = attn.norm(y.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        y = y * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y))


def _run_private(block: Block, aux: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The block's output for private tokens (B, A, D), which attend to the given keys and to one another."""
    attn, y = _attn(block), block.norm1(aux)
    q, k_a, v_a = _heads_of(attn, y)
    return _rest_of_block(block, aux, _attend(attn, y, q, torch.cat([k, k_a], 2), torch.cat([v, v_a], 2)))


def _rest_of_block(block: Block, x: Tensor, update: Tensor) -> Tensor:
    x = x + block.drop_path1(block.ls1(update))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def build(config: ViTConfig, spec: TokenSpec, image_size: int | None = None) -> ViT:
    """A freshly initialised encoder (config.weights is loaded by `encoders.load`).

    image_size (pixels) sets the native grid where the config leaves it open: the size of the global crops.
    """
    if not timm.is_model(config.arch):
        names = timm.list_models("vit*")
        raise UserError(f"timm has no model {config.arch!r}{nearest(config.arch, names)}")
    spec = spec | TokenSpec(cls=0, register=config.registers)
    given = {
        "img_size": config.image_size or image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    options = {name: value for name, value in given.items() if value is not None}
    try:
        vit = timm.create_model(
            config.arch,
            pretrained=False,
            num_classes=0,
            class_token=bool(spec.cls),
            global_pool="token" if spec.cls else "",
            reg_tokens=spec.cls_plus + spec.register,
            drop_path_rate=config.drop_path,
            **options,
        )
    except (TypeError, AssertionError) as error:
        raise UserError(f"timm cannot build {config.arch} with {options}: {error}") from error
    encoder = ViT(vit, spec, config.positions)  # type: ignore[arg-type]
    init_vit(encoder.vit, config.init)
    if config.freeze_patches:
        encoder.vit.patch_embed.proj.requires_grad_(False)
    if config.position_table != "learned":
        fix_positions(encoder.vit, "column" if config.position_table == "sincos_mae" else "row")
    return encoder
