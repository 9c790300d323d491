"""Batches for dense tasks.  A batch is a function of (seed, step): resume is exact, workers do not matter."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from triptych import distributed
from triptych.data.batches import Batches, check_batch
from triptych.data.images import UnreadableImage
from triptych.data.workers import default_workers, in_worker
from triptych.errors import UserError

Make = Callable[[int, np.random.Generator], Any]
"""(index of an image, where its randomness comes from) -> one example; raises UnreadableImage."""

_TRIES = 20


class _Examples(Dataset):
    def __init__(self, make: Make, count: int, seed: int):
        self.make, self.count, self.seed = make, count, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, list[str]]:
        """The image of that index in that epoch; another, drawn, where it cannot be read; and what could not be."""
        rng = np.random.default_rng([self.seed, *key])
        index, unreadable = key[1], []
        for _ in range(_TRIES):
            try:
                return self.make(index, rng), unreadable
            except UnreadableImage as error:
                unreadable.append(str(error))
                index = int(rng.integers(self.count))
        raise UserError(f"{_TRIES} images in a row cannot be read; the last: {unreadable[-1]}")


@dataclass(frozen=True)
class _Together:
    collate: Callable[[list], Any]

    def __call__(self, items: list[tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
        return self.collate([example for example, _ in items]), [r for _, reasons in items for r in reasons]


def examples(
    make: Make,
    count: int,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    collate: Callable[[list], Any],
    workers: int | None = None,
    pin: bool = False,
) -> Iterator[tuple[Any, list[str]]]:
    """This process's part of every batch, and which images could not be read; from step `start` on, without end.

    count: images, which come in a new order in every epoch; batch: images of a step, over all processes.  make and
    collate must be picklable.  An image that cannot be read is replaced by another.  End it with `loader.close`.
    Raises UserError where there are fewer images than a batch has, or it does not divide among the processes.
    """
    world = distributed.world_size()
    check_batch(count, batch, 1, world)
    keys = Batches(count, batch, 10**9, seed, 1, distributed.rank(), world, start)
    workers = default_workers() if workers is None else workers
    return iter(
        DataLoader(
            _Examples(make, count, seed),
            batch_sampler=keys,  # type: ignore[arg-type]  # any iterable of lists will do
            collate_fn=_Together(collate),
            num_workers=workers,
            worker_init_fn=in_worker,
            pin_memory=pin,
            prefetch_factor=4 if workers else None,
        )
    )
