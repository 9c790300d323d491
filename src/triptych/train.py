"""The loop.  It knows Method, Views, Progress and nothing about any paper.

A step's randomness is a function of (seed, step, process), the data order one of (seed, step): a run that is killed
and started again with the same command ends with the same bits as one that never stopped.  (Tested on the CPU; CUDA has
kernels of its own that add in no fixed order.)
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from triptych import checkpoint, distributed
from triptych.data.batches import check_batch
from triptych.data.sources import Source
from triptych.data.views import Views
from triptych.data.workers import close, next_of
from triptych.errors import Interrupted, NonFinite, UserError
from triptych.feed import first_views, settle_colour, view_batches
from triptych.health import measure
from triptych.log import Metrics, ProgressLine, duration
from triptych.methods import SupervisedConfig
from triptych.methods.base import Step
from triptych.recipe import Recipe, of_source
from triptych.run_folder import claim_folder
from triptych.schedules import Progress
from triptych.snapshots import Snapshots
from triptych.step import Stepper, settle_compile


@dataclass
class TrainResult:
    folder: Path
    steps: int
    seconds: float  # of this process, training only
    images_per_second: float
    unreadable: list[str] = field(default_factory=list)


def train(recipe: Recipe, source: Source, out: Path, console: Console | None = None) -> TrainResult:
    """Run or resume `recipe` on `source`; everything is written under `out`.

    Raises UserError (bad input), NonFinite, Interrupted.
    """
    device = distributed.start()
    console = console or Console()
    check_run(recipe, source)
    return Run(recipe, source, out, device, console).train()


def check_run(recipe: Recipe, source: Source) -> None:
    """Raises UserError where the images do not fill the recipe's batches, or a forward pass cannot pair its images."""
    world, method = distributed.world_size(), recipe.method
    check_batch(len(source), recipe.batch, recipe.accumulate, world)
    each = recipe.batch // (recipe.accumulate * world)
    if isinstance(method, SupervisedConfig) and (method.mixup or method.cutmix) and each % 2:
        raise UserError(f"mixup pairs images, and a process has {each} of them: choose an even --batch")


