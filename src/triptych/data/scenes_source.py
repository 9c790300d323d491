"""The drawn scenes as a source."""

import re

import numpy as np
from PIL import Image

from triptych.data.subsets import HELD_OUT, digest
from triptych.errors import UserError


class ScenesSource:
    """Drawn pictures; those of split "test" are never among those of "train", whatever their number."""

    def __init__(self, name: str, spec: str, split: str | None) -> None:
        from triptych.data.scenes import CLASSES, TEST_START  # here, because they bring OpenCV along

        given = re.fullmatch(r"scenes(?::(\d+))?(?:@(\d+))?", spec, re.IGNORECASE)
        if not given or (given[1] and int(given[1]) == 0) or split not in (None, "train", *HELD_OUT):
            raise UserError(
                f"{name!r} is no set of scenes; write scenes, scenes:N, scenes@SEED or scenes:N@SEED with N of at "
                "least 1; their splits are train and test"
            )
        self.name, self.classes = name, CLASSES
        self._count, self._seed = int(given[1] or 1000), int(given[2] or 0)
        self._start = TEST_START if split in HELD_OUT else 0

    def __len__(self) -> int:
        return self._count

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.stored(index))

    def stored(self, index: int) -> np.ndarray:
        """(96, 96, 3) uint8."""
        from triptych.data.scenes import scene

        return scene(self._start + index, seed=self._seed, size=96).image

    def label(self, index: int) -> int | None:
        return (self._start + index) % len(self.classes)  # as scene() promises, without drawing

    def key(self, index: int) -> str:
        return f"seed{self._seed}/{self._start + index:06d}"

    def fingerprint(self) -> str:
        return digest(f"{self.key(i)}\0{self.label(i)}" for i in range(len(self)))
