"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, as used by DINO, UDI, MTE and MMC).

Works on features that are already extracted; see `linear` for the probe that learns a classifier on the same tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.errors import UserError

DEFAULT_K = (10, 20, 100, 200)
"""The neighbourhood sizes of the DINO paper."""


@dataclass(frozen=True)
class KNNResult:
    """Accuracies in percent (0 to 100) for every k asked for; `classes` counts ids up to the largest label seen."""

    top1: dict[int, float]
    top5: dict[int, float]
    temperature: float
    train_images: int
    test_images: int
    classes: int


@torch.no_grad()
def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int] | None = None,
    temperature: float = 0.07,
    memory_mb: int = 512,
) -> KNNResult:
    """Classify `test` (T, D) by the votes of its nearest rows of `train` (M, D); one pass serves every k.

    s = cosine; vote of class c = sum of exp(s / temperature) over those of the k most similar train rows that carry
    label c; classes are ranked by vote, equal votes by the lower class id.  Top-5 looks at min(5, k, classes) classes:
    DINO's min(5, k) keeps classes that got no vote from counting when k < 5.  Train rows of equal similarity are taken
    in their order, so the result is deterministic.

    Labels are int64 ids >= 0, (M,) and (T,); gaps and classes present on one side only are fine.  `k=None` means those
    of 10, 20, 100 and 200 that are <= M (M itself when none is).  `memory_mb` bounds what is allocated beside the
    inputs, in MiB.  The work runs on the device of `test`, in float32; `train` may lie elsewhere.

    Raises UserError for empty sets, unlike widths, non-finite features, bad labels, k < 1 or > M, temperature <= 0.
    """
    classes = check_sets(train, train_labels, test, test_labels)
    ks = _checked_ks(k, len(train), temperature)
    test_labels = test_labels.to(test.device)
    top1, top5 = dict.fromkeys(ks, 0), dict.fromkeys(ks, 0)
    for rows, size, votes, _ in _votes(train, train_labels, test, ks, classes, temperature, memory_mb):
        rank = label_rank(votes, test_labels[rows])
        top1[size] += int((rank < 1).sum())
        top5[size] += int((rank < min(5, size)).sum())
    percent = 100 / len(test)
    return KNNResult(
        top1={size: n * percent for size, n in top1.items()},
        top5={size: n * percent for size, n in top5.items()},
        temperature=temperature,
        train_images=len(train),
        test_images=len(test),
        classes=classes,
    )


@torch.no_grad()
def knn_votes(
    train: Tensor, train_labels: Tensor, test: Tensor, *, k: int, temperature: float = 0.07, memory_mb: int = 512
) -> Tensor:
    """The class votes behind `knn` for one k: (T, C) float64 >= 0, C = largest train label + 1.  Errors as in `knn`."""
    classes = check_sets(train, train_labels, test, None)
    ks = _checked_ks([k], len(train), temperature)
    chunks = _votes(train, train_labels, test, ks, classes, temperature, memory_mb)
    return torch.cat([votes * (nearest / temperature).exp() for _, _, votes, nearest in chunks])


def check_sets(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor | None) -> int:
    """Check a train and a test set of features and labels; returns the number of classes, largest label + 1.

    Raises UserError for anything that is not (rows > 0, D) finite features of one D with integer labels >= 0.
    """
    classes = 0
    for name, x, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if x.ndim != 2 or 0 in x.shape:
            raise UserError(
                f"{name} features have shape {tuple(x.shape)}; give (images, width) with at least one image"
            )
        # One sum per row is finite only where all its values are, and needs no (rows, D) mask.
        bad = int((~x.sum(dim=1, dtype=torch.float32).isfinite()).sum())
        if bad:
            raise UserError(f"{bad} of {len(x)} {name} features hold NaN or infinity; check the encoder's weights")
        if labels is None:
            continue
        if labels.shape != x.shape[:1] or labels.is_floating_point() or int(labels.min()) < 0:
            raise UserError(
                f"{name} labels have shape {tuple(labels.shape)} and type {labels.dtype}; "
                f"give one integer class id >= 0 for each of the {len(x)} images"
            )
        classes = max(classes, int(labels.max()) + 1)
    if train.shape[1] != test.shape[1]:
        raise UserError(
            f"train features have {train.shape[1]} numbers per image, test features {test.shape[1]}; "
            "extract both with the same encoder and settings"
        )
    return classes


