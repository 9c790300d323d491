"""Analyses of several tokens: published formulas, loops, and what each measure must not see."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from triptych.errors import UserError
from triptych.evals.knn import knn
from triptych.evals.token_analysis import (
    COLUMNS,
    analyse,
    cka_matrix,
    knn_single_and_pairs,
    linear_cka,
    nmi,
    nmi_single_and_pairs,
    per_class_accuracy,
    pseudo_labels,
)
from triptych.heads import Prototypes


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(images, *, tokens=3, classes=4, width=6, seed=0):
    """Features (tokens, images, width) that cluster by label, token 0 most clearly, and the labels."""
    labels = torch.arange(images) % classes
    noise = torch.linspace(0.8, 1.6, tokens)[:, None, None]
    return draw(tokens, classes, width, seed=99)[:, labels] + noise * draw(tokens, images, width, seed=seed), labels


def gram_cka(x, y, unbiased):
    """Both definitions as they stand in the papers, with N x N matrices."""
    n = len(x)
    if not unbiased:
        H = torch.eye(n, dtype=torch.float64) - 1 / n
        K, L = H @ x @ x.T @ H, H @ y @ y.T @ H
        return (K * L).sum() / (K.norm() * L.norm())

    def hsic(K, L):
        K, L = K.clone().fill_diagonal_(0), L.clone().fill_diagonal_(0)
        one = torch.ones(n, dtype=torch.float64)
        middle = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        return torch.trace(K @ L) + middle - 2 / (n - 2) * (one @ K @ L @ one)

    K, L = x @ x.T, y @ y.T
    return hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_equals_the_golden_numbers(golden, unbiased):
    g = golden("cka_linear")
    expected = float(g["cka_unbiased" if unbiased else "cka_biased"])
    assert linear_cka(g["x"], g["y"], unbiased) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("images", "widths"), [(30, (5, 4)), (8, (20, 20)), (12, (5, 20))])
def test_cka_equals_its_definition_for_few_images_and_for_many(images, widths, unbiased):
    x, y = draw(images, widths[0]) + 3, draw(images, widths[1], seed=1)
    y[:, :4] += x[:, :4]
    expected = float(gram_cka(x, y, unbiased))
    assert linear_cka(x, y, unbiased) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_does_not_see_rotation_scale_and_offset(unbiased):
    x, y = draw(30, 6), draw(30, 6, seed=1)
    rotation = torch.linalg.qr(draw(6, 6, seed=2)).Q
    value = linear_cka(x, y, unbiased)
    assert linear_cka(-7 * x @ rotation + 5, y, unbiased) == pytest.approx(value, abs=1e-12)
    assert linear_cka(x, x @ rotation / 9 - 1, unbiased) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x * torch.linspace(0.1, 3, 6), x, unbiased) < 0.99  # but it does see unequal scales


def test_only_the_unbiased_cka_of_unrelated_tokens_is_near_zero_when_images_are_few():
    values = torch.tensor(
        [[linear_cka(draw(40, 60, seed=s), draw(40, 60, seed=s + 50), u) for u in (False, True)] for s in range(10)]
    )
    assert values[:, 0].mean() > 0.5
    assert values[:, 1].mean().abs() < 0.05


def test_the_cka_matrix_holds_every_pair_and_nothing_for_a_collapsed_token():
    tokens = draw(4, 20, 5)
    tokens[3] = 0.1
    cka = cka_matrix(tokens)
    for i in range(3):
        for j in range(3):
            assert float(cka[i, j]) == pytest.approx(linear_cka(tokens[i], tokens[j]), abs=1e-14)
    assert cka[3].isnan().all()
    assert cka[:, 3].isnan().all()


def test_nmi_equals_the_golden_numbers(golden):
    g = golden("cluster_metrics")
    assert nmi(g["truth"], g["pred"]) == pytest.approx(float(g["nmi_arithmetic"]), abs=1e-12)
    assert nmi(g["truth"], g["pred_more"]) == pytest.approx(float(g["nmi_more"]), abs=1e-12)


def test_nmi_equals_its_definition_written_as_loops(golden):
    g = golden("cluster_metrics")
    a, b = g["truth"].tolist(), g["pred"].tolist()
    n, information = len(a), 0.0
    for i in set(a):
        for j in set(b):
            both = sum(x == i and y == j for x, y in zip(a, b, strict=True)) / n
            if both:
                information += both * math.log(both / (a.count(i) / n * b.count(j) / n))
    entropy = [-sum(x.count(i) / n * math.log(x.count(i) / n) for i in set(x)) for x in (a, b)]
    assert nmi(g["truth"], g["pred"]) == pytest.approx(2 * information / sum(entropy), abs=1e-12)


def test_nmi_does_not_see_the_names_of_the_clusters(golden):
    g = golden("cluster_metrics")
    renamed = torch.tensor([31, 4, 15, 9, 2])[g["pred"]]
    assert nmi(g["truth"], renamed) == pytest.approx(nmi(g["truth"], g["pred"]), abs=1e-12)
    assert nmi(renamed, g["pred"]) == pytest.approx(1)
    assert nmi(g["truth"], torch.zeros_like(renamed)) == 0


def test_pseudo_labels_are_the_argmax_of_the_methods_logits():
    torch.manual_seed(0)
    prototypes = Prototypes(6, 11, train_gain=True).double()
    torch.nn.init.uniform_(prototypes.gain, 0.5, 2.0)
    z = draw(25, 6)
    expected = prototypes(z).argmax(1)
    assert torch.equal(pseudo_labels(z, prototypes.weight), expected)
    assert torch.equal(pseudo_labels(100 * z, prototypes.weight, rows=7), expected)


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
