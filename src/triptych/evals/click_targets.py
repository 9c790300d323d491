"""What is to be found from a click: targets made from annotated regions, counted by patch.

A prediction is made of whole patches.  So a mask is needed only as two numbers of each patch, its pixels inside the
mask and all of its pixels, at whatever resolution the prediction is compared with it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triptych.data.images import UnreadableImage
from triptych.data.regions import Annotated, Region
from triptych.data.workers import default_workers, in_worker, unwrapped
from triptych.encoders import Encoder
from triptych.errors import UserError
from triptych.evals.frozen import fast_batch, frozen
from triptych.evals.transform import EvalTransform
from triptych.precision import fast_precision
from triptych.progress import progress

Unit = Literal["category", "instance", "largest", "component"]
Resolution = Literal["size", "patches", "original"]


def targets_of(regions: Sequence[Region], unit: Unit) -> Iterator[tuple[int, np.ndarray]]:
    """(category, mask (H, W) bool) of every target of an image, one at a time.  Crowds are left out.

    "instance": every region.  "category": the union of each category's regions, by category.  "largest": the region of
    most pixels, the first of equals.  "component": every 8-connected part of every region, which stands for instances
    where masks only tell classes.
    """
    regions = [r for r in regions if not r.crowd]
    if unit == "largest":
        regions = [max(regions, key=lambda r: int(r.mask.sum()))] if regions else []
    if unit == "category":
        for category in sorted({r.category for r in regions}):
            yield category, np.logical_or.reduce([r.mask for r in regions if r.category == category])
        return
    for region in regions:
        if unit == "component":
            count, labels = cv2.connectedComponents(region.mask.astype(np.uint8), connectivity=8)
            yield from ((region.category, labels == i) for i in range(1, count))
        else:
            yield region.category, region.mask


@dataclass(frozen=True)
class Raster:
    """Patches laid over masks (H, W), of which some rows and columns are looked at, some of them more than once.

    Counting is two products of matrices: of the mask's rows with how often each patch looks at them, then its columns.
    """

    down: np.ndarray  # (rows + 1, H) float32: times that a patch looks at each row; the last: Σ of where, in patches
    across: np.ndarray  # (columns + 1, W) float32, likewise

    @classmethod
    def resized(cls, shape: tuple[int, int], size: int, grid: tuple[int, int]) -> "Raster":
        """The mask resized to size x size pixels, each of which takes the nearest pixel: ⌊(i + ½) H / size⌋."""
        sides = [_looks(side, _nearest(size, side), _nearest(size, n), n) for side, n in zip(shape, grid, strict=True)]
        return cls(*sides)

    @classmethod
    def original(cls, shape: tuple[int, int], grid: tuple[int, int]) -> "Raster":
        """The mask as it is: a pixel belongs to the patch that its centre lies in."""
        sides = [_looks(side, np.arange(side), _nearest(side, n), n) for side, n in zip(shape, grid, strict=True)]
        return cls(*sides)

    def total(self) -> np.ndarray:
        """Pixels of each patch, (N,) float32."""
        return np.outer(self.down[:-1].sum(1), self.across[:-1].sum(1)).ravel()

    def count(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of a mask (H, W) bool: pixels of each patch inside it, (N,) float32, and its centroid: row and column, in
        patches (NaN of an empty mask)."""
        sums = self.down @ mask.astype(np.float32) @ self.across.T
        inside = sums[:-1, :-1]
        with np.errstate(invalid="ignore"):
            centroid = np.array([sums[-1, :-1].sum(), sums[:-1, -1].sum()]) / inside.sum()
        return inside.ravel(), centroid


def _looks(side: int, seen: np.ndarray, patch: np.ndarray, patches: int) -> np.ndarray:
    """Along one axis: (patches + 1, side) as in `Raster`, of pixels seen (n,) in the patch of each (n,)."""
    out = np.zeros((patches + 1, side), np.float32)
    np.add.at(out, (patch, seen), 1)
    np.add.at(out[-1], seen, ((np.arange(len(seen)) + 0.5) / len(seen) * patches).astype(np.float32))
    return out


def _nearest(count: int, of: int) -> np.ndarray:
    """For `count` equal parts of a line the one of `of` equal parts that their middles lie in, (count,) int64."""
    return (2 * np.arange(count) + 1) * of // (2 * count)


