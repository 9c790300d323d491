"""Images with boxes and masks, augmented as detectors are trained since DETR (Carion et al. 2020, section A.4).

    flip with probability 1/2, then with probability 1/2 each
        short side to one of `short`, long side at most `longest`
        short side to one of `before_crop`, long side likewise; crop of U{crop} x U{crop} px; then as above

Pixels stay uint8 (cv2, bilinear); masks follow by the nearest pixel.
"""

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from triptych.data.coco import CocoSource
from triptych.data.sources import load_rgb
from triptych.errors import UserError

MIN_SIDE = 1.0
"""Pixels: a box that is narrower or lower after augmentation is left out."""


@dataclass(frozen=True)
class Sizes:
    """Of images, in pixels.  Raises UserError for sizes that no image can have."""

    short: tuple[int, ...] = tuple(range(480, 801, 32))  # shorter side in training: one of these
    longest: int = 1333  # what the longer side may have, in training and test
    before_crop: tuple[int, ...] = (400, 500, 600)  # shorter side of images that are cropped
    crop: tuple[int, int] = (384, 600)  # each side of a crop: between these, and at most the image's
    test_size: int = 800  # shorter side of test images

    def __post_init__(self) -> None:
        whole = *self.short, self.test_size
        if min(*whole, *self.before_crop, *self.crop) < 1 or self.longest < max(whole) or self.crop[0] > self.crop[1]:
            raise UserError(
                f"{self}: all must be >= 1 px, longest no less than short and test_size, crop from the smaller side on"
            )


@dataclass(frozen=True)
class Scene:
    """An image and the objects on it."""

    image: np.ndarray  # (H, W, 3) uint8
    boxes: np.ndarray  # (n, 4) float32: left, top, right, bottom in pixels
    labels: np.ndarray  # (n,) int64 position in classes
    masks: np.ndarray | None  # (n, H, W) uint8, 1 = object; None: a set without masks

    def kept(self, which: np.ndarray) -> "Scene":
        """With the objects of (n,) bool alone."""
        masks = None if self.masks is None else self.masks[which]
        return replace(self, boxes=self.boxes[which], labels=self.labels[which], masks=masks)


def read(source: CocoSource, index: int, masked: bool) -> Scene:
    """Without crowds: they are not trained on.  masked: with masks.  Raises UnreadableImage."""
    image, boxes = np.array(load_rgb(source, index)), source.boxes(index)
    masks = None
    if masked:
        regions = [r.mask for r in source.regions(index)]
        masks = np.array(regions, dtype=np.uint8).reshape(len(regions), *image.shape[:2])
    return Scene(image, boxes.xyxy, boxes.labels, masks).kept(~boxes.crowd)


def augmented(scene: Scene, sizes: Sizes, rng: np.random.Generator) -> Scene:
    """One draw of the augmentation; objects that left the image are gone."""
    if rng.random() < 0.5:
        scene = flipped(scene)
    if rng.random() < 0.5:
        scene = resized(scene, int(rng.choice(sizes.before_crop)), sizes.longest)
        height, width = scene.image.shape[:2]
        rows, columns = (int(rng.integers(min(s, sizes.crop[0]), min(s, sizes.crop[1]) + 1)) for s in (height, width))
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        scene = cropped(scene, top, left, rows, columns)
    scene = resized(scene, int(rng.choice(sizes.short)), sizes.longest)
    return scene.kept(np.all(scene.boxes[:, 2:] - scene.boxes[:, :2] >= MIN_SIDE, axis=1))


def flipped(scene: Scene) -> Scene:
    """Left becomes right."""
    boxes, width = scene.boxes.copy(), scene.image.shape[1]
    boxes[:, [0, 2]] = width - scene.boxes[:, [2, 0]]
    masks = None if scene.masks is None else scene.masks[:, :, ::-1]
    return replace(scene, image=np.ascontiguousarray(scene.image[:, ::-1]), boxes=boxes, masks=masks)


def cropped(scene: Scene, top: int, left: int, rows: int, columns: int) -> Scene:
    """Boxes are cut to the crop (pixels); an object that is not on it is dropped."""
    boxes = scene.boxes - np.array([left, top, left, top], np.float32)
    boxes = np.stack([boxes[:, i].clip(0, (columns, rows)[i % 2]) for i in range(4)], 1)
    window = slice(top, top + rows), slice(left, left + columns)
    masks = None if scene.masks is None else scene.masks[:, *window]
    inside = Scene(scene.image[window], boxes, scene.labels, masks)
    return inside.kept(np.all(boxes[:, 2:] > boxes[:, :2], axis=1))


def resized(scene: Scene, short: int, longest: int) -> Scene:
    """The shorter side to `short` pixels, less where the longer one would pass `longest`."""
    height, width = scene.image.shape[:2]
    rows, columns = scaled_size(height, width, short, longest)
    factor = np.array([columns / width, rows / height] * 2, np.float32)
    masks = scene.masks
    if masks is not None:
        near = [cv2.resize(np.ascontiguousarray(m), (columns, rows), interpolation=cv2.INTER_NEAREST) for m in masks]
        masks = np.array(near, np.uint8).reshape(len(near), rows, columns)
    return Scene(_resized(scene.image, rows, columns), scene.boxes * factor, scene.labels, masks)


def _resized(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(image), (columns, rows), interpolation=cv2.INTER_LINEAR)


def scaled_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """Rows and columns of an image whose shorter side becomes `short`, its longer side at most `longest`."""
    scale = min(short / min(height, width), longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(frozen=True)
class TrainScenes:
    """What `feed.examples` makes: scenes of a source, augmented, as `example`."""

    source: CocoSource
    sizes: Sizes
    masked: bool

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        return example(augmented(read(self.source, index, self.masked), self.sizes, rng))


def at_test_size(source: CocoSource, index: int, sizes: Sizes) -> tuple[Tensor, tuple[float, float]]:
    """(3, H, W) uint8 of the test's size, and the factors of width and height.  Raises UnreadableImage."""
    pixels = np.array(load_rgb(source, index))
    rows, columns = scaled_size(pixels.shape[0], pixels.shape[1], sizes.test_size, sizes.longest)
    image = _resized(pixels, rows, columns)
    factors = image.shape[1] / pixels.shape[1], image.shape[0] / pixels.shape[0]
    return torch.from_numpy(image.transpose(2, 0, 1)), factors


def example(scene: Scene) -> dict[str, Tensor]:
    """image (3, H, W) uint8; boxes (n, 4) float32; labels (n,) int64 from 1, as 0 is background; masks (n, H, W)."""
    parts: dict[str, Any] = {
        "image": np.ascontiguousarray(scene.image).transpose(2, 0, 1),
        "boxes": scene.boxes.astype(np.float32).reshape(-1, 4),
        "labels": scene.labels.astype(np.int64) + 1,
    }
    if scene.masks is not None:
        parts["masks"] = np.ascontiguousarray(scene.masks)
    return {name: torch.from_numpy(x) for name, x in parts.items()}


def as_list(examples: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """A batch: images differ in size, so it stays a list."""
    return examples
