"""Analyses of several tokens: published formulas, loops, and what each measure must not see."""

import json
from dataclasses import asdict

import pytest
import torch

from triptych.errors import UserError
from triptych.evals.clustering import nmi
from triptych.evals.knn import knn
from triptych.evals.token_analysis import (
    COLUMNS,
    analyse,
    knn_single_and_pairs,
    nmi_single_and_pairs,
    per_class_accuracy,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(images, *, tokens=3, classes=4, width=6, seed=0):
    """Features (tokens, images, width) that cluster by label, token 0 most clearly, and the labels."""
    labels = torch.arange(images) % classes
    noise = torch.linspace(0.8, 1.6, tokens)[:, None, None]
    return draw(tokens, classes, width, seed=99)[:, labels] + noise * draw(tokens, images, width, seed=seed), labels


def test_pairs_of_pseudo_labels_are_those_of_the_mean_embedding():
    (z, labels), prototypes = labelled(60), draw(9, 6, seed=3)
    table = nmi_single_and_pairs(z, prototypes, labels)
    for i in range(3):
        for j in range(3):
            mean = torch.stack([(z[i, n] + z[j, n]) / 2 for n in range(60)])
            nearest = torch.tensor([max(range(9), key=lambda k, x=x: float(x @ prototypes[k])) for x in mean])
            assert float(table[i, j]) == pytest.approx(nmi(labels, nearest), abs=1e-12)


def test_per_class_accuracies_are_counts_written_as_loops():
    predictions, labels = torch.tensor([0, 1, 1, 3, 0, 7]), torch.tensor([0, 1, 0, 3, 0, 3])
    accuracy = per_class_accuracy(predictions, labels, 5)
    for c in range(5):
        own = [int(p) == c for p, y in zip(predictions, labels, strict=True) if y == c]
        assert accuracy[c].isnan() if not own else float(accuracy[c]) == pytest.approx(100 * sum(own) / len(own))


def test_single_tokens_and_pairs_have_the_accuracy_that_knn_has_on_their_features():
    (train, y), (test, z) = labelled(80), labelled(30, seed=1)
    predictions = knn_single_and_pairs(train, y, test, k=5)
    accuracy = 100 * (predictions == z).double().mean(-1)
    for i in range(3):
        for j in range(3):
            sets = []
            for x in (train, test):
                units = [x[m] / x[m].norm(dim=1, keepdim=True) for m in (i, j)]
                sets.append(units[0] if i == j else torch.cat(units, dim=1))
            expected = knn(sets[0], y, sets[1], z, k=[5]).top1[5]
            assert float(accuracy[i, j]) == pytest.approx(expected, abs=1e-9)


def test_the_length_of_a_token_gives_it_no_weight_in_a_pair():
    (train, y), (test, _) = labelled(80), labelled(30, seed=1)
    longer = torch.tensor([1.0, 50.0, 0.02])[:, None, None]
    ours, scaled = knn_single_and_pairs(train, y, test), knn_single_and_pairs(train * longer, y, test * longer)
    assert (ours == scaled).double().mean() > 0.99


def test_the_analysis_is_plain_values_that_agree_with_each_other():
    (train, y), (test, z) = labelled(80), labelled(30, seed=1)
    names = ["global", "aux 1", "pooled 1"]
    result = analyse(names, train, y, test, z, embeddings=test, prototypes=draw(9, 6, seed=3), k=5)
    assert json.loads(json.dumps(asdict(result), allow_nan=False)) == asdict(result)
    assert result.nmi is not None
    for i in range(3):
        assert result.pairs[i][i] == result.knn[i]
        weights = [int((z == c).sum()) for c in range(4)]
        mean = sum(w * (a or 0) for w, a in zip(weights, result.per_class[i], strict=True)) / 30
        assert mean == pytest.approx(result.knn[i])
        assert result.cka[i][i] == pytest.approx(1)
    rows = result.rows()
    assert [row[0] for row in rows] == names
    assert {len(row) for row in rows} == {len(COLUMNS)}
    best = max((1, 2), key=lambda j: result.pairs[0][j] or 0)
    assert rows[0][2] == f"{result.pairs[0][best]:.2f} with {names[best]}"
    assert rows[0][6] == f"{sum(result.nmi[0][j] or 0 for j in (1, 2)) / 2:.3f}"


def test_one_token_without_prototypes_and_a_class_without_test_images_leave_gaps_not_errors():
    (train, y), (test, z) = labelled(80, tokens=1), labelled(2, tokens=1, seed=1)
    result = analyse(["global"], train, y, test, z)
    assert result.nmi is None
    assert result.per_class[0][2:] == [None, None]
    assert result.rows()[0][2:] == ("", "", "", "", "")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"names": ["global"]}, "one name for each token"),
        ({"train": torch.zeros(5, 4)}, r"shapes \[\(4,\)"),
        ({"prototypes": None}, "both, or neither"),
        ({"prototypes": torch.zeros(9, 5)}, r"prototypes \(9, 5\)"),
        ({"test_labels": torch.zeros(4, dtype=torch.int64)}, "test labels"),
        ({"k": 81}, "k = 81"),
    ],
)
def test_what_does_not_fit_is_said(change, says):
    (train, y), (test, z) = labelled(80), labelled(30, seed=1)
    given = {"names": ["a", "b", "c"], "train": train, "train_labels": y, "test": test, "test_labels": z}
    given |= {"embeddings": test, "prototypes": draw(9, 6)}
    with pytest.raises(UserError, match=says):
        analyse(**given | change)
