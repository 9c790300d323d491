"""Functions that `torch.compile` may take over, switched on for a block of code.

A compiled function gives the eager one's result up to rounding.  Whether it is faster depends on the machine: the loop
measures both before it switches (`train.py`).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_on = False


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """The function; inside `compiling(True)` its compiled form, made at the first call."""
    compiled: Any = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled
        if not _on:
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function)
        return compiled(*args, **kwargs)

    return call


@contextmanager
def compiling(on: bool = True) -> Iterator[None]:
    """Every `compilable` function that is called inside runs compiled (or eager)."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before
