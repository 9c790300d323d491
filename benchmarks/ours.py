"""Our side of the benchmarks of a training step: a run's own step, and what two sides are judged by."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from triptych.data.views import Views
from triptych.errors import UserError
from triptych.memory import LiveMemory
from triptych.recipe import Recipe
from triptych.schedules import Progress
from triptych.step import Stepper
from views import batch_of_views

# Past the epochs in which prototypes are frozen, and late enough for every schedule to have moved.
NOW = Progress(step=600, total=2000, steps_per_epoch=20)
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Step(Protocol):
    """One optimiser step of somebody's code; returns the loss."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    def __call__(self) -> float | Tensor: ...


class Ours:
    """The product's own step (triptych/step.py) on one batch that lies on the device."""

    def __init__(self, recipe: Recipe, device: str, dtype: torch.dtype):
        self.stepper = Stepper(recipe.model_copy(update={"precision": PRECISION[dtype]}), torch.device(device))
        self.method, self.optimizer = self.stepper.method, self.stepper.optimizer
        raw = batch_of_views(recipe, self.method.encoder.patch_size)
        self.raw = raw.map(lambda x: x.to(device))

    @property
    def views(self) -> Views:
        """What the method sees: normalised floats."""
        return self.raw.on_device(self.stepper.device, self.stepper.mean, self.stepper.std)

    def __call__(self) -> Tensor:
        return torch.as_tensor(self.stepper(NOW, lambda: self.raw).outs[0].loss)


def sized(recipe: Recipe, **asked) -> Recipe:
    """The recipe with what a command line asks for; None leaves a setting as it is.

    arch (timm's name), drop_path, checkpoint; local_crops; prototypes; batch, compile.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    changes = {
        "encoder": {k: given[k] for k in ("arch", "drop_path", "checkpoint") if k in given},
        "views": {k: given[k] for k in ("local_crops",) if k in given},
    }
    method = recipe.method
    if "prototypes" in given:
        base = getattr(method, "base", None)  # of MTE
        change = {"prototypes": given["prototypes"]}
        method = method.model_copy(update={"base": base.model_copy(update=change)} if base is not None else change)
    parts = {name: getattr(recipe, name).model_copy(update=change) for name, change in changes.items()}
    whole = {name: given[name] for name in ("batch", "compile") if name in given}
    return recipe.model_copy(update=parts | whole | {"method": method})


def peak_mib(step: Step, device: str) -> float:
    """MiB above weights and the optimiser's state that two steps in a row need at most.

    Two, because gradients that a script keeps until its next backward pass are alive during that step's forward pass.
    On CUDA what the allocator handed out; elsewhere the live bytes of tensors, which no compiled code must make.
    """
    step()
    step.optimizer.zero_grad(set_to_none=True)

    def twice() -> None:
        step()
        step()

    return _peak_cuda(twice) if device == "cuda" else _peak_live(twice)


def _peak_live(run: Callable[[], None]) -> float:
    with LiveMemory() as memory:
        run()
    return memory.peak / 2**20


def _peak_cuda(run: Callable[[], None]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def same_losses(a: Step, b: Step, steps: int = 3, tolerance: float = 1e-5) -> list[float]:
    """Differences of the two sides' losses, step by step, relative where a loss is above 1.

    Raises UserError above the tolerance: what does not compute the same is not compared.
    """
    pairs = [(float(a()), float(b())) for _ in range(steps)]
    differences = [abs(x - y) / max(1.0, abs(x)) for x, y in pairs]
    if max(differences) > tolerance:
        raise UserError(f"the losses differ, {pairs}: by {max(differences):.2g}, and {tolerance:g} is allowed")
    return differences
