"""A recipe's method, its optimiser, and one step of them: the same code in a run and in a benchmark."""

import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from triptych import distributed
from triptych.compiling import compare, compiling
from triptych.data.views import Views
from triptych.methods.base import Step
from triptych.optim import clip_gradients, exempt, make_optimizer, set_rates
from triptych.precision import chosen_precision
from triptych.recipe import Recipe, build_method
from triptych.run_folder import stored
from triptych.schedules import Progress
from triptych.spans import span

PARTS = ("data wait", "to device", "encoder forward", "heads and losses", "backward", "optimiser", "EMA")
"""The spans of a step.  "heads and losses" is the rest of the method's forward pass; "EMA" all of its `update`."""


@dataclass(frozen=True)
class Stepped:
    outs: list[Step]  # of the accumulated parts, detached
    views: Views  # the last part's, on the device
    waited: float  # seconds for the loader


class Stepper:
    """One process's method and optimiser.  Calling it is one optimiser step."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.dtype = chosen_precision(recipe.precision, device)
        self.method = build_method(recipe).to(device)
        self.optimizer = make_optimizer(self.method, recipe.optim)
        free = exempt(self.method)
        self.clipped = [p for p in self.method.parameters() if id(p) not in free]
        self.mean, self.std = (torch.tensor(x, device=device) for x in (recipe.views.mean, recipe.views.std))
        self.lr, self.weight_decay = recipe.optim.rates(recipe.batch)
        self.model: nn.Module = self.method  # what is called

    def distribute(self) -> None:
        """Average gradients over processes from now on.  Call it after weights are loaded."""
        if distributed.world_size() > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.method, device_ids=devices, broadcast_buffers=False)

    def __call__(self, t: Progress, next_views: Callable[[], Views]) -> Stepped:
        """One step; next_views gives each accumulated part's views as they come from the loader."""
        outs, waited, clip = [], 0.0, self.recipe.optim
        for part in range(self.recipe.accumulate):
            asked = time.monotonic()
            with span("data wait"):
                views = next_views()
            waited += time.monotonic() - asked
            seed_all(hash((self.recipe.seed, t.step, part, distributed.rank())))
            with span("to device"):
                views = views.on_device(self.device, self.mean, self.std)
            outs.append(self.gradients(views, t, last=part == self.recipe.accumulate - 1))
        with span("optimiser"):
            self.method.after_backward(t)
            if clip.clip is not None:
                clip_gradients(self.clipped, clip.clip, clip.clipping)
            set_rates(self.optimizer, self.lr(t), self.weight_decay(t))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with span("EMA"):
            self.method.update([out.carry for out in outs], t)
        return Stepped(outs, views, waited)

    def gradients(self, views: Views, t: Progress, *, last: bool = True) -> Step:
        """Forward and backward of one part, whose gradients are added to those that are there; detached.

        last: of the parts of this step; processes exchange gradients only then.
        """
        model = self.model
        no_sync = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
        with no_sync:
            autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
            compiled = compiling() if self.recipe.compile == "on" else nullcontext()
            with autocast, compiled, span("heads and losses"):
                out = model(views, t)
            with span("backward"):
                (out.loss / self.recipe.accumulate).backward()
        return Step(out.loss.detach(), {name: x.detach() for name, x in out.terms.items()}, out.carry)


def settle_compile(
    recipe: Recipe, device: torch.device, views: Callable[[], Views], out: Path, say: Callable[[str], None]
) -> Recipe:
    """The recipe with `compile: auto` settled: as in the run that `out` holds, else by measuring a batch of views.

    Raises UserError where torch.compile is wanted and does not work on this machine.
    """
    if recipe.compile == "off":
        return recipe
    choice = distributed.from_main(lambda: stored(out, "compile", "off"))
    if choice is None or recipe.compile == "on":
        trial = Stepper(recipe, device)  # of its own, so that nothing of the measurement stays behind
        batch = views().on_device(device, trial.mean, trial.std)

        def step() -> Step:
            return trial.gradients(batch, Progress(0, 1))

        if recipe.compile == "on":
            compare(step, rounds=0)  # does it work?
            return recipe
        eager, compiled = compare(step)
        choice = distributed.from_main(lambda: "on" if compiled < eager else "off")
        say(f"torch.compile is {choice} (forward and backward take {compiled:.3g} s with it, {eager:.3g} s without)")
    return recipe.model_copy(update={"compile": choice})


def seed_all(seed: int) -> None:
    """Every generator that a method may draw from (timm's mixup uses numpy's, its random erasing Python's)."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
