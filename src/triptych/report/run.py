"""A run's folder as the report reads it: tolerant of what a killed process left behind."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from triptych import checkpoint
from triptych.encoders.load import of_run
from triptych.errors import UserError
from triptych.recipe import Recipe


@dataclass(frozen=True)
class Series:
    """A logged column: values over training steps, not all finite."""

    steps: list[int]  # optimiser steps that were done when the value was measured
    values: list[float]

    def finite(self) -> list[float]:
        return [v for v in self.values if math.isfinite(v)]


@dataclass(frozen=True)
class RunData:
    folder: Path
    label: str  # tells runs of one page apart
    recipe_text: str
    recipe: Recipe | None  # None where this version of Triptych cannot read it
    recipe_error: str
    about: dict[str, Any]  # run.json
    columns: dict[str, Series]
    rows: int  # of training steps
    broken: int  # lines of metrics.jsonl that are no JSON: a killed process leaves one
    steps_per_epoch: int
    total: int | None  # steps of the whole run, as far as is known
    saved: list[int] = field(default_factory=list)  # steps of the checkpoints

    @property
    def data(self) -> dict[str, Any]:
        found = self.about.get("data")
        return found if isinstance(found, dict) else {}

    @property
    def done(self) -> int:
        """Optimiser steps that were logged or saved."""
        logged = [s.steps[-1] + (0 if name.startswith("health/") else 1) for name, s in self.columns.items()]
        return max([*logged, *self.saved[-1:]])

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch


def read_run(folder: Path, label: str | None = None) -> RunData:
    """Raises UserError where the folder is no run, or has logged nothing."""
    if not folder.is_dir() or not of_run(folder):
        raise UserError(f"{folder} is no run: give a folder that `triptych train` wrote")
    metrics = folder / "metrics.jsonl"
    rows, broken = _lines(metrics) if metrics.exists() else ([], 0)
    columns = _columns(rows)
    if not columns:
        raise UserError(f"{folder} has no readable line in metrics.jsonl yet: let `triptych train` do some steps first")
    about = _json(folder / "run.json")
    recipe_text = (folder / "recipe.yaml").read_text(errors="replace")
    recipe, error, raw = _recipe(recipe_text)
    images, batch, epochs = _get(about, "data", "images"), raw.get("batch"), raw.get("epochs")
    if isinstance(images, int) and isinstance(batch, int) and images >= batch > 0:
        each = images // batch
    else:
        each = _steps_per_epoch(rows)
    return RunData(
        folder,
        label or folder.resolve().name,
        recipe_text,
        recipe,
        error,
        about,
        columns,
        sum("loss" in row for row in rows),
        broken,
        each,
        epochs * each if isinstance(epochs, int) else None,
        checkpoint.steps(folder / "checkpoints"),
    )


def _recipe(text: str) -> tuple[Recipe | None, str, dict[str, Any]]:
    """-> the recipe or None, why not, the raw mapping"""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return None, f"recipe.yaml is not YAML ({' '.join(str(error).split())})", {}
    if not isinstance(raw, dict):
        return None, "recipe.yaml is no mapping", {}
    try:
        return Recipe.model_validate(raw), "", raw
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return None, f"recipe.yaml is no recipe of this version of Triptych ({where}: {first['msg']})", raw


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """-> rows with a step; how many lines are broken"""
    rows, broken = [], 0
    for line in path.read_text(errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            broken += 1
    return rows, broken


def _columns(rows: list[dict[str, Any]]) -> dict[str, Series]:
    """Every logged number by name.  Health is measured after its step, a loss before."""
    found: dict[str, Series] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("step", "epoch") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            series = found.setdefault(name, Series([], []))
            series.steps.append(row["step"] + name.startswith("health/"))
            series.values.append(float(value))
    return found


def _steps_per_epoch(rows: list[dict[str, Any]]) -> int:
    """As the logged epochs tell; 1 (so that epochs are steps) where they do not."""
    told = [row["step"] / row["epoch"] for row in rows if isinstance(row.get("epoch"), float) and row["epoch"] > 0]
    return max(1, round(told[-1])) if told else 1


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _get(nested: Any, *keys: str) -> Any:
    for key in keys:
        nested = nested.get(key) if isinstance(nested, dict) else None
    return nested
