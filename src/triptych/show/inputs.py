"""What pictures are made of: files, a folder, an archive, a data set, or the frames of a video."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from PIL import Image

from triptych.data.crops import Crop
from triptych.data.images import UnreadableImage
from triptych.data.pixels import Pixels, cut
from triptych.data.sources import Source, load_rgb, open_source
from triptych.data.stored import Stored
from triptych.data.stores import Files
from triptych.errors import UserError

T = TypeVar("T")
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
SAMPLE = 32
"""Images or frames of which shared components and centres are found, at most."""


@dataclass(frozen=True)
class Picture:
    """An image as the encoder sees it, but not yet normalised."""

    name: str
    pixels: np.ndarray  # (H, W, 3) uint8; H and W are multiples of the encoder's patch
    original: tuple[int, int]  # height and width before it was resized


@dataclass(frozen=True)
class Fit:
    """How images are resized (bicubic): the longer side to `size`, then both to the nearest multiple of `patch`.

    square: to size x size instead, as in the papers' figures; `size` rounded likewise.
    """

    size: int
    patch: int
    square: bool = False

    def __call__(self, name: str, pixels: np.ndarray) -> Picture:
        height, width = pixels.shape[:2]
        factor = self.size / max(height, width)
        sides = [self.size if self.square else side * factor for side in (height, width)]
        rows, columns = (max(1, round(side / self.patch)) * self.patch for side in sides)
        resized = cut(Pixels(pixels), Crop(0, 0, height, width), (rows, columns), "bicubic")
        return Picture(name, resized, (height, width))


@dataclass(frozen=True)
class Film:
    """The frames of a video file, or of a source's images in their order."""

    name: str
    rate: float  # frames per second
    source: Source | None = None  # None: `path` is a file
    path: str = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB of every frame, one at a time.  Raises UserError for a frame that cannot be read."""
        if self.source is not None:
            for i in range(len(self.source)):
                yield rgb(self.source, i)
            return
        capture = cv2.VideoCapture(self.path)
        try:
            while (read := capture.read())[0]:
                yield cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
        finally:
            capture.release()

    def __len__(self) -> int:
        """As the file says, which need not be so; at least 1."""
        if self.source is not None:
            return len(self.source)
        capture = cv2.VideoCapture(self.path)
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
        return max(1, count)


def rgb(source: Source, index: int) -> np.ndarray:
    """(H, W, 3) uint8, upright.  Raises UserError for an image that cannot be read."""
    try:
        return np.array(load_rgb(source, index))
    except UnreadableImage as error:
        raise UserError(f"cannot read {error}") from error


def spread(items: Iterable[T], count: int) -> list[T]:
    """At most so many of the items, evenly spaced, the first one among them.

    One pass that never holds more than 2 count: how many items there are need not be known.
    """
    kept: list[T] = []
    step = 1
    for i, item in enumerate(items):
        if i % step == 0:
            kept.append(item)
        if len(kept) == 2 * count:
            kept, step = kept[::2], 2 * step
    return [kept[i] for i in np.linspace(0, len(kept) - 1, min(count, len(kept))).round().astype(int)]


def open_film(inputs: Sequence[str], fps: float | None) -> Film | None:
    """The one video among the inputs; None for images.

    fps: frames per second, None = as the file says; given, a folder, archive or data set is a video too.  Raises
    UserError for a file that cannot be read as a video, and for a video beside other inputs.
    """
    films = [text for text in inputs if _moves(Path(text))]
    if not films and fps is None:
        return None
    if len(inputs) > 1:
        raise UserError(f"{films[0] if films else inputs[0]} is a video: give no other input beside it")
    if not films:
        assert fps is not None
        source, is_image = open_images(inputs)
        if is_image:
            raise UserError(f"{inputs[0]} is an image: --fps and .mp4 are for videos, and for folders of frames")
        return Film(inputs[0], fps, source)
    capture = cv2.VideoCapture(films[0])
    rate, readable = capture.get(cv2.CAP_PROP_FPS), capture.read()[0]
    capture.release()
    if not readable:
        raise UserError(f"{films[0]} cannot be read as a video: give another format, or a folder of its frames")
    return Film(Path(films[0]).name, fps or (rate if 0 < rate <= 1000 else 25), path=films[0])


def _moves(path: Path) -> bool:
    """A video file, or a GIF of several frames."""
    if not path.is_file():
        return False
    if path.suffix.lower() != ".gif":
        return path.suffix.lower() in VIDEOS
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except OSError:
        return False


def open_images(inputs: Sequence[str]) -> tuple[Source, bool]:
    """Image files, or one folder, archive or data set; and are they all to be shown?  (Named files are.)

    Raises UserError for what does not exist, and for a folder beside other inputs.
    """
    paths = [Path(text).expanduser() for text in inputs]
    if all(p.is_file() and p.suffix.lower() not in (".zip", ".tar", ".txt", ".lst") for p in paths):
        return Stored(", ".join(inputs), Files(Path(), [str(p) for p in paths]), range(len(paths)), None, None), True
    if len(inputs) > 1:
        missing = [text for text, p in zip(inputs, paths, strict=True) if not p.exists()]
        what = f"{missing[0]} does not exist" if missing else "more than one input, and not all are image files"
        raise UserError(f"{what}: give image files, or one folder, archive, data set or video")
    return open_source(inputs[0]), False


def order(source: Source, count: int, seed: int) -> Sequence[int]:
    """All indices: as drawn by the seed or, where the source has no more than `count`, as they are."""
    if count >= len(source):
        return range(len(source))
    return torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()


def pictures(source: Source, fit: Fit, *, named: bool, count: int, seed: int) -> Iterator[Picture]:
    """The images that were named, or `count` of the source drawn by the seed (all, in order, where it has no more).

    Those that cannot be read are passed over, but for named ones.  Raises UserError for these, and where none can be.
    """
    left = len(source) if named else count
    for index in range(len(source)) if named else order(source, count, seed):
        try:
            key = source.key(index)
            yield fit(Path(key).name if named else key, np.array(load_rgb(source, index)))
        except UnreadableImage as error:
            if named:
                raise UserError(f"cannot read {error}") from error
            continue
        left -= 1
        if not left:
            return
    if left == count and not named:
        raise UserError(f"no image of {source.name} can be read")


PLACE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*,\s*(\d+(?:\.\d*)?|\.\d+)\s*")


@dataclass(frozen=True)
class Place:
    """Where a user points: x, y from the upper left corner, in pixels of the image as it is, or as shares of it."""

    x: float
    y: float
    shares: bool

    @classmethod
    def read(cls, text: str) -> "Place":
        """ "120,80": pixels; "0.5,0.25", with decimal points: shares of width and height.  Raises UserError."""
        found = PLACE.fullmatch(text)
        shares = text.count(".") == 2
        if not found or (not shares and "." in text) or (shares and max(map(float, found.groups())) > 1):
            raise UserError(f"--at {text}: give X,Y in pixels (120,80) or as shares of the image (0.5,0.25)")
        return cls(float(found[1]), float(found[2]), shares)

    def patch(self, picture: Picture, grid: tuple[int, int]) -> tuple[int, int]:
        """Row and column of the patch that lies there.  Raises UserError for a place outside of the image."""
        height, width = picture.original
        if not self.shares and (self.x >= width or self.y >= height):
            raise UserError(
                f"--at {self.x:g},{self.y:g} lies outside of {picture.name}, which is {width} pixels wide and "
                f"{height} high: give a pixel inside, or shares such as 0.5,0.5"
            )
        shares = (self.y, self.x) if self.shares else ((self.y + 0.5) / height, (self.x + 0.5) / width)
        row, column = (min(int(share * n), n - 1) for share, n in zip(shares, grid, strict=True))
        return row, column
