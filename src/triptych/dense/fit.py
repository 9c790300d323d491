"""The loop that trains heads and detectors: supervised steps on batches, resumable, on one process or many.

Pre-training has a loop of its own (`train.py`), which knows views, teachers and what they carry from step to step.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from triptych import checkpoint, distributed
from triptych.data.workers import close, next_of
from triptych.errors import Interrupted, NonFinite, UserError
from triptych.log import Metrics, ProgressLine, duration
from triptych.optim import Decay, clip_gradients, parameter_groups, set_rates
from triptych.precision import Precision, chosen_precision
from triptych.settings import flat
from triptych.step import seed_all
from triptych.train import stop_signals


@dataclass(frozen=True)
class Fit:
    """AdamW and how long."""

    steps: int
    lr: float  # peak
    rate: Callable[[int], float]  # step -> factor of the peak
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    decay: Decay = "no_tokens"  # what decays: neither biases, norms nor tokens and positions
    layer_decay: float = 1.0  # of the encoder's rates, block by block
    clip: float | None = None  # norm that all gradients together may have
    precision: Precision = "auto"  # auto: bf16 where the hardware multiplies it fast
    save_every: int = 500  # steps

    def dtype(self, device: torch.device) -> torch.dtype:
        """That forward passes run in."""
        return chosen_precision(self.precision, device)


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterator[Any]],
    settings: Fit,
    *,
    out: Path,
    about: Mapping[str, Any],
    seed: int,
    device: torch.device,
    console: Console,
) -> None:
    """Train `model` in place, or go on with what lies in `out`; at the end it holds the weights after the last step.

    model: a batch, as `batches` gives it but on the device -> losses by name (scalars), whose sum is minimised; what
    requires no gradient stays as it is.  batches: `feed.examples` from an optimiser step on.  about: what identifies
    this training (settings, data, encoder), values that JSON can hold: another one in `out` is an error, but for what
    stands under "told" (names, which may change).
    Under torchrun every process calls it (`distributed.start` before); the first one writes.
    Raises UserError, NonFinite, Interrupted.
    """
    claim(out, about)
    _Loop(model.to(device), settings, out, seed, device, console).run(batches)


def claim(out: Path, about: Mapping[str, Any]) -> None:
    """Write fit.json, or check that it says the same where there is a checkpoint.  Raises UserError."""
    if not distributed.is_main():
        return
    file, mine = out / "fit.json", json.loads(json.dumps(about))
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder")
    if file.exists() and checkpoint.steps(out / "checkpoints"):
        theirs = json.loads(file.read_text())
        theirs, now = ({k: v for k, v in flat(x).items() if not k.startswith("told.")} for x in (theirs, mine))
        keys = sorted(theirs.keys() | now.keys())
        changed = [f"{k}: {theirs.get(k)!r} there, {now.get(k)!r} now" for k in keys if theirs.get(k) != now.get(k)]
        if changed:
            lines = "\n  ".join(changed)
            raise UserError(f"{out} holds another training:\n  {lines}\nGive another folder, or remove this one")
        return
    begun = {"fit.part", "fit.json", "metrics.jsonl", "metrics.part", "tensorboard", "checkpoints"}  # nothing to lose
    if out.exists() and any(path.name not in begun for path in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no training: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    part = out / "fit.part"
    part.write_text(json.dumps(mine, indent=2) + "\n")
    part.replace(file)


class _Loop:
    def __init__(self, model: nn.Module, settings: Fit, out: Path, seed: int, device: torch.device, console: Console):
        self.model, self.settings, self.out, self.seed = model, settings, out, seed
        self.device, self.console, self.dtype = device, console, settings.dtype(device)
        groups = parameter_groups(model, settings.decay, settings.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.pending: list[tuple[int, list[str], Tensor]] = []  # step, names, values
        self.unreadable: dict[str, None] = {}  # of this process, in the order in which they were met

    def run(self, batches: Callable[[int], Iterator[Any]]) -> None:
        steps, start = self.settings.steps, self._resume()
        if start >= steps:
            return
        self.start, self.began = start, time.monotonic()
        self.flushed = self.began
        main = distributed.is_main()
        self.metrics, self.line = Metrics(self.out, start) if main else None, ProgressLine(self.console, enabled=main)
        if start and main:
            self.console.print(f"going on from step {start} of {steps}", highlight=False)
        called, feed = self._distributed(), iter(())
        try:
            feed = batches(start)
            with self._training(), stop_signals() as stop:
                for step in range(start, steps):
                    self._step(step, called, feed)
                    stopped = distributed.any_process(bool(stop), self.device)
                    if stopped or step + 1 == steps or (step + 1) % self.settings.save_every == 0:
                        self._save(step + 1)
                    if stopped and step + 1 < steps:
                        raise Interrupted(stop[0] if stop else 15, step + 1)
        finally:
            close(feed)
            self.line.close()
            if self.unreadable and main:
                names = "\n  ".join(list(self.unreadable)[:5])
                said = f"{len(self.unreadable)} training images could not be read and were replaced:\n  {names}"
                self.console.print(said, highlight=False, markup=False, soft_wrap=True)
            if self.metrics:
                self.metrics.close()

    @contextmanager
    def _training(self) -> Iterator[None]:
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    def _step(self, step: int, called: nn.Module, feed: Iterator[Any]) -> None:
        batch, unreadable = next_of(feed)
        batch = on_device(batch, self.device)
        self.unreadable |= dict.fromkeys(unreadable)
        seed_all(hash((self.seed, step, distributed.rank())))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses = called(batch)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        total.backward()
        if self.settings.clip is not None:
            clip_gradients(self.trained, self.settings.clip, "global")
        set_rates(self.optimizer, self.settings.lr * self.settings.rate(step), self.settings.weight_decay)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        values = torch.stack([x.detach().float() for x in (total, *losses.values())])
        self.pending.append((step, ["loss", *losses], values))
        if self.device.type == "cpu" or len(self.pending) >= 20:  # reading a loss waits for the GPU
            self._flush()

    def _flush(self) -> None:
        """Write pending rows.  Raises NonFinite."""
        if not self.pending:
            return
        rows = [(step, dict(zip(names, v.tolist(), strict=True))) for step, names, v in self.pending]
        self.pending.clear()
        seconds, self.flushed = (time.monotonic() - self.flushed) / len(rows), time.monotonic()
        for step, terms in rows:
            bad = [name for name, value in terms.items() if not abs(value) < float("inf")]
            if bad:
                name = next((name for name in bad if name != "loss"), "loss")
                raise NonFinite(f"the loss {name!r} is {terms[name]} at step {step}; {self._kept()}")
            if self.metrics:
                lr = self.settings.lr * self.settings.rate(step)
                self.metrics.write({"step": step, "lr": lr, "seconds": seconds} | terms)
        step, terms = rows[-1]
        losses = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
        left = duration((time.monotonic() - self.began) / (step + 1 - self.start) * (self.settings.steps - step - 1))
        self.line.show(f"step {step + 1}/{self.settings.steps}  {losses}  {seconds:.2f} s a step  left {left}")

    def _kept(self) -> str:
        return f"{checkpoint.kept(self.out / 'checkpoints')}\nTry a lower --lr"

    def _distributed(self) -> nn.Module:
        if distributed.world_size() == 1:
            return self.model
        devices = [self.device.index] if self.device.type == "cuda" else None
        # A frozen tap or a class token that the last block's patches do not see may have no gradient.
        return DistributedDataParallel(self.model, device_ids=devices, find_unused_parameters=True)

    def _save(self, step: int) -> None:
        self._flush()
        if not checkpoint.finite(self.model):
            raise NonFinite(f"the weights are not finite after step {step}; {self._kept()}")
        if distributed.is_main():
            if self.metrics:
                self.metrics.flush()
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            checkpoint.save(self.out / "checkpoints", step, state, keep=1)
        if distributed.world_size() > 1:
            dist.barrier()

    def _resume(self) -> int:
        found = checkpoint.steps(self.out / "checkpoints")
        if not found:
            return 0
        state = checkpoint.load(checkpoint.path_of(self.out / "checkpoints", found[-1]))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"]


def on_device(batch: Any, device: torch.device) -> Any:
    """Tensors in lists, tuples and dicts, there."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: on_device(x, device) for name, x in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(on_device(x, device) for x in batch)
    return batch
