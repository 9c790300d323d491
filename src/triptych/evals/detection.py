"""Detection and instance segmentation: train a detector on an encoder, then COCO AP of boxes and masks.

The encoder is trained with the rest.  Which detector and how: `detection_presets`; the model: `dense/mask_rcnn.py`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from triptych import distributed
from triptych.data.batches import check_batch
from triptych.data.coco import CocoSource
from triptych.data.images import UnreadableImage
from triptych.dense.coco_ap import AP, coco_ap, encoded, evaluator, pasted
from triptych.dense.detect_data import Sizes, TrainScenes, as_list, at_test_size
from triptych.dense.feed import examples
from triptych.dense.fit import Fit, fit
from triptych.dense.maps import to_train
from triptych.dense.mask_rcnn import Detector
from triptych.dense.pyramid import Pyramid
from triptych.encoders.load import Loaded
from triptych.errors import UserError
from triptych.evals.detection_presets import DetectionPreset, preset_of
from triptych.evals.features import encoder_hash
from triptych.evals.frozen import frozen
from triptych.evals.outcome import Figure
from triptych.progress import progress

DETECTIONS = "detections.json"
FEW_CLASSES = 20  # so many at most have a figure each; the result has all


@dataclass(frozen=True)
class DetectionResult:
    """After the last step: nothing is chosen on the test images.  AP in percent (`coco_ap.AP`)."""

    box: AP
    mask: AP | None  # None: the sets have no masks (Faster R-CNN)
    preset: str  # name
    steps: int
    batch: int  # images per step
    lr: float  # peak
    layer_decay: float
    test_size: int  # pixels of the shorter side, up to `longest` of the longer one
    longest: int
    prefix: bool  # were class tokens in the encoder?
    train_images: int
    test_images: int  # that could be read
    classes: int
    detections: str  # file: COCO's form of results


def detection(
    model: Loaded,
    train: CocoSource,
    test: CocoSource,
    preset: str | DetectionPreset,
    *,
    out: Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    console: Console | None = None,
    workers: int | None = None,
) -> DetectionResult | None:
    """Train `preset`'s detector from `model` on `train`, and measure it on `test`.

    Masks are learned and measured where both sets have them.  out: folder of the training, which the same call goes on
    with, and measures again where it is finished; detections.json is written there.  workers: processes that read.
    Under torchrun all processes train (`distributed.start` before); the first one measures, the others return None.
    Raises UserError, and what `fit.fit` raises.
    """
    preset, device = preset_of(preset), torch.device(device)
    _check(train, test)
    say = console or Console(quiet=True)
    masks, steps = _masks(train, test, say), preset.count(len(train))
    check_batch(len(train), preset.batch, 1, distributed.world_size())
    detector, settings = build(model, preset, len(train.classes), masks=masks, seed=seed), _settings(preset, steps)
    make, pin = TrainScenes(train, preset.sizes, masks), device.type == "cuda"
    drawn = {"batch": preset.batch, "seed": seed, "collate": as_list, "workers": workers, "pin": pin}
    about = {"preset": _trained_by(preset), "steps": steps, "masks": masks, "seed": seed, "task": "detection"}
    about |= {"encoder": encoder_hash(model.encoder), "train": train.fingerprint()}
    about |= {"told": {"model": model.name, "train": train.name}}
    fit(
        detector,
        lambda start: examples(make, len(train), start=start, **drawn),
        settings,
        out=out,
        about=about,
        seed=seed,
        device=device,
        console=say,
    )
    if not distributed.is_main():
        return None
    with frozen(detector, device, settings.dtype(device)):
        found, images = detect_all(detector, test, preset.sizes, device)
    part = out / f"{DETECTIONS}.part"
    part.write_text(json.dumps(found))
    part.replace(out / DETECTIONS)
    if len(images) < len(test):
        say.print(
            f"{len(test) - len(images)} images of {test.name} cannot be read: left out", markup=False, soft_wrap=True
        )
    return DetectionResult(
        box=coco_ap(test.json_path, found, "bbox", images),
        mask=coco_ap(test.json_path, found, "segm", images) if masks else None,
        steps=steps,
        train_images=len(train),
        test_images=len(images),
        classes=len(train.classes),
        detections=str(out / DETECTIONS),
        **_said(preset),
    )


def _masks(train: CocoSource, test: CocoSource, console: Console) -> bool:
    """Are masks learned and measured?  Told where some of the objects have one and others not."""
    for source in (train, test):
        objects = sum(len(source.boxes(i).ids) for i in range(len(source)))
        if 0 < source.without_mask < objects:
            said = f"{source.without_mask} of {objects} objects of {source.name} have no mask: boxes alone"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
    if train.has_masks != test.has_masks:
        without = (test if train.has_masks else train).name
        console.print(
            f"{without} has no masks for all objects: boxes alone", highlight=False, markup=False, soft_wrap=True
        )
    return train.has_masks and test.has_masks


TESTING = ("test_size", "test_proposals", "score", "nms", "detections", "save_every", "name")
"""Of a preset, at any depth: what may change after the training."""


def _trained_by(preset: DetectionPreset) -> dict[str, Any]:
    """The settings that decide a training."""

    def without(values: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in values.items() if name not in TESTING}
        return {name: without(value) if isinstance(value, dict) else value for name, value in kept.items()}

    return without(asdict(preset))


def _said(preset: DetectionPreset) -> dict[str, Any]:
    """What a result says of its settings."""
    sizes = {"test_size": preset.sizes.test_size, "longest": preset.sizes.longest}
    own = {name: getattr(preset, name) for name in ("batch", "lr", "layer_decay", "prefix")}
    return {"preset": preset.name, **own, **sizes}


def build(model: Loaded, preset: DetectionPreset, classes: int, *, masks: bool, seed: int) -> Detector:
    """The detector, its encoder a copy of the model's and its heads drawn from the seed.  Raises UserError."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = model.encoder if preset.prefix else model.encoder.without("prefix")
        config = preset.detector
        pyramid = Pyramid(to_train(encoder, preset.drop_path), config.blocks, norm=config.norm)
        return Detector(pyramid, config, classes=classes, masks=masks, mean=model.mean, std=model.std)


