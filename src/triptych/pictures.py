"""Pictures of what an encoder's tokens see."""

import itertools

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from triptych.data.views import View
from triptych.encoders import Encoder
from triptych.evals.reconstruction import Reconstruction

_MARGIN = 4  # pixels between tiles


@torch.no_grad()
def class_attention(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """What the class token and, where there is one, class+ look at in the last block, mean over heads.

    images (B, 3, H, W) -> {"class": (B, rows, columns), "class+": ...}, each map divided by its own maximum.
    """
    spec, grid = encoder.spec, encoder.grid(*images.shape[-2:])
    prefix = spec.cls + spec.cls_plus + spec.register
    attention = encoder.last_attention(images).mean(1)  # (B, T, T)
    maps = {}
    for name, row in [("class", 0)] * spec.cls + [("class+", spec.cls)] * spec.cls_plus:
        x = attention[:, row, prefix:].unflatten(1, grid)
        maps[name] = x / x.amax((1, 2), keepdim=True)
    return maps


@torch.no_grad()
def patch_pca(encoder: Encoder, images: Tensor) -> Tensor:
    """(B, rows, columns, 3) in 0..1: the first three principal components of all the images' patch tokens, as colours.

    Components are shared by the images, so equal colours mean similar tokens.
    """
    tokens = encoder(images)
    assert tokens.grid is not None
    x = tokens.patch.flatten(0, 1).double()
    x = x - x.mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    y = x @ directions[:3].T
    low, high = torch.quantile(y, torch.tensor([0.02, 0.98], dtype=y.dtype), dim=0)
    return ((y - low) / (high - low)).clamp(0, 1).float().unflatten(0, (len(images), -1)).unflatten(1, tokens.grid)


def heat(values: np.ndarray) -> np.ndarray:
    """(H, W) in 0..1 -> (H, W, 3) uint8, dark blue to yellow."""
    levels = (values * 255).round().astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _tile(values: Tensor, side: int) -> np.ndarray:
    """A token map (rows, columns) or (rows, columns, 3) as a square tile; single tokens stay visible."""
    array = values.cpu().numpy()
    colours = heat(array) if array.ndim == 2 else (array * 255).round().astype(np.uint8)
    return cv2.resize(colours, (side, side), interpolation=cv2.INTER_NEAREST)


def token_sheet(encoder: Encoder, pixels: Tensor, images: Tensor, side: int = 128) -> Image.Image:
    """One row per image: the image, attention of class and class+, PCA of the patch tokens.

    pixels (B, 3, H, W) uint8 and the same images normalised; side = pixels of a tile.
    """
    columns: dict[str, list[np.ndarray]] = {
        "image": [cv2.resize(p.permute(1, 2, 0).numpy(), (side, side), interpolation=cv2.INTER_CUBIC) for p in pixels]
    }
    for name, maps in class_attention(encoder, images).items():
        columns[f"attention of {name}"] = [_tile(m, side) for m in maps]
    columns["PCA of patches"] = [_tile(m, side) for m in patch_pca(encoder, images)]
    return _sheet(columns, side)


def reconstruction_sheet(
    result: Reconstruction,
    view: View,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    side: int = 128,
) -> Image.Image:
    """One row per image: the image, what the student saw, R_l of every block, differences of neighbouring blocks.

    Pixels are put back to 0..1 by mean and std, and cut off there.  A head that reads the mean of several blocks adds
    what it makes of that, after R_l.  The differences share one scale, 0 to their largest value.
    """
    assert view.corrupted is not None
    columns = {"image": view.images, "corrupted": view.corrupted}
    columns |= {f"block {block}": x for block, x in zip(result.blocks, result.images, strict=True)}
    if len(result.read) > 1:
        columns["mean " + " ".join(map(str, result.read))] = result.trained
    shift, scale = (torch.tensor(x)[:, None, None] for x in (mean, std))
    tiles = {
        name: [_photo((x * scale + shift).clamp(0, 1), side) for x in images.cpu()] for name, images in columns.items()
    }
    maps = result.differences.cpu()
    maps = maps / maps.max().clamp(min=1e-12) if len(maps) else maps
    for i, name in enumerate(f"|{b} - {a}|" for a, b in itertools.pairwise(result.blocks)):
        tiles[name] = [_tile(x, side) for x in maps[i]]
    return _sheet(tiles, side)


def _photo(pixels: Tensor, side: int) -> np.ndarray:
    """(3, H, W) in 0..1 as a square tile."""
    array = (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return cv2.resize(array, (side, side), interpolation=cv2.INTER_AREA if len(array) > side else cv2.INTER_CUBIC)


def _sheet(columns: dict[str, list[np.ndarray]], side: int) -> Image.Image:
    font, head, step = ImageFont.load_default(size=13), 22, side + _MARGIN
    rows = len(next(iter(columns.values())))
    sheet = Image.new("RGB", (len(columns) * step + _MARGIN, rows * step + head + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (name, tiles) in enumerate(columns.items()):
        x = _MARGIN + c * step
        draw.text((x + side / 2, head / 2 + 2), name, fill="black", font=font, anchor="mm")
        for r, tile in enumerate(tiles):
            sheet.paste(Image.fromarray(tile), (x, head + _MARGIN + r * step))
    return sheet
