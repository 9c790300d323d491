"""A module as evaluations use it: on their device, in eval mode, without gradients; afterwards as it was before."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(module: nn.Module, device: torch.device | str, precision: torch.dtype = torch.float32) -> Iterator[None]:
    """What runs inside computes in this precision.

    Lower ones are those of autocast, which converts each weight once for the whole block; weights, norms and the
    residual stream stay float32, so that features keep a cosine above 0.9999 with those of float32.
    """
    device = torch.device(device)
    modes = [(part, part.training) for part in module.modules()]
    home = next((p.device for p in module.parameters()), device)
    try:
        module.to(device).eval()
        with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
            yield
    finally:
        for part, training in modes:
            part.training = training
        module.to(home)


def fast_batch(device: torch.device | str, size: int = 224) -> int:
    """Images of `size` px at a time: enough to fill a GPU; on a CPU so few that a block's activations stay in its
    cache, and so many that its threads, which wait for each other at every operation, have something to do."""
    at_224, most = (256, 1024) if torch.device(device).type == "cuda" else (16, 256)
    return max(1, min(most, at_224 * 224**2 // size**2))