class Run:
    """One process's share of a run: the state that the loop needs, and its parts by name."""

    def __init__(self, recipe: Recipe, source: Source, out: Path, device: torch.device, console: Console):
        recipe = of_source(recipe, source)
        self.source, self.out, self.device, self.console = source, out, device, console
        self.stepper = Stepper(recipe, device)
        self.method, self.optimizer = self.stepper.method, self.stepper.optimizer
        patch_size = self.method.encoder.patch_size
        recipe = settle_colour(recipe, source, patch_size, device, out, self._say)
        recipe = settle_compile(recipe, device, lambda: first_views(recipe, source, patch_size, device), out, self._say)
        self.recipe = self.stepper.recipe = recipe
        claim_folder(recipe, source, out)  # after what may refuse the recipe: a mistake leaves no folder behind
        self.steps_per_epoch = len(source) // recipe.batch
        self.total = recipe.epochs * self.steps_per_epoch
        self.unreadable: dict[str, None] = {}  # in the order in which they were met
        self.start = self._resume()
        self.stepper.distribute()
        self.main = distributed.is_main()
        self.metrics = Metrics(out, self.start) if self.main else None
        self.progress = ProgressLine(console, enabled=self.main)
        self.snapshots = Snapshots(recipe, source, out, device, self._say) if self.main else None
        self.pending: list[tuple[dict[str, Any], list[str], torch.Tensor]] = []

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def train(self) -> TrainResult:
        if self.start >= self.total:
            self._say(f"{self.out} is finished ({self.total} steps)")
            return TrainResult(self.out, self.total, 0.0, 0.0, list(self.unreadable))
        began, step = time.monotonic(), self.start
        patch_size = self.method.encoder.patch_size
        batches = view_batches(self.recipe, self.source, patch_size, self.device, self.start, self.progress.show)
        if self.start:
            self._say(f"going on from step {self.start} of {self.total}")
        else:
            self._save(0)
            if self.snapshots:
                self.snapshots.take(self.method.encoder, 0)
        try:
            with stop_signals() as stop:
                for step in range(self.start, self.total):
                    t = Progress(step, self.total, self.steps_per_epoch)
                    self._step(t, batches)
                    done = step + 1
                    if done % self.steps_per_epoch == 0:
                        self._epoch_end(done, t)
                    stopped = distributed.any_process(bool(stop), self.device)
                    if stopped or done == self.total or done % self._save_every == 0:
                        self._save(done)
                    if stopped and done < self.total:
                        raise Interrupted(stop[0] if stop else signal.SIGTERM, done)
        finally:
            close(batches)
            self.progress.close()
            if self.metrics:
                self.metrics.close()
        seconds = time.monotonic() - began
        self._report_unreadable()
        rate = (self.total - self.start) * self.recipe.batch / seconds
        return TrainResult(self.out, self.total, seconds, rate, list(self.unreadable))

    def _step(self, t: Progress, batches: Iterator) -> None:
        """One optimiser step, and its row."""
        began = time.monotonic()
        done = self.stepper(t, lambda: self._next_views(batches))
        self.last_views = done.views
        self._log(t, done.outs, done.waited, time.monotonic() - began)

    def _next_views(self, batches: Iterator) -> Views:
        views, unreadable = next_of(batches)
        self._note_unreadable(unreadable)
        return views

    def _log(self, t: Progress, outs: list[Step], waited: float, seconds: float) -> None:
        """Means over the accumulated parts.  They stay on the device and are read in blocks: no wait for the GPU."""
        names = ["loss", *outs[0].terms]
        parts = [torch.stack([torch.as_tensor(x).float() for x in (out.loss, *out.terms.values())]) for out in outs]
        values = torch.stack(parts).mean(0)
        row = {"step": t.step, "epoch": t.step / t.steps_per_epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= {"weight_decay": self.optimizer.param_groups[0]["weight_decay"]}
        row |= {"images_per_second": self.recipe.batch / seconds, "data_wait": waited / seconds}
        self.pending.append((row, names, values))
        if self.device.type == "cpu" or len(self.pending) >= 20:
            self._flush()

    def _flush(self) -> None:
        """Write pending rows.  Raises NonFinite."""
        rows = [(row, dict(zip(names, v.tolist(), strict=True))) for row, names, v in self.pending]
        self.pending.clear()
        for row, terms in rows:
            bad = [name for name, value in terms.items() if value != value or abs(value) == float("inf")]
            if bad:
                term = next((name for name in bad if name != "loss"), "loss")
                raise NonFinite(f"the loss term {term!r} is {terms[term]} at step {row['step']}; {self._kept()}")
            if self.metrics:
                self.metrics.write(row | terms)
        if rows and self.main:
            self._show(*rows[-1])

    def _show(self, row: dict[str, Any], terms: dict[str, float]) -> None:
        left = (self.total - row["step"] - 1) * self.recipe.batch / row["images_per_second"]
        losses = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
        self.progress.show(
            f"epoch {row['epoch']:.2f}/{self.recipe.epochs}  step {row['step'] + 1}/{self.total}  {losses}  "
            f"{row['images_per_second']:.1f} images/s  data wait {row['data_wait']:.0%}  "
            f"colour on {self.recipe.loader.colour}  left {duration(left)}"
        )

    def _epoch_end(self, done: int, t: Progress) -> None:
        """Health and, where labels are known, a k-NN probe; the same images every time."""
        health = self.recipe.health
        epoch = done // self.steps_per_epoch
        self._flush()
        self._check_weights(done)
        measured = bool(health.every) and epoch % health.every == 0
        if self.snapshots and (measured or done == self.total):
            self.snapshots.take(self.method.encoder, done)
        if not measured or not self.main:
            return
        row = measure(self.method, self.source, self.recipe, self.last_views, t, self.device, self.stepper.dtype)
        if self.metrics:
            self.metrics.write({"step": t.step, **{f"health/{name}": value for name, value in row.items()}})
            self.metrics.flush()
        line = "  ".join(f"{name} {value:.3g}" for name, value in row.items())
        self.progress.show(f"epoch {epoch}/{self.recipe.epochs}  {line}", force=True)

    @property
    def _save_every(self) -> int:
        return max(1, round(self.recipe.checkpoint.every * self.steps_per_epoch))

    def _save(self, step: int) -> None:
        self._flush()
        self._check_weights(step)
        self._share_unreadable()
        self._note_unreadable([])
        if self.main:
            if self.metrics:
                self.metrics.flush()
            state = {"method": self.method.state_dict(), "optimizer": self.optimizer.state_dict()}
            state |= {"unreadable": list(self.unreadable)}
            checkpoint.save(self.checkpoints, step, state, self.recipe.checkpoint.keep)
        if distributed.world_size() > 1:
            dist.barrier()

    def _check_weights(self, step: int) -> None:
        """Raises NonFinite."""
        if not checkpoint.finite(self.method):
            raise NonFinite(f"the weights are not finite after step {step}; {self._kept()}")

    def _kept(self) -> str:
        advice = "Try a lower --optim.lr, a longer --optim.warmup, or --precision fp32"
        return f"{checkpoint.kept(self.checkpoints)}\n{advice}"

    def _resume(self) -> int:
        found = checkpoint.steps(self.checkpoints)
        if not found:
            return 0
        state = checkpoint.load(checkpoint.path_of(self.checkpoints, found[-1]))
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.unreadable = dict.fromkeys(state["unreadable"])
        return state["step"]

    def _note_unreadable(self, reasons: list[str]) -> None:
        self.unreadable |= dict.fromkeys(reasons)
        allowed = self.recipe.loader.max_unreadable * len(self.source)
        if len(self.unreadable) > allowed:
            some = "\n  ".join(list(self.unreadable)[:5])
            raise UserError(
                f"{len(self.unreadable)} of {len(self.source)} images cannot be read, more than the "
                f"{self.recipe.loader.max_unreadable:.1%} that --loader.max_unreadable allows:\n  {some}\n"
                "Remove or mend them, or allow more"
            )

    def _share_unreadable(self) -> None:
        """Every process meets its own share of the images."""
        if distributed.world_size() > 1:
            lists: list[Any] = [None] * distributed.world_size()
            dist.all_gather_object(lists, list(self.unreadable))
            self.unreadable = {reason: None for one in lists for reason in one}

    def _report_unreadable(self) -> None:
        if self.unreadable:
            names = "\n  ".join(self.unreadable)
            self._say(f"{len(self.unreadable)} images could not be read and were skipped:\n  {names}")

    def _say(self, text: str) -> None:
        if distributed.is_main():
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def stop_signals():
    """A list that receives the number of the first SIGTERM or SIGINT; a second one acts at once."""
    received: list[int] = []
    before = {}

    def note(number: int, _frame) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            before[number] = signal.signal(number, note)
        except ValueError:  # not the main thread: the caller handles signals
            break
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
