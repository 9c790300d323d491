"""A timm vision transformer whose tokens have roles.

timm supplies the architecture and the names of the weights; the forward pass is ours, so that one encoder serves crops
of any size, hides patches, gives the tokens of any layer, and carries private tokens that leave the rest untouched.
class+ and registers live in timm's `reg_token` (class+ first): `encoder.vit.state_dict()` loads in timm as it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triptych.encoders.base import Crops, Encoder
from triptych.encoders.blocks import Stream, packed, queries_and_keys, run_block
from triptych.encoders.positions import Positions, resampled
from triptych.errors import UserError
from triptych.losses import full_precision
from triptych.tokens import Tokens, TokenSpec


class ViT(Encoder):
    """images (B, 3, H, W) -> Tokens.  H and W are any multiples of the patch size."""

    def __init__(self, vit: VisionTransformer, spec: TokenSpec, positions: Positions = "timm"):
        super().__init__()
        _check_plain(vit)
        self.vit, self.spec = vit, spec
        self.positions: Positions = positions
        self.skip = False  # `ViTConfig.drop_path_skips`
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
        return cast(Attention, self.blocks[0].attn).num_heads

    @property
    def patch_size(self) -> int:
        return self.vit.patch_embed.patch_size[0]

    @property
    def norm_eps(self) -> float:
        """ε of the layer norms."""
        return cast(nn.LayerNorm, self.blocks[0].norm1).eps

    @property
    def activation(self) -> str:
        return type(self.blocks[0].mlp.act).__name__

    @property
    def prefix(self) -> int:
        """Tokens before the patches: class, class+, registers."""
        return self.spec.cls + self.spec.cls_plus + self.spec.register

    @property
    def native_size(self) -> tuple[int, int]:
        return self.vit.patch_embed.img_size

    def _drop_prefix(self) -> None:
        vit = self.vit
        slots = 0 if vit.no_embed_class else self.prefix
        if vit.pos_embed is not None and slots:
            vit.pos_embed = nn.Parameter(vit.pos_embed[:, slots:].clone(), vit.pos_embed.requires_grad)
        vit.cls_token = vit.reg_token = None
        vit.has_class_token, vit.num_prefix_tokens, vit.num_reg_tokens, vit.global_pool = False, 0, 0, ""
        self.spec = replace(self.spec, cls=0, cls_plus=0, register=0)

    def run(self, inputs: Sequence[Crops], blocks: Sequence[int]) -> list[list[Tokens]]:
        return self._pass(inputs, blocks)[0]

    def _pass(self, inputs: Sequence[Crops], blocks: Sequence[int]) -> tuple[list[list[Tokens]], Stream]:
        """`run`, and what enters the last of these blocks."""
        wanted = [b % self.depth for b in blocks]
        last, taps = max(wanted), {}
        x, grids = self._embed(inputs)
        # An encoder whose private tokens are not private must go on with all.
        whole = [c.patches or not self.spec.cls or self._uncut for c in inputs]
        queries = [None if w else self.prefix for w in whole]
        entering = x
        for i, block in enumerate(self.blocks[: last + 1]):
            entering = x
            x = self._run(block, x, queries if i == last else ())
            if i in wanted:
                taps[i] = self._roles(x, grids)
        return [[taps[b][i] for b in wanted] for i in range(len(inputs))], entering

    def last_attention(self, images: Tensor) -> Tensor:
        return self._attention(self._pass([Crops(images, patches=False)], [-1])[1])

    def layers_and_attention(self, images: Tensor, blocks: Sequence[int]) -> tuple[list[Tokens], Tensor]:
        ((*taps, _),), entering = self._pass([Crops(images)], [*blocks, -1])
        return taps, self._attention(entering, self.prefix)[..., self.prefix :]

    def _attention(self, x: Stream, queries: int | None = None) -> Tensor:
        """(B, heads, queries, T) of the last block, of its first tokens or of all."""
        q, k = queries_and_keys(self.blocks[-1], x)[0]
        n = x.shapes[0][1] - (x.count if self._uncut else 0)
        with torch.autocast(q.device.type, enabled=False):  # bf16 scores would decide which patches are seen most
            q, k = full_precision(q[:, :, :queries]), full_precision(k)
            return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)[:, :, :n, :n]

    def timm_arguments(self) -> tuple[str, dict]:
        vit, block = self.vit, self.blocks[0]
        arguments = {
            "img_size": list(vit.patch_embed.img_size),
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "mlp_ratio": mlp_ratio(cast(nn.Linear, block.mlp.fc1).out_features, self.width),
            "qkv_bias": cast(nn.Linear, block.attn.qkv).bias is not None,
            "init_values": 1.0 if hasattr(block.ls1, "gamma") else None,
            "class_token": vit.has_class_token,
            "no_embed_class": vit.no_embed_class,
            "reg_tokens": vit.num_reg_tokens,
            "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
            "global_pool": "token" if vit.has_class_token else "",
            "dynamic_img_size": True,
        }
        # The arguments say all that differs from the named ViT, but for SwiGLU, which is a class.
        name = "vit_tiny_patch16_224" if type(block.mlp) is Mlp else "vit_giant_patch14_dinov2"
        return name, {k: v for k, v in arguments.items() if v is not None}

    def as_timm(self, tokens: Tokens) -> Tensor:
        """(B, T, D): class, class+, registers, patches."""
        single = [t[:, None] for t in (tokens.cls, tokens.cls_plus) if t is not None]
        return torch.cat([*single, *([tokens.register] if tokens.register is not None else []), tokens.patch], 1)

    @property
    def _uncut(self) -> bool:
        """Do private tokens lie among the base's (an ablation)?"""
        return self.aux_tokens is not None and self.spec.aux_sees == "uncut"

    def _embed(self, inputs: Sequence[Crops]) -> tuple[Stream, list[tuple[int, int] | None]]:
        """Tokens of every crop, prefix before patches; grids of those that kept all their patches."""
        parts, grids = zip(*(self._embedded(c) for c in inputs), strict=True)
        shapes, rows = [(x.shape[0], x.shape[1]) for x in parts], packed(parts)
        if self.aux_tokens is None:
            return Stream(rows, shapes), list(grids)
        count = self.aux_tokens.shape[1]
        if self._uncut:
            own = [self.aux_tokens.expand(len(x), -1, -1).to(x.dtype) for x in parts]
            joined = [torch.cat(pair, 1) for pair in zip(parts, own, strict=True)]
            return Stream(packed(joined), [(b, n + count) for b, n in shapes], None, count), list(grids)
        aux = self.aux_tokens.expand(sum(b for b, _ in shapes), -1, -1).flatten(0, 1).to(rows.dtype)
        return Stream(rows, shapes, aux, count), list(grids)

    def _embedded(self, crops: Crops) -> tuple[Tensor, tuple[int, int] | None]:
        """(B, T, D) of crops of one size, and their grid."""
        vit, grid = self.vit, self.grid(*crops.images.shape[-2:])
        x = vit.patch_embed.norm(vit.patch_embed.proj(crops.images).flatten(2).transpose(1, 2))
        if crops.mask is not None:
            assert self.mask_token is not None, "this encoder was built without a mask token"
            x = torch.where(crops.mask[..., None], self.mask_token.to(x.dtype), x)
        position, prefix = self._positions(grid)
        x = x + position
        if crops.keep is not None:
            x = x.gather(1, crops.keep[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([prefix.expand(len(x), -1, -1).to(x.dtype), x], 1)
        return vit.norm_pre(vit.pos_drop(x)), grid if crops.keep is None else None

    def _run(self, block: Block, x: Stream, queries: Sequence[int | None] = ()) -> Stream:
        """One block; under `checkpoint` its activations are computed again in the backward pass instead of kept."""

        def run(rows: Tensor, aux: Tensor | None) -> Stream:
            of = Stream(rows, x.shapes, aux, x.count)
            return run_block(block, of, self.spec.aux_sees, self.prefix, queries, skip=self.skip)

        if self.recomputes(block):
            return cast(Stream, checkpoint(run, x.rows, x.aux, use_reentrant=False))
        return run(x.rows, x.aux)

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
            table = resampled(table, native, grid, self.positions)
        return table, prefix

    def _roles(self, x: Stream, grids: list[tuple[int, int] | None]) -> list[Tokens]:
        """The tokens of every size by role, through the final norm."""
        normed = Stream(self.vit.norm(x.rows), x.shapes, None if x.aux is None else self.vit.norm(x.aux), x.count)
        rows = zip(x.base(), normed.base(), x.private(), normed.private(), grids, strict=True)
        return [self._role(*row) for row in rows]

    def _role(self, x: Tensor, y: Tensor, aux_raw: Tensor | None, aux: Tensor | None, grid) -> Tokens:
        spec, p = self.spec, self.prefix
        if self._uncut:
            own = cast(nn.Parameter, self.aux_tokens).shape[1]
            (x, aux_raw), (y, aux) = (t.split([t.shape[1] - own, own], 1) for t in (x, y))
        return Tokens(
            patch=y[:, p:],
            patch_raw=x[:, p:],
            grid=grid,
            cls=y[:, 0] if spec.cls else None,
            cls_raw=x[:, 0] if spec.cls else None,
            cls_plus=y[:, spec.cls] if spec.cls_plus else None,
            register=y[:, spec.cls + spec.cls_plus : p] if spec.register else None,
            aux=aux,
            aux_raw=aux_raw,
        )


def mlp_ratio(hidden: int, width: int) -> float:
    """What timm multiplies by the width and rounds down to `hidden`."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else (hidden + 0.5) / width


def _check_plain(vit: nn.Module) -> None:
    plain = type(vit) is VisionTransformer and all(type(b) is Block and type(b.attn) is Attention for b in vit.blocks)
    if not plain:
        raise UserError(f"{type(vit).__name__} is not a plain ViT: use a timm model made of VisionTransformer's Block")
