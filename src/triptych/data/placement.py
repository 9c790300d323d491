"""Who changes the colours of crops: the workers, one at a time, or the device, by the batch.

What is drawn is the same, and the pixels agree within about a grey level.  Which is faster depends on cores, device and
recipe, so it is measured when a run starts.
"""

import copy
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import cv2
import torch

from triptych.data.colour import batchable
from triptych.data.corruption import CorruptionConfig
from triptych.data.loader import ViewDataset, collate
from triptych.errors import UserError

IMAGES = 8  # that the measurement takes at most ...
SECONDS = 2.0  # ... and about how long on the workers' side
ON_DEVICE = 64  # images of a batch on a GPU, where a few would not fill it
GAIN = 0.9  # the device's bottleneck must be below so much of the workers': what is closer is noise


class Placement(NamedTuple):
    place: Literal["workers", "device"]
    why: str  # with figures where it was measured


def obstacle(policy: str, corruption: CorruptionConfig | None) -> str | None:
    """Why colours cannot be left to the device, if so."""
    if not batchable(policy):
        return f"the policy {policy!r} has RandAugment's operations, which exist on the CPU alone"
    if corruption is not None:
        return "crops are corrupted with pixels of other crops, which must have their colours by then"
    return None


def check(place: str, policy: str, corruption: CorruptionConfig | None) -> None:
    """Raises UserError where `--loader.colour device` is impossible."""
    if place == "device" and (why := obstacle(policy, corruption)):
        raise UserError(f"--loader.colour device: {why}; leave it at auto")


def choose(dataset: ViewDataset, device: torch.device, workers: int) -> Placement:
    """The place that leaves the clearly smaller bottleneck, measured on a few images of the data set; else the workers.

    Workers share their time per image; on a GPU colours run beside them, on the CPU they run between two steps.
    """
    if why := obstacle(dataset.config.colour, dataset.spec.corruption):
        return Placement("workers", why)
    left, done = copy.copy(dataset), copy.copy(dataset)
    left.colour_on_device, done.colour_on_device = True, False
    crops, coloured = _of_worker(left, done)
    batch = _of_device(left, device)
    each = max(workers, 1)
    beside = device.type == "cuda" and workers > 0
    on_workers, on_device = coloured / each, max(crops / each, batch) if beside else crops / each + batch
    why = (
        f"ms per image: workers {1e3 * coloured:.2f} with colours and {1e3 * crops:.2f} without, "
        f"shared by {each}; device {1e3 * batch:.2f}"
    )
    return Placement("device" if on_device < GAIN * on_workers else "workers", why)


def _of_worker(*datasets: ViewDataset) -> list[float]:
    """Seconds per image of each, taking turns, in one worker; the files are in the system's cache by then."""
    torch_threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    best = [[] for _ in datasets]
    try:
        began = time.perf_counter()
        for index in _some(len(datasets[0].source)):
            for dataset, seconds in zip(datasets, best, strict=True):
                seconds.append(min(_seconds(lambda d=dataset, i=index: d[0, i]) for _ in range(2)))
            if time.perf_counter() - began > SECONDS:
                break
    finally:
        torch.set_num_threads(torch_threads)
        cv2.setNumThreads(cv2_threads)
    return [sum(seconds) / len(seconds) for seconds in best]


def _of_device(dataset: ViewDataset, device: torch.device) -> float:
    """Seconds per image for the colours of a batch that lies on the device."""
    n = 8 if device.type == "cuda" else 2
    views, _ = collate([dataset[0, i] for i in list(_some(len(dataset.source)))[:n]])
    if device.type == "cuda":
        views = views.map(lambda x: x.repeat(-(-ON_DEVICE // len(x)), *[1] * (x.ndim - 1)))
    moved = views.map(lambda x: x.to(device))
    return min(_seconds(lambda: moved.coloured(views), device) for _ in range(2)) / len(views)


def _some(n: int) -> range:
    """IMAGES positions at most, spread over a source of n images."""
    return range(0, n, -(-n // IMAGES))


def _seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
