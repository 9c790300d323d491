"""How much an encoder's tokens vary where an image is cropped or half hidden (MMC, arXiv 2308.11448, Table 10).

Image level: the global token over random crops.  Patch level: the token of one position over maskings of one crop.
Low variance says that the encoder is stable, not that it is good: one that ignores its input has 0.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triptych.data.corruption import block_cover, draw_blocks
from triptych.data.crops import Crop, random_crop
from triptych.data.images import UnreadableImage
from triptych.data.pixels import Picture, cut, shrink_for
from triptych.data.sources import Source
from triptych.data.workers import default_workers, in_worker, unwrapped
from triptych.encoders import Encoder
from triptych.errors import UserError
from triptych.evals.frozen import fast_batch, frozen
from triptych.evals.transform import EvalTransform

HIDDEN = 0.5  # of the pixels; at one half `draw_blocks` draws no other share


@dataclass(frozen=True)
class VarianceResult:
    """Unbiased variances over the versions of an image, means over dimensions and images (patch: and positions)."""

    image: float  # of the global token, over random crops
    patch: float  # of the patch tokens, over maskings
    images: int  # that were measured
    unreadable: int  # left out besides
    views: int  # crops, and as many maskings, of each image
    size: int  # pixels
    scale: tuple[float, float]  # of the crops, share of the image's area
    seed: int


def variance(
    encoder: Encoder,
    source: Source,
    transform: EvalTransform,
    *,
    views: int = 128,
    scale: tuple[float, float] = (0.25, 1.0),
    images: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> VarianceResult:
    """Of the last block's tokens, after the final norm; encoders without a class token give the mean patch for it.

    views: crops of `transform.size` pixels whose area is U(scale) of the image's, neither flipped nor recoloured; and
    as many times the centre crop with half of its pixels in blocks of N(0, 1) in normalised space (GMML's).
    images: at most so many, drawn once by the seed; None = all.  batch: views per encoder call (None = what is fast),
    which changes no number: what is drawn for an image is a function of (seed, index) alone (noise: on one kind of
    device).
    Raises UserError for fewer than 2 views, a scale outside (0, 1], and where no image can be read.
    """
    _check(views, scale, images, seed)
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:images].tolist()
    loader = DataLoader(
        _Disturbed(source, transform, views, scale, seed),
        sampler=sorted(chosen),
        batch_size=None,
        num_workers=min(default_workers() if workers is None else workers, len(chosen)),
        worker_init_fn=in_worker,
    )
    with frozen(encoder, device):
        at_once = batch or fast_batch(device, transform.size)
        measured = [
            _levels(encoder, drawn, transform, at_once, device) for drawn in unwrapped(loader) if drawn is not None
        ]
    if not measured:
        raise UserError(f"no image of {source.name} can be read")
    image, patch = np.mean(measured, 0).tolist()
    return VarianceResult(image, patch, len(measured), len(chosen) - len(measured), views, transform.size, scale, seed)


def _levels(
    encoder: Encoder,
    drawn: tuple[Tensor, Tensor, Tensor, int],
    transform: EvalTransform,
    batch: int,
    device: torch.device | str,
) -> list[float]:
    """The image-level and the patch-level variance of one image, from what `_Disturbed` gives of it."""
    crops, centre, covers, noise_seed = drawn
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (transform.mean, transform.std))
    cropped = ((x.to(device) / 255 - mean) / std for x in crops.split(batch))
    hidden = _half_noise((centre.to(device) / 255 - mean) / std, covers, noise_seed, batch)
    return [
        streamed_variance(encoder(x).global_token for x in cropped).mean().item(),
        streamed_variance(encoder(x).patch for x in hidden).mean().item(),
    ]


def streamed_variance(chunks: Iterable[Tensor]) -> Tensor:
    """Chunks (rows, ...) of any number of rows -> the unbiased variance over all rows (...), float64.

    One chunk at a time is held.  The sums are of differences from the first row: with those of the values themselves,
    a small variance beside a large mean would drown in rounding.
    """
    rows, first, total, squares = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    for chunk in chunks:
        x = chunk.double()
        if not rows:
            first, total, squares = x[0], torch.zeros_like(x[0]), torch.zeros_like(x[0])
        x = x - first
        rows, total, squares = rows + len(x), total + x.sum(0), squares + x.square().sum(0)
    return ((squares - total.square() / rows) / (rows - 1)).clamp(min=0)


def _half_noise(image: Tensor, covers: Tensor, seed: int, batch: int) -> Iterator[Tensor]:
    """Versions of a normalised image (3, H, W) with noise where covers (views, H, W) are True, `batch` at a time."""
    generator = torch.Generator(image.device).manual_seed(seed)
    for cover in covers.split(batch):
        # View by view, so that the noise of a view does not depend on how many are drawn together.
        noise = [torch.randn(image.shape, generator=generator, device=image.device) for _ in cover]
        yield torch.where(cover[:, None].to(image.device), torch.stack(noise), image)


class _Disturbed(Dataset):
    """index -> crops (views, 3, S, S) uint8, centre crop (3, S, S) uint8, covers (views, S, S) bool, the noise's seed.

    None for an image that cannot be read.
    """

    def __init__(self, source: Source, transform: EvalTransform, views: int, scale: tuple[float, float], seed: int):
        self.source, self.transform, self.views, self.scale, self.seed = source, transform, views, scale, seed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int] | None:
        rng, size = np.random.default_rng([self.seed, index]), self.transform.size
        try:
            picture = Picture(self.source, index)
            height, width = picture.height, picture.width
            crops, covers = [], []
            for _ in range(self.views):
                crops.append(random_crop(height, width, self.scale, rng))
                covers.append(torch.from_numpy(block_cover(draw_blocks(HIDDEN, size, size, rng), size, size)))
            whole = Crop(0, 0, height, width), self.transform.resize
            pixels = picture.pixels(shrink_for([whole, *((crop, size) for crop in crops)]))
        except UnreadableImage:
            return None
        views = [torch.from_numpy(cut(pixels, crop, (size, size), "bicubic")) for crop in crops]
        centre, noise_seed = self.transform.middle(pixels, height, width), int(rng.integers(2**63))
        return torch.stack(views).permute(0, 3, 1, 2), centre, torch.stack(covers), noise_seed


def _check(views: int, scale: tuple[float, float], images: int | None, seed: int) -> None:
    if views < 2:
        raise UserError(f"views {views}: a variance needs at least 2 (the paper takes 128)")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"scale {scale[0]} {scale[1]}: give shares of the image's area, 0 < smallest <= largest <= 1")
    if images is not None and images < 1:
        raise UserError(f"images {images}: measure at least 1, or leave the setting out for all")
    if seed < 0:
        raise UserError(f"seed {seed}: give a number of 0 or more")
