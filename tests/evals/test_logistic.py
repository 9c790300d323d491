"""Low-shot logistic regression: the unique optimum, as scikit-learn finds it, under the papers' three settings."""

import math
from typing import Any, cast

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from triptych.errors import UserError
from triptych.evals.logistic import SETTINGS, Setting, fit, logistic, prepared

GOLDEN_NAMES = {
    "udi": "l2norm_lambda0p1_over_n",
    "dino": "l2norm_lambda0p1",
    "msn": "center_l2norm_lambda0p075_over_n",
}


def blobs(images: int, *, classes=5, width=12, noise=1.5, seed=0):
    """Features (images, width) that cluster by label around a mean far from 0, and the labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    centres = 3 + torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + noise * torch.randn(images, width, generator=g), labels


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_each_paper_s_setting_gives_the_unique_optimum(golden, name):
    g, prefix = golden("lowshot_logreg"), GOLDEN_NAMES[name]
    result = logistic(g["train"], g["train_label"], g["test"], g["test_label"], SETTINGS[name])
    assert result.lam == pytest.approx(float(g[f"{prefix}_lambda"]), rel=1e-12)
    assert result.objective == pytest.approx(float(g[f"{prefix}_objective"]), abs=1e-11)
    assert result.top1 == pytest.approx(100 * float(g[f"{prefix}_test_acc"]))
    assert result.converged
    fitted = fit(prepared(g["train"], SETTINGS[name].rows), g["train_label"], result.lam, tolerance=1e-8)
    torch.testing.assert_close(fitted.weight, g[f"{prefix}_weight"], rtol=0, atol=5e-8)


@pytest.mark.parametrize("lam", [1.0, 1e-3, 1e-6])
def test_scikit_learn_finds_the_same_weights(lam):
    x, y = blobs(90)
    x = prepared(x, "unit")
    solver = LogisticRegression(C=1 / (lam * len(x)), fit_intercept=False, solver="newton-cg", tol=1e-10, max_iter=1000)
    theirs = torch.from_numpy(solver.fit(x.numpy(), y.numpy()).coef_).T
    ours = fit(x, y, lam)
    assert ours.converged
    torch.testing.assert_close(ours.weight, theirs, rtol=0, atol=1e-5 * float(theirs.norm()))


def test_the_objective_is_mean_cross_entropy_plus_half_lambda_times_the_squared_weights():
    x, y = blobs(30)
    lam = 0.02
    x = prepared(x, "unit")
    fitted = fit(x, y, lam)
    total = 0.0
    for row, label in zip(x, y, strict=True):
        logits = [float(row @ column) for column in fitted.weight.T]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    expected = total / 30 + lam / 2 * sum(float(w) ** 2 for w in fitted.weight.flatten())
    assert fitted.objective == pytest.approx(expected, rel=1e-12)


def test_the_gradient_norm_is_that_of_the_weights_and_bounds_their_error():
    """|W - W*| <= |gradient| / lambda, wherever the solver stops."""
    x, y = blobs(60)
    x, lam = prepared(x, "unit"), 1e-3
    best = fit(x, y, lam, tolerance=1e-9)
    stopped = fit(x, y, lam, max_iterations=2)
    weight = stopped.weight.clone().requires_grad_()
    (torch.nn.functional.cross_entropy(x @ weight, y) + lam / 2 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert stopped.gradient_norm == pytest.approx(float(weight.grad.norm()), rel=1e-9)
    error = float((stopped.weight - best.weight).norm())
    assert 0 < error <= stopped.gradient_norm / lam
    assert best.gradient_norm <= 1e-9 * lam * float(best.weight.norm())


def test_a_fit_that_stops_early_says_that_it_did_not_converge():
    sets = *blobs(60), *blobs(200, seed=1)
    early = logistic(*sets, Setting(1e-5, False, "unit"), max_iterations=3)
    assert (early.converged, early.iterations) == (False, 3)
    done = logistic(*sets, Setting(1e-5, False, "unit"))
    assert done.converged
    assert done.objective < early.objective
    x = prepared(sets[0], "unit")
    beyond_float64 = fit(x, sets[1], 1e-5, tolerance=1e-20)
    assert not beyond_float64.converged
    assert beyond_float64.iterations < 30  # it sees that nothing moves any more


@pytest.mark.parametrize("lam", [1e-9, 1e-6, 1e-3, 1.0, 1e3])
def test_any_penalty_converges_on_features_of_very_unlike_variances(lam):
    g = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -4, 32)
    labels = torch.arange(300) % 10
    x = torch.randn(10, 32, generator=g)[labels] * spectrum + 2 * spectrum * torch.randn(300, 32, generator=g) + 1
    fitted = fit(prepared(x, "unit"), labels, lam)
    assert fitted.converged
    assert fitted.iterations < 40


def test_lambda_is_divided_by_the_images_only_if_so_set():
    sets = *blobs(50), *blobs(20, seed=1)
    assert logistic(*sets, SETTINGS["udi"]).lam == pytest.approx(0.1 / 50)
    assert logistic(*sets, SETTINGS["dino"]).lam == 0.1
    assert logistic(*sets, SETTINGS["msn"]).lam == pytest.approx(0.075 / 50)
    assert logistic(*sets, SETTINGS["msn_few"]).lam == pytest.approx(0.0025 / 50)


def test_centring_ignores_what_is_added_to_all_features_of_an_image_and_unit_length_ignores_scale():
    x, _ = blobs(9)
    added, scaled = torch.arange(9.0)[:, None], torch.arange(1.0, 10)[:, None]
    torch.testing.assert_close(prepared(x * scaled + added, "centred"), prepared(x, "centred"), rtol=0, atol=1e-6)
    torch.testing.assert_close(prepared(x * scaled, "unit"), prepared(x, "unit"), rtol=0, atol=1e-6)
    torch.testing.assert_close(prepared(x, "centred").mean(1), torch.zeros(9).double(), rtol=0, atol=1e-12)
    assert prepared(x, "none").equal(x.double())


def test_test_rows_are_prepared_like_train_rows():
    train, (test, labels) = blobs(60), blobs(200, seed=1)
    unit, centred = SETTINGS["udi"], SETTINGS["msn"]
    assert logistic(*train, test * 5, labels, unit) == logistic(*train, test, labels, unit)
    assert logistic(*train, test * 5 + 7, labels, centred) == logistic(*train, test, labels, centred)


def test_gaps_between_class_ids_change_nothing():
    train, test = blobs(60), blobs(200, seed=1)
    spread = logistic(train[0], train[1] * 70 + 3, test[0], test[1] * 70 + 3)
    assert spread == logistic(*train, *test)
    assert spread.classes == 5


def test_test_images_of_classes_without_train_images_are_wrong():
    x, y = blobs(60)
    test, test_y = blobs(100, seed=1)
    whole = logistic(x[y != 4], y[y != 4], test, test_y)
    known = logistic(x[y != 4], y[y != 4], test[test_y != 4], test_y[test_y != 4])
    assert (whole.unseen, known.unseen, whole.classes) == (20, 0, 4)
    assert whole.top1 == pytest.approx(known.top1 * 0.8)
    assert whole.top5 == pytest.approx(80)
    between = logistic(x[y != 2], y[y != 2], test, test_y)
    assert between.unseen == 20
    assert between.top5 == pytest.approx(80)


def test_top1_and_top5_count_the_images_whose_class_is_among_the_first():
    (x, y), (test, test_y) = blobs(90, classes=9), blobs(100, classes=9, seed=1)
    result = logistic(x, y, test, test_y)
    order = (prepared(test, "unit") @ fit(prepared(x, "unit"), y, 0.1 / 90).weight).argsort(1, descending=True).tolist()
    for best, reported in ((1, result.top1), (5, result.top5)):
        right = sum(label in given[:best] for given, label in zip(order, test_y.tolist(), strict=True))
        assert reported == pytest.approx(right)
    assert result.top1 < result.top5 < 100


def test_small_chunks_give_the_same_result():
    sets = *blobs(700, width=400), *blobs(900, width=400, seed=1)
    whole, chunks = logistic(*sets), logistic(*sets, memory_mb=1)  # 100 rows at a time
    assert chunks.objective == pytest.approx(whole.objective, rel=1e-10)
    assert (chunks.top1, chunks.top5) == (whole.top1, whole.top5)


def test_features_that_say_nothing_give_weights_of_zero():
    fitted = fit(torch.zeros(6, 3), torch.tensor([0, 1, 2] * 2), 0.1)
    assert fitted.weight.equal(torch.zeros(3, 3).double())
    assert fitted.converged
    assert fitted.objective == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"setting": Setting(0.0, True, "unit")}, "lambda is 0.0; it must be > 0"),
        ({"setting": Setting(math.inf, True, "unit")}, "finite"),
        ({"setting": Setting(0.1, True, cast(Any, "whitened"))}, "unit, centred, none"),
        ({"train_labels": torch.zeros(30, dtype=torch.int64)}, "all of one class"),
        ({"train_labels": torch.zeros(30)}, "integer class id"),
        ({"train": torch.full((30, 12), math.nan)}, "NaN"),
        ({"test": torch.zeros(9, 5)}, "12 numbers per image, test features 5"),
    ],
)
def test_bad_input_is_named(given, words):
    names = "train", "train_labels", "test", "test_labels"
    sets = dict(zip(names, (*blobs(30), *blobs(9, seed=1)), strict=True))
    with pytest.raises(UserError, match=words):
        logistic(**{**sets, **given})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_same_accuracies():
    (x, y), (test, test_y) = blobs(300), blobs(500, seed=1)
    ours, theirs = logistic(x.cuda(), y.cuda(), test.cuda(), test_y.cuda()), logistic(x, y, test, test_y)
    assert (ours.top1, ours.top5, ours.converged) == (theirs.top1, theirs.top5, True)
    assert ours.objective == pytest.approx(theirs.objective, rel=1e-9)
    assert logistic(x.cuda(), y, test, test_y).top1 == theirs.top1  # labels and test images may lie elsewhere
