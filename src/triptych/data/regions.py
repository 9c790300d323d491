"""What an annotated image holds: regions of categories, or a class for every pixel."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from triptych.data.sources import Source

IGNORE = 255
"""In a mask: pixels that nobody labelled."""


@dataclass(frozen=True)
class Region:
    """One annotated object, or all pixels of one class, in an image."""

    mask: np.ndarray  # (H, W) bool, at the image's own size
    category: int  # position in the source's classes
    crowd: bool = False  # a group that was not told apart


class Annotated(Source, Protocol):
    """Images with regions; `label` is None."""

    @property
    def classes(self) -> tuple[str, ...]: ...  # names of categories

    def regions(self, index: int) -> list[Region]: ...


class Segmented(Annotated, Protocol):
    """Images with a class for every pixel; a region is all pixels of a class that is there."""

    def mask(self, index: int) -> np.ndarray: ...  # (H, W) uint8: class, or IGNORE
