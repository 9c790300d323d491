"""A timm Swin transformer: windows of tokens that shift from block to block, four tokens merged between stages.

timm supplies the architecture and the names of the weights; the forward pass is ours, so that one encoder serves crops
of any size, puts a mask token in the place of hidden patches and gives the tokens of any block.

The blocks themselves, and what happens at sizes that windows do not tile: `windows.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage, WindowAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triptych.encoders.base import Crops, Encoder
from triptych.encoders.windows import Pair, attention_of, run_block
from triptych.errors import UserError
from triptych.heads import init_linear
from triptych.tokens import Tokens, TokenSpec


class Swin(Encoder):
    """images (B, 3, H, W) -> Tokens without class token.  H and W are any multiples of `patch_size`.

    Patches are embedded at patch_size / 2^(stages - 1) pixels; D, N and the grid are those of the last stage.
    """

    aux_tokens = None

    def __init__(self, swin: SwinTransformer, spec: TokenSpec):
        super().__init__()
        _check_swin(swin)
        check_spec(spec)
        self.swin, self.spec = swin, spec
        self.mask_token = nn.Parameter(torch.zeros(1, 1, swin.embed_dim)) if spec.mask else None

    @property
    def trunk(self) -> SwinTransformer:
        return self.swin

    @property
    def stages(self) -> list[SwinTransformerStage]:
        return _stages(self.swin)

    @property
    def width(self) -> int:
        return self.swin.num_features

    @property
    def depth(self) -> int:
        """Number of blocks, over all stages."""
        return sum(len(stage.blocks) for stage in self.stages)

    def block_parts(self) -> list[list[nn.Module]]:
        return [[block] if merge is None else [merge, block] for block, merge, _ in self._schedule()]

    @property
    def heads(self) -> int:
        return attention_of(_blocks(self.stages[-1])[-1]).num_heads

    @property
    def patch_size(self) -> int:
        return cast(Pair, patch_embed(self.swin).patch_size)[0] * self._ratio

    @property
    def native_size(self) -> Pair:
        return cast(Pair, patch_embed(self.swin).img_size)

    @property
    def norm_eps(self) -> float:
        return cast(nn.LayerNorm, self.swin.norm).eps

    @property
    def activation(self) -> str:
        return type(cast(SwinTransformerBlock, self.block_parts()[0][-1]).mlp.act).__name__

    @property
    def positions(self) -> str:
        """What, beside weights and heads, decides the tokens of an image: part of the key of cached features."""
        blocks = [(b.window_size, b.shift_size) for stage in self.stages for b in _blocks(stage)]
        return f"windows and shifts {blocks}, norm eps {self.norm_eps}"

    @property
    def _ratio(self) -> int:
        """Embedded patches per side of a final token."""
        return 2 ** (len(self.stages) - 1)

    def run(self, inputs: Sequence[Crops], blocks: Sequence[int]) -> list[list[Tokens]]:
        """The tokens after each of the given blocks (0-based, negative from the end), on the grid of its stage.

        The final norm has the last stage's width: blocks of earlier stages give patch = patch_raw, as in iBOT.
        """
        return [self._run(crops, blocks) for crops in inputs]

    def _run(self, crops: Crops, blocks: Sequence[int]) -> list[Tokens]:
        if crops.keep is not None:
            raise UserError("a Swin cannot leave out patches, its windows need whole grids: use a ViT, or mask instead")
        wanted = [b % self.depth for b in blocks]
        x = self._embed(crops.images, crops.mask)
        taps = {}
        for i, (block, merge, is_last_stage) in enumerate(self._schedule()):
            x = self._block(block, x if merge is None else merge(x))
            if i in wanted:
                raw = x.flatten(1, 2)
                patch = self.swin.norm(raw) if is_last_stage else raw
                taps[i] = Tokens(patch=patch, patch_raw=raw, grid=(x.shape[1], x.shape[2]))
            if i == max(wanted):
                break
        return [taps[b] for b in wanted]

    def _block(self, block: SwinTransformerBlock, x: Tensor) -> Tensor:
        if self.recomputes(block):
            return cast(Tensor, checkpoint(run_block, block, x, use_reentrant=False))
        return run_block(block, x)

    def check_blocks(self, blocks: Sequence[int]) -> None:
        super().check_blocks(blocks)
        first = self.depth - len(self.stages[-1].blocks) + 1
        early = [b for b in blocks if b < first]
        if early:
            raise UserError(
                f"block {early[0]}: a Swin's earlier stages have patches of another size; choose from {first} to "
                f"{self.depth}"
            )

    def timm_arguments(self) -> tuple[str, dict]:
        first = _blocks(self.stages[0])[0]
        windows = [list(_blocks(stage)[0].window_size) for stage in self.stages]
        arguments = {
            "img_size": list(self.native_size),
            "patch_size": patch_embed(self.swin).patch_size[0],
            "embed_dim": self.swin.embed_dim,
            "depths": [len(stage.blocks) for stage in self.stages],
            "num_heads": [attention_of(_blocks(stage)[0]).num_heads for stage in self.stages],
            "window_size": window_argument(windows),
            "always_partition": first.always_partition,
            "mlp_ratio": cast(nn.Linear, first.mlp.fc1).out_features / self.swin.embed_dim,
            "qkv_bias": attention_of(first).qkv.bias is not None,
            "strict_img_size": False,  # images of other sizes too
        }
        # Any Swin's name will do: the arguments say all that differs.
        return "swin_tiny_patch4_window7_224", arguments

    def as_timm(self, tokens: Tokens) -> Tensor:
        """(B, rows, columns, D)"""
        assert tokens.grid is not None
        return tokens.patch.unflatten(1, tokens.grid)

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """-> (B, rows, columns, C) of the first stage; mask (B, N) is of the final grid."""
        rows, columns = self.grid(*images.shape[-2:])
        embed = patch_embed(self.swin)
        x = embed.norm(embed.proj(images).permute(0, 2, 3, 1))
        if mask is not None:
            assert self.mask_token is not None, "this encoder was built without a mask token"
            fine = mask.unflatten(1, (rows, columns))
            fine = fine.repeat_interleave(self._ratio, 1).repeat_interleave(self._ratio, 2)
            x = torch.where(fine[..., None], self.mask_token.to(x.dtype), x)
        return x

    def _schedule(self) -> Iterator[tuple[SwinTransformerBlock, nn.Module | None, bool]]:
        """Every block in order, with the merging before it (at the start of all stages but the first)."""
        for s, stage in enumerate(self.stages):
            for j, block in enumerate(_blocks(stage)):
                yield block, stage.downsample if s and not j else None, s == len(self.stages) - 1


def patch_embed(swin: SwinTransformer) -> PatchEmbed:
    return cast(PatchEmbed, swin.patch_embed)


def window_argument(windows: Sequence[Sequence[int]]) -> Sequence:
    """timm's window_size for one window (h, w) per stage: two in a list would be read as (h, w) themselves."""
    return windows[0] if all(w == windows[0] for w in windows) else windows


