"""Named parts of a training step: they appear in a torch profile, and `recorded` adds up their time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

_seconds: dict[str, float] | None = None
_open: list[float] = []  # time spent in spans within the innermost open one, and so on outwards


@contextmanager
def span(name: str) -> Iterator[None]:
    """One part of a step.  Costs about a microsecond where nothing records."""
    with record_function(name):
        if _seconds is None:
            yield
            return
        began = now()
        _open.append(0.0)
        try:
            yield
        finally:
            spent = now() - began
            _seconds[name] = _seconds.get(name, 0.0) + spent - _open.pop()
            if _open:
                _open[-1] += spent


@contextmanager
def recorded() -> Iterator[dict[str, float]]:
    """Seconds of every span inside, each without the spans within it.  Waits for the GPU at every border."""
    global _seconds
    _seconds = {}
    try:
        yield _seconds
    finally:
        _seconds = None


def now() -> float:
    """Seconds, read when the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
