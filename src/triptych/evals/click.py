"""Zero-shot segmentation from one clicked patch (MMC, arXiv 2308.11448, Table 1): what is as similar as a threshold.

No code is public, and the paper leaves much open: every such point is a setting of `ClickSettings`.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from triptych.data.images import UnreadableImage
from triptych.data.regions import Annotated
from triptych.encoders import Encoder
from triptych.errors import UserError, nearest
from triptych.evals.by_image import average_ratio
from triptych.evals.click_iou import clicked, prompt_iou
from triptych.evals.click_targets import (
    AnnotatedTokens,
    Resolution,
    TargetReader,
    Targets,
    Unit,
    check_sample,
    check_size,
    sample,
)
from triptych.evals.outcome import Figure
from triptych.progress import progress

Prompt = Literal["random", "max_coverage", "centroid", "mean"]
Averaging = Literal["targets", "classes", "dataset", "dataset_classes"]
Similarity = Literal["cosine", "minmax", "shifted"]
Connected = Literal["none", "4", "8"]
CHUNK = 2**22
"""Similarities that are held at a time, where every candidate is clicked."""


@dataclass(frozen=True)
class ClickSettings:
    """What the paper says first, then what it leaves open; the defaults are the preset "mmc"."""

    size: int = 480  # pixels; the image is resized to size x size, whatever its aspect
    thresholds: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)  # θ
    # Of what the mask is sought: of each category in the image, each instance, the largest one, or each connected part.
    unit: Unit = "category"
    # The clicked patch, of those that lie at least half in the target: a random one, the first of largest coverage, the
    # nearest to the target's centroid; "mean": every one of them in turn, and the mean.
    prompt: Prompt = "random"
    # Mean IoU over targets; mean over classes of those; Σ intersections / Σ unions of all targets; mean of it by class.
    averaging: Averaging = "targets"
    # Where IoU is measured: among pixels at `size`; patches, of which the target is those at least half in it; pixels
    # of the original image, each predicted as the patch that its centre lies in.
    resolution: Resolution = "size"
    # What is compared with θ: the cosine s; (s - min) / (max - min) of each map; (1 + s) / 2.
    similarity: Similarity = "cosine"
    connected: Connected = "none"  # keep only what is 4- or 8-connected with the clicked patch

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_args(kind) and name != "thresholds" and getattr(self, name) not in get_args(kind):
                given, allowed = getattr(self, name), get_args(kind)
                raise UserError(f"{name} is {given!r}{nearest(str(given), allowed)}; give {', '.join(allowed)}")
        if not self.thresholds or not all(-1 <= theta < 1 for theta in self.thresholds):
            raise UserError(f"thresholds are {list(self.thresholds)}; give at least one, each from -1 to below 1")


PRESETS = {"mmc": ClickSettings()}


@dataclass(frozen=True)
class ClickResult:
    """Percent (0 to 100).  Margins are half of the 95 % interval if other images had been drawn; None for one image."""

    miou: dict[float, float]  # by threshold
    margin: dict[float, float | None]
    best: float  # the largest of miou ...
    threshold: float  # ... reached at this θ, the lowest of equals ...
    selected_on: str  # ... which was chosen so
    floor: float  # of a mask of all ones, averaged likewise: what no look at the image is needed for
    target_area: float  # mean share of the image that a measured target covers
    images: int  # with a target that was measured
    without_target: int  # besides
    unreadable: int  # besides
    targets: int  # measured
    skipped: int  # targets of which no patch lies half inside
    targets_by_class: dict[str, int]  # measured, of classes that have any
    patches: tuple[int, int]  # rows and columns
    settings: ClickSettings
    seed: int


@torch.no_grad()
def click(
    encoder: Encoder,
    source: Annotated,
    settings: ClickSettings = PRESETS["mmc"],
    *,
    mean: tuple[float, float, float] = AnnotatedTokens.mean,
    std: tuple[float, float, float] = AnnotatedTokens.std,
    images: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    workers: int | None = None,
) -> ClickResult:
    """IoU of every target with the patches whose similarity to the clicked patch is above θ.

    Tokens are those of the last block after the final norm.  images: at most so many, drawn by the seed; None = all.
    A random click is a function of (seed, index of the image, number of the target in it).  batch, precision: None =
    what is fast on the device.  Images that cannot be read are left out and counted.

    Raises UserError for a size that patches do not divide, no readable image, no target that half of a patch lies in,
    and tokens that are not finite.
    """
    tokens = AnnotatedTokens(
        encoder, source, settings.unit, settings.size, settings.resolution, mean, std, images, seed, batch, device,
        precision, workers,
    )  # fmt: skip
    tally = _Tally(settings.averaging)
    with tokens.frozen():
        for targets, x in tokens:
            tally.add(targets, None if x is None else _measured(x, targets, settings, tokens.grid, seed))
    if not tally.rows:
        raise UserError(
            f"no target of {source.name} has a patch at least half inside it, at {settings.size} px in "
            f"{tokens.grid[0]} x {tokens.grid[1]} patches: give a larger size, or other data"
        )
    values, margins = (100 * x for x in tally.averages())
    thetas = sorted(set(settings.thresholds))
    best = int(values[:-1].argmax())
    names = Counter(source.classes[c] for c in tally.categories)  # type: ignore[index]  # never None
    return ClickResult(
        miou=dict(zip(thetas, values[:-1].tolist(), strict=True)),
        margin={t: None if np.isnan(m) else float(m) for t, m in zip(thetas, margins[:-1], strict=True)},
        best=float(values[best]),
        threshold=thetas[best],
        selected_on="the best on the measured images, as in the paper"
        if len(thetas) > 1
        else "one threshold, nothing to select",
        floor=float(values[-1]),
        target_area=float(100 * np.mean(tally.areas)),
        images=len(set(tally.images)),
        without_target=tally.without_target,
        unreadable=tally.unreadable,
        targets=len(tally.rows),
        skipped=tally.skipped,
        targets_by_class=dict(names.most_common()),
        patches=tokens.grid,
        settings=settings,
        seed=seed,
    )


def _measured(x: Tensor, targets: Targets, settings: ClickSettings, grid: tuple[int, int], seed: int) -> np.ndarray:
    """(n, 3, T + 1) float64: IoU, intersection and union of each target by threshold, and of a mask of all ones.

    Where every candidate is clicked, means over the clicks.
    """
    clicks = [
        clicked(coverage, centroid, grid[1], settings.prompt, np.random.default_rng([seed, targets.index, number]))
        for coverage, centroid, number in zip(targets.coverage, targets.centroid, targets.numbers, strict=True)
    ]
    inside, total = (torch.from_numpy(a).to(x.device) for a in (targets.inside, targets.total))
    thetas = sorted(set(settings.thresholds))
    options = {"mapped": settings.similarity, "connected": settings.connected, "columns": grid[1]}

    def iou(prompts: list[int], inside: Tensor) -> Tensor:
        both, union = prompt_iou(x, torch.tensor(prompts, device=x.device), inside, total, thetas, **options)
        return torch.stack([both / union, both, union], 1)  # (P, 3, T)

    if settings.prompt == "mean":
        chunk = max(1, CHUNK // len(total))
        parts = []
        for prompts, own in zip(clicks, inside, strict=True):
            some = [iou(prompts[i : i + chunk], own[None]) for i in range(0, len(prompts), chunk)]
            parts.append(torch.cat(some).mean(0))
        found = torch.stack(parts)
    else:
        found = iou([prompt for (prompt,) in clicks], inside)
    ones = torch.stack([inside.sum(1, dtype=torch.float64), total.sum(dtype=torch.float64).expand(len(inside))], 1)
    ones = torch.cat([ones[:, :1] / ones[:, 1:], ones], 1)[..., None]
    return torch.cat([found, ones], -1).cpu().numpy()


class _Tally:
    """What was measured of each target, and counts of the rest."""

    def __init__(self, averaging: Averaging) -> None:
        self.averaging = averaging
        self.rows: list[np.ndarray] = []  # (3, T) each: IoU, intersection, union
        self.images: list[int] = []
        self.categories: list[int] = []
        self.areas: list[float] = []  # shares of the image
        self.unreadable = self.without_target = self.skipped = 0

    def add(self, targets: Targets, rows: np.ndarray | None) -> None:
        self.unreadable += not targets.readable
        self.without_target += targets.readable and rows is None
        self.skipped += len(targets.areas) - len(targets)
        if rows is not None:
            self.rows += list(rows)
            self.images += [targets.index] * len(targets)
            self.categories += targets.categories
            self.areas += [targets.areas[i] for i in targets.numbers]

    def averages(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean IoU (T,) as the averaging says, 0 to 1, and half of its 95 % interval."""
        iou, both, union = np.stack(self.rows, 1)  # (n, T) each
        above, below = (both, union) if self.averaging.startswith("dataset") else (iou, np.ones_like(iou))
        of_class = self.averaging in ("classes", "dataset_classes")
        group = np.array(self.categories) if of_class else np.zeros(len(iou), int)
        return average_ratio(above, below, np.array(self.images), group)


