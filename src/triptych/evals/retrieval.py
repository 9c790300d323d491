"""Image retrieval: rank a gallery by similarity to each query; mean average precision (revisited Oxford and Paris).

Works on features that are already extracted; `triptych.data.retrieval_sets` reads galleries, queries and ground truths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from triptych.data.retrieval_sets import Truth, Wanted
from triptych.errors import UserError
from triptych.losses import unit
from triptych.progress import progress

DRAWS = 1000
"""Resamples of the queries behind a confidence interval."""


@dataclass(frozen=True)
class RetrievalSettings:
    """How images are described."""

    size: int  # pixels of the longest side: EvalTransform's shape "longest"
    scales: tuple[float, ...] = (1.0,)  # as of `extract_all`


THREE_SCALES = (1.0, 0.5**0.5, 0.5)
PRESETS: dict[str, dict[str, RetrievalSettings]] = {
    "dino": {"roxford5k": RetrievalSettings(224), "rparis6k": RetrievalSettings(512, THREE_SCALES)},  # its README
    "ibot": {  # its run.sh
        "roxford5k": RetrievalSettings(512, THREE_SCALES),
        "rparis6k": RetrievalSettings(512, THREE_SCALES),
    },
}
"""What the papers' commands say, by paper and set (the `name` of the set)."""


@dataclass(frozen=True)
class Scores:
    """Percent (0 to 100), over the queries that have positives; `skipped` counts the others."""

    mean_ap: float
    interval: tuple[float, float]  # 95 %, of mean_ap: bootstrap over queries
    precision_at: dict[int, float]  # mP@k
    ap: tuple[float | None, ...]  # of every query; None = skipped
    skipped: int


@dataclass(frozen=True)
class RetrievalResult:
    """Scores for each way to judge of the truth, such as "easy", "medium" and "hard"."""

    scores: dict[str, Scores]
    gallery_images: int
    query_images: int


@torch.no_grad()
def retrieval(
    gallery: Tensor,
    queries: Tensor,
    truth: Truth,
    *,
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
    memory_mb: int = 512,
) -> RetrievalResult:
    """Rank `gallery` (M, D) for each of `queries` (Q, D) by cosine and compare with what it ought to find.

    Junk is taken out of the ranking.  AP: `average_precision`.  Precision at k counts the first min(k, rank of the last
    positive, from 1) images (dino utils.py:708).  Images of equal similarity rank by the lower index.  seed: of the
    confidence interval.  `memory_mb` bounds what is allocated beside the inputs, in MiB, down to one query's ranking.
    Runs on the device of `queries`; the gallery may lie elsewhere.

    Raises UserError for empty sets, unlike widths, non-finite features, a truth that does not fit, no positives, k < 1.
    """
    check_features(gallery=gallery, query=queries)
    _check_truth(gallery, queries, truth, ks)
    ap: dict[str, list[float | None]] = {setting: [] for setting in truth}
    precision: dict[str, list[list[float]]] = {setting: [] for setting in truth}
    for query, place in enumerate(progress(_places(gallery, queries, memory_mb), "ranked queries:", len(queries))):
        for setting, wanted in truth.items():
            ranks = ranks_of(place, wanted[query])
            ap[setting].append(average_precision(ranks, len(ranks)) if len(ranks) else None)
            if len(ranks):
                counted = [min(k, int(ranks[-1]) + 1) for k in ks]
                precision[setting].append([100 * int((ranks < n).sum()) / n for n in counted])
    scores = {}
    for setting, values in ap.items():
        kept = [x for x in values if x is not None]
        if not kept:
            raise UserError(f"no query has a positive ({setting}): nothing can be measured; check the ground truth")
        scores[setting] = Scores(
            mean_ap=float(np.mean(kept)),
            interval=bootstrap_interval(kept, seed),
            precision_at=dict(zip(ks, np.mean(precision[setting], axis=0).tolist(), strict=True)),
            ap=tuple(values),
            skipped=len(values) - len(kept),
        )
    return RetrievalResult(scores, len(gallery), len(queries))


