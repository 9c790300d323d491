"""Interleaved timing of alternatives, and the files that a benchmark leaves."""

import datetime
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from triptych.run_folder import provenance

Clock = Literal["wall", "cpu"]
RESULTS = Path(__file__).parent / "results"


def rounds_of(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Clock = "wall"
) -> dict[str, list[float]]:
    """Seconds of each contender in each of `rounds` rounds in which all take turns, after one warm-up round.

    Turns within one process see the same neighbours on a shared machine, so ratios within a round hold where seconds do
    not.  clock "cpu": seconds that this process spent on CPUs, all threads together.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            began = _now(clock)
            run()
            if turn:
                seconds[name].append(_now(clock) - began)
    return seconds


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least seconds of each contender over `rounds_of`."""
    return {name: min(seconds) for name, seconds in rounds_of(contenders, rounds).items()}


@dataclass(frozen=True)
class Ratio:
    """How often `under` goes into `over`, round by round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, over: Sequence[float], under: Sequence[float]) -> "Ratio":
        each = [a / b for a, b in zip(over, under, strict=True)]
        return cls(statistics.median(each), min(each), max(each))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def report(
    theme: str,
    title: str,
    command: str,
    table: list[str],
    rows: Sequence[Mapping] = (),
    about: Mapping[str, object] | None = None,
    folder: Path = RESULTS,
) -> None:
    """Print the table and write it to FOLDER/THEME_HARDWARE_DATE.md with what identifies it.

    about: more of that, e.g. commits of checkouts.  rows: one per measurement, to the .jsonl file beside it.
    """
    facts: dict[str, Any] = provenance() | {"load": [round(x, 1) for x in os.getloadavg()]} | dict(about or {})
    day = datetime.date.today().isoformat()
    words = re.findall(r"[a-z0-9.]+", facts["hardware"].split(",")[0].lower())
    hardware = "-".join(w for w in words if w not in ("r", "tm", "processor"))
    lines = [f"# {title}, {day}", "", f"Command: `{command}`", "", f"Provenance: `{json.dumps(facts)}`.", "", *table]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{theme}_{hardware}_{day}.md"
    file.write_text("\n".join(lines) + "\n")
    if rows:
        dumped = [json.dumps({**row, "command": command, **facts}) for row in rows]
        file.with_suffix(".jsonl").write_text("\n".join(dumped) + "\n")
    print("\n".join(lines))
    print(f"written to {file}")


def _now(clock: Clock) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() if clock == "wall" else time.process_time()
