"""What several tokens of the same images know, alone and in pairs: the analyses of the MTE paper (Li et al. 2024).

Shapes: M tokens, N train and n test images, D features, P embedding, K prototypes, C classes.  Accuracies in percent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.evals.cka import Table, as_table, cka_matrix
from triptych.evals.clustering import nmi
from triptych.evals.knn import check_sets, knn_of_spaces
from triptych.evals.pseudo_labels import nearest_prototype

COLUMNS = ("token", "k-NN", "best pair", "pairs", "CKA with others", "NMI", "NMI of pairs")


@dataclass(frozen=True)
class TokenAnalysis:
    """Tables of M tokens in the order of `names`; off the diagonal of `pairs`, `cka` and `nmi` stand pairs."""

    names: list[str]
    k: int
    knn: list[float]  # (M,) top-1 of each token
    per_class: Table  # (M, C) its accuracy on each class; None where no test image has the class
    pairs: Table  # (M, M) top-1 of two tokens side by side; the diagonal is knn
    cka: Table  # (M, M) similarity of what two tokens know, 0 to 1; None for a token that is the same for all images
    nmi: Table | None  # (M, M) agreement of pseudo-labels with the classes, 0 to 1; None without prototypes

    def rows(self) -> list[tuple[str, ...]]:
        """One row of text per token, under COLUMNS: means over the other tokens, and the best partner."""
        rows = []
        for i, name in enumerate(self.names):
            pairs, cka = _others(self.pairs, i), _others(self.cka, i)
            partner = max(pairs, key=lambda j: pairs[j], default=None)
            best = "" if partner is None else f"{pairs[partner]:.2f} with {self.names[partner]}"
            own, nmi = ("", {}) if self.nmi is None else (f"{self.nmi[i][i]:.3f}", _others(self.nmi, i))
            rows.append((name, f"{self.knn[i]:.2f}", best, _mean(pairs, 2), _mean(cka, 3), own, _mean(nmi, 3)))
        return rows


@torch.no_grad()
def analyse(
    names: Sequence[str],
    train: Sequence[Tensor],
    train_labels: Tensor,
    test: Sequence[Tensor],
    test_labels: Tensor,
    *,
    embeddings: Tensor | None = None,
    prototypes: Tensor | None = None,
    k: int = 10,
) -> TokenAnalysis:
    """All analyses of train and test, M features (N, D) and (n, D); CKA is that of the test images.

    NMI needs the test images' embeddings (M, n, P), after each token's own projector, and the prototypes (K, P) with
    which the method compares them (`Prototypes.weight`).  Raises UserError for shapes that do not fit, and as `knn`.
    """
    _check(names, train, test, embeddings, prototypes)
    classes = check_sets(train[0], train_labels, test[0], test_labels)
    predictions = knn_single_and_pairs(train, train_labels, test, k=k)
    labels = test_labels.to(predictions.device)
    pairs = 100 * (predictions == labels).double().mean(-1)
    each = [per_class_accuracy(predictions[m, m], labels, classes) for m in range(len(names))]
    nmis = None
    if embeddings is not None and prototypes is not None:
        nmis = as_table(nmi_single_and_pairs(embeddings, prototypes, test_labels))
    return TokenAnalysis(
        names=list(names),
        k=k,
        knn=pairs.diagonal().tolist(),
        per_class=as_table(torch.stack(each)),
        pairs=as_table(pairs),
        cka=as_table(cka_matrix(test)),
        nmi=nmis,
    )


@torch.no_grad()
def knn_single_and_pairs(
    train: Sequence[Tensor], train_labels: Tensor, test: Sequence[Tensor], *, k: int = 10, temperature: float = 0.07
) -> Tensor:
    """Classes that `knn` gives to the test images: M features (N, D) and M (n, D) -> (M, M, n) int64.

    [i, i]: from token i; [i, j]: from i and j side by side, each of unit length.
    """
    pairs = list(combinations_with_replacement(range(len(test)), 2))
    joints = [sorted({i, j}) for i, j in pairs]
    found = knn_of_spaces(train, train_labels, test, joints=joints, k=k, temperature=temperature)
    out = found.new_empty(len(test), len(test), found.shape[1])
    for (i, j), classes in zip(pairs, found, strict=True):
        out[i, j] = out[j, i] = classes
    return out


def per_class_accuracy(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Percent of each class's images that are given it: (n,), (n,) -> (C,) float64, NaN for a class without any."""
    right = (predictions == labels).double()
    return 100 * torch.bincount(labels, right, classes) / torch.bincount(labels, minlength=classes)


def nmi_single_and_pairs(z: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """NMI of classes and pseudo-labels: z (M, n, P), prototypes (K, P), labels (n,) -> (M, M) float64.

    [i, i]: pseudo-labels of token i; [i, j]: of the mean of i's and j's embeddings.  As MTE fuses its tokens, they are
    combined after the projectors and before unit length.
    """
    out = torch.empty(len(z), len(z), dtype=torch.float64)
    for i, j in combinations_with_replacement(range(len(z)), 2):
        out[i, j] = out[j, i] = nmi(labels, nearest_prototype((z[i] + z[j]) / 2, prototypes))
    return out


def _check(
    names: Sequence[str], train: Sequence[Tensor], test: Sequence[Tensor], z: Tensor | None, prototypes: Tensor | None
) -> None:
    shapes = [[tuple(x.shape) for x in side] for side in (train, test)]
    if not len(names) == len(train) == len(test) > 0 or any(len(shape) != 2 for side in shapes for shape in side):
        raise UserError(
            f"train features have shapes {shapes[0]}, test features {shapes[1]}; give (images, width) of every token "
            f"for both, with one name for each token (given: {len(names)})"
        )
    if (z is None) != (prototypes is None):
        raise UserError("embeddings and prototypes go together: give both, or neither to leave out NMI")
    if z is None or prototypes is None:
        return
    if z.ndim != 3 or z.shape[:2] != (len(test), len(test[0])) or prototypes.shape[1:] != z.shape[2:]:
        raise UserError(
            f"embeddings have shape {tuple(z.shape)}, prototypes {tuple(prototypes.shape)}; give "
            f"{(len(test), len(test[0]), 'P')} for the tokens and images of the test features, and (K, P)"
        )


def _others(table: Table, i: int) -> dict[int, float]:
    """Row i without its diagonal and without what is missing."""
    return {j: value for j, value in enumerate(table[i]) if j != i and value is not None}


def _mean(values: dict[int, float], digits: int) -> str:
    return f"{sum(values.values()) / len(values):.{digits}f}" if values else ""
