"""CKA: the published numbers, both definitions, and what it must not see."""

import json
from dataclasses import asdict

import pytest
import torch

from triptych.errors import UserError
from triptych.evals import cka as module
from triptych.evals.cka import cka, cka_matrix, linear_cka


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("width", [9, 70])
def test_images_that_are_taken_a_few_at_a_time_give_the_same_cka(monkeypatch, unbiased, rows, width):
    x, y = draw(50, 6) + 9, draw(50, width, seed=1)
    y[:, :6] += x
    monkeypatch.setattr(module, "ROWS", rows)
    assert linear_cka(x, y, unbiased) == pytest.approx(float(gram_cka(x, y, unbiased)), abs=1e-11)


def test_no_copy_of_all_images_is_made(monkeypatch):
    """Every tensor that is centred has ROWS rows or fewer."""
    monkeypatch.setattr(module, "ROWS", 16)
    seen, centred = [], module._centred
    monkeypatch.setattr(module, "_centred", lambda part, c: seen.append(len(part)) or centred(part, c))
    cka({"a": draw(100, 4), "b": draw(100, 5)})
    assert max(seen) == 16
    assert sum(seen) == 2 * 3 * 100, "two sides of three pairs"


@pytest.mark.parametrize("unbiased", [False, True])
def test_encoders_of_unlike_widths_are_compared_by_name(unbiased):
    features = {"ours": draw(40, 6).float(), "theirs": draw(40, 9, seed=1).float(), "collapsed": torch.ones(40, 3)}
    result = cka(features, unbiased=unbiased)
    assert result.names == ["ours", "theirs", "collapsed"]
    assert (result.images, result.unbiased) == (40, unbiased)
    assert result.cka[0][1] == pytest.approx(linear_cka(features["ours"], features["theirs"], unbiased))
    assert result.cka[0][0] == pytest.approx(1)
    assert result.cka[2] == [None, None, None]
    assert json.loads(json.dumps(asdict(result), allow_nan=False)) == asdict(result)


@pytest.mark.parametrize(
    ("features", "unbiased", "says"),
    [
        ({"a": torch.ones(5, 2)}, False, "two or more"),
        ({"a": torch.ones(5, 2), "b": torch.ones(5)}, False, r"b \(5,\)"),
        ({"a": torch.ones(5, 2), "b": torch.ones(6, 2)}, False, "same images"),
        ({"a": torch.ones(3, 2), "b": torch.ones(3, 2)}, True, "needs 4 images"),
        ({"a": torch.ones(1, 2), "b": torch.ones(1, 2)}, False, "needs 2 images"),
        ({"a": torch.ones(5, 2), "b": torch.full((5, 2), torch.nan)}, False, "'b' hold NaN"),
    ],
)
def test_what_cannot_be_compared_is_said(features, unbiased, says):
    with pytest.raises(UserError, match=says):
        cka(features, unbiased=unbiased)
