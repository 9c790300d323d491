"""The views that the benchmarks of a training step work on: one batch, made by the product's own loader."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from triptych.data.loader import ViewDataset, collate
from triptych.data.views import View, Views
from triptych.methods import METHODS
from triptych.recipe import Recipe

NUDGE = 1e-4  # of the image's side


class NoiseSource:
    """`count` unlabelled pictures of 375 x 500 random pixels; the same ones every time."""

    name, classes = "noise", None

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (375, 500, 3), np.uint8))

    def label(self, index: int) -> int | None:
        return None

    def key(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return f"{self.count:016x}"


def batch_of_views(recipe: Recipe, patch_size: int) -> Views:
    """One batch of the recipe's views, as its loader gives them (uint8 pixels, boxes, samples, masks).

    Boxes are moved by up to NUDGE: where two crops share an edge of the image, whether a patch centre on that edge lies
    inside is a matter of rounding, which two programs may do differently.
    """
    spec = METHODS[type(recipe.method)].view_spec(recipe.method)
    dataset = ViewDataset(NoiseSource(recipe.batch), recipe.views, spec, patch_size, recipe.seed)
    views, _ = collate([dataset[0, i] for i in range(recipe.batch)])
    generator = torch.Generator().manual_seed(recipe.seed)

    def nudged(view: View) -> View:
        return replace(view, box=view.box + NUDGE * (2 * torch.rand(view.box.shape, generator=generator) - 1))

    return replace(
        views,
        global_crops=[nudged(v) for v in views.global_crops],
        local_crops=[nudged(v) for v in views.local_crops],
    )
