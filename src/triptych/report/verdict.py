"""A run in a few sentences, each by a rule that it states.  The limits are rules of thumb of ours."""

import statistics
from dataclasses import dataclass
from typing import Literal

from triptych.log import duration
from triptych.report.html import number
from triptych.report.run import RunData

DATA_WAIT, RANK_SHARE, SPREAD, UNIFORM, ONE = 0.3, 0.05, 0.1, 0.97, 0.1


@dataclass(frozen=True)
class Finding:
    level: Literal["good", "note", "warning"]
    text: str


def verdict(run: RunData, unreadable: list[str] | None) -> list[Finding]:
    """unreadable: what the run met, None where no checkpoint tells."""
    found = [_finished(run), _loss(run), *_knn(run), *_collapse(run), *_waits(run)]
    if unreadable:
        found.append(Finding("warning", f"{len(unreadable)} images could not be read and were skipped"))
    elif unreadable is not None:
        found.append(Finding("good", "no unreadable image was met"))
    if run.broken:
        what = "line" if run.broken == 1 else "lines"
        said = f"{run.broken} {what} of metrics.jsonl cannot be read (a killed process leaves one)"
        found.append(Finding("note", said))
    return found


def _finished(run: RunData) -> Finding:
    if run.total is None:
        return Finding("note", f"{run.done} steps were done; how many the recipe asks for is not known")
    if run.done >= run.total and run.total in run.saved:
        return Finding("good", f"finished: {run.total} steps, {number(run.epoch(run.total))} epochs")
    saved = f"; the last checkpoint is of step {run.saved[-1]}" if run.saved else "; there is no checkpoint"
    share = 100 * run.done / run.total
    return Finding("warning", f"not finished: step {run.done} of {run.total} ({share:.0f} %){saved}")


def _loss(run: RunData) -> Finding:
    loss = run.columns.get("loss")
    if loss is None:
        return Finding("warning", "no loss was logged")
    finite = loss.finite()
    if len(finite) < len(loss.values):
        lost = len(loss.values) - len(finite)
        return Finding("warning", f"the loss is not finite at {lost} of {len(loss.values)} steps")
    part = max(1, len(finite) // 20)
    first, last = statistics.fmean(finite[:part]), statistics.fmean(finite[-part:])
    said = f"mean of the first {part} steps {number(first)}, of the last {part} {number(last)}"
    return Finding("good", f"the loss is finite at every logged step ({said})")


def _knn(run: RunData) -> list[Finding]:
    values = _health(run, "knn")
    if not values:
        return [Finding("note", "no k-NN probe: it needs labels and health.every above 0")]
    steps = run.columns["health/knn"].steps
    first, last, best = values[0], values[-1], max(values)
    if len(values) == 1:
        return [Finding("note", f"k-NN probe: {first:.1f} % at epoch {number(run.epoch(steps[0]), 3)}, measured once")]
    said = f"k-NN probe: {first:.1f} % at epoch {number(run.epoch(steps[0]), 3)}, {last:.1f} % at the last measurement"
    if last <= first:
        return [Finding("warning", f"{said}: it did not rise")]
    if last < best - 2:
        return [Finding("warning", f"{said}, {best:.1f} % in between: more than 2 points were lost")]
    return [Finding("good", f"{said} (a sample of the training images)")]


def _collapse(run: RunData) -> list[Finding]:
    found = []
    rank, spread = _health(run, "rankme"), _health(run, "feature_std")
    width = run.recipe.encoder.width if run.recipe else None
    if rank and width and rank[-1] < RANK_SHARE * width:
        rule = f"below {_percent(RANK_SHARE)} of the encoder's width of {width}"
        found.append(Finding("warning", f"the features' rank is collapsed: RankMe {rank[-1]:.1f} is {rule}"))
    elif len(rank) > 1 and rank[-1] < rank[0] / 2:
        found.append(Finding("warning", f"RankMe fell to less than half: {rank[0]:.1f} to {rank[-1]:.1f} dimensions"))
    elif rank:
        of = f" of {width}" if width else ""
        found.append(Finding("good", f"the features' rank is not collapsed: RankMe {rank[-1]:.1f}{of} dimensions"))
    if spread and spread[-1] < SPREAD:
        found.append(Finding("warning", f"features are nearly all the same: spread {spread[-1]:.3f}, below {SPREAD}"))
    teacher, mean = _health(run, "teacher_entropy_share"), _health(run, "batch_entropy_share")
    if teacher and teacher[-1] > UNIFORM:
        said = f"targets are uniform and say nothing: entropy {_percent(teacher[-1])} of ln K"
        found.append(Finding("warning", f"{said}, above {_percent(UNIFORM)}"))
    if mean and mean[-1] < ONE:
        said = f"few prototypes are in use: entropy of the mean target {_percent(mean[-1])} of ln K"
        found.append(Finding("warning", f"{said}, below {_percent(ONE)}"))
    if not rank:
        found.append(Finding("note", "health was not measured (health.every 0, or no epoch is over)"))
    return found


def _waits(run: RunData) -> list[Finding]:
    waits = run.columns.get("data_wait")
    finite = waits.finite() if waits else []
    if not finite:
        return []
    share = statistics.median(finite)
    said = f"{_percent(share)} of the median step is spent waiting for images (limit {_percent(DATA_WAIT)})"
    if share > DATA_WAIT:
        mend = "more --loader.workers, --loader.cache_side, or smaller files would help"
        return [Finding("warning", f"{said}: {mend}")]
    return [Finding("good", said)]


def _percent(share: float) -> str:
    return f"{number(100 * share, 3)} %"


def _health(run: RunData, name: str) -> list[float]:
    series = run.columns.get(f"health/{name}")
    return series.finite() if series else []


def stepping(run: RunData) -> list[tuple[str, str]]:
    """What the log tells of speed: names and values."""
    speed, batch = run.columns.get("images_per_second"), run.recipe.batch if run.recipe else None
    rates = [v for v in speed.finite() if v > 0] if speed else []
    if not rates:
        return [("images/s", "not logged")]
    quarters = statistics.quantiles(rates, n=4) if len(rates) > 1 else [rates[0]] * 3
    low, median, high = map(number, quarters)
    told = [("images/s, median step", f"{median} (quartiles {low} and {high})")]
    if batch:
        seconds = sum(batch / rate for rate in rates)
        without = "without health, checkpoints and start-up"
        told.append(("time in training steps", f"{duration(seconds)} (h:mm:ss or m:ss; {len(rates)} steps, {without})"))
    waits = run.columns.get("data_wait")
    if waits and waits.finite():
        told.append(("waiting for images, median step", _percent(statistics.median(waits.finite()))))
    return told