def _stages(swin: SwinTransformer) -> list[SwinTransformerStage]:
    return cast(list[SwinTransformerStage], list(swin.layers))


def _blocks(stage: SwinTransformerStage) -> list[SwinTransformerBlock]:
    return cast(list[SwinTransformerBlock], list(stage.blocks))  # `_check_swin` made sure


def _check_swin(swin: nn.Module) -> None:
    """A SwinTransformer whose own windows tile the grids of its native size."""
    if type(swin) is not SwinTransformer or not all(
        isinstance(m, SwinTransformerStage) and all(type(b) is SwinTransformerBlock for b in _blocks(m))
        for m in _stages(swin)
    ):
        raise UserError(f"{type(swin).__name__} is not a Swin (the first version): use a timm SwinTransformer")
    embed, stages = patch_embed(swin), _stages(swin)
    size, (rows, columns), n = cast(Pair, embed.img_size), cast(Pair, embed.grid_size), len(stages)
    if rows % 2 ** (n - 1) or columns % 2 ** (n - 1):
        multiple = embed.patch_size[0] * 2 ** (n - 1)
        raise UserError(f"--encoder.image_size {size[0]}x{size[1]}: a Swin of {n} stages needs multiples of {multiple}")
    grids = [(rows >> i, columns >> i) for i in range(n)]
    for grid, stage in zip(grids, stages, strict=True):
        block = _blocks(stage)[0]
        if attention_of(block).qkv.out_features != 3 * block.dim:
            raise UserError(
                f"--encoder.heads: {attention_of(block).num_heads} does not divide a stage's width of {block.dim}"
            )
        if grid[0] % block.window_size[0] or grid[1] % block.window_size[1]:
            tile = [
                w
                for w in range(2, min(32, rows, columns) + 1)
                if all(side <= w or side % w == 0 for g in grids for side in g)
            ]
            window = f"--encoder.window_size {' or '.join(map(str, tile))}, or " if tile else ""
            raise UserError(
                f"a Swin built for {size[0]}x{size[1]} px has a stage of {grid[0]}x{grid[1]} tokens, which windows of "
                f"{block.window_size[0]} do not tile: choose {window}another --encoder.image_size to build it for "
                f"(crops may have any size)"
            )


def check_spec(spec: TokenSpec) -> None:
    if spec.aux:
        raise UserError(
            f"a Swin has no sequence to put {spec.aux} auxiliary class tokens in: set --method.aux 0, or use a ViT "
            f"(--encoder.name vit)"
        )
    if spec.cls_plus or spec.register:
        what = "class+ token, which UDI needs" if spec.cls_plus else "registers"
        raise UserError(f"a Swin has no sequence to put tokens in, so it has no {what}: use a ViT (--encoder.name vit)")
    assert not spec.cls, "a Swin has no class token"


def set_norm_eps(trunk: nn.Module, eps: float) -> None:
    """ε of every layer norm, which timm offers no argument for that a file could hold."""
    for module in trunk.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def init_encoder(encoder: Swin, init: Literal["dino", "xavier"] = "dino") -> None:
    """Linear weights and bias tables truncated-normal σ 0.02, biases 0, norms 1 and 0.

    The patch projection keeps PyTorch's default.  "xavier": the linear weights Xavier-uniform instead.
    """
    swin = encoder.swin
    init_linear(swin.layers)
    for module in swin.layers.modules():
        if isinstance(module, nn.Linear) and init == "xavier":
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, WindowAttention):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
    cast(nn.Conv2d, patch_embed(swin).proj).reset_parameters()
