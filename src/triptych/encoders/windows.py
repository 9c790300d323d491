"""Swin's blocks: attention among the tokens of a window, and windows that shift from block to block.

A block keeps the window and the shift that its native size gave it, at every size, as iBOT's Swin does: its bias table
has that window's size.  Where windows do not tile a grid, zeros are added below and to the right after the first norm;
then comes the shift; the zeros take part in attention.  So says iBOT's code.  (timm shifts first and pads then, but
masks as if it had padded first; that differs only at such grids, and an encoder's native size never has one.)
"""

from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor

Pair = tuple[int, int]


def attention_of(block: SwinTransformerBlock) -> WindowAttention:
    """A block's attention, which timm types as any module."""
    return cast(WindowAttention, block.attn)


def run_block(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    """One pre-norm block with attention in (shifted) windows.  (B, H, W, C) -> (B, H, W, C)"""
    (h, w), (down, right) = block.window_size, block.shift_size
    rows, columns = x.shape[1:3]
    y = F.pad(block.norm1(x), (0, 0, 0, -columns % w, 0, -rows % h))
    grid, mask = (y.shape[1], y.shape[2]), None
    if down or right:
        y = y.roll((-down, -right), (1, 2))
        mask = shift_mask(grid, (h, w), (down, right), y.device)
    y = join_windows(attend(attention_of(block), split_windows(y, (h, w)), mask), (h, w), grid)
    if down or right:
        y = y.roll((down, right), (1, 2))
    x = x + block.drop_path1(y[:, :rows, :columns])
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def attend(attn: WindowAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ/√d + bias + mask) v in each window.  (B·windows, T, C), mask (windows, T, T) -> (B·windows, T, C)"""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * attn.scale) @ k.transpose(-2, -1) + relative_bias(attn)  # (B·windows, heads, T, T)
    if mask is not None:
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None].to(scores.dtype)).flatten(0, 1)
    y = attn.attn_drop(scores.softmax(-1)) @ v
    return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))


def relative_bias(attn: WindowAttention) -> Tensor:
    """(heads, T, T): the table's entry for every offset between two tokens of a window."""
    index = cast(Tensor, attn.relative_position_index)  # (T, T), a buffer of timm's
    return attn.relative_position_bias_table[index].permute(2, 0, 1).contiguous()  # it is added to every window


def split_windows(x: Tensor, window: Pair) -> Tensor:
    """(B, H, W, C) -> (B·windows, h·w, C), windows and the tokens in them row by row."""
    h, w = window
    x = x.unflatten(2, (-1, w)).unflatten(1, (-1, h))  # (B, H/h, h, W/w, w, C)
    return x.transpose(2, 3).reshape(-1, h * w, x.shape[-1])


def join_windows(x: Tensor, window: Pair, grid: Pair) -> Tensor:
    """(B·windows, h·w, C) -> (B, H, W, C), the inverse of `split_windows`."""
    (h, w), (rows, columns) = window, grid
    x = x.reshape(-1, rows // h, columns // w, h, w, x.shape[-1])
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


@lru_cache(maxsize=64)
def shift_mask(grid: Pair, window: Pair, shift: Pair, device: torch.device) -> Tensor:
    """(windows, T, T) float32: -100, Swin's minus infinity, between tokens that only the cyclic shift made neighbours.

    After a shift by s, the last s rows (columns) of the grid came from the opposite edge.
    """
    with torch.inference_mode(False):  # the cached tensor must serve training too
        wrapped = [torch.arange(n, device=device) >= n - s for n, s in zip(grid, shift, strict=True)]
        region = 2 * wrapped[0][:, None].long() + wrapped[1]  # (H, W)
        region = split_windows(region[None, :, :, None], window)[..., 0]  # (windows, T)
        return torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)
