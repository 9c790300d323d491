"""Functions that `torch.compile` may take over, switched on for a block of code.

A compiled function gives the eager one's result up to rounding.  Whether it is faster depends on the machine: a run
with `compile: auto` measures both and keeps the faster (`step.py`).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from triptych.errors import UserError
from triptych.spans import now

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


def compare(run: Callable[[], object], rounds: int = 3) -> tuple[float, float]:
    """(eager, compiled) seconds of a call: the least of so many each, taken in turns after one of each to warm up.

    Raises UserError where torch.compile does not work on this machine.
    """
    from torch._dynamo.exc import TorchDynamoException  # seconds to import

    seconds = {False: float("inf"), True: float("inf")}
    for turn in range(rounds + 1):
        for on in seconds:
            began = now()
            try:
                with compiling(on):
                    run()
            except TorchDynamoException as error:
                raise UserError(
                    f"torch.compile does not work here ({str(error).strip().splitlines()[0]}): set --compile off"
                ) from error
            if turn:
                seconds[on] = min(seconds[on], now() - began)
    return seconds[False], seconds[True]
