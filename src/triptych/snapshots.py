"""Pictures over time: what the tokens see in a few fixed images at the start, the end, and when health is measured.

The principal components are those of each moment: tokens move, so no basis could stay.  Within one picture equal
colours mean similar tokens; from one picture to the next colours may swap without any meaning.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from triptych.data.images import UnreadableImage
from triptych.data.sources import Source
from triptych.encoders import Encoder
from triptych.errors import UserError
from triptych.evals.frozen import frozen
from triptych.evals.transform import EvalTransform
from triptych.pictures import token_sheet
from triptych.recipe import Recipe

FOLDER = "pictures"
MOST_PATCHES = 32
"""Rows (and columns) of patches of a picture, at most: attention needs memory by the square of their number."""


def path_of(out: Path, step: int) -> Path:
    return out / FOLDER / f"step_{step:09d}.png"


def steps(out: Path) -> list[int]:
    """Optimiser steps of the pictures of a run, ascending."""
    names = (path.stem.removeprefix("step_") for path in (out / FOLDER).glob("step_*.png"))
    return sorted(int(name) for name in names if name.isdecimal())


class Snapshots:
    """Writes `path_of(out, step)`.  Draws no random number, so that a run's bits are the same with and without it."""

    def __init__(self, recipe: Recipe, source: Source, out: Path, device: torch.device, say: Callable[[str], None]):
        self.recipe, self.source, self.out, self.device, self.say = recipe, source, out, device, say
        self.wanted = recipe.health.pictures
        self._pixels: Tensor | None = None

    def take(self, encoder: Encoder, step: int) -> None:
        """A picture of the encoder after `step` optimiser steps.  Whatever fails is said once, and the run goes on."""
        if not self.wanted:
            return
        try:
            self._write(encoder, step)
        except Exception as error:  # of any kind: a run of days is worth more than its pictures
            self.say(f"no more pictures of this run are taken ({type(error).__name__}: {error})")
            self.wanted = 0

    def _write(self, encoder: Encoder, step: int) -> None:
        views = self.recipe.views
        if self._pixels is None:
            size = picture_size(encoder, views.global_size)
            self._pixels = fixed_pixels(self.source, size, self.wanted, self.recipe.seed)
        mean, std = (torch.tensor(x, device=self.device)[:, None, None] for x in (views.mean, views.std))
        images = (self._pixels.to(self.device) / 255 - mean) / std
        with frozen(encoder, self.device):
            sheet = token_sheet(encoder, self._pixels, images)
        target = path_of(self.out, step)
        target.parent.mkdir(exist_ok=True)
        part = target.with_suffix(".part")
        sheet.save(part, format="PNG")
        part.replace(target)


def picture_size(encoder: Encoder, trained: int) -> int:
    """Pixels: twice the size of training, for a finer grid, where the encoder takes that and it is not too much."""
    try:
        rows, _ = encoder.grid(2 * trained, 2 * trained)
    except UserError:
        return trained
    return 2 * trained if rows <= MOST_PATCHES else trained


def fixed_pixels(source: Source, size: int, count: int, seed: int) -> Tensor:
    """(n, 3, size, size) uint8 of at most `count` images that the seed draws; what cannot be read gives way to others.

    Raises UserError where none of those tried can be read.
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    transform, found = EvalTransform.of(size), []
    for index in order[: 8 * count]:
        try:
            found.append(transform.read(source, index))
        except UnreadableImage:
            continue
        if len(found) == count:
            break
    if not found:
        raise UserError(f"none of {min(len(order), 8 * count)} images of {source.name} can be read")
    return torch.stack(found)
