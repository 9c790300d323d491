"""Pictures that other parts make: of a run's tokens, of what a pixel head reconstructs.  `triptych show` has more."""

import itertools

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from triptych.data.views import View
from triptych.encoders import Encoder
from triptych.evals.reconstruction import Reconstruction
from triptych.show.attention import attends, attention_maps
from triptych.show.colours import heat, three
from triptych.show.patches import patch_pca
from triptych.show.sheet import Panel, Scale, Tile, resized, sheet


def token_sheet(encoder: Encoder, pixels: Tensor, images: Tensor, side: int = 128) -> Image.Image:
    """One row per image: the image, attention of class and class+ (mean over heads), PCA of the patch tokens.

    pixels (B, 3, H, W) uint8 and the same images normalised; side = pixels of a tile.  Encoders without class token,
    such as Swins, have no attention to show.
    """
    columns = {"image": [_array(p) for p in pixels]}
    for name, maps in attention_maps(encoder, images).items() if attends(encoder) else ():
        mean = maps.mean(1)
        shown = (mean / mean.amax((1, 2), keepdim=True)).cpu().numpy()
        columns[f"attention of {name}"] = [heat(x) for x in shown]
    columns["PCA of patches"] = [three(x) for x in patch_pca(encoder, images).cpu().numpy()]
    return _rows(columns, side, {"image"})


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
    photos = {"image": view.images, "corrupted": view.corrupted}
    photos |= {f"block {block}": x for block, x in zip(result.blocks, result.images, strict=True)}
    if len(result.read) > 1:
        photos["mean " + " ".join(map(str, result.read))] = result.trained
    shift, scale = (torch.tensor(x)[:, None, None] for x in (mean, std))
    columns = {
        name: [_array(((x * scale + shift).clamp(0, 1) * 255).round().byte()) for x in images.cpu()]
        for name, images in photos.items()
    }
    maps = result.differences.cpu()
    maps = maps / maps.max().clamp(min=1e-12) if len(maps) else maps
    for i, (a, b) in enumerate(itertools.pairwise(result.blocks)):
        columns[f"|{b} - {a}|"] = [heat(x.numpy()) for x in maps[i]]
    return _rows(columns, side, set(photos), Scale("no difference", "largest") if len(maps) else None)


def _array(pixels: Tensor) -> np.ndarray:
    """(3, H, W) uint8 -> (H, W, 3)"""
    return pixels.permute(1, 2, 0).cpu().numpy()


def _rows(columns: dict[str, list[np.ndarray]], side: int, photos: set[str], scale: Scale | None = None) -> Image.Image:
    """Titles and their tiles, one below the other."""
    rows = zip(*columns.values(), strict=True)
    panels = [
        Panel("", [Tile(name, x, smooth=name in photos) for name, x in zip(columns, row, strict=True)]) for row in rows
    ]
    return sheet([resized(panel, side) for panel in panels], scale=scale, width=1)
