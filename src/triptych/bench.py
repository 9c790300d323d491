"""`triptych bench`: how fast a recipe is on this machine, and what a step's time goes to."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from triptych import distributed
from triptych.bench_parts import Bench
from triptych.data.sources import open_source
from triptych.errors import UserError, nearest
from triptych.evaluation import console, report, writable
from triptych.recipe import of_source
from triptych.settings import parse_overrides, resolve
from triptych.train import check_run

PARTS = "step", "data", "knn", "inference", "syncs"
IMAGES = 64  # of a step at most, where no --batch is given: a recipe's own batch is that of many devices


def bench(
    recipe: str,
    config: Path | None,
    overrides: list[str],
    *,
    data: str | None = None,
    parts: Sequence[str] | None = None,
    steps: int = 5,
    out: Path,
) -> list[dict[str, Any]]:
    """Measure, print and append one JSON line per part.  parts: of PARTS, default all but "syncs".

    Raises UserError.
    """
    for part in parts or ():
        if part not in PARTS:
            raise UserError(f"no part {part!r}{nearest(part, PARTS)} there are: {', '.join(PARTS)}")
    if steps < 1:
        raise UserError(f"--steps {steps}: at least 1 is needed")
    resolved, origin = resolve(recipe, config, parse_overrides(overrides))
    if origin["batch"] in ("default", f"recipe {recipe}") and resolved.batch > IMAGES:
        console.print(f"{IMAGES} images per step; the recipe's {resolved.batch} with --batch {resolved.batch}")
        resolved = resolved.model_copy(update={"batch": IMAGES})
    device = distributed.start()
    if distributed.world_size() > 1:
        distributed.stop()
        raise UserError("one process is measured: start `triptych bench` without torchrun")
    source = open_source(data or f"scenes:{max(IMAGES, resolved.batch)}")
    resolved = of_source(resolved, source)
    check_run(resolved, source)
    measured = Bench(resolved, source, device, steps)
    measured.settle(out, lambda line: console.print(line, highlight=False))
    writable(out)  # after what may refuse the recipe: a mistake leaves no file behind
    about = {
        "recipe": resolved.name,
        "data": {"name": source.name, "images": len(source)},
        "batch": resolved.batch,
        "dtype": str(measured.dtype).removeprefix("torch."),
        "seed": resolved.seed,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "steps": steps,
    }
    rows = []
    for part in parts or PARTS[:-1]:
        result = getattr(measured, part)()
        table = Table("", "", title=f"{part}, {resolved.name}, {about['batch']} images, {about['dtype']}")
        for name, value in lines(part, result):
            table.add_row(name, value)
        settings = {"settings": measured.recipe.model_dump(mode="json")}
        rows.append(report("bench", {"part": part, **result}, about | settings, table, out))
    return rows


def lines(part: str, row: dict[str, Any]) -> list[tuple[str, str]]:
    """A part's row for people: names and values with units."""
    if part == "syncs":
        counts = Counter((s["where"], s["operation"] + " (gradient)" * s["backward"]) for s in row["syncs"])
        return [(where, f"{n} x {what}") for (where, what), n in counts.items()] or [("host synchronisations", "none")]
    what = {"knn": "test images/s", "inference": "images/s, encoder alone"}.get(part, "images/s")
    out = [(what, f"{row['images_per_second']:.4g}")]
    if part == "data":
        out.append(("images/s of one worker alone", f"{row['images_per_second_of_one_worker']:.4g}"))
        out.append(("workers", str(row["workers"])))
    if part == "knn":
        out.append(("train images", str(row["train_images"])))
    if part == "inference":
        out.append(("images/s from the images on", f"{row['images_per_second_from_images']:.4g}"))
    if part == "step":
        out.append(("seconds of a step", f"{row['seconds_per_step']:.3f}"))
        spent, whole = row["split"], row["split_seconds"]
        rest = {"everything else": whole - sum(spent.values())}
        out += [(f"  {name}", f"{s:.3f}  {s / whole:4.0%}") for name, s in (spent | rest).items()]
    if "mfu" in row:
        out.append(("model GFLOP of an image", f"{row['flops_per_image'] / 1e9:.2f}"))
        out.append(("fastest matrix product, GFLOP/s", f"{row['matmul_flops_per_second'] / 1e9:.0f}"))
        out.append(("model FLOPs utilisation", f"{row['mfu']:.1%}"))
    if "peak_memory" in row:
        out.append((f"peak memory, MiB ({row['peak_memory_from']})", f"{row['peak_memory'] / 2**20:.0f}"))
    return [*out, ("most memory of the process, MiB", f"{row['max_rss'] / 2**20:.0f}")]
