"""How well objects were followed through videos: the measures of DAVIS (Perazzi et al. 2016; Pont-Tuset et al. 2017).

Works on index masks, in memory or as a folder of PNG files in the layout of DAVIS, whoever made them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from triptych.data.annotated import IGNORE
from triptych.data.davis import Video
from triptych.errors import UserError
from triptych.progress import progress

TOLERANCE = 0.008
"""Of the image's diagonal: how far a contour may be off."""


@dataclass(frozen=True)
class Statistics:
    """Of one measure over the frames of an object, or means of that over objects."""

    mean: float
    recall: float  # share of frames above one half
    decay: float  # mean of the first quarter of the frames minus that of the last


@dataclass(frozen=True)
class SequenceScores:
    """Percent (0 to 100); decay in percentage points.  j, f: one entry for each of `objects`."""

    name: str
    objects: tuple[int, ...]  # ids in the first mask
    frames: int  # that were measured
    j: tuple[Statistics, ...]
    f: tuple[Statistics, ...]
    floor_j: tuple[float, ...]  # mean J of the first mask copied to every frame


@dataclass(frozen=True)
class VideoScores:
    """Percent (0 to 100), means over objects, each of which counts the same in however long a sequence."""

    j: Statistics  # region: intersection over union
    f: Statistics  # boundary: F-measure of the contours
    jf: float  # (mean J + mean F) / 2
    floor_j: float  # mean J of the first mask copied to every frame
    objects: int
    frames: int  # that were measured, of all sequences
    sequences: tuple[SequenceScores, ...]
    left_out: tuple[str, ...]  # sequences with fewer than three annotated frames


def region(truth: np.ndarray, predicted: np.ndarray, void: np.ndarray | None = None) -> float:
    """J = |truth and predicted| / |truth or predicted|, in 0..1; 1 where both are empty.

    Masks (H, W) bool.  void: pixels that count neither way.
    """
    both, either = truth & predicted, truth | predicted
    if void is not None:
        both, either = both & ~void, either & ~void
    union = np.count_nonzero(either)
    return np.count_nonzero(both) / union if union else 1.0


