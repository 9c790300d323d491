"""The operations of ``data/operations.py`` on a batch of crops, on any device, each image with parameters of its own.

Images are (B, 3, H, W) uint8 RGB.  Values are rounded to whole grey levels after every operation, as PIL rounds them,
which also keeps what is read and written at one byte per value.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.compiling import compilable
from triptych.data.colour import JITTERS

_LUMA = (19595.0, 38470.0, 7471.0)  # ITU-R 601 as PIL counts: in 65536ths, so that every product is exact in float32


def _each(factor: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return factor[:, None, None, None]


def _luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 1, H, W) float32: whole grey levels."""
    r, g, b = (channel.float() * weight for channel, weight in zip(x.split(1, 1), _LUMA, strict=True))
    return ((r + g + b + 32768) / 65536).floor()


def _blend(other: Tensor | float, x: Tensor, factor: Tensor) -> Tensor:
    """other + factor (x - other), cut off to whole levels within 0..255."""
    return (other + _each(factor) * (x - other)).clamp(0, 255).to(torch.uint8)


@compilable
def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(0.0, x, factor)


@compilable
def contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend((_luma(x).mean((1, 2, 3), keepdim=True) + 0.5).floor(), x, factor)


@compilable
def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(_luma(x), x, factor)


@compilable
def hue(x: Tensor, factor: Tensor) -> Tensor:
    """Through PIL's HSV of 8 bits: 255 steps of hue and of saturation, cut off to whole ones."""
    r, g, b = x.float().unbind(1)
    value, least = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - least
    some = chroma.clamp(min=1)
    sixth = torch.where(r == value, (g - b) / some, torch.where(g == value, 2 + (b - r) / some, 4 + (r - g) / some))
    turn = sixth / 6
    # Half a thousandth of a step: exact steps must not be cut off to the one below.
    step = ((turn - turn.floor()) * 255 + 5e-4).floor() + (factor * 255).trunc()[:, None, None]
    at = (step - 256 * (step / 256).floor()) * (6 / 255)  # in 0..6 and a little more: 256 steps are counted on 255
    strength = (chroma / value.clamp(min=1) * 255 + 5e-4).floor() / 255
    n = torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
    k = torch.remainder(n + at[:, None], 6)
    off = torch.minimum(k, 4 - k).clamp(0, 1)  # a channel falls, stays low, rises and stays high around the circle
    return (value[:, None] * (1 - strength[:, None] * off) + 0.5).floor().to(torch.uint8)


@compilable
def grey(x: Tensor) -> Tensor:
    return _luma(x).to(torch.uint8).expand_as(x)


@compilable
def blur(x: Tensor, kernel: Tensor) -> Tensor:
    """kernel (B, K) of odd K, along both axes; edges are repeated."""
    y, reach = x.float(), kernel.shape[1] // 2
    for dim, padding in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        wide = F.pad(y, padding, mode="replicate")
        taps = [wide.narrow(dim, i, x.shape[dim]) for i in range(kernel.shape[1])]
        y = _each(kernel[:, reach]) * taps[reach]
        for i in range(reach):
            y = torch.addcmul(y, taps[i] + taps[-1 - i], _each(kernel[:, i]))
    return (y + 0.5).floor().to(torch.uint8)


@compilable
def solarise(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x < _each(threshold), x, 255 - x)


def _ends(sigma: Tensor) -> Tensor:
    """(B,) -> (B,) int64: l of `operations.blur_kernel`, whose kernel has 6 l + 7 numbers."""
    return ((((4 * sigma * sigma + 1).sqrt() - 1) / 2).floor()).long()


def blur_kernels(sigma: Tensor) -> Tensor:
    """(B,) -> (B, K) float32: `operations.blur_kernel` of deviations that share one K."""
    variance, l = sigma.double()[:, None] ** 2 / 3, int(_ends(sigma.double())[0])
    end = (2 * l + 1) * (variance - l * (l + 1) / 3) / (2 * ((l + 1) ** 2 - variance))
    box = torch.cat([end, torch.ones(len(sigma), 2 * l + 1, dtype=end.dtype), end], 1)
    kernel = box = box / box.sum(1, keepdim=True)
    n = box.shape[1]
    for _ in range(2):
        shifted = [F.pad(kernel * box[:, i, None], (i, n - 1 - i)) for i in range(n)]
        kernel = cast(Tensor, sum(shifted))
    return kernel.float()


_Step = tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...]]  # operation, rows of the batch, its parameters


def _steps(drawn: Tensor) -> Iterator[_Step]:
    """What `Drawn` does, in its order, each operation on all images that are due for it."""
    jitters = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    for position in range(4):
        for number, name in enumerate(JITTERS):
            rows = (drawn[:, position] == number).nonzero()[:, 0]
            yield jitters[name], rows, (drawn[rows, 4 + position],)
    yield grey, (drawn[:, 8] > 0).nonzero()[:, 0], ()
    sigma = drawn[:, 9].double()
    for l in range(int(_ends(sigma).max()) + 1):
        rows = ((sigma > 0) & (_ends(sigma) == l)).nonzero()[:, 0]
        if len(rows):
            yield blur, rows, (blur_kernels(sigma[rows]),)
    rows = (drawn[:, 10] < 256).nonzero()[:, 0]
    yield solarise, rows, (drawn[rows, 10].to(torch.int16),)


def apply(images: Tensor, drawn: Tensor) -> Tensor:
    """images (B, 3, H, W) uint8 on the device, drawn (B, COLUMNS) float32 of data/colour.py on the CPU -> new images.

    What is done to which image is decided on the CPU: nothing waits for the device.
    """
    out = images.clone(memory_format=torch.contiguous_format)
    steps = [step for step in _steps(drawn) if len(step[1])]
    if not steps:
        return out
    rows = torch.cat([rows for _, rows, _ in steps]).to(out.device, non_blocking=True)
    for (operation, on, parameters), at in zip(steps, rows.split([len(step[1]) for step in steps]), strict=True):
        moved = [p.to(out.device, non_blocking=True) for p in parameters]
        if len(on) == len(out):
            out = operation(out, *moved)
        else:
            out[at] = operation(out[at], *moved)
    return out
