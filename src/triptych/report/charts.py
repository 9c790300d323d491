"""Curves as inline SVG: small multiples that read on a phone, one colour for each run."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from triptych.report.html import Html, el, join, number
from triptych.report.run import Series
from triptych.report.series import LOG_FROM, Points, log_ticks, thinned, ticks, trend

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 220, 62, 12, 12, 40
COLOURS = 8
"""Of the Okabe-Ito palette, which colour-blind people tell apart; style.css has them as --line-0 .. --line-7."""


@dataclass(frozen=True)
class Line:
    """One run's curve of a chart."""

    label: str
    colour: int  # 0 .. COLOURS - 1
    series: Series
    steps_per_epoch: int

    def xs(self) -> list[float]:
        return [step / self.steps_per_epoch for step in self.series.steps]


@dataclass(frozen=True)
class Axis:
    """Values low..high on pixels start..end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, v = self.low, self.high, value
        if self.log:
            low, high, v = math.log10(low), math.log10(high), math.log10(v)
        return self.start + (v - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def chart(title: str, unit: str, lines: Sequence[Line]) -> Html:
    """A figure: title, curve, and a line that tells the values under the pointer (first and last ones until then)."""
    finite = [v for line in lines for v in line.series.finite()]
    lost = sum(len(line.series.values) for line in lines) - len(finite)
    heading = el("figcaption", el("strong", title), f" · {unit}" if unit else "")
    notes = [el("p", f"{lost} values are not finite: gaps", class_="warn")] if lost else []
    if not finite:
        return el("figure", heading, *notes, class_="chart")
    x = _x_axis(lines)
    y = _y_axis(finite)
    drawn = [_drawn(line, x, y) for line in lines]
    said = "; ".join(_said(line, len(lines) > 1) for line in lines if line.series.finite())
    svg = el(
        "svg",
        el("title", f"{title}: {said}"),
        _grid(x, y),
        join(shape for shape, _ in drawn),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        tabindex="0",
        data_lines=json.dumps([about for _, about in drawn], separators=(",", ":"), ensure_ascii=True),
        data_x=f"{x.low!r},{x.high!r},{x.start},{x.end}",
        data_y=f"{y.low!r},{y.high!r},{y.start},{y.end},{int(y.log)}",
    )
    return el("figure", heading, svg, el("p", said, class_="readout", aria_live="off"), *notes, class_="chart")


def _said(line: Line, named: bool) -> str:
    """'2.31 to 0.97'"""
    values = line.series.finite()
    ends = f"{number(values[0])} to {number(values[-1])}" if len(values) > 1 else number(values[0])
    return (f"{line.label}: " if named else "") + ends


def _x_axis(lines: Sequence[Line]) -> Axis:
    all_x = [x for line in lines for x in line.xs()]
    low, high = min(0.0, *all_x), max(all_x)
    if math.ceil(high) - high < 0.02 * high:  # the last step is just before an epoch's end
        high = math.ceil(high)
    return Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)


def _y_axis(finite: list[float]) -> Axis:
    low, high = min(finite), max(finite)
    log = low > 0 and high / low >= LOG_FROM
    if log:
        low, high = low / 1.1, high * 1.1
    else:
        pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        low, high = (0.0 if 0 <= low < pad else low - pad), high + pad
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def _grid(x: Axis, y: Axis) -> Html:
    parts = []
    for value in y.ticks():
        at = f"{y.at(value):.1f}"
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
        parts.append(el("text", number(value), x=LEFT - 6, y=at, dy="0.35em", text_anchor="end"))
    for value in x.ticks():
        at = x.at(value)
        anchor = "end" if at > WIDTH - RIGHT - 20 else "middle"
        parts.append(el("text", number(value), x=f"{at:.1f}", y=HEIGHT - BOTTOM + 17, text_anchor=anchor))
    name = "epochs, log scale" if y.log else "epochs"
    parts.append(el("text", name, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle"))
    return el("g", *parts, class_="grid")


def _drawn(line: Line, x: Axis, y: Axis) -> tuple[Html, dict]:
    """-> its shapes, what the script reads"""
    xs, ys = line.xs(), line.series.values
    points, mean = thinned(xs, ys), trend(xs, ys)
    kept = [(a, b) for a, b in points if b is not None]
    shapes = [el("path", d=_path(points, x, y), class_="every" if mean else "line")]
    if mean:
        shapes.append(el("path", d=_path(mean, x, y), class_="line"))
    elif len(kept) <= 40:
        shapes += [el("circle", cx=f"{x.at(a):.1f}", cy=f"{y.at(b):.1f}", r=2.5) for a, b in kept]
    about = {"label": line.label, "each": line.steps_per_epoch}
    about |= {"x": [float(f"{a:.6g}") for a, _ in kept], "y": [float(f"{b:.5g}") for _, b in kept]}
    return el("g", *shapes, class_=f"of-run line-{line.colour}"), about


def _path(points: Points, x: Axis, y: Axis) -> str:
    """M and L commands; a new M after every gap.  A point between two gaps is a dot (its line goes nowhere)."""
    commands, pen = [], "M"
    for a, b in points:
        if b is None:
            pen = "M"
            continue
        commands.append(f"{pen}{x.at(a):.1f} {y.at(b):.1f}" + ("h0" if pen == "M" else ""))
        pen = "L"
    return "".join(commands)