@dataclass(frozen=True)
class Targets:
    """The n targets of one image that at least half of a patch lies in; N patches, row by row."""

    index: int  # of the image
    readable: bool
    numbers: list[int]  # of each target among all of the image's
    categories: list[int]
    coverage: np.ndarray  # (n, N) float32, share of a patch inside the target at `size`
    centroid: np.ndarray  # (n, 2) float64, mean row and column of the target's pixels at `size`, in patches
    inside: np.ndarray  # (n, N) float32, what is compared with predictions: pixels of a patch inside the target
    total: np.ndarray  # (N,) float32, pixels of a patch
    unmarked: np.ndarray  # (N,) float32, share of a patch at `size` in no region, crowds included
    areas: list[float]  # of all targets, also those left out: share of the image at `size`

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class TargetReader:
    """Reads the targets of an image for patches of a grid."""

    source: Annotated
    unit: Unit
    size: int  # pixels
    grid: tuple[int, int]
    resolution: Resolution = "size"

    def read(self, index: int) -> Targets:
        """Raises UnreadableImage where the source does so for its annotation."""
        regions = self.source.regions(index)
        if not regions:
            return self.nothing(index, readable=True)
        shape = regions[0].mask.shape
        resized, original = Raster.resized(shape, self.size, self.grid), Raster.original(shape, self.grid)
        pixels, found, areas = resized.total(), [], []
        for number, (category, mask) in enumerate(targets_of(regions, self.unit)):
            inside, centroid = resized.count(mask)
            areas.append(float(inside.sum() / pixels.sum()))
            coverage = inside / pixels
            if coverage.max() >= 0.5:
                inside = original.count(mask)[0] if self.resolution == "original" else inside
                found.append((number, category, coverage, centroid, inside))
        if not found:
            return self.nothing(index, readable=True, areas=areas)
        numbers, categories = ([one[i] for one in found] for i in (0, 1))
        coverage, centroid, inside = (np.stack([one[i] for one in found]) for i in (2, 3, 4))
        total = original.total() if self.resolution == "original" else pixels
        if self.resolution == "patches":
            inside, total = (coverage >= 0.5).astype(np.float32), np.ones_like(pixels)
        unmarked = 1 - resized.count(np.logical_or.reduce([r.mask for r in regions]))[0] / pixels
        return Targets(index, True, numbers, categories, coverage, centroid, inside, total, unmarked, areas)

    def nothing(self, index: int, *, readable: bool, areas: Sequence[float] = ()) -> Targets:
        """No target of this image."""
        none = np.zeros((0, self.grid[0] * self.grid[1]), np.float32)
        return Targets(index, readable, [], [], none, np.zeros((0, 2)), none, none[:0], none[:0], list(areas))


@dataclass(frozen=True)
class AnnotatedTokens:
    """Images of a source, at most `images` of them, drawn by the seed: their targets and their patch tokens."""

    encoder: Encoder
    source: Annotated
    unit: Unit
    size: int  # pixels; images are resized to size x size whatever their aspect, bicubic and antialiased
    resolution: Resolution = "size"
    mean: tuple[float, float, float] = EvalTransform.mean
    std: tuple[float, float, float] = EvalTransform.std
    images: int | None = None
    seed: int = 0
    batch: int | None = None  # images per encoder call; None = what is fast
    device: torch.device | str = "cpu"
    precision: torch.dtype | None = None  # None = what is fast
    workers: int | None = None

    def __post_init__(self) -> None:
        check_sample(self.images, self.seed)
        check_size(self.size, self.encoder.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        return self.encoder.grid(self.size, self.size)

    def frozen(self) -> AbstractContextManager[None]:
        """The encoder as it is measured: iterate within it."""
        return frozen(self.encoder, self.device, self.precision or fast_precision(self.device))

    def __iter__(self) -> Iterator[tuple[Targets, Tensor | None]]:
        """In the source's order: targets, and tokens (N, D) of the last block after its norm, of images with any.

        Raises UserError for tokens that are not finite, and where no image can be read.
        """
        batch = self.batch or fast_batch(self.device, self.size)
        chosen = sample(len(self.source), self.images, self.seed)
        loader = DataLoader(
            _Examples(self),
            sampler=chosen,
            batch_size=batch,
            collate_fn=_together,
            num_workers=min(default_workers() if self.workers is None else self.workers, -(-len(chosen) // batch)),
            worker_init_fn=in_worker,
            pin_memory=torch.device(self.device).type == "cuda",
        )
        readable = 0
        for every, pixels in progress(unwrapped(loader), f"images of {self.source.name}:", len(chosen), each=batch):
            readable += sum(targets.readable for targets in every)
            tokens = iter(()) if pixels is None else iter(self._tokens(pixels))
            for targets in every:
                yield targets, next(tokens) if len(targets) else None
        if not readable:
            raise UserError(f"no image of {self.source.name} can be read")

    def _tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size) uint8 -> (B, N, D)."""
        mean, std = (torch.tensor(x, device=self.device)[:, None, None] for x in (self.mean, self.std))
        patch = self.encoder((pixels.to(self.device, non_blocking=True) / 255 - mean) / std).patch
        if not patch.isfinite().all():
            raise UserError("patch tokens hold NaN or infinity; check the encoder's weights")
        return patch


class _Examples(Dataset):
    """index -> targets, and the image (3, size, size) uint8 where it has any."""

    def __init__(self, of: AnnotatedTokens) -> None:
        self.reader = TargetReader(of.source, of.unit, of.size, of.grid, of.resolution)
        self.transform = EvalTransform(of.size, of.size, of.mean, of.std, shape="square")

    def __getitem__(self, index: int) -> tuple[Targets, Tensor | None]:
        try:
            targets = self.reader.read(index)
            return targets, self.transform.read(self.reader.source, index) if len(targets) else None
        except UnreadableImage:
            return self.reader.nothing(index, readable=False), None


def _together(examples: list[tuple[Targets, Tensor | None]]) -> tuple[list[Targets], Tensor | None]:
    """One tensor of all images that have targets: each tensor of a worker takes a file descriptor."""
    pixels = [image for _, image in examples if image is not None]
    return [targets for targets, _ in examples], torch.stack(pixels) if pixels else None


def sample(count: int, images: int | None, seed: int) -> list[int]:
    """Which images are measured: all, or at most so many drawn by the seed; in order."""
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:images].tolist())


def check_sample(images: int | None, seed: int) -> None:
    if images is not None and images < 1:
        raise UserError(f"images {images}: measure at least 1, or leave the setting out for all")
    if seed < 0:
        raise UserError(f"seed {seed}: give a number of 0 or more")


def check_size(size: int, patch: int) -> None:
    if size < 1 or size % patch:
        near = sorted({max(1, size // patch) * patch, max(1, size // patch + 1) * patch})
        raise UserError(
            f"size {size} px does not divide into the encoder's patches of {patch} px: give a multiple, "
            f"such as {' or '.join(map(str, near))}"
        )
