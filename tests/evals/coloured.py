"""Images whose colours are their classes: segmentation that any encoder can learn."""

import numpy as np
from PIL import Image

from triptych.data.images import UnreadableImage

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
IGNORE = 255


class Coloured:
    """A `Segmented` source in memory: four rectangles of a class each, with noise, and a border that is ignored."""

    classes: tuple[str, ...] = ("red", "green", "blue")

    def __init__(self, images: int, sizes=((32, 48), (40, 24)), *, seed: int = 0, unreadable: tuple[int, ...] = ()):
        self.name, self.images, self.sizes, self.seed, self.unreadable = "coloured", images, sizes, seed, unreadable

    def __len__(self) -> int:
        return self.images

    def image(self, index: int) -> Image.Image:
        if index in self.unreadable:
            raise UnreadableImage(self.key(index), "gone")
        mask, rng = self.mask(index), np.random.default_rng([self.seed, index, 1])
        pixels = COLOURS[np.where(mask == IGNORE, 0, mask)] + rng.integers(-20, 20, (*mask.shape, 3))
        return Image.fromarray(pixels.astype(np.uint8))

    def mask(self, index: int) -> np.ndarray:
        height, width = self.sizes[index % len(self.sizes)]
        of_corner = np.random.default_rng([self.seed, index]).integers(0, len(self.classes), (2, 2))
        mask = of_corner.repeat(height // 2, 0).repeat(width // 2, 1).astype(np.uint8)
        mask[0] = IGNORE
        return mask

    def regions(self, index: int) -> list:
        raise NotImplementedError

    def label(self, index: int) -> None:
        return None

    def key(self, index: int) -> str:
        return f"{index}.png"

    def fingerprint(self) -> str:
        return f"{self.images}-{self.seed}"
