"""Images with an index mask each: a class for every pixel."""

from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from triptych.data.images import UnreadableImage
from triptych.data.regions import IGNORE, Region
from triptych.data.stored import Stored, reason
from triptych.data.subsets import digest
from triptych.data.tree import Tree
from triptych.errors import UserError

FORBIDDEN = -1


@dataclass(frozen=True)
class Pairs:
    """Images and their masks by position in a tree, and what the masks' values mean."""

    images: list[int]
    masks: list[int]
    classes: tuple[str, ...]
    table: np.ndarray  # (256,) int16: value in a file -> class, IGNORE or FORBIDDEN


def table(values: dict[int, int]) -> np.ndarray:
    """(256,) int16 of the given values; 255 is ignored, all others are forbidden."""
    result = np.full(256, FORBIDDEN, np.int16)
    result[IGNORE] = IGNORE
    for value, meaning in values.items():
        result[value] = meaning
    return result


class MaskedImages:
    """A `Segmented` source.  Masks are read, and their sizes compared with the images', when they are asked for."""

    def __init__(self, name: str, tree: Tree, pairs: Pairs) -> None:
        self.name, self.classes = name, pairs.classes
        self._tree, self._pairs = tree, pairs
        self._images = Stored(name, tree, pairs.images, None, pairs.classes)
        self._same_size = bytearray(len(pairs.images))  # already compared, in this process

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        return self._images.image(index)

    def label(self, index: int) -> None:
        return None

    def key(self, index: int) -> str:
        return self._images.key(index)

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8: class or IGNORE.  Raises UnreadableImage, and UserError for another size or unknown values."""
        position = self._pairs.masks[index]
        values = read_indices(self._tree, position)
        if not self._same_size[index]:
            check_size(self.key(index), self._upright_size(index), self._tree.keys[position], values)
            self._same_size[index] = 1
        classes = self._pairs.table[values]
        if (classes == FORBIDDEN).any():
            found = ", ".join(map(str, numbers_of(values[classes == FORBIDDEN])[:5]))
            allowed = np.flatnonzero((self._pairs.table != FORBIDDEN) & (self._pairs.table != IGNORE))
            raise UserError(
                f"{self._tree.keys[position]} of {self.name} has the values {found}; its {len(self.classes)} classes "
                f"have values in {allowed[0]}..{allowed[-1]}, and 255 is no class"
            )
        return classes.astype(np.uint8)

    def regions(self, index: int) -> list[Region]:
        """One for each class that is there, in the order of classes."""
        mask = self.mask(index)
        return [Region(mask == value, value) for value in numbers_of(mask) if value != IGNORE]

    def fingerprint(self) -> str:
        """Of names and sizes (bytes) of images and masks, of the classes and the values that mean them."""
        positions = zip(self._pairs.images, self._pairs.masks, strict=True)
        files = (f"{self._tree.keys[p]}\0{self._tree.size(p)}" for pair in positions for p in pair)
        return digest([*files, *self.classes, *map(str, self._pairs.table)])

    def _upright_size(self, index: int) -> tuple[int, int]:
        """(height, width), from the header alone."""
        try:
            image = self._tree.image(self._pairs.images[index])
            return upright_size(image)
        except Exception as error:  # of any kind: each of Pillow's decoders raises its own
            raise UnreadableImage(self.key(index), reason(error)) from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image as `to_rgb` turns it."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    width, height = image.size
    return (width, height) if turned else (height, width)


def check_size(key: str, size: tuple[int, ...], mask_key: str, mask: np.ndarray) -> None:
    """Raises UserError unless a mask (H, W) is as large as its image of size (height, width)."""
    if mask.shape != size:
        raise UserError(
            f"{mask_key} is {mask.shape[1]} x {mask.shape[0]} pixels and its image {key} {size[1]} x {size[0]}: they "
            "must agree; make the mask anew, or resize it with nearest neighbours"
        )


def numbers_of(mask: np.ndarray) -> list[int]:
    """Which values a uint8 array has, in order; ten times as fast as np.unique."""
    return np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist()


def read_indices(tree: Tree, position: int) -> np.ndarray:
    """(H, W) uint8: the values of a mask; of a palette image the indices.  Raises UnreadableImage and UserError."""
    key = tree.keys[position]
    try:
        image = tree.image(position)
        values = np.asarray(image)
    except Exception as error:  # of any kind: each of Pillow's decoders raises its own
        raise UnreadableImage(key, reason(error)) from error
    if values.ndim != 2 or values.dtype.kind not in "bui" or values.min() < 0 or values.max() > 255:
        raise UserError(
            f"{key} is no index mask (mode {image.mode}, values up to {values.max()}): each pixel must be one number "
            "in 0..255, its class; replace colours by numbers"
        )
    return values.astype(np.uint8)
