"""`triptych eval retrieval` and `copy`: sets with a ground truth of their own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from triptych.data.retrieval_sets import RetrievalSet, open_retrieval
from triptych.data.sources import open_source
from triptych.errors import UserError
from triptych.evals.copy_detection import copydays
from triptych.evals.retrieval import PRESETS
from triptych.evals.retrieval_protocols import of_copy_detection, of_retrieval
from triptych.evaluation import subject_of, writable
from triptych.run_frozen import show


def eval_retrieval(
    model: str,
    data: str,
    queries: str | None,
    out: Path,
    *,
    crop_queries: bool,
    preset: str | None,
    subject: dict[str, Any],
    size: int | None,
    scales: Sequence[float] | None,
    **settings: Any,
) -> list[dict]:
    writable(out)
    sets = open_retrieval(data, queries, crop_queries=crop_queries)
    if preset is not None:
        if size or scales:
            raise UserError(f"--preset {preset} says size and scales: leave out --size and --scales")
        size, scales = _preset(preset, sets[0])
    form = {"size": size, "scales": tuple(scales or (1.0,))}
    with subject_of(model, **subject) as of:
        of.check([settings["token"]], settings["layers"])
        found = (replace(of_retrieval(of, images, **form, **settings), setting=images.name) for images in sets)
        return [show(outcome, out) for outcome in found]


def _preset(preset: str, images: RetrievalSet) -> tuple[int, tuple[float, ...]]:
    name = images.name.partition(" [")[0]
    if name not in PRESETS[preset]:
        known = ", ".join(PRESETS[preset])
        raise UserError(f"--preset {preset} is for {known}; {name} has none: give --size and --scales")
    found = PRESETS[preset][name]
    return found.size, found.scales


def eval_copy(
    model: str,
    data: Path,
    attacks: Sequence[str],
    out: Path,
    *,
    subject: dict[str, Any],
    distractors: str | None,
    whiten_on: str | None,
    **settings: Any,
) -> list[dict]:
    writable(out)
    sets = [copydays(data, attack) for attack in attacks]
    more = {"distractors": distractors, "whiten_on": whiten_on}
    sources = {name: open_source(given) for name, given in more.items() if given is not None}
    with subject_of(model, **subject) as of:
        of.check([settings["token"]], settings["layers"])
        return [show(of_copy_detection(of, images, **sources, **settings), out) for images in sets]
