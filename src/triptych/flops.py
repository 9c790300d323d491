"""Model FLOPs: what the mathematics of a step needs, not what recomputation adds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_repeating = False


@contextmanager
def repeated() -> Iterator[None]:
    """What is computed inside was computed before and not kept: `Flops` does not count it twice."""
    global _repeating
    before, _repeating = _repeating, True
    try:
        yield
    finally:
        _repeating = before


class Flops(TorchDispatchMode):
    """`with Flops() as f: ...; f.total` = FLOPs of matrix products, convolutions and attention, two per multiply-add.

    What activation checkpointing computes again in the backward pass is left out, and so is the score matrix that fused
    attention computes again there, and what is `repeated`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, kind = kwargs or {}, func.overloadpacket
        if kind not in flop_registry:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        # Gradients are computed with grad mode off; a forward pass that is computed again switches it on.
        again = _repeating or (torch._C._current_autograd_node() is not None and torch.is_grad_enabled())
        if kind in flop_registry and not again:
            flops = flop_registry[kind](*args, **kwargs, out_val=out)
            fused = "attention" in str(kind) and "backward" in str(kind)
            self.total += flops * 4 // 5 if fused else flops  # torch counts five products, one of them for the scores
        return out
