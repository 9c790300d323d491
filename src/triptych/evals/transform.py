"""Images as evaluations see them: no augmentation, a fixed size or a fixed longest side."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triptych.data.crops import Crop
from triptych.data.images import UnreadableImage
from triptych.data.pixels import Picture, Pixels, cut, shrink_for
from triptych.data.sources import Source
from triptych.data.workers import default_workers, in_worker, unwrapped
from triptych.errors import UserError
from triptych.evals.frozen import fast_batch


@dataclass(frozen=True)
class EvalTransform:
    """An image resized (anti-aliased), then mean and std.

    shape "crop": shorter side to `resize` pixels, then the centre crop of `size`.  "square": to `size` x `size`,
    whatever its own aspect (copy detection).  "longest": the longer side to `size` where it is more, aspect kept, as
    Pillow's `thumbnail` (retrieval); images then differ in size.  The last two have no use for `resize`.
    """

    size: int
    resize: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    shape: Literal["crop", "square", "longest"] = "crop"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # MSN: bilinear

    @classmethod
    def of(cls, size: int, mean=mean, std=std) -> "EvalTransform":
        """The field's habit: 256 -> 224, and the same ratio for other sizes."""
        return cls(size, round(size * 256 / 224), tuple(mean), tuple(std))

    def pixels(self, image: Image.Image) -> Tensor:
        """PIL RGB image -> (3, H, W) uint8; H = W = size but for "longest"."""
        return self.middle(Pixels(np.array(image)), *image.size[::-1])

    def read(self, source: Source, index: int) -> Tensor:
        """(3, H, W) uint8 of one image, decoded no larger than need be.  Raises UnreadableImage."""
        picture = Picture(source, index)
        whole, sides = Crop(0, 0, picture.height, picture.width), self.resized(picture.height, picture.width)
        return self.middle(picture.pixels(shrink_for([(whole, min(sides))])), picture.height, picture.width)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the whole image after resizing."""
        if self.shape == "square":
            return self.size, self.size
        if self.shape == "longest":
            return _thumbnail(height, width, self.size)
        short = min(height, width)
        rows, columns = (self.resize if side == short else self.resize * side // short for side in (height, width))
        return rows, columns

    def middle(self, pixels: Pixels, height: int, width: int) -> Tensor:
        """(3, H, W) uint8 of an image of this size."""
        rows, columns = self.resized(height, width)
        resized = cut(pixels, Crop(0, 0, height, width), (rows, columns), self.interpolation)
        if self.shape == "crop":
            top, left = (round((side - self.size) / 2) for side in (rows, columns))
            resized = resized[top : top + self.size, left : left + self.size]
        return torch.from_numpy(resized).permute(2, 0, 1)


def _thumbnail(height: int, width: int, longest: int) -> tuple[int, int]:
    """Pillow's rule: the shorter side is rounded to what keeps width / height best, and is at least 1."""
    if max(height, width) <= longest:
        return height, width
    aspect, short = width / height, longest * min(height, width) / max(height, width)
    near = [n for n in (math.floor(short), math.ceil(short)) if n] or [1]
    if width > height:
        return min(near, key=lambda rows: abs(aspect - longest / rows)), longest
    return longest, min(near, key=lambda columns: abs(aspect - columns / longest))


class _Images(Dataset):
    def __init__(self, source: Source, transform: EvalTransform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        try:
            return index, self.transform.read(self.source, index)
        except UnreadableImage:
            return index, None


Group = tuple[list[int], Tensor]
"""Indices into the source, and images of one size."""


def _collate(items: list[tuple[int, Tensor | None]]) -> list[Group]:
    """Images of each size together; they stay channels last in memory, as they were decoded."""
    groups: dict[torch.Size, tuple[list[int], list[Tensor]]] = {}
    for i, x in items:
        if x is not None:
            indices, images = groups.setdefault(x.shape, ([], []))
            indices.append(i)
            images.append(x.permute(1, 2, 0))
    return [(indices, torch.stack(images).permute(0, 3, 1, 2)) for indices, images in groups.values()]


def grouped_batches(
    source: Source, transform: EvalTransform, *, batch: int, device: torch.device, workers: int | None = None
) -> Iterator[list[Group]]:
    """For every `batch` images in order: indices into the source and normalised images (B, 3, H, W), by size.

    Images that cannot be read are left out; UserError where that leaves none.
    """
    loader = DataLoader(
        _Images(source, transform),
        batch_size=batch,
        collate_fn=_collate,
        num_workers=min(default_workers() if workers is None else workers, -(-len(source) // batch)),
        worker_init_fn=in_worker,
        pin_memory=device.type == "cuda",
    )
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (transform.mean, transform.std))
    scale, shift, read = 1 / (255 * std), mean / std, 0
    for groups in unwrapped(loader):
        read += len(groups)
        yield [(i, (pixels.to(device, non_blocking=True) * scale).sub_(shift)) for i, pixels in groups]
    if not read:
        raise UserError(f"no image of {source.name} can be read")


def batches(
    source: Source, transform: EvalTransform, *, batch: int | None, device: torch.device, workers: int | None = None
) -> Iterator[Group]:
    """`grouped_batches` one after the other: in order but where sizes differ.  batch: None = what is fast there."""
    for groups in grouped_batches(
        source, transform, batch=batch or fast_batch(device, transform.size), device=device, workers=workers
    ):
        yield from groups
