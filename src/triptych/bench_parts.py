"""What `triptych bench` measures, part by part: the code of a run and of the evaluations, timed."""

import resource
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.data.sources import Source
from triptych.data.workers import close, default_workers, next_of
from triptych.evals.features import extract
from triptych.evals.knn import knn as nearest_neighbours
from triptych.evals.selection import select
from triptych.evals.transform import EvalTransform
from triptych.feed import first_views, settle_colour, view_batches
from triptych.flops import Flops
from triptych.memory import LiveMemory
from triptych.precision import chosen_precision
from triptych.recipe import Recipe
from triptych.schedules import Progress
from triptych.spans import now, recorded
from triptych.step import PARTS, Stepper, settle_compile
from triptych.syncs import DEVICE, host_syncs

WARM_UP = 2  # runs before the first that counts
BANK, QUERIES, CLASSES = 50_000, 1_000, 1_000  # of the k-NN: train and test rows
SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of the matrices that give the peak


@dataclass
class Bench:
    """What is measured: one process of `recipe` on `source`.  Every part returns a JSON-able row."""

    recipe: Recipe
    source: Source
    device: torch.device
    steps: int  # repetitions that count
    peak: "Peak" = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = chosen_precision(self.recipe.precision, self.device)
        self.peak = Peak(self.device, self.dtype)

    def settle(self, out: Path, say: Callable[[str], None]) -> None:
        """Measure what a run measures before it begins; `out` is that of no run."""
        patch_size = self.stepper.method.encoder.patch_size
        self.recipe = settle_colour(self.recipe, self.source, patch_size, self.device, out, say)
        views = lambda: first_views(self.recipe, self.source, patch_size, self.device)  # noqa: E731
        self.recipe = settle_compile(self.recipe, self.device, views, out, say)
        self.stepper.recipe = self.recipe

    @cached_property
    def stepper(self) -> Stepper:
        return Stepper(self.recipe, self.device)

    def step(self) -> dict[str, Any]:
        """The training step as the loop runs it, in the middle of the recipe's schedules."""
        stepper, t = self.stepper, middle(self.recipe, self.source)
        batches = self._batches()

        def once() -> None:
            stepper(t, lambda: next_of(batches)[0])

        split: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        whole = 0.0

        def in_parts() -> None:
            nonlocal whole
            with recorded() as seconds:
                began = now()
                once()
                whole += (now() - began) / self.steps
            for name, spent in seconds.items():
                split[name] = split.get(name, 0.0) + spent / self.steps

        try:
            seconds = self._time(once, in_parts)
            with Flops() as flops:
                once()
            memory = self._memory(once, stepper.method.state_dict().values(), state_of(stepper.optimizer))
        finally:
            close(batches)
        return {
            "images_per_second": self.recipe.batch / seconds,
            "seconds_per_step": seconds,
            "split": split,  # seconds; of other steps, in which the host waits for the device at every border
            "split_seconds": whole,
            **self._utilisation(flops.total, seconds),
            **memory,
        }

    def data(self) -> dict[str, Any]:
        """The loader, nothing else running: images per second of one worker alone and of all together."""
        asked = self.recipe.loader.workers
        workers = default_workers() if asked is None else asked
        rates = {n: self._loader_rate(n) for n in {1, workers}}
        about = {"workers": workers, "images_per_second_of_one_worker": rates[1], **max_rss()}
        return {"images_per_second": rates[workers], **about}

    def _loader_rate(self, workers: int) -> float:
        """Images per second."""
        loader = self.recipe.loader.model_copy(update={"workers": workers})
        batches = self._batches(self.recipe.model_copy(update={"loader": loader}))
        turns = max(1, workers)  # batches come from the workers in turn
        count = turns * max(2, -(-self.steps // turns))
        try:
            for _ in range(max(WARM_UP, turns)):
                next_of(batches)
            began = now()
            for _ in range(count):
                next_of(batches)
            return count * self.recipe.batch / self.recipe.accumulate / (now() - began)
        finally:
            close(batches)

    def knn(self) -> dict[str, Any]:
        """Four k at once on drawn features of the encoder's width, where the evaluation has them: on the host."""
        g = torch.Generator().manual_seed(self.recipe.seed)
        width, classes = self.stepper.method.encoder.width, torch.arange(BANK) % CLASSES
        centres = torch.randn(CLASSES, width, generator=g)
        bank = centres[classes] + torch.randn(BANK, width, generator=g)
        asked = classes[:QUERIES]
        test = centres[asked] + torch.randn(QUERIES, width, generator=g)

        def once() -> None:
            nearest_neighbours(bank, classes, test, asked)

        seconds = self._time(once)
        about = {"train_images": BANK, "test_images": QUERIES, "width": width}
        return {"images_per_second": QUERIES / seconds, "seconds": seconds, **about, **self._memory(once, [bank, test])}

    def inference(self) -> dict[str, Any]:
        """Feature extraction: the encoder alone on random pixels, and `extract` from the images on."""
        encoder, views = self.stepper.method.encoder, self.recipe.views
        size = views.global_size
        images = torch.randn(self.recipe.batch, 3, size, size, device=self.device)
        was_training = encoder.training
        encoder.eval()

        @torch.no_grad()
        def alone() -> None:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                select(encoder, images, "cls")

        transform = EvalTransform.of(size, views.mean, views.std)
        options: dict[str, Any] = {"batch": self.recipe.batch, "device": self.device, "precision": self.dtype}
        seconds = self._time(alone)
        whole = self._time(lambda: extract(encoder, self.source, transform, **options))
        with Flops() as flops:
            alone()
        memory = self._memory(alone, encoder.state_dict().values())
        encoder.train(was_training)
        return {
            "images_per_second": self.recipe.batch / seconds,
            "seconds": seconds,
            "images_per_second_from_images": len(self.source) / whole,
            "images": len(self.source),
            **self._utilisation(flops.total, seconds),
            **memory,
        }

    def syncs(self) -> dict[str, Any]:
        """Host synchronisations of a step, found on the CPU; see `triptych.syncs`."""
        each = 2 * self.recipe.accumulate
        recipe = self.recipe.model_copy(update={"batch": each})
        stepper, t = Stepper(recipe, DEVICE), middle(recipe, self.source)
        batches = self._batches(recipe)
        try:
            parts = [next_of(batches)[0] for _ in range(recipe.accumulate)]
        finally:
            close(batches)
        views = cycle(parts)
        found = host_syncs(lambda: stepper(t, lambda: next(views)))
        return {"syncs": [vars(sync) for sync in found]}

    def _batches(self, recipe: Recipe | None = None) -> Any:
        recipe = (recipe or self.recipe).model_copy(update={"epochs": 10**6})  # more than will be asked for
        return view_batches(recipe, self.source, self.stepper.method.encoder.patch_size, self.device)

    def _time(self, run: Callable[[], object], *others: Callable[[], object]) -> float:
        """Median seconds of `run`; the others and the matrix product take turns with it."""
        for _ in range(WARM_UP):
            run()
        seconds = []
        for _ in range(self.steps):
            began = now()
            run()
            seconds.append(now() - began)
            for other in (*others, self.peak.measure):
                other()
        return statistics.median(seconds)

    def _utilisation(self, flops: int, seconds: float) -> dict[str, float]:
        """Of `batch` images that took so many FLOPs and seconds."""
        return {
            "flops_per_image": flops / self.recipe.batch,
            "matmul_flops_per_second": self.peak.best,
            "mfu": flops / seconds / self.peak.best,
        }

    def _memory(self, run: Callable[[], object], *held: Iterable[Tensor]) -> dict[str, Any]:
        """Bytes, in one more run: of `held`, which was there before, and the most that is made at once."""
        found = sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in chain(*held)}.values())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before, how = torch.cuda.memory_allocated(), "torch.cuda.max_memory_allocated"
            run()
            found += torch.cuda.max_memory_allocated() - before
        else:
            with LiveMemory() as live:
                run()
            found, how = found + live.peak, "live tensors"
        return {"peak_memory": found, "peak_memory_from": how, **max_rss()}


class Peak:
    """The fastest matrix product so far."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.pairs = [torch.randn(2, n, n, device=device).to(dtype) for n in SIDES[device.type]]
        self.best = 0.0  # FLOP/s

    def measure(self) -> None:
        for a, b in 3 * self.pairs:
            began = now()
            torch.mm(a, b)
            self.best = max(self.best, 2 * len(a) ** 3 / (now() - began))


def middle(recipe: Recipe, source: Source) -> Progress:
    """Half-way: past frozen prototypes, queues that are not yet used, and warm-ups."""
    per_epoch = max(1, len(source) // recipe.batch)
    return Progress(recipe.epochs * per_epoch // 2, recipe.epochs * per_epoch, per_epoch)


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]


def max_rss() -> dict[str, int]:
    """Bytes of main memory that this process held at most since it began."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {"max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