def ranks_of(place: np.ndarray, wanted: Wanted) -> np.ndarray:
    """Ranks (P,) from 0, ascending, of the positives among the images that are no junk; place: (M,) of each image."""
    positive = np.sort(place[np.setdiff1d(wanted.positive, wanted.junk)])
    junk = np.sort(place[np.unique(wanted.junk)])
    return positive - np.searchsorted(junk, positive)


def average_precision(ranks: np.ndarray, relevant: int) -> float:
    """Percent: sum over j of (j / rank_j + (j + 1) / (rank_j + 1)) / 2 / relevant, the area by the trapezoid rule.

    ranks: of the images found, from 0, ascending; 0 / 0 counts as 1.  relevant > 0: how many there are to be found.
    """
    j = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    return float(100 * ((before + (j + 1) / (ranks + 1)) / 2).sum() / relevant)


def bootstrap_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95 % confidence interval of the mean: 2.5th and 97.5th percentile of means of DRAWS resamples."""
    rng, x = np.random.default_rng(seed), np.asarray(values)
    means = [x[rng.integers(0, len(x), len(x))].mean() for _ in range(DRAWS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def of_readable(truth: Truth, gallery: Tensor, queries: Tensor) -> Truth:
    """The truth about the images that could be read; gallery, queries: their indices, ascending, as of `extract`."""
    kept, asked = gallery.numpy(), queries.tolist()
    renumbered: dict[int, np.ndarray] = {}  # by id: queries of one class share an array, and go on doing so

    def renumber(positions: np.ndarray) -> np.ndarray:
        if id(positions) not in renumbered:
            renumbered[id(positions)] = np.searchsorted(kept, positions[np.isin(positions, kept)])
        return renumbered[id(positions)]

    return {k: [Wanted(renumber(w[q].positive), renumber(w[q].junk)) for q in asked] for k, w in truth.items()}


def _places(gallery: Tensor, queries: Tensor, memory_mb: int) -> Iterator[np.ndarray]:
    """For each query the place of every gallery image in its ranking, (M,) int64 from 0."""
    budget, images = memory_mb * 2**20, len(gallery)
    rows = max(1, budget // 2 // (64 * images))  # similarities, sorted ones, order, places, and what sorting needs
    width = max(1, budget // 4 // (16 * gallery.shape[1]))
    for start in range(0, len(queries), rows):
        asked = unit(queries[start : start + rows])
        s = asked.new_empty(len(asked), images)
        for first in range(0, images, width):
            part = unit(gallery[first : first + width].to(asked.device)).to(asked.dtype)
            with torch.autocast(asked.device.type, enabled=False):  # half precision would blur the ranking
                torch.mm(asked, part.T, out=s[:, first : first + len(part)])
        order = s.sort(dim=1, descending=True, stable=True).indices
        place = torch.empty_like(order).scatter_(1, order, torch.arange(images, device=s.device).expand_as(order))
        yield from place.cpu().numpy()


def check_features(**sets: Tensor) -> None:
    """Raises UserError for anything that is not (rows > 0, D) finite features of one D; keys: what the sets are of."""
    for name, x in sets.items():
        if x.ndim != 2 or 0 in x.shape:
            raise UserError(f"{name} features have shape {tuple(x.shape)}; give (images, width), at least one image")
        bad = int((~x.sum(dim=1, dtype=torch.float32).isfinite()).sum())
        if bad:
            raise UserError(f"{bad} of {len(x)} {name} features hold NaN or infinity; check the encoder's weights")
    widths = {name: x.shape[1] for name, x in sets.items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"numbers per image differ ({widths}); extract all with the same encoder and settings")


def _check_truth(gallery: Tensor, queries: Tensor, truth: Truth, ks: Sequence[int]) -> None:
    if not ks or min(ks) < 1:
        raise UserError(f"ks is {list(ks)}; give at least one k, each >= 1")
    for setting, wanted in truth.items():
        last = max((int(x.max()) for w in wanted for x in w if len(x)), default=-1)
        if len(wanted) != len(queries) or last >= len(gallery):
            raise UserError(
                f"the truth ({setting}) is about {len(wanted)} queries and gallery images up to {last}; there are "
                f"{len(queries)} queries and {len(gallery)} images: use `of_readable` where some could not be read"
            )
