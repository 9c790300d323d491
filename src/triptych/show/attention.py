"""Which patches a token attends to: in the encoder's last block, and in UDI's semantic sampling (SRS)."""

import torch
from torch import Tensor

from triptych.encoders import Encoder
from triptych.encoders.vit import ViT
from triptych.errors import UserError
from triptych.methods.udi import SRS


def attends(encoder: Encoder) -> bool:
    """Has it a class token whose attention to patches can be shown?  A Swin has none."""
    return isinstance(encoder, ViT) and encoder.spec.cls > 0


def check_attends(encoder: Encoder) -> None:
    """Raises UserError where there is nothing for `attention_maps`."""
    if not attends(encoder):
        kind = "a ViT without class token" if isinstance(encoder, ViT) else f"a {type(encoder).__name__}"
        raise UserError(
            f"this encoder is {kind}: no token attends to all patches. "
            "Show pca, clusters, click, neighbours or correspondence instead"
        )


@torch.no_grad()
def attention_maps(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """What the class token and, where there is one, class+ attend to among the patches in the last block.

    images (B, 3, H, W) -> {"class": (B, heads, rows, columns), "class+": ...}.  Shares of the token's attention, whose
    sum is 1 less what goes to class tokens and registers.  (DINO, visualize_attention.py.)  Raises UserError for
    encoders without class token.
    """
    check_attends(encoder)
    spec, grid = encoder.spec, encoder.grid(*images.shape[-2:])
    _, attention = encoder.layers_and_attention(images, [])  # (B, heads, prefix, N)
    rows = {"class": 0} | ({"class+": spec.cls} if spec.cls_plus else {})
    return {name: attention[:, :, row].unflatten(-1, grid) for name, row in rows.items()}


def mass_masks(maps: Tensor, share: float = 0.6) -> Tensor:
    """The fewest patches of a map that hold this share of it: (..., rows, columns) >= 0 -> bool of that shape.

    Patches in ascending order; kept are those whose cumulative sum is above 1 − share of the whole (DINO,
    visualize_attention.py).  Raises UserError unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise UserError(f"share {share}: give a number above 0 and at most 1, such as 0.6")
    flat = maps.flatten(-2)
    value, order = flat.sort(-1)
    kept = (value / value.sum(-1, keepdim=True)).cumsum(-1) > 1 - share
    return torch.zeros_like(kept).scatter(-1, order, kept).unflatten(-1, maps.shape[-2:])


@torch.no_grad()
def srs_maps(srs: SRS, patch: Tensor, at: Tensor) -> Tensor:
    """The attention of UDI's equation (2): which patches a sampled patch is made of.

    patch (B, N, D) before the encoder's final norm, at (B, M, N) rows of bilinear weights, as `SRS` takes them ->
    (B, heads, M, N), each row with sum 1.
    """
    u = srs.norm_in(patch)
    q, k, _ = srs.qkv(u).chunk(3, -1)
    q, k = (x.unflatten(2, (srs.heads, -1)).transpose(1, 2) for x in (at.to(q.dtype) @ q, k))
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


@torch.no_grad()
def srs_map_of(srs: SRS, encoder: Encoder, images: Tensor, place: tuple[int, int]) -> Tensor:
    """`srs_maps` of one queried patch (row, column): (B, 3, H, W) -> (B, heads, rows, columns)."""
    grid = encoder.grid(*images.shape[-2:])
    patch = encoder(images).patch_raw
    at = patch.new_zeros(len(patch), 1, patch.shape[1])
    at[..., place[0] * grid[1] + place[1]] = 1
    return srs_maps(srs, patch, at)[:, :, 0].unflatten(-1, grid)
