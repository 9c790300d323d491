"""Schedules: functions of Progress, the only clock.  Tables are those of the methods' authors."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """Where a run is.  step counts optimiser steps from 0; total is their number."""

    step: int
    total: int
    steps_per_epoch: int = 1

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def next(self) -> "Progress":
        """One step later."""
        return replace(self, step=self.step + 1)


Schedule = Callable[[Progress], float]


def cosine(start: float, end: float) -> Schedule:
    """start -> end over the run: end + ½(start − end)(1 + cos(π step/total)).  end itself is never reached."""
    return lambda t: end + 0.5 * (start - end) * (1 + math.cos(math.pi * t.step / max(t.total, 1)))


def linear(start: float, end: float) -> Schedule:
    """start -> end over the run, evenly; end itself is never reached."""
    return lambda t: start + (end - start) * t.step / max(t.total, 1)


WarmUp = Literal["dino", "mocov3", "moby", "msn"]


def warmup_cosine(peak: float, end: float, warmup_epochs: float, start: float = 0.0, kind: WarmUp = "dino") -> Schedule:
    """Linear from start to peak over W = warmup_epochs, in whole steps, then cosine to end.

    kind  after s < W steps of the warm-up      cosine over   authors
    dino    start + (peak − start) s / (W − 1)  the rest      DINO, iBOT, UDI, SwAV: both ends, so the peak comes twice
    mocov3  start + (peak − start) s / W        the rest      MoCo v3, BYOL, MAE
    moby    start + (peak − start) s / W        the whole run  MoBY (timm): falls below the peak when the warm-up ends
    msn     mocov3's, one step ahead            the rest       MSN
    """
    if kind == "msn":
        return ahead(warmup_cosine(peak, end, warmup_epochs, start, "mocov3"))

    def value(t: Progress) -> float:
        warm = min(int(warmup_epochs * t.steps_per_epoch), t.total)
        if t.step < warm:
            last = max(warm - 1, 1) if kind == "dino" else warm
            return start + (peak - start) * t.step / last
        past = 0 if kind == "moby" else warm
        return cosine(peak, end)(replace(t, step=t.step - past, total=t.total - past))

    return value


def epoch_warmup(start: float, end: float, epochs: int) -> Schedule:
    """One value per epoch: linear from start (epoch 0) to end (epoch `epochs` − 1), then end."""
    return lambda t: end if t.epoch >= epochs else start + (end - start) * t.epoch / max(epochs - 1, 1)


def ahead(schedule: Schedule) -> Schedule:
    """What `schedule` says one step later."""
    return lambda t: schedule(t.next)


def stretched(schedule: Schedule, runs: float) -> Schedule:
    """`schedule` laid out over so many times the run's length, of which the run sees the beginning (MSN: 1.25)."""
    return lambda t: schedule(replace(t, total=round(t.total * runs)))


def delayed(schedule: Schedule, epochs: float) -> Schedule:
    """`schedule`, begun after so many epochs; until then its first value."""
    return lambda t: schedule(replace(t, step=max(0, t.step - int(epochs * t.steps_per_epoch))))
