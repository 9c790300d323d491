"""Images with class maps as networks of semantic segmentation see them: mmsegmentation 0.x's pipeline.

Training: resize by a random ratio, random crop that no class fills, flip, photometric distortion, mean and std, pad.
Everything random comes from the generator that is handed in.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from triptych.data.annotated import IGNORE, Segmented
from triptych.data.sources import load_rgb

MOST_OF_ONE_CLASS = 0.75  # share of a crop's labelled pixels, exclusive
TRIES = 10
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 18  # grey levels, factors, steps of 2 degrees


@dataclass(frozen=True)
class TestTransform:
    """An image resized so that its longer side is at most `long` and its shorter one at most `short` pixels, one of
    them exactly, aspect kept; then mean and std."""

    __test__ = False  # no test of pytest's

    long: int
    short: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, image: np.ndarray, scale: float = 1.0) -> Tensor:
        """(H, W, 3) uint8 -> (3, h, w) float32.  scale: both limits times this (multi-scale testing)."""
        rows, columns = resized(image, int(self.long * scale), int(self.short * scale))
        return normalised(resize_image(image, rows, columns), self.mean, self.std)


@dataclass(frozen=True)
class TrainTransform:
    """Random crops of images and their class maps; see the functions below for each step."""

    crop: int  # pixels, of both sides
    long: int  # limits of the resized sides at ratio 1, pixels
    short: int
    ratio: tuple[float, float] = (0.5, 2.0)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(H, W, 3) uint8, (H, W) uint8 -> (3, crop, crop) float32, (crop, crop) uint8.

        What lies outside the image is 0 after normalisation, and IGNORE.
        """
        ratio = rng.uniform(*self.ratio)
        rows, columns = resized(mask, int(self.long * ratio), int(self.short * ratio))
        image, mask = resize_image(image, rows, columns), resize_mask(mask, rows, columns)
        top, left = draw_crop(mask, self.crop, rng)
        window = slice(top, top + self.crop), slice(left, left + self.crop)
        image, mask = image[window], mask[window]
        if rng.random() < 0.5:
            image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
        pixels = normalised(photometric(image, rng), self.mean, self.std)
        pad = (0, self.crop - mask.shape[1], 0, self.crop - mask.shape[0])  # right and below
        labels = torch.from_numpy(np.ascontiguousarray(mask))
        return torch.nn.functional.pad(pixels, pad), torch.nn.functional.pad(labels, pad, value=IGNORE)


@dataclass(frozen=True)
class TrainExamples:
    """`dense.feed`'s make: (index, generator) -> what TrainTransform gives.  Raises UnreadableImage."""

    source: Segmented
    transform: TrainTransform

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        return self.transform(*read_pair(self.source, index), rng)


def read_pair(source: Segmented, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8 and class map (H, W) uint8.  Raises UnreadableImage, and what `source.mask` raises."""
    return np.asarray(load_rgb(source, index)), source.mask(index)


def resized(image: np.ndarray, long: int, short: int) -> tuple[int, int]:
    """Rows and columns of an image (H, W, ...) brought to the limits, at least 1 (mmcv's `imrescale`)."""
    height, width = image.shape[:2]
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bilinear as OpenCV's; pixel areas below half the size, where that one would skip pixels."""
    less_than_half = 2 * rows < image.shape[0]
    return cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA if less_than_half else cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return cv2.resize(mask, (columns, rows), interpolation=cv2.INTER_NEAREST)


def draw_crop(mask: np.ndarray, crop: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a window with two classes at least and none that fills 75 % of the labelled pixels.

    After TRIES windows without, one more is drawn and taken, as in mmsegmentation.
    """
    free = [max(side - crop, 0) for side in mask.shape]
    for _ in range(TRIES):
        top, left = (int(rng.integers(0, room + 1)) for room in free)
        counts = np.bincount(mask[top : top + crop, left : left + crop].ravel(), minlength=IGNORE + 1)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() < MOST_OF_ONE_CLASS * counts.sum():
            return top, left
    top, left = (int(rng.integers(0, room + 1)) for room in free)
    return top, left


def photometric(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """PhotoMetricDistortion (SSD, mmsegmentation): each of four changes with probability 1/2.

    Brightness, contrast (here or at the end, with equal chance), saturation, hue.
    """

    def changes() -> bool:
        return bool(rng.integers(2))

    if changes():
        image = linear(image, 1.0, rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = changes()
    if contrast_first and changes():
        image = linear(image, rng.uniform(*CONTRAST), 0.0)
    if changes():
        image = saturate(image, rng.uniform(*SATURATION))
    if changes():
        image = turn_hue(image, int(rng.integers(-HUE, HUE)))
    if not contrast_first and changes():
        image = linear(image, rng.uniform(*CONTRAST), 0.0)
    return image


def linear(image: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Each value v to αv + β, clipped to 0 ... 255 and cut to a whole number."""
    return cv2.LUT(image, _line(alpha, beta))


def saturate(image: np.ndarray, factor: float) -> np.ndarray:
    """HSV saturation (8 bits) times `factor`."""
    return _in_hsv(image, 1, _line(factor, 0.0))


def turn_hue(image: np.ndarray, steps: int) -> np.ndarray:
    """HSV hue (OpenCV's 180 steps of 2 degrees) plus `steps`, around the circle."""
    return _in_hsv(image, 0, ((np.arange(256) + steps) % 180).astype(np.uint8))


def _line(alpha: float, beta: float) -> np.ndarray:
    values = np.arange(256, dtype=np.float32) * np.float32(alpha) + np.float32(beta)
    return np.clip(values, 0, 255).astype(np.uint8)


def _in_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    hsv: np.ndarray = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), dtype=np.uint8)
    hsv[..., channel] = table[hsv[..., channel]]
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def normalised(image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32: (v / 255 - mean) / std."""
    mean_, std_ = np.array(mean, np.float32), np.array(std, np.float32)
    pixels = image * (1 / (255 * std_)) - mean_ / std_
    return torch.from_numpy(pixels).permute(2, 0, 1)