def contour(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that differ from the one to the right, below, or below right of it.

    The last row looks to the right alone and the last column below, so that an image's edge is no contour.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != diagonal)


def boundary(truth: np.ndarray, predicted: np.ndarray, void: np.ndarray | None = None) -> float:
    """F = 2 P R / (P + R), in 0..1; 1 where neither has a contour.

    P: share of the predicted contour that is within ceil(0.008 diagonal) pixels of the true one, R: the reverse; a side
    without contour has P = 1 (nothing predicted) or R = 1 (nothing there).  Arguments as of `region`; void pixels are
    taken for background.
    """
    if void is not None:
        truth, predicted = truth & ~void, predicted & ~void
    radius = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    lines = [contour(mask).astype(np.uint8) for mask in (truth, predicted)]
    x, y, width, height = cv2.boundingRect(lines[0] | lines[1])  # nothing beyond can match
    true, found = (line[y : y + height, x : x + width] for line in lines)
    n_true, n_found = np.count_nonzero(true), np.count_nonzero(found)
    if not n_true or not n_found:
        return float(n_true == n_found)
    precision = np.count_nonzero(found & _widened(true, radius)) / n_found
    recall = np.count_nonzero(true & _widened(found, radius)) / n_true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _widened(line: np.ndarray, radius: int) -> np.ndarray:
    """(H, W) uint8: 1 within this distance (pixels) of a 1."""
    squares = np.arange(-radius, radius + 1) ** 2
    disk = (squares[:, None] + squares <= radius**2).astype(np.uint8)
    return np.asarray(cv2.dilate(line, disk))


def statistics(values: Sequence[float] | np.ndarray) -> Statistics:
    """Of J or F in 0..1 over the frames of one object, in their order; nan is left out of means and is no hit.

    Quarters of n frames begin and end at round(linspace(1, n, 5)), so that neighbours share a frame.
    """
    x = np.asarray(values, np.float64)
    edges = np.round(np.linspace(1, len(x), 5) + 1e-10).astype(int) - 1
    first, last = x[edges[0] : edges[1] + 1], x[edges[3] : edges[4] + 1]
    return Statistics(float(np.nanmean(x)), float(np.mean(x > 0.5)), float(np.nanmean(first) - np.nanmean(last)))


def davis_metrics(
    frames: Iterable[tuple[np.ndarray, np.ndarray]], first: np.ndarray, name: str = ""
) -> SequenceScores | None:
    """Scores of one sequence; None where no frame is given.

    frames: index masks (H, W) uint8, true and predicted, of the frames to measure, in order; IGNORE (255) in a true one
    is void.  first: the mask that was given, whose ids are the objects.  An object that is nowhere predicted counts as
    empty; predicted ids that are no object are background.
    """
    objects = tuple(i for i in np.unique(first).tolist() if i not in (0, IGNORE))
    rows = []
    for true, found in frames:
        masked = true == IGNORE
        void = masked if masked.any() else None
        pairs = [(true == i, found == i, first == i) for i in objects]
        rows.append([(region(t, p, void), boundary(t, p, void), region(t, c, void)) for t, p, c in pairs])
    if not rows or not objects:
        return None
    table = 100 * np.array(rows)  # (frames, objects, 3)
    j, f = ([_percent(table[:, i, measure]) for i in range(len(objects))] for measure in (0, 1))
    return SequenceScores(name, objects, len(rows), tuple(j), tuple(f), tuple(table[:, :, 2].mean(0).tolist()))


def _percent(values: np.ndarray) -> Statistics:
    of = statistics(values / 100)
    return Statistics(100 * of.mean, 100 * of.recall, 100 * of.decay)


def mean_of(parts: Sequence[Statistics]) -> Statistics:
    """Each number's mean."""
    mean, recall, decay = np.mean([(x.mean, x.recall, x.decay) for x in parts], 0).tolist()
    return Statistics(mean, recall, decay)


def score(folder: Path, videos: Sequence[Video]) -> VideoScores | None:
    """Score FOLDER/SEQUENCE/00000.png ...; None where no video has annotations to measure on.

    Of the annotated frames the first, which was given, and the last are left out, as the official evaluation does.
    Raises UserError for a PNG file that is missing, no index mask, or of another size than its annotation.
    """
    found, left_out = [], []
    for video in progress(videos, "sequences scored:", len(videos)):
        scores = _score_one(folder / video.name, video)
        if scores is None:
            left_out.append(video.name)
        else:
            found.append(scores)
    if not found:
        return None
    j, f = mean_of([x for s in found for x in s.j]), mean_of([x for s in found for x in s.f])
    floors = [x for s in found for x in s.floor_j]
    frames = sum(s.frames for s in found)
    jf = (j.mean + f.mean) / 2
    return VideoScores(j, f, jf, float(np.mean(floors)), len(floors), frames, tuple(found), tuple(left_out))


def _score_one(folder: Path, video: Video) -> SequenceScores | None:
    first = video.mask(0)
    if first is None:
        return None
    pairs = ((true, _index_mask(folder / png(i), first.shape)) for i, true in _measured(video))
    return davis_metrics(pairs, first, video.name)


def _measured(video: Video) -> Iterator[tuple[int, np.ndarray]]:
    """The annotated frames but for the first and the last one."""
    before = None
    for i in range(1, len(video)):
        mask = video.mask(i)
        if mask is not None:
            if before is not None:
                yield before
            before = i, mask


def is_measured(video: Video) -> bool:
    """Is there an annotated frame between the first and the last annotated one?"""
    return sum(position is not None for position in video.masks) > 2


def png(frame: int) -> str:
    """The file of a frame."""
    return f"{frame:05d}.png"


def _index_mask(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if not path.exists():
        raise UserError(f"{path} is not there: a scored folder holds a PNG file for each frame, as SEQUENCE/00000.png")
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise UserError(f"{path} is an image of mode {image.mode}; give index masks, one number per pixel (P or L)")
        mask = np.array(image)
    if mask.shape != shape:
        raise UserError(f"{path} has {mask.shape[1]} x {mask.shape[0]} pixels, its video {shape[1]} x {shape[0]}")
    return mask
