"""Schedules: functions of Progress, the only clock.  Tables follow DINO's."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run is.  step counts optimiser steps from 0; total is their number."""

    step: int
    total: int
    steps_per_epoch: int = 1

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch


Schedule = Callable[[Progress], float]


def cosine(start: float, end: float) -> Schedule:
    """start -> end over the run: end + ½(start − end)(1 + cos(π step/total)).  end itself is never reached."""
    return lambda t: end + 0.5 * (start - end) * (1 + math.cos(math.pi * t.step / max(t.total, 1)))


def warmup_cosine(peak: float, end: float, warmup_epochs: float, start: float = 0.0) -> Schedule:
    """Linear from start to peak over the warm-up, both ends included, then cosine to end over the rest."""

    def value(t: Progress) -> float:
        warm = min(int(warmup_epochs * t.steps_per_epoch), t.total)
        if t.step < warm:
            return start + (peak - start) * t.step / max(warm - 1, 1)
        return cosine(peak, end)(Progress(t.step - warm, t.total - warm))

    return value


def epoch_warmup(start: float, end: float, epochs: int) -> Schedule:
    """One value per epoch: linear from start (epoch 0) to end (epoch `epochs` − 1), then end."""
    return lambda t: end if t.epoch >= epochs else start + (end - start) * t.epoch / max(epochs - 1, 1)
