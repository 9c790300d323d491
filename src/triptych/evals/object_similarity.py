"""How alike patches of one object are, and of different ones (MMC, arXiv 2308.11448, Figure 5 and Table 5).

Cosines of patch tokens: "in" between two patches of one object, "out" between patches of different objects.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from triptych.data.regions import Annotated
from triptych.encoders import Encoder
from triptych.errors import UserError
from triptych.evals.by_image import average_ratio, half_interval
from triptych.evals.click_targets import AnnotatedTokens
from triptych.evals.object_pairs import MIXED, Drawn, draw_across, draw_pairs, patch_labels
from triptych.evals.outcome import Figure
from triptych.losses import unit

Objects = Literal["category", "instance"]
Pairs = Literal["image", "dataset"]
KEPT = 2**25
"""Numbers of all tokens that are kept for pairs across images: 128 MiB."""


@dataclass(frozen=True)
class SimilarityResult:
    """Cosines, -1 to 1; overlap of the two densities, 0 (apart) to 1 (the same).

    Margins are half of the 95 % interval if other images had been drawn; None for one image.
    """

    mean_in: float
    mean_out: float
    overlap: float
    margin_in: float | None
    margin_out: float | None
    margin_overlap: float | None
    density_in: list[float]  # in equal bins on [-1, 1]; its area is 1
    density_out: list[float]
    pairs_in: int
    pairs_out: int
    images: int  # with a pair of either kind
    without_pair: int  # besides
    unreadable: int  # besides
    objects: Objects
    pairs: Pairs
    per_image: int
    background: bool
    size: int  # pixels
    patches: tuple[int, int]  # rows and columns
    seed: int


@torch.no_grad()
def object_similarity(
    encoder: Encoder,
    source: Annotated,
    *,
    size: int = 480,
    objects: Objects = "category",
    pairs: Pairs = "image",
    per_image: int = 1000,
    background: bool = False,
    bins: int = 100,
    mean: tuple[float, float, float] = AnnotatedTokens.mean,
    std: tuple[float, float, float] = AnnotatedTokens.std,
    images: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    workers: int | None = None,
) -> SimilarityResult:
    """Tokens of the last block after the final norm, of images resized to size x size pixels.

    A patch is of the object that at least half of it lies in; those of none or two are left out.  objects: what one
    is, a category (all its instances) or an instance.  per_image: pairs of either kind that are drawn of each image
    that has one, with replacement and uniformly.  pairs: both patches of that image, or the other one of another image
    (of a sample of all images' patches that takes at most KEPT numbers).  background: patches at least half in no
    region are different from every object; needed where an image has one object (DAVIS-2016).  images: at most so
    many, drawn by the seed.

    Raises UserError for settings that mean nothing, as `click`, and where pairs of either kind are missing.
    """
    _check(objects, pairs, per_image, bins)
    tokens = AnnotatedTokens(
        encoder, source, objects, size, "size", mean, std, images, seed, batch, device, precision, workers
    )
    rows = _Rows(bins)
    with tokens.frozen():
        if pairs == "image":
            _within(tokens, rows, per_image, background)
        else:
            _across(tokens, rows, per_image, background)
    for missing, kind in ((not rows.count(0), "one object"), (not rows.count(1), "two different objects")):
        if missing:
            raise UserError(
                f"{source.name}: no pair of patches is of {kind}, at {size} px in {tokens.grid[0]} x {tokens.grid[1]} "
                "patches; give more images or a larger size; where images have one object, count the background "
                "(--background)"
            )
    return SimilarityResult(
        **rows.summary(),
        without_pair=rows.without,
        unreadable=rows.unreadable,
        objects=objects,
        pairs=pairs,
        per_image=per_image,
        background=background,
        size=size,
        patches=tokens.grid,
        seed=seed,
    )


def overlap(density_in: np.ndarray, density_out: np.ndarray) -> float:
    """∫ min(p_in, p_out) over [-1, 1], of densities in equal bins (bins,) whose area is 1."""
    return float(np.minimum(density_in, density_out).sum() * 2 / len(density_in))


class _Rows:
    """Of every image, the histogram and the sum of its cosines of either kind."""

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.histograms: list[np.ndarray] = []  # (2, bins) each: in, out
        self.sums: list[list[float]] = []  # in, out
        self.unreadable = self.without = 0

    def add(self, x: Tensor, drawn: Drawn) -> None:
        """x: unit tokens (n, D) that the pairs are rows of."""
        rows = torch.from_numpy(np.stack([np.concatenate(one) for one in zip(*drawn, strict=True)])).to(x.device)
        cosine = (x[rows[0]] * x[rows[1]]).sum(-1).clamp(-1, 1).double().cpu().numpy()
        if not len(cosine):
            self.without += 1
            return
        of_one, of_two = np.split(cosine, [len(drawn.of_one[0])])
        self.histograms.append(np.stack([np.histogram(s, self.bins, (-1, 1))[0] for s in (of_one, of_two)]))
        self.sums.append([of_one.sum(), of_two.sum()])

    def count(self, kind: int) -> int:
        return int(sum(h[kind].sum() for h in self.histograms))

    def summary(self) -> dict:
        histograms, sums = np.stack(self.histograms).astype(float), np.array(self.sums)  # (I, 2, bins), (I, 2)
        pairs = histograms.sum(-1)  # (I, 2)
        density = histograms.sum(0) / pairs.sum(0)[:, None] * self.bins / 2  # (2, bins)
        means = [_mean(sums[pairs[:, i] > 0, i], pairs[pairs[:, i] > 0, i]) for i in (0, 1)]
        # Each bin's smaller density is a ratio of sums over images: each image's share in what it would move.
        shift = (histograms - density * (2 / self.bins) * pairs[..., None]) / pairs.sum(0)[:, None]
        moved = np.where(density[0] < density[1], shift[:, 0], shift[:, 1]).sum(-1)
        total = pairs.sum(0).astype(int).tolist()
        return {
            "mean_in": means[0][0],
            "mean_out": means[1][0],
            "overlap": overlap(*density),
            "margin_in": means[0][1],
            "margin_out": means[1][1],
            "margin_overlap": _or_none(half_interval(moved)),
            "density_in": density[0].tolist(),
            "density_out": density[1].tolist(),
            "pairs_in": total[0],
            "pairs_out": total[1],
            "images": len(histograms),
        }


def _mean(sums: np.ndarray, pairs: np.ndarray) -> tuple[float, float | None]:
    rows = np.arange(len(sums))
    value, margin = average_ratio(sums[:, None], pairs[:, None], rows, np.zeros_like(rows))
    return float(value[0]), _or_none(margin[0])


def _or_none(x: np.ndarray) -> float | None:
    return None if np.isnan(x) else float(x)


def _labelled(tokens: AnnotatedTokens, rows: _Rows, background: bool) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Of each image its index, labels (n,) and unit tokens (n, D) of the patches that have one."""
    for targets, x in tokens:
        rows.unreadable += not targets.readable
        rows.without += targets.readable and x is None
        if x is not None:
            objects = targets.categories if tokens.unit == "category" else targets.numbers
            labels = patch_labels(targets.coverage, objects, targets.unmarked if background else None)
            keep = np.flatnonzero(labels != MIXED)
            yield targets.index, labels[keep], unit(x[torch.from_numpy(keep).to(x.device)])


def _within(tokens: AnnotatedTokens, rows: _Rows, per_image: int, background: bool) -> None:
    for index, labels, x in _labelled(tokens, rows, background):
        rows.add(x, draw_pairs(labels, per_image, np.random.default_rng([tokens.seed, index])))


def _across(tokens: AnnotatedTokens, rows: _Rows, per_image: int, background: bool) -> None:
    """First the patches that are kept, as many of each image, then the pairs."""
    count = min(len(tokens.source), tokens.images or len(tokens.source))
    bank = []
    for index, labels, x in _labelled(tokens, rows, background):
        order = np.random.default_rng([tokens.seed, index]).permutation(len(labels))
        some = order[: max(1, KEPT // (count * x.shape[-1]))]
        bank.append((np.full(len(some), index), labels[some], x[torch.from_numpy(some).to(x.device)]))
    if not bank:
        return
    images, labels = (np.concatenate([part[i] for part in bank]) for i in (0, 1))
    patches = torch.cat([x for _, _, x in bank])
    for index in np.unique(images):
        rng = np.random.default_rng([tokens.seed, index, 1])
        rows.add(patches, draw_across(labels, images, index, per_image, rng))


def _check(objects: str, pairs: str, per_image: int, bins: int) -> None:
    for name, given, allowed in (("objects", objects, get_args(Objects)), ("pairs", pairs, get_args(Pairs))):
        if given not in allowed:
            raise UserError(f"{name} is {given!r}; give {' or '.join(allowed)}")
    if pairs == "dataset" and objects == "instance":
        raise UserError("an instance is in one image: for pairs across the data set, objects are categories")
    if per_image < 1 or bins < 2:
        raise UserError(f"{per_image} pairs per image in {bins} bins: give at least 1 and 2")


def figures(result: SimilarityResult) -> list[Figure]:
    """Overlap, and both means."""
    note = f"up to {result.per_image} pairs of either kind of each image, objects: {result.objects}"
    return [
        Figure("overlap", result.overlap, result.margin_overlap, note=note),
        Figure("mean cosine within objects", result.mean_in, result.margin_in),
        Figure("mean cosine between objects", result.mean_out, result.margin_out),
    ]