@dataclass(frozen=True)
class TargetArea:
    """Percent.  By averaging, the IoU of a mask of all ones with the targets that can be clicked on: what an encoder
    that finds everything alike gets, however its thresholds are."""

    floor: dict[Averaging, float]
    every_target: float  # mean share of the image, also of those that no patch lies half in
    targets: int  # that can be clicked on
    skipped: int
    images: int  # with a target that can be
    unit: Unit
    size: int  # pixels
    patch_size: int  # pixels


def mean_target_area(
    source: Annotated,
    unit: Unit = "category",
    *,
    size: int = 480,
    patch_size: int = 16,
    images: int | None = None,
    seed: int = 0,
) -> TargetArea:
    """How large targets are, from the annotation alone: no model, no pixel.

    It decides between readings of the paper, whose untrained encoder, which finds nearly all patches alike, has 16.8.
    Raises UserError for a size that patches do not divide, and where there is no target.
    """
    check_size(size, patch_size)
    check_sample(images, seed)
    ClickSettings(unit=unit)
    side, chosen = size // patch_size, sample(len(source), images, seed)
    reader = TargetReader(source, unit, size, (side, side))
    tallies = {averaging: _Tally(averaging) for averaging in get_args(Averaging)}
    every: list[float] = []
    for index in progress(chosen, f"targets of {source.name}:", len(chosen)):
        try:
            targets = reader.read(index)
        except UnreadableImage:
            continue
        every += targets.areas
        ones = np.array([[[area], [area], [1]] for area in (targets.areas[i] for i in targets.numbers)])
        for tally in tallies.values():
            tally.add(targets, ones if len(targets) else None)
    one = tallies["targets"]
    if not one.rows:
        raise UserError(f"no target of {source.name} has a patch of {patch_size} px at least half inside it")
    floor = {averaging: float(100 * tally.averages()[0][0]) for averaging, tally in tallies.items()}
    area = float(100 * np.mean(every))
    return TargetArea(floor, area, len(one.rows), one.skipped, len(set(one.images)), unit, size, patch_size)


def figures(result: ClickResult) -> list[Figure]:
    """One for each threshold; the best of them, the floor and the targets' area stand for all."""
    best = f"θ: {result.selected_on}; a mask of all ones has {result.floor:.2f}"
    area = f"{result.targets} targets ({result.settings.unit}) of {result.images} images, {result.skipped} skipped"
    return [
        *(Figure(f"mIoU %, θ = {t:g}", v, result.margin[t], main=False) for t, v in result.miou.items()),
        Figure("mIoU %", result.best, result.margin[result.threshold], best, f"θ = {result.threshold:g}"),
        Figure("mIoU %, all ones", result.floor, note="the floor: no look at the image is needed for it", main=False),
        Figure("target area %", result.target_area, note=area, main=False),
    ]
