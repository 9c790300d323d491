"""The section of evaluations: figures side by side, and every line as it was written."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

from triptych.report.html import Html, el, folded, join, table
from triptych.report.run import RunData
from triptych.report.tables import PROVENANCE, Result, side_by_side

OPEN = 3  # sets of images whose table is not folded
LONGEST = 30  # numbers of a list that a folded result shows


def evaluations(runs: Sequence[RunData], results: Sequence[Result], notes: Sequence[str]) -> Html:
    said = join(el("p", note, class_="note") for note in notes)
    if not results:
        command = f"triptych eval knn {shlex.quote(str(runs[0].folder))} --data DATA"
        return el("p", "No evaluation found: run ", el("code", command), ", or name its file with --results.") + said
    by_images: dict[str, list[Result]] = {}
    for result in results:
        by_images.setdefault(result.images, []).append(result)
    parts: list[Html] = []
    for images, found in by_images.items():
        columns, rows = side_by_side(found)
        if not rows:
            continue
        head = [which if len(runs) == 1 else f"{runs[run].label}: {which}" for run, which in columns]
        body = [[*key, *(of[c].text() if c in of else "-" for c in columns)] for key, of in rows.items()]
        drawn = table(["protocol", "on", "figure", *head], body, len(columns))
        parts.append(folded(el("strong", f"On {images}"), drawn, open_=len(parts) < OPEN))
    lines = folded(f"All {len(results)} lines, newest first", join(_line(runs, result) for result in results))
    note = "Of equal measurements the newest is shown. ± is half of the 95 % confidence interval, where there is one."
    return join(parts) + el("p", note, class_="note") + said + lines


def _line(runs: Sequence[RunData], result: Result) -> Html:
    whose = f"{runs[result.run].label}, " if len(runs) > 1 else ""
    with_ = ", ".join(str(result.fields[key]) for key in PROVENANCE if result.fields.get(key))
    name = f"{result.protocol} on {result.images}: {whose}{result.which}"
    shown = json.dumps({k: _short(v) for k, v in result.fields.items()}, indent=1, ensure_ascii=False, default=str)
    return folded(name, el("p", with_, class_="note"), el("pre", shown))


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(v) for v in value[:LONGEST]] + ([f"... {len(value)} in all"] if len(value) > LONGEST else [])
    return value
