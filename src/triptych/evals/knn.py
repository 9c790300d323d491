"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, as used by DINO, UDI, MTE and MMC).

Works on features that are already extracted; see `linear` for the probe that learns a classifier on the same tensors.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.evals.neighbours import index, nearest, similarity

DEFAULT_K = (10, 20, 100, 200)
"""The neighbourhood sizes of the DINO paper."""
PRESETS: dict[str, tuple[int, ...]] = {
    "dino": DEFAULT_K,
    "udi": (10, 15, 20, 30, 40, 50, 100, 200),
    "mte": (10,),
    "mmc": (10, 20, 50, 100),
}
"""Those of the papers; temperature 0.07 and weighted votes in all."""


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
    for searched, (keys,) in nearest([train], [test], ks[-1], memory_mb=memory_mb):
        asked = test_labels[searched]
        for rows, size, votes, _ in _votes(keys, train_labels, ks, classes, temperature, memory_mb):
            rank = label_rank(votes, asked[rows])
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
    return torch.cat(
        [
            votes * (nearest_s / temperature).exp()
            for _, (keys,) in nearest([train], [test], k, memory_mb=memory_mb)
            for _, _, votes, nearest_s in _votes(keys, train_labels, ks, classes, temperature, memory_mb)
        ]
    )


@torch.no_grad()
def knn_of_spaces(
    train: Sequence[Tensor],
    train_labels: Tensor,
    test: Sequence[Tensor],
    *,
    joints: Sequence[Sequence[int]],
    k: int,
    temperature: float = 0.07,
    memory_mb: int = 512,
) -> Tensor:
    """The classes that `knn` gives where several features of the same images are looked at together.

    train, test: one tensor (M, D_i) and (T, D_i) for each space; joints: spaces of each search -> (joints, T) int64.
    As of features of unit length side by side, whose cosine is the mean of theirs: every space is searched once.
    """
    classes = max(check_sets(a, train_labels, b, None) for a, b in zip(train, test, strict=True))
    ks = _checked_ks([k], len(train[0]), temperature)
    out = torch.empty(len(joints), len(test[0]), dtype=torch.int64, device=test[0].device)
    for searched, keys in nearest(train, test, k, joints=joints, memory_mb=memory_mb):
        for given, of_joint in zip(out[:, searched], keys, strict=True):
            for rows, _, votes, _ in _votes(of_joint, train_labels, ks, classes, temperature, memory_mb):
                given[rows] = votes.argmax(1)  # the first of equals, as `knn`
    return out


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


def check_votes(k: Sequence[int] | None, temperature: float) -> None:
    """Raises UserError for what no set of images could make right."""
    if not 0 < temperature < math.inf:
        raise UserError(f"the k-NN temperature is {temperature}; it must be > 0 (the papers use 0.07)")
    if k is not None and (not k or min(k) < 1):
        raise UserError(f"k is {list(k)}; give at least one k, each >= 1")


def _checked_ks(k: Sequence[int] | None, bank: int, temperature: float) -> list[int]:
    """The sorted, distinct k to compute."""
    check_votes(k, temperature)
    if k is None:
        return [size for size in DEFAULT_K if size <= bank] or [bank]
    if max(k) > bank:
        raise UserError(f"k = {max(k)} neighbours asked of {bank} train images; use k <= {bank} or more train images")
    return sorted(set(k))


def _votes(
    keys: Tensor, labels: Tensor, ks: Sequence[int], classes: int, temperature: float, memory_mb: int
) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """For each chunk of test rows and each k (ascending): the rows, k, votes (rows, C) and similarity of the nearest.

    keys: of the neighbours (T, largest k), nearest first.  The votes are divided by exp(nearest / temperature), so that
    low temperatures cannot overflow.  They are one float64 tensor that grows between the yields: nearest first, one
    neighbour of every row at a time, an order of addition that neither the chunks nor the device changes.
    """
    labels = labels.to(keys.device, torch.int64)
    step = max(1, memory_mb * 2**20 // 4 // (8 * (4 * classes + 6 * ks[-1])))
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        s = similarity(part).double()
        nearest_s = s[:, :1].clone()
        weight = s.sub_(nearest_s).div_(temperature).exp_().T.contiguous()
        votes = s.new_zeros(len(part), classes)
        place = labels[index(part)].T + classes * torch.arange(len(part), device=keys.device)  # in all votes
        for j in range(ks[-1]):
            votes.view(-1).index_add_(0, place[j], weight[j])
            if j + 1 in ks:
                yield slice(start, start + len(part)), j + 1, votes, nearest_s