def label_rank(scores: Tensor, labels: Tensor) -> Tensor:
    """Rank of the true class, 0 = first: scores (T, ..., C), labels (T,) -> (T, ...) int64 in [0, C].

    Equal scores rank by the lower class id.  NaN scores never win: a true class scored NaN has rank C.
    """
    own_id = labels.view(-1, *[1] * (scores.ndim - 1)).expand(*scores.shape[:-1], 1)
    own = scores.gather(-1, own_id)
    not_ahead = (scores < own) | ((scores == own) & (torch.arange(scores.shape[-1], device=scores.device) >= own_id))
    return scores.shape[-1] - not_ahead.sum(-1)


def _checked_ks(k: Sequence[int] | None, bank: int, temperature: float) -> list[int]:
    """The sorted, distinct k to compute."""
    if temperature <= 0:
        raise UserError(f"the k-NN temperature is {temperature}; it must be > 0 (the papers use 0.07)")
    if k is None:
        return [size for size in DEFAULT_K if size <= bank] or [bank]
    if not k or min(k) < 1:
        raise UserError(f"k is {list(k)}; give at least one k, each >= 1")
    if max(k) > bank:
        raise UserError(f"k = {max(k)} neighbours asked of {bank} train images; use k <= {bank} or more train images")
    return sorted(set(k))


def _votes(
    train: Tensor, labels: Tensor, test: Tensor, ks: list[int], classes: int, temperature: float, memory_mb: int
) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """For each chunk of test rows and each k (ascending): the rows, k, votes (rows, C) and similarity of the nearest.

    The votes are divided by exp(nearest / temperature), so that low temperatures cannot overflow.  They are one float64
    tensor that grows between the yields: nearest first, one neighbour of every row at a time, an order of addition that
    neither the chunks nor the device changes.
    """
    labels = labels.to(test.device, torch.int64)
    step, width = _chunk_sizes(train.shape, len(test), ks[-1], classes, memory_mb)
    for start in range(0, len(test), step):
        rows = slice(start, min(start + step, len(test)))
        s, index = _nearest(train, F.normalize(test[rows].float(), dim=1), ks[-1], width)
        nearest = s[:, :1].double()
        weight, label = ((s.double() - nearest) / temperature).exp(), labels[index]
        votes = weight.new_zeros(len(s), classes)
        for j in range(ks[-1]):
            votes.scatter_add_(1, label[:, j : j + 1], weight[:, j : j + 1])
            if j + 1 in ks:
                yield rows, j + 1, votes, nearest


def _chunk_sizes(bank: torch.Size, test_rows: int, k: int, classes: int, memory_mb: int) -> tuple[int, int]:
    """Test rows and bank rows of one chunk: half of the memory for similarities, a quarter for neighbours and votes."""
    budget = memory_mb * 2**20
    step = min(test_rows, 1024, max(1, budget // 4 // (8 * (3 * classes + 8 * k))))
    width = max(1, budget // 2 // (8 * step + 12 * bank[1]))
    return step, min(bank[0], width)


def _nearest(train: Tensor, unit: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """Similarity and index of the k nearest train rows, each (rows, k): largest first, equals by the lower index."""
    s, index = unit.new_empty(len(unit), 0), torch.empty(len(unit), 0, dtype=torch.int64, device=unit.device)
    for start in range(0, len(train), width):
        bank = F.normalize(train[start : start + width].to(unit.device, torch.float32), dim=1)
        with torch.autocast(unit.device.type, enabled=False):  # half precision would blur the neighbours
            new, at = _top(unit @ bank.T, k)
        # What is kept so far has lower indices and stands first, so a stable sort by value settles ties by index.
        s, order = torch.sort(torch.cat([s, new], dim=1), dim=1, descending=True, stable=True)
        s, index = s[:, :k], torch.cat([index, at + start], dim=1).gather(1, order[:, :k])
    return s, index


def _top(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (all, if fewer) and their columns, in the order of the columns; ties take the lower."""
    value, at = s.topk(min(k + 1, s.shape[1]), dim=1)
    if value.shape[1] > k:
        tied = value[:, k - 1] == value[:, k]  # topk chooses freely among equals: choose again in these (rare) rows
        value, at = value[:, :k], at[:, :k]
        if tied.any():
            again = torch.sort(s[tied], dim=1, descending=True, stable=True)
            value[tied], at[tied] = again.values[:, :k], again.indices[:, :k]
    at, order = at.sort(dim=1)
    return value.gather(1, order), at
