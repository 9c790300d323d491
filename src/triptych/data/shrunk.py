"""A source whose images were decoded and made smaller once, into one file of raw pixels that all workers map.

For data sets that are read many times and whose decoding is what training waits for.  Crops are then cut from the
smaller images, which changes what small crops look like: a choice of the recipe (`loader.cache_side`), not a default.
"""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triptych.cache import cache_folder
from triptych.data.crops import Crop
from triptych.data.images import UnreadableImage
from triptych.data.pixels import Picture, cut, shrink_for
from triptych.data.sources import Source
from triptych.data.subsets import digest
from triptych.data.workers import close, default_workers, in_worker
from triptych.errors import UserError

_VERSION = 1  # of how images are made smaller and laid out
_BATCH = 16  # images that a worker hands over at once


class Shrunk:
    """The images of another source, at most `side` pixels at their shorter side; unreadable ones stay the source's."""

    def __init__(self, source: Source, side: int, pixels: Path, sizes: Path) -> None:
        self.source, self.side = source, side
        self.name, self.classes = source.name, source.classes
        self._path = pixels
        self._sizes = np.fromfile(sizes, np.int32).reshape(-1, 2)  # (N, 2) height and width; 0 = unreadable
        self._starts = _starts(self._sizes)
        self._pixels: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # every process maps the file itself

    def __len__(self) -> int:
        return len(self.source)

    def stored(self, index: int) -> np.ndarray | None:
        """(H, W, 3) uint8, upright RGB; None where the source could not read it."""
        if not self._sizes[index, 0]:
            return None
        if self._pixels is None:
            self._pixels = np.memmap(self._path, np.uint8, mode="c")  # private: torch asks for memory it may write to
        height, width = map(int, self._sizes[index])
        return self._pixels[self._starts[index] : self._starts[index + 1]].reshape(height, width, 3)

    def image(self, index: int) -> Image.Image:
        pixels = self.stored(index)
        return self.source.image(index) if pixels is None else Image.fromarray(pixels)

    def label(self, index: int) -> int | None:
        return self.source.label(index)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def fingerprint(self) -> str:
        return digest([self.source.fingerprint(), f"{self.side} pixels"])


def shrunk(
    source: Source,
    side: int,
    *,
    workers: int | None = None,
    show: Callable[[int, int], None] = lambda images, size: None,
) -> Shrunk:
    """The source through its cache, which is made now where it does not exist; what was interrupted goes on.

    side: pixels.  show: called with the number of images that are done and the file's size in bytes.  The cache is
    found again by the source's fingerprint: an image replaced by another of the same size is not noticed.  Raises
    UserError where the cache cannot be written.
    """
    pixels = cache_folder("pixels") / f"{source.fingerprint()}-{side}-v{_VERSION}.rgb"
    sizes = pixels.with_suffix(".sizes")
    try:
        if not sizes.exists():
            pixels.parent.mkdir(parents=True, exist_ok=True)
            with sizes.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making it: wait, and find it made
                if not sizes.exists():
                    _make(source, side, pixels, sizes, default_workers() if workers is None else workers, show)
    except OSError as error:
        raise UserError(
            f"cannot write {pixels}: {error.strerror or error}; make room there, set TRIPTYCH_CACHE to another folder, "
            "or leave --loader.cache_side out"
        ) from error
    return Shrunk(source, side, pixels, sizes)


def _make(source: Source, side: int, pixels: Path, sizes: Path, workers: int, show: Callable[[int, int], None]) -> None:
    """Both files grow together, pixels first, so that the sizes tell how far it got; they are named at the end."""
    parts = [path.with_name(f"{path.name}.part") for path in (pixels, sizes)]
    for part in parts:
        part.touch()
    rows = np.fromfile(parts[1], np.int32)
    rows = rows[: len(rows) // 2 * 2].reshape(-1, 2)
    if parts[0].stat().st_size < _starts(rows)[-1]:  # the system lost what had been written
        rows = rows[:0]
    done, size = len(rows), int(_starts(rows)[-1])
    loader = DataLoader(
        _Shrinking(source, side, done),
        batch_size=_BATCH,
        collate_fn=_packed,
        num_workers=workers,
        worker_init_fn=in_worker,
    )
    batches = iter(loader)
    try:
        with parts[0].open("r+b") as pixel_file, parts[1].open("r+b") as size_file:
            for file, end in ((pixel_file, size), (size_file, 8 * done)):
                file.truncate(end)
                file.seek(end)
            for values, heights_widths in batches:
                pixel_file.write(values.numpy().data)
                pixel_file.flush()
                size_file.write(heights_widths.numpy().data)
                size_file.flush()
                done, size = done + len(heights_widths), size + len(values)
                show(done, size)
    finally:
        close(batches)
    for part, path in zip(parts, (pixels, sizes), strict=True):
        part.replace(path)


class _Shrinking(Dataset):
    """The images from `start` on: (h, w, 3) uint8, of no pixels where one cannot be read."""

    def __init__(self, source: Source, side: int, start: int) -> None:
        self.source, self.side, self.start = source, side, start

    def __len__(self) -> int:
        return len(self.source) - self.start

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            picture = Picture(self.source, self.start + index)
            height, width = picture.height, picture.width
            factor = min(1.0, self.side / min(height, width))
            whole, size = Crop(0, 0, height, width), (round(factor * height), round(factor * width))
            pixels = picture.pixels(shrink_for([(whole, self.side)]))
            return cut(pixels, whole, size, "bicubic") if factor < 1 else np.ascontiguousarray(pixels.values)
        except UnreadableImage:
            return np.empty((0, 0, 3), np.uint8)


def _packed(images: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """-> all pixels one after the other (n,) uint8, heights and widths (B, 2) int32"""
    sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int32)
    return torch.from_numpy(np.concatenate([image.ravel() for image in images])), sizes


def _starts(sizes: np.ndarray) -> np.ndarray:
    """(N, 2) -> (N + 1,) int64: where each image's pixels start in the file, and where the last one's end."""
    return np.concatenate([[0], np.cumsum(3 * np.prod(sizes, 1, dtype=np.int64))])
