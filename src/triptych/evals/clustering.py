"""Clusters of frozen features, and how well any clusters agree with the classes.

k-means as the unsupervised-classification papers measure it; the four numbers are those of iBOT's
evaluation/unsupervised/unsup_cls.py.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.evals.lowshot import student_t_95
from triptych.losses import unit
from triptych.progress import progress

EXACT = 2_000_000
"""Images x clusters, the distances of one iteration, above which k-means works on mini-batches."""

MEASURES = ("nmi", "ari", "fowlkes_mallows", "accuracy")


@dataclass(frozen=True)
class ClusterMetrics:
    """Agreement of clusters with classes; the names of both do not matter."""

    nmi: float  # normalised mutual information, 0 to 1 (arithmetic mean of the entropies)
    ari: float  # adjusted Rand index, -0.5 to 1; 0 is what chance gives
    fowlkes_mallows: float  # geometric mean of the pairs' precision and recall, 0 to 1
    accuracy: float  # percent (0 to 100), each class matched with one cluster of its own, the best way (Hungarian)
    images: int
    classes: int
    clusters: int  # that hold an image


@dataclass(frozen=True)
class ClusteringResult:
    """The clusters of least inertia of all starts, as with scikit-learn's n_init: no label has a say in the choice.

    `mean` and `margin` tell how far one start may be from another: mean of each of MEASURES over all starts, and half
    of its 95 % confidence interval (Student's t; None of one start).
    """

    metrics: ClusterMetrics
    shuffled: ClusterMetrics  # the same clusters when the labels are shuffled: what chance gives
    mean: dict[str, float]
    margin: dict[str, float | None]
    asked_clusters: int
    inertia: float  # mean squared distance of an image of unit length to its cluster's centre, 0 to 1
    restarts: int
    seed: int
    algorithm: Literal["k-means", "mini-batch k-means"]


@torch.no_grad()
def clustering(
    features: Tensor, labels: Tensor, *, clusters: int | None = None, restarts: int = 10, seed: int = 0
) -> ClusteringResult:
    """k-means (k-means++) of features (N, D) at unit length, beside labels (N,) int64 that only the metrics see.

    clusters: None = as many as there are classes.  Needs memory for two more copies of the features.  More than EXACT
    distances an iteration are left to scikit-learn's MiniBatchKMeans, and the result says so.  Runs on the CPU.  Raises
    UserError for bad features or labels, clusters outside 2 ... N, restarts < 1.
    """
    truth = _labels("labels", labels, len(features))
    clusters = len(np.unique(truth)) if clusters is None else clusters
    _check(features, clusters, restarts)
    points, exact = unit(features.float()).cpu().numpy(), len(features) * clusters <= EXACT
    found: list[tuple[float, np.ndarray]] = []
    each: list[ClusterMetrics] = []
    for start in progress(range(restarts), "starts of k-means:", restarts):
        found.append(_k_means(points, clusters, seed + start, exact))
        each.append(_metrics(truth, found[-1][1]))
    best = min(range(restarts), key=lambda i: found[i][0])
    columns = {name: [getattr(m, name) for m in each] for name in MEASURES}
    return ClusteringResult(
        metrics=each[best],
        shuffled=_metrics(shuffled(truth, seed), found[best][1]),
        mean={name: float(np.mean(values)) for name, values in columns.items()},
        margin={name: student_t_95(values) for name, values in columns.items()},
        asked_clusters=clusters,
        inertia=found[best][0] / len(points),
        restarts=restarts,
        seed=seed,
        algorithm="k-means" if exact else "mini-batch k-means",
    )


def cluster_metrics(truth: Tensor, predicted: Tensor) -> ClusterMetrics:
    """Of class ids and cluster ids of the same images, (N,) integers >= 0 each.

    There may be more clusters than classes: those that no class is matched with count as wrong; or fewer.  Needs memory
    for the pairs of class and cluster that occur, whatever the ids.  Raises UserError for anything else.
    """
    return _metrics(_labels("classes", truth, len(predicted)), _labels("clusters", predicted, len(truth)))


def nmi(truth: Tensor, predicted: Tensor) -> float:
    """2 I(a, b) / (H(a) + H(b)), 0 to 1, of two labellings (N,) of the same images."""
    from sklearn.metrics import normalized_mutual_info_score  # takes a second to import

    return float(normalized_mutual_info_score(truth.cpu().numpy(), predicted.cpu().numpy()))


def shuffled(truth: np.ndarray, seed: int) -> np.ndarray:
    """In random order: what clusters score then is chance."""
    return np.random.default_rng(seed).permutation(truth)


def _metrics(truth: np.ndarray, predicted: np.ndarray) -> ClusterMetrics:
    from sklearn import metrics

    return ClusterMetrics(
        nmi=float(metrics.normalized_mutual_info_score(truth, predicted)),
        ari=float(metrics.adjusted_rand_score(truth, predicted)),
        fowlkes_mallows=float(metrics.fowlkes_mallows_score(truth, predicted)),
        accuracy=100 * _matched(truth, predicted) / len(truth),
        images=len(truth),
        classes=len(np.unique(truth)),
        clusters=len(np.unique(predicted)),
    )


def _matched(truth: np.ndarray, predicted: np.ndarray) -> int:
    """Images whose class has their cluster, for the best one-to-one matching of classes and clusters."""
    from scipy.sparse import eye_array, hstack
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching
    from sklearn.metrics.cluster import contingency_matrix

    # A table of 1000 classes and 65 536 prototypes is nearly empty.  The sparse solver wants a partner for every class
    # and no zeros: each class may also stay alone, and every edge counts one more.
    counts: Any = contingency_matrix(truth, predicted, sparse=True)
    counts.data += 1
    edges: Any = hstack([counts, eye_array(counts.shape[0], dtype=counts.dtype)], format="csr")
    classes, chosen = min_weight_full_bipartite_matching(edges, maximize=True)
    return int((edges[classes, chosen] - 1).sum())


def _k_means(points: np.ndarray, clusters: int, seed: int, exact: bool) -> tuple[float, np.ndarray]:
    """Sum of squared distances, and the cluster of each point, of one start."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    options: Any = {"n_clusters": clusters, "n_init": 1, "random_state": seed}
    model: Any = KMeans(**options) if exact else MiniBatchKMeans(**options, batch_size=max(4096, 2 * clusters))
    model.fit(points)
    return float(model.inertia_), model.labels_


def _labels(name: str, ids: Tensor, images: int) -> np.ndarray:
    if ids.shape != (images,) or not images or ids.is_floating_point() or ids.is_complex() or int(ids.min()) < 0:
        raise UserError(
            f"{name} have shape {tuple(ids.shape)} and type {ids.dtype}; give one integer id >= 0 for each of the "
            f"{images} images, of which there must be one"
        )
    return ids.cpu().numpy()


def _check(features: Tensor, clusters: int, restarts: int) -> None:
    if features.ndim != 2 or not features.shape[1]:
        raise UserError(f"features have shape {tuple(features.shape)}; give (images, width)")
    bad = int((~features.sum(dim=1, dtype=torch.float32).isfinite()).sum())
    if bad:
        raise UserError(f"{bad} of {len(features)} features hold NaN or infinity; check the encoder's weights")
    if not 2 <= clusters <= len(features):
        raise UserError(f"{clusters} clusters of {len(features)} images: choose from 2 to the number of images")
    if restarts < 1:
        raise UserError(f"restarts is {restarts}: give at least one start of k-means")
