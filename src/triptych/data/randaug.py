"""RandAugment as DeiT trains and MAE fine-tunes with it: timm's operations, all drawn from our generator."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

GREY = (124, 116, 104)  # ImageNet's mean colour: what a rotation or shift leaves empty
SHIFT = 0.45  # the longest shift, as a share of the crop's side (timm's transforms_factory)


@dataclass(frozen=True)
class RandAugment:
    """Some of timm's operations, one after the other (Cubuk et al. 2020).

    Rotations, shears and shifts are among them, of which the crop's box knows nothing: only for methods that do not
    map patches from one view to another.
    """

    config: str = "rand-m9-mstd0.5-inc1"  # magnitude 9 of 10 ± 0.5, 2 operations, each carried out with probability 1/2

    def draw(self, rng: np.random.Generator) -> "DrawnRandAugment":
        return DrawnRandAugment(self.config, int(rng.integers(2**32)))


@dataclass(frozen=True)
class DrawnRandAugment:
    """What one view gets: timm's operations under one seed."""

    config: str
    seed: int

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> a new (H, W, 3) uint8 array."""
        operations = _operations(self.config, min(image.shape[:2]))
        with _seeded(self.seed):
            return np.array(operations(Image.fromarray(image)))


@lru_cache(maxsize=8)
def _operations(config: str, side: int):
    from timm.data.auto_augment import rand_augment_transform  # here: other policies' workers need no timm

    options = {"translate_const": int(SHIFT * side), "img_mean": GREY, "interpolation": Image.Resampling.BICUBIC}
    options["magnitude_max"] = 9.999  # at 10 timm posterizes to 0 bits, which Pillow 13 refuses
    return rand_augment_transform(config, options)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """timm draws from the global generators of Python and numpy, whose states differ from worker to worker.

    They are seeded for one image, so that it depends on (seed, epoch, index) alone, and put back: with no workers
    they are the main process's, which nobody expects to start again at every image.
    """
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
