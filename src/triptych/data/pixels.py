"""From what a source stores to the pixels of crops: header first, then decoded once, no larger than the crops need.

Plain JPEG files are decoded by OpenCV, bit for bit as by PIL, also at 1/2, 1/4 or 1/8 of their size (libjpeg then
leaves out frequencies); everything else goes through `load_rgb`, and so does every file with which that fails, so that
there is one text for each error.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image

from triptych.data.crops import Crop
from triptych.data.sources import Source, load_rgb

# A crop keeps at least so many decoded pixels for each of its own, along either axis.  With 2, crops of images of 12
# megapixels were 0.1 to 0.5 grey levels off on average, and 1 to 3 at the 99th percentile, from those of whole ones.
MARGIN = 2
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {  # its values -> transpose, then flip rows, flip columns
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
# OpenCV's REDUCED_COLOR flags say BGR and allow no other order; its REDUCED_GRAYSCALE flags only say the size.
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_KERNELS = {"bicubic": torch.ops.aten._upsample_bicubic2d_aa, "bilinear": torch.ops.aten._upsample_bilinear2d_aa}


@dataclass(frozen=True)
class Pixels:
    """An upright image or a smaller version of it."""

    values: np.ndarray  # (h, w, 3) uint8
    shrink: int = 1  # so many rows and columns of the image lie in one of `values`
    start: tuple[int, int] = (0, 0)  # row and column of the image at which `values` start: 0, or a little less


class Picture:
    """One image of a source: its size at once, its pixels when they are asked for.

    Raises UnreadableImage, on opening and for `pixels`.
    """

    def __init__(self, source: Source, index: int) -> None:
        self._source, self._index = source, index
        self._jpeg, self._turn = b"", _TURNS[1]
        self._pixels: np.ndarray | None = None
        stored = getattr(source, "stored", lambda _: None)(index)
        if isinstance(stored, bytes):
            self._read_header(stored)
        elif stored is not None:
            self._pixels = stored
        if not self._jpeg:
            if self._pixels is None:
                self._pixels = np.array(load_rgb(source, index))
            self.height, self.width = self._pixels.shape[:2]

    def _read_header(self, data: bytes) -> None:
        """Sets size and orientation of a plain JPEG file; leaves all others alone."""
        try:
            image = Image.open(io.BytesIO(data))
            if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
                return
            self._turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1), _TURNS[1])
        except Exception:  # of any kind: each of Pillow's readers raises its own, and load_rgb will meet it again
            return
        self._jpeg = data
        self.width, self.height = image.size[::-1] if self._turn[0] else image.size

    def pixels(self, shrink: int = 1) -> Pixels:
        """Of the whole image, at 1/shrink of its size where it is a JPEG file; shrink: 1, 2, 4 or 8."""
        if not self._jpeg:
            assert self._pixels is not None
            return Pixels(self._pixels)
        try:
            flags = _REDUCED[shrink] | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            values = cv2.imdecode(np.frombuffer(self._jpeg, np.uint8), flags)
        except cv2.error:
            values = None
        if values is None:
            return Pixels(np.array(load_rgb(self._source, self._index)))
        transposed, rows, columns = self._turn
        if transposed:
            values = cv2.transpose(values)
        if rows or columns:
            values = cv2.flip(values, -1 if rows and columns else 0 if rows else 1)
        # The last row of a reduced image stands for less than `shrink` rows; mirrored, it is the first one.
        start = (-(-self.height % shrink) if rows else 0, -(-self.width % shrink) if columns else 0)
        return Pixels(values, shrink, start)


def shrink_for(crops: Iterable[tuple[Crop, int]]) -> int:
    """1, 2, 4 or 8: how much smaller an image may be decoded for these (crop, side in pixels that it is resized to)."""
    least = min(min(crop.h, crop.w) / side for crop, side in crops)
    return next(shrink for shrink in (8, 4, 2, 1) if shrink == 1 or least >= MARGIN * shrink)


def cut(pixels: Pixels, crop: Crop, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """One crop of the image, resized: a new (height, width, 3) uint8 array; antialiased, along the rows first.

    Within 1/255 of PIL's (2 in a few values of a million) where that takes the same order, as Pillow does but for tall
    images.

    crop: in pixels of the image, whatever `pixels.shrink`.  interpolation: "bicubic" or "bilinear".
    """
    first = crop.i - pixels.start[0], crop.j - pixels.start[1]
    values = pixels.values
    for axis, start, extent in ((0, first[0], crop.h), (1, first[1], crop.w)):
        values = _span(values, axis, start, extent, pixels.shrink)
    # A crop need not hold whole pixels of a reduced image: its true extent decides, not the array's.
    scale = (size[0] * pixels.shrink / crop.h, size[1] * pixels.shrink / crop.w) if pixels.shrink > 1 else (None, None)
    return _resized(values, size, interpolation, scale)


def _span(values: np.ndarray, axis: int, start: int, extent: int, shrink: int) -> np.ndarray:
    """`extent` rows or columns of the image from `start` on; between two of `values`, the line through both."""
    first, rest = divmod(start, shrink)
    n = -(-extent // shrink)

    def part(at: int) -> np.ndarray:
        return values[at : at + n] if axis == 0 else values[:, at : at + n]

    if not rest:
        return part(first)
    here, there = part(first), part(first + 1)
    if there.shape[axis] < n:  # at the image's end
        there = np.concatenate([there, values[-1:] if axis == 0 else values[:, -1:]], axis)
    return cv2.addWeighted(here, 1 - rest / shrink, there, rest / shrink, 0)


def _resized(
    values: np.ndarray, size: tuple[int, int], interpolation: str, scale: tuple[float | None, float | None]
) -> np.ndarray:
    """(h, w, 3) uint8 -> (*size, 3); scale: output pixels per input pixel, None for the sizes' ratio."""
    x = torch.from_numpy(values)
    height, width, _ = x.shape
    rows, columns, _ = x.stride()
    # A batch of one whose first stride says "channels last", which that of [None] does not: half the time.
    x = x.as_strided((1, 3, height, width), (height * rows, 1, rows, columns))
    out = _KERNELS[interpolation](x, list(size), False, *scale)
    return np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())
