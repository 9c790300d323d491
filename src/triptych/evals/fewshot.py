"""Few-shot episodes on frozen features: accuracy of the nearest support, and F1 of a similarity threshold (MMC).

No code is public.  Queries and episodes are not in the paper; 15 and 600 are the habit of the few-shot papers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.errors import UserError
from triptych.evals.knn import check_sets
from triptych.progress import progress

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CHUNK = 2**24
"""Numbers that the largest tensor of a chunk of episodes may have.  It changes what a seed draws: not an option."""


@dataclass(frozen=True)
class FewShotResult:
    """Percent (0 to 100): accuracy, its accuracy_ci95 (half the width of the 95 % interval over the episodes), all F1.

    best_f1: the largest of f1 (by threshold), reached at `threshold`, which was chosen as `selected_on` says.
    f1_all_yes: of the answer "same class" to every pair.  averaging: "pairs" counts all pairs of all episodes together,
    "episodes" is the mean of each episode's F1.  classes: those drawn from; left_out: classes of too few images.
    """

    accuracy: float
    accuracy_ci95: float
    f1: dict[float, float]
    best_f1: float
    threshold: float
    selected_on: str
    f1_all_yes: float
    averaging: str
    ways: int
    shots: int
    queries: int
    episodes: int
    classes: int
    left_out: int


@torch.no_grad()
def few_shot(
    features: Tensor,
    labels: Tensor,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    thresholds: Sequence[float] = THRESHOLDS,
    averaging: Literal["pairs", "episodes"] = "pairs",
    seed: int = 0,
) -> FewShotResult:
    """Episodes of `ways` random classes, each with `shots` support images and `queries` queries, no image twice.

    features (N, D), labels (N,) int64 >= 0.  A query belongs to the class of the largest cosine with its support, or
    with the mean of its unit supports where there are several.  For F1, every pair of a query and a support image is
    "the same class" iff their cosine > θ.  The best θ is that of these very episodes, as in the paper.

    Classes of fewer than shots + queries images are left out.  A seed fixes the episodes, whatever the device; the work
    runs on that of the features, in float32 (float64 for float64 features).

    Raises UserError for bad features or labels (as `knn`), fewer than `ways` classes that are large enough, ways < 2,
    shots, queries or episodes < 1 (2 for an interval), thresholds outside -1 ... 1, an unknown averaging.
    """
    check_sets(features, labels, features, labels)
    check_episodes(ways, shots, queries, episodes)
    _check(thresholds, averaging)
    order = labels.cpu().sort(stable=True).indices
    counts = labels.cpu().unique(return_counts=True)[1]
    large = counts >= shots + queries
    if int(large.sum()) < ways:
        raise UserError(
            f"{int(large.sum())} of {len(counts)} classes have {shots} + {queries} images, for {shots} support images "
            f"and {queries} queries; {ways} ways need {ways} such classes: ask for fewer ways, shots or queries"
        )
    starts, counts, left_out = (counts.cumsum(0) - counts)[large], counts[large], int((~large).sum())
    x = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
    theta = torch.tensor(sorted(set(thresholds)), dtype=x.dtype, device=x.device)
    right, true, yes = [], [], []
    for rows in _episodes(order, starts, counts, ways, shots + queries, episodes, x.shape[1], seed):
        images = x[rows.to(x.device)]  # (E, W, S + Q, D)
        part = scores(images[:, :, :shots], images[:, :, shots:], theta)
        for all_parts, new in zip((right, true, yes), part, strict=True):
            all_parts.append(new.double().cpu())
    accuracy = 100 * torch.cat(right)
    same = ways * queries * shots  # pairs of an episode that are of one class
    f1 = f1_score(torch.cat(true), torch.cat(yes), same, averaging)
    best = int(f1.argmax())  # the lowest θ of equals
    by_threshold = dict(zip(sorted(set(thresholds)), f1.tolist(), strict=True))
    return FewShotResult(
        accuracy=float(accuracy.mean()),
        accuracy_ci95=float(1.96 * accuracy.std() / episodes**0.5),
        f1=by_threshold,
        best_f1=float(f1[best]),
        threshold=list(by_threshold)[best],
        selected_on="the test episodes, as in the paper" if len(theta) > 1 else "one threshold, nothing to select",
        f1_all_yes=200 / (ways + 1),
        averaging=averaging,
        ways=ways,
        shots=shots,
        queries=queries,
        episodes=episodes,
        classes=len(counts),
        left_out=left_out,
    )


def scores(support: Tensor, query: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What happens in E episodes: support (E, W, S, D), query (E, W, Q, D) of the same classes, both of unit length.

    -> share of right queries (E,), "same class" pairs that are right (E, T), and all "same class" pairs (E, T).
    """
    cosine = torch.einsum("ewqd,evsd->ewqvs", query, support)
    # The cosine with the mean of the supports, but for the query's own length.
    length = support.mean(2).norm(dim=-1).clamp(min=1e-12)
    nearest = (cosine.mean(-1) / length[:, None, None]).argmax(-1)  # (E, W, Q)
    own = torch.arange(query.shape[1], device=query.device)[:, None]
    right = (nearest == own).flatten(1).double().mean(1)
    own_pairs = cosine.diagonal(dim1=1, dim2=3).flatten(1)  # those of one class
    true, yes = [], []
    for theta in thresholds:
        true.append((own_pairs > theta).sum(1))
        yes.append((cosine.flatten(1) > theta).sum(1))
    return right, torch.stack(true, 1), torch.stack(yes, 1)


def f1_score(true: Tensor, yes: Tensor, same: int, averaging: str) -> Tensor:
    """F1 in percent, (T,): of true and of all yes answers (E, T), with `same` pairs of one class in each episode."""
    if averaging == "pairs":
        return 200 * true.sum(0) / (yes.sum(0) + same * len(yes))
    return (200 * true / (yes + same)).mean(0)


def _episodes(
    order: Tensor, starts: Tensor, counts: Tensor, ways: int, images: int, episodes: int, width: int, seed: int
) -> Iterator[Tensor]:
    """Rows of chunks of episodes, (E, ways, images) int64: different classes, and different images of each.

    order: all rows, class by class; starts, counts: where the classes to draw from lie in it.
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same
    largest = int(counts.max())
    chunk = max(1, CHUNK // max(len(counts), ways * largest, ways * images * width, (ways * images) ** 2))
    for first in progress(range(0, episodes, chunk), "few-shot episodes:", episodes, each=chunk):
        some = min(chunk, episodes - first)
        classes = torch.rand(some, len(counts), generator=generator).topk(ways).indices
        ticket = torch.rand(some, ways, largest, generator=generator)
        ticket[torch.arange(largest) >= counts[classes][..., None]] = -1.0  # images that the class does not have
        yield order[starts[classes][..., None] + ticket.topk(images).indices]


def check_episodes(ways: int, shots: int, queries: int, episodes: int) -> None:
    """Raises UserError for what no set of images could make right."""
    if ways < 2 or shots < 1 or queries < 1 or episodes < 2:
        raise UserError(
            f"{episodes} episodes of {ways} ways, {shots} shots and {queries} queries: "
            "give at least 2 episodes, 2 ways, 1 shot and 1 query"
        )


def _check(thresholds: Sequence[float], averaging: str) -> None:
    if not thresholds or not all(-1 <= theta <= 1 for theta in thresholds):
        raise UserError(f"thresholds are {list(thresholds)}; give at least one cosine, each from -1 to 1")
    if averaging not in ("pairs", "episodes"):
        raise UserError(f"averaging is {averaging!r}; it must be pairs or episodes")
