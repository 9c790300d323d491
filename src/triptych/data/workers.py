"""Worker processes of a DataLoader: how many, how they are set up, how their mistakes come out and how they end."""

import os
import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

import cv2
import torch

from triptych.errors import UserError

T = TypeVar("T")


def in_worker(_: int) -> None:
    """Set-up of every worker process."""
    # A signal to the whole process group is the main process's to handle: it still needs the batch in hand.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def next_of(batches: Iterator[T]) -> T:
    """The next batch of a DataLoader's iterator; a worker's UserError comes without that process's traceback."""
    try:
        return next(batches)
    except UserError as error:
        raise UserError(str(error).strip().split("UserError: ")[-1]) from None


def unwrapped(loader: Iterable[T]) -> Iterator[T]:
    """All batches, each as of `next_of`."""
    batches = iter(loader)
    try:
        while True:
            try:
                batch = next_of(batches)
            except StopIteration:
                return
            yield batch
    finally:
        close(batches)


def close(batches: Iterator) -> None:
    """Ends the workers of a DataLoader's iterator, also where an exception's traceback keeps it alive.

    They ignore SIGTERM, so Python's own clean-up at exit would wait for them for ever.
    """
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()  # type: ignore[attr-defined]
