"""The nearest rows of a bank by cosine similarity: exact, float32, in bounded memory, equals by the lower index.

A matrix product gives similarities, a chunk of the bank at a time.  Nearly all of them are too small to matter, and are
not looked at one by one: only groups whose maximum beats the k-th best so far.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 16
"""Similarities that share one maximum."""

NOTHING = -(0x7F800000 << 32) - 2**32
"""The key of similarity -inf and the highest index: below all others."""


@dataclass(frozen=True)
class Sizes:
    """Rows and columns that are worked on at a time; together they need at most the memory given."""

    searched: int  # test rows whose neighbours are kept: one pass over the bank serves them
    rows: int  # test rows, and
    width: int  # bank rows of one matrix of similarities
    hits: int  # groups of similarities that are looked into at a time

    @classmethod
    def of(
        cls, bank: int, test: int, widths: Sequence[int], joints: Sequence[Sequence[int]], k: int, memory_mb: int
    ) -> "Sizes":
        """bank, test: rows; widths of the spaces; joints and k as in `nearest`."""
        budget, matrices = memory_mb * 2**20, len(widths) + _means(joints)
        searched = min(test, max(1, budget // 4 // (8 * k * len(joints))))
        rows = min(searched, 1024, max(1, budget // 8 // (8 * max(*widths, 4 * k + 256))), math.isqrt(budget // 24))
        left = budget * 3 // 4 - 8 * k * len(joints) * searched
        width = min(bank, 16384, max(1, left // ((6 + 4 * matrices) * rows + 12 * sum(widths))))
        return cls(searched, rows, -(-width // GROUP) * GROUP, max(1, budget // 8 // (GROUP * 96)))


def _means(joints: Sequence[Sequence[int]]) -> bool:
    """Is room needed for the mean of several spaces?"""
    return any(len(joint) > 1 for joint in joints)


def nearest(
    bank: Sequence[Tensor],
    test: Sequence[Tensor],
    k: int,
    *,
    joints: Sequence[Sequence[int]] = ((0,),),
    memory_mb: int = 512,
) -> Iterator[tuple[slice, Tensor]]:
    """The k nearest bank rows of each test row, nearest first: test rows, and keys (joints, rows, k) int64 of them.

    bank, test: one tensor (M, D_i) and (T, D_i) for each space.  joints: which spaces each search looks at together;
    similar is then what has a large mean cosine, as of vectors of unit length side by side.  A key holds a `similarity`
    and an `index`.  memory_mb bounds what is allocated beside the inputs, in MiB.  The work runs on the device of
    `test`; the bank may lie elsewhere.  k <= M.
    """
    widths = [x.shape[1] for x in bank]
    sizes = Sizes.of(len(bank[0]), len(test[0]), widths, joints, k, memory_mb)
    for rows in range(0, len(test[0]), sizes.searched):
        asked = [x[rows : rows + sizes.searched] for x in test]
        best = asked[0].new_full((len(joints), len(asked[0]), k), NOTHING, dtype=torch.int64)
        _search(bank, asked, joints, sizes, best)
        for found in best:
            for part in found.split(sizes.rows):
                part.copy_(part.sort(dim=1, descending=True).values)
        yield slice(rows, rows + len(asked[0])), best


def _search(
    bank: Sequence[Tensor], test: Sequence[Tensor], joints: Sequence[Sequence[int]], sizes: Sizes, best: Tensor
) -> None:
    """Fills best (joints, rows, k) with the keys of the nearest bank rows, in any order."""
    device = best.device
    # One piece of memory for all chunks, products and means: fresh memory for each is slow.
    units = [torch.empty(sizes.width, x.shape[1], device=device) for x in bank]
    space = torch.empty(len(bank) + _means(joints), sizes.rows * sizes.width, device=device)
    for start in range(0, len(bank[0]), sizes.width):
        width = min(sizes.width, len(bank[0]) - start)
        for x, unit in zip(bank, units, strict=True):
            F.normalize(x[start : start + width].to(device, torch.float32), dim=1, out=unit[:width])
        for first in range(0, best.shape[1], sizes.rows):
            kept = best[:, first : first + sizes.rows]
            s = space[:, : kept.shape[1] * width].view(len(space), kept.shape[1], width)
            with torch.autocast(device.type, enabled=False):  # half precision would blur the neighbours
                for x, unit, out in zip(test, units, s, strict=False):
                    torch.mm(F.normalize(x[first : first + sizes.rows].float(), dim=1), unit[:width].T, out=out)
            for joint, keys in zip(joints, kept, strict=True):
                _absorb(keys, _mean(s, joint), start, sizes.hits)


def _mean(s: Tensor, joint: Sequence[int]) -> Tensor:
    """The mean of the joint's matrices of s (spaces + 1, rows, width), of which the last is room for it."""
    if len(joint) == 1:
        return s[joint[0]]
    torch.add(s[joint[0]], s[joint[1]], out=s[-1])
    for i in joint[2:]:
        s[-1].add_(s[i])
    return s[-1].div_(len(joint))


def _absorb(best: Tensor, s: Tensor, start: int, hits: int) -> None:
    """Update the best keys (rows, k) by similarities (rows, width) to the bank rows from `start` on.

    The bank rows come in their order, so later ones enter only if they are more similar than the k-th best so far.
    """
    if missing := -s.shape[1] % GROUP:
        s = F.pad(s, (0, missing), value=-math.inf)
    k, groups = best.shape[1], s.view(len(s), GROUP, -1)  # a group's members lie apart: the maximum is fast that way
    top = groups.amax(1)
    bar = similarity(best.amin(1, keepdim=True))
    if start == 0 and top.shape[1] >= k:
        # k groups reach their k-th largest maximum, so at least k bank rows do: what is less similar cannot enter.
        bar = top.topk(k, dim=1).values[:, -1:].nextafter(bar)
    for hit in (top > bar).nonzero().split(hits):
        row, group = hit.unbind(1)
        value = groups[row, :, group]
        of_hit, member = (value > bar[row]).nonzero().unbind(1)
        column = start + member * groups.shape[2] + group[of_hit]
        _keep(best, row[of_hit], key(value[of_hit, member], column))


def _keep(best: Tensor, row: Tensor, new: Tensor) -> None:
    """The k largest of the best keys (rows, k) and of new ones (n,), which belong to the rows (n,) ascending."""
    k = best.shape[1]
    step = max(2 * k, 256)  # new keys of a row at a time, so that one row of many does not widen the table of all
    while len(row):
        rows, place, count = row.unique_consecutive(return_inverse=True, return_counts=True)
        slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[place]
        width = min(step, int(count.max()))
        now = slot < width
        table = best.new_full((len(rows), k + width), NOTHING)
        table[place[now], k + slot[now]] = new[now]
        table[:, :k] = best[rows]
        best[rows] = table.topk(k, dim=1, sorted=False).values
        row, new, step = row[~now], new[~now], 2 * step


# --- a neighbour as one integer, which sorts by similarity and then by the lower index ---


def key(s: Tensor, column: Tensor) -> Tensor:
    """Similarities (n,) float32 and indices (n,) int64, 0 ... 2^32 - 1 -> (n,) int64."""
    bits = (s + 0.0).view(torch.int32)  # makes -0 a 0: they are equal similarities
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the bits of negative floats count downwards
    return (ordered.long() << 32) | (0xFFFFFFFF - column)


def similarity(key: Tensor) -> Tensor:
    """float32"""
    ordered = (key >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def index(key: Tensor) -> Tensor:
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)
