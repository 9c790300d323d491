"""Semantic segmentation: train a linear layer on a frozen encoder, or UPerNet or Semantic FPN with it; mean IoU.

The linear protocol is MMC's and iBOT's, UPerNet MTE's and iBOT's, Semantic FPN UDI's; `segmentation_presets` has their
settings, `dense` the networks.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import default_collate

from triptych import checkpoint, distributed
from triptych.data.annotated import Segmented
from triptych.data.batches import check_batch
from triptych.dense.feed import examples
from triptych.dense.fit import fit
from triptych.dense.inference import Inference, of_inputs
from triptych.dense.segment_data import TrainExamples
from triptych.dense.segmenters import Segmenter, blocks_of, build_segmenter
from triptych.encoders.load import Loaded
from triptych.errors import UserError
from triptych.evals.class_maps import MapScores, check_classes, measure, most_frequent
from triptych.evals.features import encoder_hash
from triptych.evals.frozen import frozen
from triptych.evals.segmentation_presets import SegmentationPreset, preset_of

PRESET = "preset.json"
"""In the folder: how it was measured last, beside fit.json, which says how it was trained."""
TESTING = ("mode", "stride", "scales", "flip", "save_every")  # of a preset: may change after the training


@dataclass(frozen=True)
class SegmentationResult(MapScores):
    """Of the weights after the last step: none is chosen on the validation images."""

    preset: str
    head: str
    blocks: list[int] | None  # counted from 1; None = the last of each of a Swin's stages
    steps: int
    batch: int
    lr: float  # peak
    layer_decay: float
    crop: int  # pixels
    short: int  # pixels, of the shorter side of a test image
    mode: str  # of testing: "slide" or "whole"
    stride: int  # pixels
    scales: list[float]
    flip: bool
    seed: int
    run: str  # folder


def segmentation(
    model: Loaded,
    train: Segmented,
    val: Segmented,
    preset: str | SegmentationPreset = "linear_small",
    *,
    out: Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    console: Console | None = None,
    workers: int | None = None,
) -> SegmentationResult | None:
    """Train the preset's network on `train`, measure it on `val`.

    out: folder of checkpoints and metrics.jsonl; the same call goes on where it was stopped, and measures again (also
    with other windows or scales) where it is finished.  The encoder that was given stays as it is.
    Images have any size; masks are at the images' own, and so are the maps that are compared with them.
    Under torchrun all processes train; the first one measures, the others return None.
    Raises UserError, and what `dense.fit.fit` raises.
    """
    preset = preset_of(preset)
    own, place = preset.sized(model), torch.device(device)
    classes, floor = check_classes(train, val), most_frequent(train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        segmenter = build_segmenter(preset, model.encoder, len(classes))
    check_batch(len(train), preset.batch, 1, distributed.world_size())
    with frozen(segmenter, "cpu"):  # a crop that the network cannot take is an error now, not in a begun folder
        segmenter.full_size(torch.zeros(1, 3, own.crop, own.crop))
    make = TrainExamples(train, preset.train_transform(model))
    drawn: dict[str, Any] = {"batch": preset.batch, "seed": seed, "collate": default_collate, "workers": workers}
    drawn |= {"pin": place.type == "cuda"}
    about = _about(own, model, train, classes, seed)
    settings, say = preset.fit(), console or Console(quiet=True)
    fit(
        _Training(segmenter),
        lambda start: examples(make, len(train), start=start, **drawn),
        settings,
        out=out,
        about=about,
        seed=seed,
        device=place,
        console=say,
    )
    if not distributed.is_main():
        return None
    (out / PRESET).write_text(json.dumps(asdict(preset), indent=2) + "\n")
    inference = preset.inference(model)
    with frozen(segmenter, place, settings.dtype(place)):
        predictor = partial(of_inputs, segmenter, inference=inference)
        counts = {"floor": floor, "train_images": len(train)}
        measured = measure(predictor, inference.inputs, val, **counts, device=place, workers=workers)
    return SegmentationResult(
        **asdict(measured),
        preset=preset.name,
        head=preset.head,
        blocks=blocks_of(preset, model.encoder),
        steps=preset.steps,
        batch=preset.batch,
        lr=preset.lr,
        layer_decay=preset.layer_decay,
        crop=own.crop,
        short=own.short,
        mode=preset.mode,
        stride=own.stride,
        scales=list(preset.scales),
        flip=preset.flip,
        seed=seed,
        run=str(out),
    )


def load_segmenter(out: Path, model: Loaded) -> tuple[Segmenter, Inference, tuple[str, ...]]:
    """What `segmentation` trained in a folder on this encoder, how images go in, and the names of classes.

    In eval mode, on the CPU, with windows and scales as it was measured last; for `dense.inference.predict`.
    Raises UserError where there is no such training.
    """
    steps = checkpoint.steps(out / "checkpoints")
    if not steps or not (out / PRESET).exists():
        raise UserError(f"{out} holds no trained segmenter: give the folder of `triptych eval segmentation`")
    about = json.loads((out / "fit.json").read_text())
    if about["encoder"] != encoder_hash(model.encoder):
        raise UserError(f"{out} was trained on {about['told']['model']}, not on {model.name}: give that encoder")
    preset = TypeAdapter(SegmentationPreset).validate_python(json.loads((out / PRESET).read_text()))
    classes = tuple(about["classes"])
    segmenter = build_segmenter(preset, model.encoder, len(classes))
    state = checkpoint.load(checkpoint.path_of(out / "checkpoints", steps[-1]))
    _Training(segmenter).load_state_dict(state["model"])
    return segmenter.eval(), preset.inference(model), classes


class _Training(nn.Module):
    """A batch -> losses by name."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        return self.segmenter.losses(images, labels.long())


def _about(
    preset: SegmentationPreset, model: Loaded, train: Segmented, classes: Sequence[str], seed: int
) -> dict[str, Any]:
    """What identifies a training."""
    settings = {name: value for name, value in asdict(preset).items() if name not in ("name", *TESTING)}
    about = {"task": "segmentation", "encoder": encoder_hash(model.encoder), "classes": list(classes), "seed": seed}
    told = {"model": model.name, "train": train.name}
    return about | {"preset": settings, "train": train.fingerprint(), "told": told}
