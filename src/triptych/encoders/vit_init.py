"""How a ViT starts: the authors' random weights, and MoCo v3's fixed positions."""

from typing import Literal, cast

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from triptych.errors import UserError
from triptych.heads import init_linear

Init = Literal["dino", "xavier", "mocov3", "mae"]


def init_vit(vit: VisionTransformer, init: Init = "dino") -> None:
    """DINO's start: class tokens, positions and linear weights truncated-normal σ 0.02, biases 0, norms 1 and 0.

    The patch projection keeps PyTorch's default.  "xavier": the blocks' linear weights Xavier-uniform instead.
    "mocov3": also queries, keys and values as three matrices, the patch projection as one matrix, class token σ 1e-6.
    "mae": also the patch projection as one matrix, class token normal σ 0.02.
    """
    init_linear(vit.blocks)
    if init != "dino":
        for module in vit.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    for token in (vit.cls_token, vit.reg_token, vit.pos_embed):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02)
    vit.patch_embed.proj.reset_parameters()
    if init == "mocov3":
        bound = (6 / (2 * vit.embed_dim)) ** 0.5
        for block in cast(list[Block], list(vit.blocks)):
            nn.init.uniform_(cast(Attention, block.attn).qkv.weight, -bound, bound)
    if init in ("mocov3", "mae"):
        kernel = cast(nn.Conv2d, vit.patch_embed.proj)
        bound = (6 / (kernel.weight[0].numel() + vit.embed_dim)) ** 0.5
        nn.init.uniform_(kernel.weight, -bound, bound)
        nn.init.zeros_(cast(nn.Parameter, kernel.bias))
        if vit.cls_token is not None:
            nn.init.normal_(vit.cls_token, std=1e-6 if init == "mocov3" else 0.02)


def sincos_table(grid: tuple[int, int], width: int, first: Literal["row", "column"] = "row") -> Tensor:
    """(N, D) float64: sines and cosines of the row in one half of the channels, of the column in the other.

    first: which of them has the first half; MoCo v3's authors put the row there, MAE's the column.
    """
    if width % 4:
        raise UserError(f"sine-cosine positions need a width that 4 divides, not {width}")
    rate = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * rate for axis in axes]
    angles = angles if first == "row" else angles[::-1]
    return torch.cat([part for x in angles for part in (x.sin(), x.cos())], 1)


@torch.no_grad()
def fix_positions(vit: VisionTransformer, first: Literal["row", "column"]) -> None:
    """Sine-cosine positions in the place of learned ones; prefix tokens have no place.  They are not trained."""
    table = cast(nn.Parameter, vit.pos_embed)
    slots = table.shape[1] - vit.patch_embed.num_patches
    table.zero_()
    table[:, slots:] = sincos_table(vit.patch_embed.grid_size, vit.embed_dim, first)
    table.requires_grad_(False)
