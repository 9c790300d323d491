"""How a table of positions, learned or fixed, is resampled for another grid."""

from typing import Literal

import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

# All bicubic.  timm: to the grid's size, antialiased (also DINOv2 with registers).  dino: by the factor
# (n + 0.1)/native, which shifts the sampling grid slightly (DINO, iBOT, UDI, DINOv2).  mae: to the grid's size, plain
# (MAE, DeiT, MSN, Hugging Face).
Positions = Literal["timm", "dino", "mae"]


def resampled(table: Tensor, native: tuple[int, int], grid: tuple[int, int], rule: Positions) -> Tensor:
    """(1, rows·columns, D) of the native grid -> of another."""
    if rule == "timm":
        return resample_abs_pos_embed(table, list(grid), list(native), num_prefix_tokens=0)
    factor = tuple((n + 0.1) / m for n, m in zip(grid, native, strict=True))
    to: dict = {"scale_factor": factor} if rule == "dino" else {"size": grid}
    return F.interpolate(table.transpose(1, 2).unflatten(2, native), mode="bicubic", **to).flatten(2).transpose(1, 2)
