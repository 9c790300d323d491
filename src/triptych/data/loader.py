"""From a source to batches of views.  A batch is a function of (seed, step): resume is exact, workers do not matter."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import cv2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triptych.data.batches import Batches
from triptych.data.colour import COLOURS, Drawn, Role, draw
from triptych.data.corruption import Corruption, corrupt, draw_corruption
from triptych.data.crops import (
    Box,
    Crop,
    LocalReference,
    Overlap,
    local_reference,
    random_crop,
    steer,
    stratified_sample,
)
from triptych.data.images import UnreadableImage
from triptych.data.masks import draw_keep, draw_mask
from triptych.data.pixels import Picture, cut, shrink_for
from triptych.data.sources import Source
from triptych.data.views import View, Views, ViewSpec
from triptych.data.workers import default_workers, in_worker
from triptych.errors import UserError, nearest


class ViewsConfig(BaseModel):
    """One or two global crops and so many local ones of every image."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    global_crops: Literal[1, 2] = 2  # of each image; supervised training takes one
    global_size: int = Field(default=224, ge=1)  # pixels
    local_size: int = Field(default=96, ge=1)  # pixels
    local_crops: int = Field(default=8, ge=0)  # L
    repeats: int = Field(default=1, ge=1)  # of an image in a row, each augmented anew (data/batches.py)
    global_scale: tuple[float, float] = (0.25, 1.0)  # share of the image's area
    local_scale: tuple[float, float] = (0.05, 0.25)
    overlap: Overlap = "independent"  # or steered towards each other: "fixed", "official" (with its slip)
    local_reference: LocalReference = "union"  # what local crops are steered to; "official": as released
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of crops to their size, antialiased either way
    flip: float = Field(default=0.5, ge=0, le=1)  # probability
    colour: str = "dino"  # policy of data/colour.py
    blur_scale: float = Field(default=1.0, ge=0)  # on the policy's blur radii, which are for crops of 96-224 px
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @field_validator("global_scale", "local_scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("a share of the image's area is two numbers, 0 < smallest <= largest <= 1")
        return scale

    @field_validator("std")
    @classmethod
    def _positive(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError("standard deviations must be above 0")
        return std

    @field_validator("colour")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in COLOURS:
            raise ValueError(f"no such policy{nearest(name, COLOURS)} there are {', '.join(COLOURS)}")
        return name


ColourPlace = Literal["auto", "workers", "device"]


class LoaderConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    workers: int | None = Field(default=None, ge=0)  # processes that make views; None: this process's cores, at most 16
    colour: ColourPlace = "auto"  # who changes colours: what is faster here, the workers, or the device by the batch
    cache_side: int | None = Field(default=None, ge=16)  # train from a cache of images of this shorter side, pixels
    max_unreadable: float = Field(default=0.01, ge=0, le=1)  # share of the data set; more of it stops the run


@dataclass(frozen=True)
class Sample:
    """All views of one image: pixels (h, w, 3) uint8, boxes (4,) and samples (M,) or None, global crops first."""

    pixels: list[Tensor]
    boxes: list[Tensor]
    samples: list[Tensor | None]
    masks: list[Tensor]  # (N,) bool, one per global crop; empty where the method masks nothing
    keeps: list[Tensor]  # (n,) int64, likewise of what is dropped
    corruptions: list[Corruption]  # likewise
    colours: list[Tensor]  # (COLUMNS,), one per crop, of data/colour.py; empty where the pixels have their colours
    global_crops: int
    pixel: Tensor  # (2,)
    label: int | None  # of the image that was read; None unless the method asks for it
    unreadable: tuple[str, ...]  # keys that were tried before one could be read


class ViewDataset(Dataset):
    """(epoch, index) or (epoch, index, repeat) -> Sample.  All randomness comes from the seed and this key."""

    def __init__(
        self,
        source: Source,
        config: ViewsConfig,
        spec: ViewSpec,
        patch_size: int,
        seed: int,
        *,
        colour_on_device: bool = False,
    ):
        self.source, self.config, self.spec, self.patch_size, self.seed = source, config, spec, patch_size, seed
        self.colour_on_device = colour_on_device
        if spec.labels:
            check_labels(source)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        """Of this image or the next one that can be read."""
        index = key[1]
        unreadable = []
        for i in range(min(100, len(self.source))):
            rng = np.random.default_rng([self.seed, *key])
            try:
                return self._sample((index + i) % len(self.source), rng, tuple(unreadable))
            except UnreadableImage as error:
                unreadable.append(str(error))
        raise UserError(f"{len(unreadable)} images in a row cannot be read, the first: {unreadable[0]}")

    def _sample(self, position: int, rng: np.random.Generator, unreadable: tuple[str, ...]) -> Sample:
        """Everything is drawn before the first pixel: crops tell at which size the image is decoded."""
        c, picture = self.config, Picture(self.source, position)
        height, width = picture.height, picture.width
        label = self.source.label(position) if self.spec.labels else None
        pixel = _floats([1 / height, 1 / width])
        sample = Sample([], [], [], [], [], [], [], c.global_crops, pixel=pixel, label=label, unreadable=unreadable)
        windows = self._windows(rng)
        drawn = [
            (crop, flipped, role, draw(c.colour, role, rng, blur_scale=c.blur_scale))
            for (crop, flipped), role in self._crops(height, width, rng)
        ]
        self._hide(sample, rng)  # last: asking for masks changes no crop and no colour
        side = {"global_1": c.global_size, "global_2": c.global_size, "local": c.local_size}
        pixels = picture.pixels(shrink_for((crop, side[role]) for crop, _, role, _ in drawn))
        for crop, flipped, role, colour in drawn:
            view = cut(pixels, crop, (side[role], side[role]), c.interpolation)
            view = cv2.flip(view, 1) if flipped else view
            if not self.colour_on_device:
                view = colour(view)
            else:
                assert isinstance(colour, Drawn), "data/placement.py leaves RandAugment to the workers"
                sample.colours.append(_floats(colour.row()))
            sample.pixels.append(torch.from_numpy(view))
            sample.boxes.append(_edges(crop, flipped, height, width))
            sample.samples.append(windows["local" if role == "local" else "global"])
        return sample

    def _crops(self, height: int, width: int, rng: np.random.Generator) -> Iterator[tuple[tuple[Crop, bool], Role]]:
        c = self.config

        def draw(scale: tuple[float, float], reference: Box | None) -> tuple[Crop, bool]:
            crop = random_crop(height, width, scale, rng)
            if reference is not None:
                crop = steer(crop, reference, height, width, c.overlap)
            return crop, bool(rng.random() < c.flip)

        first = last = draw(c.global_scale, None)
        if c.global_crops == 2:
            last = draw(c.global_scale, Box.of(*first))
        yield first, "global_1"
        if c.global_crops == 2:
            yield last, "global_2"
        reference = local_reference(Box.of(*first), Box.of(*last), c.local_reference)
        for _ in range(c.local_crops):
            yield draw(c.local_scale, reference), "local"

    def _windows(self, rng: np.random.Generator) -> dict[str, Tensor | None]:
        """One stratified pattern for both global views and one for all local views of the image, as released."""
        sizes = {"global": self.config.global_size, "local": self.config.local_size}
        windows = {"global": self.spec.window_global, "local": self.spec.window_local}
        side = {level: size // self.patch_size for level, size in sizes.items()}
        return {
            level: torch.from_numpy(stratified_sample((side[level], side[level]), window, rng)) if window else None
            for level, window in windows.items()
        }

    def _hide(self, sample: Sample, rng: np.random.Generator) -> None:
        """What the student does not see of each global crop, each with its own share; local crops are seen whole."""
        size, spec = self.config.global_size, self.spec
        side = size // self.patch_size
        for _ in range(self.config.global_crops):
            if spec.mask is not None:
                sample.masks.append(torch.from_numpy(draw_mask(spec.mask, (side, side), rng)))
            if spec.drop is not None:
                sample.keeps.append(torch.from_numpy(draw_keep(side * side, spec.drop, rng)))
            if spec.corruption is not None:
                sample.corruptions.append(draw_corruption(spec.corruption, size, size, rng))


def check_labels(source: Source) -> None:
    """Raises UserError unless every image has a label: before training, not at the first image that lacks one."""
    if source.classes is None:
        raise UserError(f"{source.name} has no labels: put the images of each class in a sub-folder of its own")
    without = [i for i in range(len(source)) if source.label(i) is None]
    if without:
        raise UserError(
            f"{len(without)} of {len(source)} images of {source.name} have no label, the first: "
            f"{source.key(without[0])}; give each one, or leave those images out"
        )


def _edges(crop: Crop, flipped: bool, height: int, width: int) -> Tensor:
    """(4,) y0 x0 y1 x1 in image coordinates, x0 > x1 when flipped."""
    left, right = crop.j / width, (crop.j + crop.w) / width
    if flipped:
        left, right = right, left
    return _floats([crop.i / height, left, (crop.i + crop.h) / height, right])


def _floats(numbers: list[float]) -> Tensor:
    """(n,) float32; at a third of what torch.tensor takes, which counts where every crop makes two."""
    return torch.from_numpy(np.array(numbers, np.float32))


def collate(samples: list[Sample]) -> tuple[Views, list[str]]:
    """-> views (uint8, channels last in memory), reasons of images that could not be read"""

    first = samples[0]

    def view(i: int) -> View:
        mask = torch.stack([s.masks[i] for s in samples]) if i < len(first.masks) else None
        pixels, corrupted, codes = torch.stack([s.pixels[i] for s in samples]), None, None
        if i < len(first.corruptions):
            corrupted, codes = corrupt(pixels, [s.corruptions[i] for s in samples])
            corrupted = corrupted.permute(0, 3, 1, 2)
        return View(
            images=pixels.permute(0, 3, 1, 2),
            box=torch.stack([s.boxes[i] for s in samples]),
            pixel=torch.stack([s.pixel for s in samples]),
            samples=None if first.samples[i] is None else torch.stack([cast(Tensor, s.samples[i]) for s in samples]),
            mask=mask,
            hidden=None if mask is None else mask.flatten().nonzero()[:, 0],
            keep=torch.stack([s.keeps[i] for s in samples]) if i < len(first.keeps) else None,
            corrupted=corrupted,
            pixel_mask=codes,
            colours=torch.stack([s.colours[i] for s in samples]) if first.colours else None,
        )

    views, n = [view(i) for i in range(len(first.pixels))], first.global_crops
    labels = None if first.label is None else torch.tensor([s.label for s in samples])
    return Views(views[:n], views[n:], labels), [reason for s in samples for reason in s.unreadable]


def make_loader(dataset: ViewDataset, batches: Batches, config: LoaderConfig, *, pin: bool) -> DataLoader:
    """Yields (Views, reasons of unreadable images) for every entry of `batches`."""
    workers = default_workers() if config.workers is None else config.workers
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of lists will do
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=in_worker,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