def detect_all(
    detector: Detector, source: CocoSource, sizes: Sizes, device: torch.device
) -> tuple[list[dict[str, Any]], list[int]]:
    """Detections in COCO's form, in pixels of the images, and the ids of images that could be read.

    One image at a time: its masks are pasted and encoded before the next one's.
    """
    detector.eval()
    found: list[dict[str, Any]] = []
    images: list[int] = []
    for i in progress(range(len(source)), "detecting in image", len(source)):
        try:
            image, factors = at_test_size(source, i, sizes)
        except UnreadableImage:
            continue
        images.append(source.image_id(i))
        (detected,) = detector.detect([image.to(device)])
        found += _coco_form(detected, factors, source, i)
    if not images:
        raise UserError(f"no image of {source.name} can be read")
    return found, images


def _coco_form(
    detected: dict[str, Tensor], factors: tuple[float, float], source: CocoSource, index: int
) -> list[dict[str, Any]]:
    """One image's boxes [left, top, width, height], and masks as run lengths."""
    part = {name: x.cpu().numpy() for name, x in detected.items()}
    boxes, (height, width) = part["boxes"] / np.array(factors * 2, np.float32), source.size(index)
    rows = []
    for k, (box, score, label) in enumerate(zip(boxes, part["scores"], part["labels"], strict=True)):
        left, top, right, bottom = (float(v) for v in box)
        row: dict[str, Any] = {
            "image_id": source.image_id(index),
            "category_id": source.category_ids[int(label) - 1],
            "bbox": [left, top, right - left, bottom - top],
            "score": float(score),
        }
        if "masks" in part:
            row["segmentation"] = encoded(pasted(part["masks"][k], box, height, width))
        rows.append(row)
    return rows


def figures(result: DetectionResult) -> list[Figure]:
    """What a table shows of it; sizes that the test images do not have are left out."""
    note = f"{result.steps} steps of {result.batch} images"
    rows = []
    for kind, ap in (("box", result.box), ("mask", result.mask)):
        if ap is None:
            continue
        values = {
            f"{kind} AP %": ap.ap,
            f"{kind} AP50 %": ap.ap50,
            f"{kind} AP75 %": ap.ap75,
            f"{kind} AP % of small objects": ap.small,
            f"{kind} AP % of medium objects": ap.medium,
            f"{kind} AP % of large objects": ap.large,
        }
        main = (f"{kind} AP %", f"{kind} AP50 %")
        rows += [Figure(name, x, note=note, main=name in main) for name, x in values.items() if x is not None]
        by_class = ap.class_ap50.items() if len(ap.class_ap50) <= FEW_CLASSES else ()
        rows += [Figure(f"{kind} AP50 %, {c}", x, note=note, main=False) for c, x in by_class if x is not None]
    return rows


def _check(train: CocoSource, test: CocoSource) -> None:
    evaluator()
    if train.classes != test.classes:
        raise UserError(f"{train.name} and {test.name} do not have the same classes: labels would not fit")
    for source in (train, test):
        if not any((~source.boxes(i).crowd).any() for i in range(len(source))):
            raise UserError(f"{source.name} has no objects: detection needs annotated boxes to train on and to measure")


def _settings(preset: DetectionPreset, steps: int) -> Fit:
    return Fit(
        steps=steps,
        lr=preset.lr,
        rate=lambda step: preset.rate(step, steps),
        weight_decay=preset.weight_decay,
        layer_decay=preset.layer_decay,
        clip=preset.clip,
        save_every=preset.save_every,
        precision=preset.precision,
    )
