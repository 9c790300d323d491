"""Interleaved timing of alternatives, and the file that a benchmark leaves."""

import datetime
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from triptych.run_folder import provenance

RESULTS = Path(__file__).parent / "results"


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each contender: the minimum over `rounds` rounds in which all take turns, after one warm-up round.

    Turns within one process see the same neighbours on a shared machine, so ratios hold where seconds do not.
    """
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def report(theme: str, title: str, command: str, table: list[str]) -> None:
    """Print the table and write it to results/THEME_HARDWARE_DATE.md with what identifies it."""
    about, day = provenance(), datetime.date.today().isoformat()
    words = re.findall(r"[a-z0-9.]+", about["hardware"].split(",")[0].lower())
    hardware = "-".join(w for w in words if w not in ("r", "tm", "processor"))
    lines = [f"# {title}, {day}", "", f"Command: `{command}`", "", f"Provenance: `{json.dumps(about)}`.", "", *table]
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{theme}_{hardware}_{day}.md"
    file.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written to {file}")
