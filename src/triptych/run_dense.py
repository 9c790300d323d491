"""`triptych eval click`, `similarity`, `video`, `probe`, `segmentation`, `detection`: what patch tokens know."""

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from rich.markup import escape
from rich.table import Table

from triptych import distributed
from triptych.data.annotated import (
    coco_splits,
    open_annotated,
    open_coco,
    open_segmented,
    open_videos,
    segmented_splits,
)
from triptych.errors import UserError
from triptych.evals import detection as detections
from triptych.evals import segmentation as segmentations
from triptych.evals.class_maps import figures as segmentation_figures
from triptych.evals.click import ClickSettings, mean_target_area
from triptych.evals.click_targets import Unit
from triptych.evals.davis_metrics import is_measured
from triptych.evals.dense_protocols import of_click, of_patch_probe, of_similarity, of_video
from triptych.evals.detection_presets import preset_of as detection_preset
from triptych.evals.features import encoder_hash
from triptych.evals.outcome import Figure, Outcome, about_images
from triptych.evals.presets import with_changes
from triptych.evals.propagation import Settings
from triptych.evals.published_dense import known_annotated, known_videos, published_dense
from triptych.evals.segmentation_presets import preset_of as segmentation_preset
from triptych.evals.subject import random_weights
from triptych.evaluation import console, load_one, say, subject_of, tell_same, writable
from triptych.progress import reporting
from triptych.run_folder import slug
from triptych.run_frozen import show
from triptych.settings import parse_overrides


def eval_click(
    model: str, data: str, out: Path, *, subject: dict, images: int | None, seed: int, **settings: Any
) -> dict:
    writable(out)
    asked, source = ClickSettings(**settings), open_annotated(data)
    with subject_of(model, **subject) as of:
        outcome = of_click(of, source, asked, images=images, seed=seed)
    _tell(known_annotated(source), "click")
    return show(outcome, out)


def target_area(data: str, *, size: int, patch_size: int, images: int | None, seed: int) -> None:
    """How large targets are in every reading of the paper, from the annotation alone."""
    source = open_annotated(data)
    # At one size of all images averaging by "dataset" gives the mean over targets again, and so by classes.
    columns = ("mean area %", "mean of classes", "with skipped", "number", "skipped")
    table = Table("target", *columns, title=escape(f"{data}, {size} px"))
    with reporting(console):
        for unit in get_args(Unit):
            of = mean_target_area(source, unit, size=size, patch_size=patch_size, images=images, seed=seed)
            areas = (of.floor["targets"], of.floor["classes"], of.every_target)
            table.add_row(unit, *(f"{x:.2f}" for x in areas), str(of.targets), str(of.skipped))
    console.print(table)


def eval_similarity(model: str, data: str, out: Path, *, subject: dict, **settings: Any) -> dict:
    writable(out)
    source = open_annotated(data)
    with subject_of(model, **subject) as of:
        outcome = of_similarity(of, source, **settings)
    _tell(known_annotated(source), "similarity")
    return show(outcome, out)


def eval_video(model: str, data: str, out: Path, *, subject: dict, masks: Path | None, **settings: Any) -> dict:
    writable(out)
    asked, videos = Settings(**settings), open_videos(data)
    if masks is None and not any(is_measured(video) for video in videos):
        raise UserError(f"{data}: no video has annotations to be scored on: say where to write masks, --masks FOLDER")
    with subject_of(model, **subject) as of:
        outcome = of_video(of, data, videos, asked, out=masks)
    if not outcome.figures:
        say(f"no video has annotations to be scored on; masks: {masks}")
        return {}
    _tell(known_videos(videos), "video")
    return show(outcome, out)


def eval_patch_probe(
    model: str, data: str, test: str | None, out: Path, *, subject: dict, seed: int, **settings: Any
) -> dict:
    writable(out)
    pair = _pair(segmented_splits, open_segmented, data, test)
    with subject_of(model, **subject) as of:
        return show(of_patch_probe(of, *pair, seed=seed, **settings), out)


def eval_segmentation(model: str, data: str, test: str | None, out: Path, **options: Any) -> dict | None:
    """Under torchrun all processes train; the first one measures."""
    preset = with_changes(segmentation_preset(options["preset"]), parse_overrides(options.pop("overrides")))
    options |= {"preset": preset, "protocol": "segmentation", "figures": segmentation_figures}
    opened = segmented_splits, open_segmented
    return _trained(model, data, test, out, opened, segmentations.segmentation, **options)


def eval_detection(model: str, data: str, test: str | None, out: Path, **options: Any) -> dict | None:
    """Under torchrun all processes train; the first one measures."""
    preset = with_changes(detection_preset(options["preset"]), parse_overrides(options.pop("overrides")))
    options |= {"preset": preset, "protocol": "detection", "figures": detections.figures}
    return _trained(model, data, test, out, (coco_splits, open_coco), detections.detection, **options)


def _trained(
    model: str,
    data: str,
    test: str | None,
    out: Path,
    opened: tuple[Callable, Callable],
    train: Callable,
    *,
    preset: Any,
    protocol: str,
    figures: Callable[[Any], list[Figure]],
    run: Path | None,
    seed: int,
    weights: dict[str, Any],
) -> dict | None:
    """Train a network on an encoder, measure it, write the outcome down."""
    writable(out)
    loaded = load_one(model, **weights)
    asked = preset.name.removesuffix(" (changed)")
    folder = run or Path("runs") / slug(f"{asked}-{loaded.name}-{Path(data).name}-{seed}")
    device = distributed.start()
    try:
        pair = distributed.first_process_first(lambda: _pair(*opened, data, test))
        with reporting(console):
            result = train(loaded, *pair, preset, out=folder, seed=seed, device=device, console=console)
    finally:
        distributed.stop()
    if result is None:  # not the first process
        return None
    about = {"model": loaded.name, "encoder": encoder_hash(loaded.encoder), "heads": loaded.encoder.heads}
    about |= {"settings": asdict(preset), "run": str(folder), "seed": seed} | about_images(train=pair[0], test=pair[1])
    about |= random_weights(loaded)
    said = {field.name for field in fields(result)}
    about = {key: value for key, value in about.items() if key not in said}
    if getattr(result, "unreadable", 0):
        say(f"{result.unreadable} images of {pair[1].name} cannot be read: left out")
    say(f"run: {folder}")
    _tell(known_annotated(pair[1]), protocol)
    return show(Outcome(protocol, preset.name, about, result, figures(result)), out)


def _pair(splits: Callable, open_one: Callable, data: str, test: str | None) -> tuple[Any, Any]:
    """(to train on, to measure on)."""
    if test is None:
        return splits(data)
    pair = open_one(data), open_one(test, measured=True)
    tell_same(*pair)
    return pair


def _tell(known: str | None, protocol: str) -> None:
    for row in published_dense(known, protocol):
        say(f"reported by the papers, not measured here: {row.figure}, {row.encoder}: {row.value:g}")
