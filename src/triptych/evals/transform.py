"""Images as evaluations see them: no augmentation, a fixed size, in order."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triptych.data.crops import Crop
from triptych.data.images import UnreadableImage
from triptych.data.loader import default_workers, in_worker
from triptych.data.pixels import Picture, Pixels, cut, shrink_for
from triptych.data.sources import Source
from triptych.errors import UserError
from triptych.evals.frozen import fast_batch


@dataclass(frozen=True)
class EvalTransform:
    """Shorter side to `resize` pixels (bicubic, anti-aliased), centre crop of `size`, then mean and std."""

    size: int
    resize: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @classmethod
    def of(cls, size: int, mean=mean, std=std) -> "EvalTransform":
        """The field's habit: 256 -> 224, and the same ratio for other sizes."""
        return cls(size, round(size * 256 / 224), tuple(mean), tuple(std))

    def pixels(self, image: Image.Image) -> Tensor:
        """PIL RGB image -> (3, size, size) uint8."""
        return self.middle(Pixels(np.array(image)), *image.size[::-1])

    def read(self, source: Source, index: int) -> Tensor:
        """(3, size, size) uint8 of one image, decoded no larger than need be.  Raises UnreadableImage."""
        picture = Picture(source, index)
        whole = Crop(0, 0, picture.height, picture.width)
        return self.middle(picture.pixels(shrink_for([(whole, self.resize)])), picture.height, picture.width)

    def middle(self, pixels: Pixels, height: int, width: int) -> Tensor:
        """(3, size, size) uint8 of an image of this size."""
        short = min(height, width)
        rows, columns = (self.resize if side == short else self.resize * side // short for side in (height, width))
        resized = cut(pixels, Crop(0, 0, height, width), (rows, columns), "bicubic")
        top, left = (round((side - self.size) / 2) for side in (rows, columns))
        return torch.from_numpy(resized[top : top + self.size, left : left + self.size]).permute(2, 0, 1)


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


def _collate(items: list[tuple[int, Tensor | None]]) -> tuple[list[int], Tensor | None]:
    """Images stay channels last in memory, as they were decoded."""
    read = [(i, x.permute(1, 2, 0)) for i, x in items if x is not None]
    return [i for i, _ in read], torch.stack([x for _, x in read]).permute(0, 3, 1, 2) if read else None


def batches(
    source: Source, transform: EvalTransform, *, batch: int | None, device: torch.device, workers: int | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices into the source and normalised images (B, 3, size, size) on the device, in order.

    batch: None = what is fast there.  Images that cannot be read are left out; UserError where that leaves none.
    """
    batch = batch or fast_batch(device)
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
    for index, pixels in loader:
        if pixels is not None:
            read += len(index)
            yield index, (pixels.to(device, non_blocking=True) * scale).sub_(shift)
    if not read:
        raise UserError(f"no image of {source.name} can be read")
