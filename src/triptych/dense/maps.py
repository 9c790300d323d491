"""Patch tokens as maps, and an encoder as a dense task wants it."""

import copy
from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from triptych.encoders import Encoder
from triptych.tokens import Tokens


def patch_map(encoder: Encoder, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, D, rows, columns): patch tokens of the last block after the final norm.

    H and W are multiples of the patch size (`pad_to_multiple`).
    """
    return _map(encoder(images))


def feature_maps(encoder: Encoder, images: Tensor, blocks: Sequence[int], *, norm: bool = True) -> list[Tensor]:
    """Patch tokens after each of these blocks (0-based, negative from the end): a list of (B, D, rows, columns).

    norm: through the encoder's final norm, as DINO and iBOT have it for every block; a Swin's earlier stages, whose
    width is another, go without.
    """
    return [_map(tokens, norm) for tokens in encoder.layers(images, blocks)]


def _map(tokens: Tokens, norm: bool = True) -> Tensor:
    assert tokens.grid is not None
    return (tokens.patch if norm else tokens.patch_raw).transpose(1, 2).unflatten(2, tokens.grid)


def scaled_blocks(of_twelve: Sequence[int], depth: int) -> list[int]:
    """Blocks of an encoder of 12 blocks -> those as deep in one of `depth`, counted from 1; shallow ones repeat some.

    Rounded, halves up: 6 8 10 12 are 12 16 20 24 of 24 blocks, and 2 3 3 4 of 4.
    """
    return [max(1, (2 * b * depth + 12) // 24) for b in of_twelve]


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """(..., H, W) with zeros below and to the right, so that both sides are multiples."""
    rows, columns = images.shape[-2:]
    return F.pad(images, (0, -columns % multiple, 0, -rows % multiple))


def to_train(encoder: Encoder, drop_path: float = 0.0) -> Encoder:
    """A copy with gradients, and with stochastic depth that grows linearly from 0 to `drop_path` in the last block."""
    own = copy.deepcopy(encoder).requires_grad_(True).train()
    with_drop_path(own, drop_path)
    return own


def with_drop_path(encoder: Encoder, rate: float) -> None:
    """Sets stochastic depth (a probability) in place: 0 in the first block, `rate` in the last, linear between."""
    blocks = [parts[-1] for parts in encoder.block_parts()]
    for i, block in enumerate(blocks):
        p = rate * i / max(1, len(blocks) - 1)
        for name in ("drop_path1", "drop_path2"):
            setattr(cast(nn.Module, block), name, DropPath(p) if p else nn.Identity())
