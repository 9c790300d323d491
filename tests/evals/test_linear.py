"""The linear probe against plain torch.optim.SGD, and that its choice of a rate is honest."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from triptych.errors import UserError
from triptych.evals.linear import HELD_OUT, ONE, TEST, held_out, linear
from triptych.evals.linear_presets import PRESETS
from triptych.evals.probe import Probe


def blobs(images: int, *, classes=4, width=8, noise=1.0, seed=0):
    """Features (images, width) that cluster by label, and the labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=g)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + noise * torch.randn(images, width, generator=g), labels


def probe_of(**changes):
    """A probe of blobs: SGD at the rates of "sweep", but for the changes."""
    return Probe(replace(PRESETS["sweep"], **changes), 8, 4, torch.Generator().manual_seed(0), "cpu")


def test_separable_classes_are_separated():
    sets = *blobs(400, noise=0.1), *blobs(100, noise=0.1, seed=1)
    result = linear(*sets, epochs=10)
    assert result.top1 == result.top5 == result.best_epoch_top1 == 100
    assert (result.train_images, result.test_images, result.classes, result.epochs) == (400, 100, 4, 10)


def test_accuracy_reaches_that_of_the_best_possible_rule():
    """Two unit Gaussians at distance 2: the optimum is right with probability Phi(1) = 84.13 %, and is linear."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (24_000,), generator=g)
    x = torch.randn(24_000, 4, generator=g)
    x[:, 0] += 2.0 * labels - 1.0
    result = linear(x[:4000], labels[:4000], x[4000:], labels[4000:], epochs=10)
    optimum = 50 * (1 + math.erf(1 / math.sqrt(2)))
    assert result.top1 == pytest.approx(optimum, abs=1.0)  # the standard error of 20 000 images is 0.26


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_a_rate_equals_sgd_with_cosine_annealing(weight_decay):
    x, y = blobs(150)
    epochs, batch, lrs = 4, 32, (0.01, 0.3)
    probe = probe_of(lrs=lrs, weight_decay=weight_decay)
    for column, lr in enumerate(lrs):
        head = torch.nn.Linear(8, 4)
        head.weight.data.copy_(probe_of(lrs=lrs).weight.view(8, 2, 4)[:, 0].T)
        head.bias.data.zero_()
        assert 0.005 < head.weight.std() < 0.02
        sgd = torch.optim.SGD(head.parameters(), lr=lr * batch / 256, momentum=0.9, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs, eta_min=0)
        shuffle = torch.Generator().manual_seed(1)
        for epoch in range(epochs):
            for rows in torch.randperm(150, generator=shuffle).split(batch):
                sgd.zero_grad()
                F.cross_entropy(head(x[rows]), y[rows]).backward()
                sgd.step()
                if column == 0:
                    decay = batch / 256 * (1 + math.cos(math.pi * epoch / epochs)) / 2
                    probe.step(x[rows], y[rows], decay)
            schedule.step()
        torch.testing.assert_close(probe.weight.view(8, 2, 4)[:, column].T, head.weight.data, rtol=0, atol=1e-6)
        torch.testing.assert_close(probe.bias.view(2, 4)[column], head.bias.data, rtol=0, atol=1e-6)


def test_the_reported_accuracy_is_that_of_sgd_over_all_train_images():
    """The whole of `linear` for one rate, written out."""
    (x, y), (test, test_y) = blobs(150, noise=1.5), blobs(200, noise=1.5, seed=1)
    generator = torch.Generator().manual_seed(5)
    head = torch.nn.Linear(8, 4)
    head.weight.data.copy_((torch.randn(8, 4, generator=generator) * 0.01).T)
    head.bias.data.zero_()
    sgd = torch.optim.SGD(head.parameters(), lr=0.1 * 64 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 6)
    per_epoch = []
    for _ in range(6):
        for rows in torch.randperm(150, generator=generator).split(64):
            sgd.zero_grad()
            F.cross_entropy(head(x[rows]), y[rows]).backward()
            sgd.step()
        schedule.step()
        per_epoch.append(float((head(test).argmax(1) == test_y).double().mean() * 100))
    result = linear(x, y, test, test_y, epochs=6, batch=64, lrs=[0.1], seed=5)
    assert result.selected_on == ONE
    assert result.top1 == result.per_lr[0.1] == pytest.approx(per_epoch[-1])
    assert result.best_epoch_top1 == pytest.approx(max(per_epoch))


def test_a_rate_is_not_changed_by_the_others():
    sets = *blobs(300, noise=2.0), *blobs(500, noise=2.0, seed=1)
    lrs = (0.001, 0.03, 1.0)
    together = linear(*sets, epochs=3, lrs=lrs)
    for lr in lrs:
        assert linear(*sets, epochs=3, lrs=[lr]).per_lr[lr] == pytest.approx(together.per_lr[lr])


def test_a_rate_that_diverges_leaves_the_others_alone():
    sets = *blobs(300, noise=2.0), *blobs(100, noise=2.0, seed=1)
    alone, beside = (linear(*sets, epochs=3, lrs=lrs) for lrs in ((0.01, 0.1), (0.01, 0.1, 1e38)))
    assert beside.per_lr.pop(1e38) == 0
    assert beside.per_lr == pytest.approx(alone.per_lr)
    assert (beside.lr, beside.top1) == (alone.lr, pytest.approx(alone.top1))
    with pytest.raises(UserError, match="diverged"):
        linear(*sets, epochs=3, lrs=[1e38])


def test_test_labels_have_no_part_in_the_choice():
    train = blobs(300, noise=2.0)
    test, test_labels = blobs(60, noise=2.0, seed=1)
    chosen = set()
    for seed in range(4):
        shuffled = test_labels[torch.randperm(60, generator=torch.Generator().manual_seed(seed))]
        result = linear(*train, test, shuffled, epochs=3, lrs=(1e-4, 1e-2, 1.0))
        chosen.add(result.lr)
        assert result.selected_on == HELD_OUT
        assert result.top1 == result.per_lr[result.lr]
    assert len(chosen) == 1


def test_choosing_on_the_test_images_is_labelled_and_never_worse_there():
    sets = *blobs(300, noise=2.0), *blobs(100, noise=2.0, seed=1)
    papers, honest = (linear(*sets, epochs=3, select=select) for select in ("test", "held_out"))
    assert papers.selected_on == TEST
    assert papers.per_lr == honest.per_lr
    assert papers.best_epoch_top1 >= papers.top1 == max(papers.per_lr.values()) >= honest.top1


def test_the_held_out_tenth_is_stratified_and_leaves_every_class():
    labels = torch.cat([torch.arange(4).repeat_interleave(torch.tensor([500, 100, 3, 1])), torch.full((396,), 7)])
    labels = labels[torch.randperm(1000, generator=torch.Generator().manual_seed(3))]
    held = held_out(labels, seed=0)
    counts = torch.bincount(labels[held], minlength=8)
    assert abs(int(held.sum()) - 100) <= 1
    assert [abs(int(counts[c]) - n) <= 1 for c, n in ((0, 50), (1, 10), (7, 40))] == [True] * 3
    assert torch.equal(labels[~held].unique(), labels.unique())
    assert torch.equal(held, held_out(labels, seed=0))
    assert not torch.equal(held, held_out(labels, seed=1))
    with pytest.raises(UserError, match="too few to hold out"):
        held_out(torch.arange(30), seed=0)


def test_a_seed_fixes_the_result():
    sets = *blobs(300, noise=2.0), *blobs(500, noise=2.0, seed=1)
    first, again, other = (linear(*sets, epochs=2, lrs=(0.01, 0.1), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.per_lr != other.per_lr


def test_batch_norm_makes_scale_and_shift_of_features_irrelevant():
    (x, y), (test, test_y) = blobs(300, noise=2.0), blobs(500, noise=2.0, seed=1)
    scale = torch.logspace(0, 3, 8)  # not below 1, where the 1e-6 added to the variance begins to count
    plain = linear(x, y, test, test_y, epochs=3, norm="batch")
    moved = linear(x * scale + scale, y, test * scale + scale, test_y, epochs=3, norm="batch")
    assert moved.per_lr == pytest.approx(plain.per_lr, abs=0.5)


def test_a_batch_larger_than_the_train_set_is_cut():
    result = linear(*blobs(50), *blobs(20, seed=1), epochs=2, batch=4096, lrs=[0.1])
    assert result.batch == 50


def test_features_are_left_as_they_were():
    sets = *blobs(100), *blobs(20, seed=1)
    before = [x.clone() for x in sets]
    linear(*sets, epochs=2, norm="batch")
    assert all(torch.equal(a, b) for a, b in zip(sets, before, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_labels": torch.zeros(50, dtype=torch.int64)}, "all of one class"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"lrs": []}, "at least one"),
        ({"lrs": [0.1, -1.0]}, "each > 0"),
        ({"select": "train"}, "held_out, test"),
        ({"norm": "layer"}, "none, batch"),
        ({"test": torch.full((9, 8), math.nan)}, "9 of 9 test features"),
        ({"test": torch.zeros(9, 5)}, "8 numbers per image, test features 5"),
        ({"train": torch.zeros(0, 8), "train_labels": torch.zeros(0, dtype=torch.int64)}, "at least one image"),
    ],
)
def test_bad_input_is_named(change, words):
    train, test = blobs(50), blobs(9, seed=1)
    given = {"train": train[0], "train_labels": train[1], "test": test[0], "test_labels": test[1], **change}
    with pytest.raises(UserError, match=words):
        linear(**given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_same_accuracies():
    sets = *blobs(300, noise=2.0), *blobs(500, noise=2.0, seed=1)
    here, there = (linear(*x, epochs=3, lrs=(0.01, 0.1)) for x in (sets, [x.cuda() for x in sets]))
    assert there.per_lr == pytest.approx(here.per_lr, abs=0.5)
