"""Which images each step takes: a function of (seed, step) alone, so that resume is exact."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from triptych.errors import UserError


@dataclass(frozen=True)
class Batches:
    """Which images each batch holds: lists of (epoch, index), from any optimiser step on.

    One optimiser step takes `batch` images of the epoch's permutation: `accumulate` parts, each shared out evenly and
    in order among the processes.  The rest of an epoch that fills no step is left out.

    repeats above 1 is repeated augmentation (Hoffer et al. 2020), by DeiT's rule: each image comes so many times in a
    row, as (epoch, index, repeat), and an epoch is as long as without: only the first images / repeats of its
    permutation are seen in it.
    """

    images: int
    batch: int
    epochs: int
    seed: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1
    start: int = 0  # optimiser step
    repeats: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.batch

    def __len__(self) -> int:
        return (self.epochs * self.steps_per_epoch - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        each = self.batch // (self.accumulate * self.world)
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(self.start, self.epochs * self.steps_per_epoch):
            epoch, at = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng([self.seed, epoch]).permutation(self.images), epoch
            for part in range(self.accumulate):
                first = at * self.batch + (part * self.world + self.rank) * each
                yield [self._key(epoch, order, place) for place in range(first, first + each)]

    def _key(self, epoch: int, order: np.ndarray, place: int) -> tuple[int, ...]:
        image, repeat = divmod(place, self.repeats)
        return (epoch, int(order[image])) if self.repeats == 1 else (epoch, int(order[image]), repeat)


def check_batch(images: int, batch: int, accumulate: int, world: int) -> None:
    """Raises UserError where a step cannot be filled or shared out."""
    if batch > images:
        raise UserError(f"the data set has {images} images, fewer than one step's batch of {batch}: set --batch lower")
    if batch % (accumulate * world):
        raise UserError(
            f"a batch of {batch} images does not divide into {accumulate} accumulated parts x {world} processes"
        )
