"""How far a long computation is, and how long it will still take; silent unless a command asks for it."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console

from triptych.log import ProgressLine, duration

T = TypeVar("T")
PATIENCE = 3.0  # seconds before anything is said

_line: ContextVar[ProgressLine | None] = ContextVar("progress", default=None)


@contextmanager
def reporting(console: Console) -> Iterator[None]:
    """Within it `progress` tells on this console: a live line on a terminal, a line every ten seconds elsewhere.

    Within another one it changes nothing: a terminal has one live line.
    """
    if _line.get() is not None:
        yield
        return
    line = ProgressLine(console)
    token = _line.set(line)
    try:
        yield
    finally:
        _line.reset(token)
        line.close()


def progress(items: Iterable[T], what: str, total: int, *, each: int = 1) -> Iterator[T]:
    """The items as they are; while they pass, "WHAT 12 of 40, 0:31 left".  total: the sum; each: what an item counts
    for (the last one less)."""
    line, began, done = _line.get(), time.monotonic(), 0
    try:
        for item in items:
            yield item
            done = min(total, done + each)
            spent = time.monotonic() - began
            if line is not None and spent > PATIENCE:
                line.show(f"{what} {done} of {total}, {duration(spent / done * (total - done))} left")
    finally:  # also where the caller needs no more of them
        if line is not None:
            line.show("")  # the live line goes blank
