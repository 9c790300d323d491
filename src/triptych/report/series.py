"""Long curves made short without losing their spikes, and round numbers for axes."""

import math
from collections.abc import Sequence

Points = list[tuple[float, float | None]]
"""(x, y); y None = not a finite number: the line has a gap there."""

MOST = 1000
"""Points of a drawn line."""
LOG_FROM = 50
"""A positive curve whose largest value is so many times its smallest has a logarithmic axis."""


def thinned(xs: Sequence[float], ys: Sequence[float], most: int = MOST) -> Points:
    """At most `most` points, plus gaps: of every bucket the smallest and the largest value, in their order."""
    points: Points = [(x, y if math.isfinite(y) else None) for x, y in zip(xs, ys, strict=True)]
    if len(points) <= most:
        return points
    out: Points = []
    for part in buckets(points, most // 2):
        finite = [(y, i) for i, (_, y) in enumerate(part) if y is not None]
        kept = {min(finite)[1], max(finite)[1]} if finite else set()
        gap = [i for i, (_, y) in enumerate(part) if y is None][:1]
        out += [part[i] for i in sorted([*kept, *gap])]
    return out


def trend(xs: Sequence[float], ys: Sequence[float], parts: int = 60, fewest: int = 180) -> Points:
    """Means of equal parts of a long curve, without what is not finite; [] for a short one."""
    if len(ys) < fewest:
        return []
    out: Points = []
    for part in buckets(list(zip(xs, ys, strict=True)), parts):
        finite = [y for _, y in part if math.isfinite(y)]
        if finite:
            out.append((sum(x for x, _ in part) / len(part), sum(finite) / len(finite)))
    return out


def buckets(items: list, count: int) -> list[list]:
    """Consecutive parts of nearly equal length, none empty."""
    n = len(items)
    return [items[i * n // count : (i + 1) * n // count] for i in range(count) if i * n // count < (i + 1) * n // count]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers within low..high, at steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within low..high, thinned to five at most; with 2 and 5 times them where those are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**e for e in exponents if low <= 10.0**e <= high]
    if len(tens) < 3:
        return [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return tens[:: -(-len(tens) // 5)]
