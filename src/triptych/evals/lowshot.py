"""A few labels: which images of a train set carry one, and logistic regression on their frozen features.

A subset is a tensor of rows, so features of the whole train set, once extracted, serve every share and every draw.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.evals.logistic import SETTINGS, LogisticResult, Setting, logistic
from triptych.progress import progress


@dataclass(frozen=True)
class LowShotResult:
    """top1: mean over the subsets, in percent; top1_ci95: half the width of its 95 % interval, None for one subset.

    The interval is Student's t over the subsets: what another choice of labelled images would change.  converged: all
    draws did; draws: one result per subset, in their order.
    """

    top1: float
    top1_ci95: float | None
    converged: bool
    setting: Setting
    draws: tuple[LogisticResult, ...]


def low_shot(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    subsets: Sequence[Tensor],
    setting: Setting = SETTINGS["udi"],
    *,
    memory_mb: int = 512,
) -> LowShotResult:
    """`logistic` from each subset (rows of `train` (M, D)) to `test` (T, D).  Errors as there, and for no subset."""
    if not subsets:
        raise UserError("no subset of labelled images was given; give at least one")
    draws = []
    for rows in progress(subsets, "few-label subsets:", len(subsets)):
        chosen = train[rows.to(train.device)], train_labels[rows.to(train_labels.device)]
        draws.append(logistic(*chosen, test, test_labels, setting, memory_mb=memory_mb))
    top1 = [draw.top1 for draw in draws]
    converged = all(draw.converged for draw in draws)
    return LowShotResult(sum(top1) / len(top1), student_t_95(top1), converged, setting, tuple(draws))


def student_t_95(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean of independent values; None for one value."""
    if len(values) < 2:
        return None
    from scipy.stats import t  # slow to import

    error = torch.tensor(values, dtype=torch.float64).std() / len(values) ** 0.5
    return float(t.ppf(0.975, len(values) - 1) * error)


def chosen(labels: Tensor, *, share: float | None = None, per_class: int | None = None, seed: int = 0) -> Tensor:
    """Rows of a random, stratified part of the labels (M,): ascending int64, on their device.

    share (0 to 1): of each class the nearest whole number of images, at least one.  per_class: that many of each.  A
    seed fixes the rows, whatever the device; seeds 0, 1, 2 ... give independent draws.

    Raises UserError unless one of both is given and in range, and for classes of fewer than `per_class` images.
    """
    if (share is None) == (per_class is None):
        raise UserError("say how many images to label: either a share or a number per class")
    if share is not None and not 0 < share <= 1:
        raise UserError(f"the share of labels is {share}; it must be above 0 and at most 1 (0.01 is 1 %)")
    if per_class is not None and per_class < 1:
        raise UserError(f"{per_class} images per class: give at least 1")
    if not len(labels):
        raise UserError("there are no labels to choose from")
    of_image, counts = labels.cpu().unique(return_inverse=True, return_counts=True)[1:]
    if per_class is not None and (short := int((counts < per_class).sum())):
        raise UserError(
            f"{per_class} images per class: {short} of {len(counts)} classes have fewer, the smallest has "
            f"{int(counts.min())}; ask for {int(counts.min())} or fewer"
        )
    quota = torch.full_like(counts, per_class) if per_class else (counts * share).round().clamp(min=1).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[of_image[order].sort(stable=True).indices]  # class by class, shuffled within
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[of_image[order]]  # within its class
    return order[place < quota[of_image[order]]].sort().values.to(labels.device)


def from_file(path: str | Path, keys: Sequence[str]) -> Tensor:
    """Rows of the images that a text file lists, in its order: (lines,) int64, on the CPU.

    keys: of every row, as `Source.key` gives them.  The file is in SimCLR's format (its `1percent.txt`): a name per
    line, `n02979186_9036.JPEG`, or more of the path, `n02979186/n02979186_9036.JPEG`.  A line means the image whose
    key it is, else the one image where the shorter of both paths is how the longer ends.  Empty lines do not count.

    Raises UserError when the file cannot be read or is empty, and for lines that no image, several images, or another
    line has.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; give a text file of one image name per line") from error
    if not lines:
        raise UserError(f"{path} lists no image; write one image name per line")
    by_name: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        by_name[key.rpartition("/")[2]].append(row)
    found = [_matches(line, by_name.get(line.rpartition("/")[2], []), keys) for line in lines]
    rows = [matches[0] for matches in found if len(matches) == 1]
    wrong = {
        "are no image of the data": [line for line, m in zip(lines, found, strict=True) if not m],
        "fit several images (write more of the path)": [line for line, m in zip(lines, found, strict=True) if m[1:]],
        "mean an image that another line means too": [keys[row] for row, times in Counter(rows).items() if times > 1],
    }
    complaints = [
        f"{len(names)} of {len(lines)} names {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in wrong.items()
        if names
    ]
    if complaints:
        has = f"the data has {len(keys)} images, such as {', '.join(keys[:2])}"
        raise UserError(f"{path}: {'; '.join(complaints)}\n{has}")
    return torch.tensor(rows)


def _matches(line: str, rows: Sequence[int], keys: Sequence[str]) -> list[int]:
    """Of rows with the line's file name: the one whose key it is, else those whose path agrees as far as both go."""
    if equal := [row for row in rows if keys[row] == line]:
        return equal
    asked = line.split("/")[::-1]
    return [row for row in rows if all(a == b for a, b in zip(keys[row].split("/")[::-1], asked, strict=False))]
