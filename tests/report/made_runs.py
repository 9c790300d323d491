"""Folders that look like runs, made without training: what the tests of the report share."""

import json
from pathlib import Path

import yaml

from triptych.settings import parse_overrides, resolve

SMALL = "--batch 4 --epochs 2 --encoder.width 24 --encoder.depth 2 --encoder.heads 3 --method.hidden 16"
SMALL += " --method.embedding 8 --method.prototypes 32 --views.global_size 32 --encoder.image_size 32"
SMALL += " --views.local_size 16 --views.local_crops 1 --loader.workers 0 --health.every 1 --health.images 8"


def small_recipe(more: str = ""):
    return resolve("udi_quickstart", None, parse_overrides(f"{SMALL} {more}".split()))[0]


def step_rows(count: int = 16, each: int = 8) -> list[dict]:
    """Rows of training steps, as the trainer logs them."""
    same = {"lr": 1e-3, "weight_decay": 0.04, "images_per_second": 50.0, "data_wait": 0.1}
    return [{"step": i, "epoch": i / each, **same, "loss": 3 - i / count, "class": 2.0} for i in range(count)]


def health_row(step: int, knn: float, rankme: float = 9.0) -> dict:
    return {"step": step, "health/feature_std": 0.8, "health/rankme": rankme, "health/knn": knn}


def make_run(folder: Path, rows: list[dict] | None = None, *, broken: str = "", data: str = "nowhere") -> Path:
    """The folder of a run of 2 epochs of 8 steps, width 24, that logged these rows; broken: a last line."""
    (folder / "checkpoints").mkdir(parents=True)
    recipe = yaml.safe_dump(small_recipe().model_dump(mode="json"), sort_keys=False)
    (folder / "recipe.yaml").write_text(recipe)
    about = {"data": {"name": data, "images": 32, "fingerprint": "0" * 16}, "triptych": "0.1.0", "commit": "abc"}
    (folder / "run.json").write_text(json.dumps(about))
    rows = [*step_rows(), health_row(7, 30.0), health_row(15, 40.0)] if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + broken)
    return folder
