"""Linear probe on frozen features: a sweep of learning rates trained side by side (DINO's protocol, iBOT's sweep)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.errors import UserError
from triptych.evals.knn import check_sets, label_rank

DEFAULT_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Half-decades over the range of iBOT's 45 rates, which holds DINO's 1e-3, UDI's 0.02 and MSN's 6.4; for batch 256."""

HELD_OUT, TEST, ONE = "held-out tenth of train", "test", "one rate, nothing to select"


@dataclass(frozen=True)
class LinearResult:
    """Accuracies in percent (0 to 100); rates are for batch 256, as given.

    top1, top5: test accuracy of the chosen rate `lr` at the last epoch.  per_lr: test top-1 of every rate at the last
    epoch (0 for a rate that diverged).  best_epoch_top1: maximum over epochs and rates on the test images, the papers'
    habit and an optimistic number.  selected_on: what chose the rate.  batch: as used, at most train_images.
    """

    top1: float
    top5: float
    lr: float
    per_lr: dict[float, float]
    selected_on: str
    best_epoch_top1: float
    epochs: int
    batch: int
    train_images: int
    test_images: int
    classes: int


@dataclass(frozen=True)
class _Recipe:
    lrs: tuple[float, ...]
    classes: int
    epochs: int
    batch: int
    weight_decay: float
    momentum: float
    norm: Literal["none", "batch"]
    seed: int


@torch.no_grad()
def linear(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    epochs: int = 100,
    batch: int = 256,
    lrs: Sequence[float] = DEFAULT_LRS,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    select: Literal["held_out", "test"] = "held_out",
    norm: Literal["none", "batch"] = "none",
    seed: int = 0,
) -> LinearResult:
    """Train a linear classifier on `train` (M, D) for every rate and report its accuracy on `test` (T, D).

    SGD on the cross-entropy, W ~ N(0, 0.01), b = 0, the same start and batches for every rate; rate x batch / 256,
    cosine to 0 by epoch.  Runs on the device of `train` in float32; a seed fixes the result.

    select "held_out" takes the rate that is best on a seeded, stratified tenth of the train images when trained on the
    others (the lowest of equals), then trains on all of them; the test labels do not take part.  "test" takes the rate
    that is best on the test images, as the papers' scripts do.  norm "batch" standardises each feature with mean and
    variance of the train images, the frozen-feature equivalent of MAE's BatchNorm without affine; DINO has "none".

    Labels are int64 ids >= 0.  Raises UserError for bad features or labels (as `knn`), fewer than two classes in train,
    epochs or batch < 1, no rate or one <= 0, unknown names, too few images to hold some out, all rates diverged.
    """
    classes = check_sets(train, train_labels, test, test_labels)
    _check_settings(train_labels, epochs, batch, lrs, select, norm)
    rates = tuple(sorted(set(lrs)))
    recipe = _Recipe(rates, classes, epochs, batch, weight_decay, momentum, norm, seed)
    test = test.to(train.device)
    train_labels, test_labels = (y.to(train.device, torch.int64) for y in (train_labels, test_labels))
    selected_on = ONE if len(rates) == 1 else TEST if select == "test" else HELD_OUT
    every = torch.arange(len(train), device=train.device)
    scores = _train(recipe, train, train_labels, every, test, test_labels, every_epoch=True)
    top1, top5 = scores[-1]
    judge = top1
    if selected_on == HELD_OUT:
        held = held_out(train_labels, seed)
        tenth = train[held], train_labels[held]
        judge = _train(recipe, train, train_labels, every[~held], *tenth, every_epoch=False)[-1, 0]
    chosen = int(judge.argmax())  # the first, so the lowest, of equals
    return LinearResult(
        top1=float(top1[chosen]),
        top5=float(top5[chosen]),
        lr=rates[chosen],
        per_lr=dict(zip(rates, top1.tolist(), strict=True)),
        selected_on=selected_on,
        best_epoch_top1=float(scores[:, 0].max()),
        epochs=epochs,
        batch=min(batch, len(train)),
        train_images=len(train),
        test_images=len(test),
        classes=classes,
    )


def held_out(labels: Tensor, seed: int) -> Tensor:
    """A seeded, stratified tenth of the labels (M,) as a mask (M,); UserError when nothing can be held out.

    Every tenth row of the set shuffled and then ordered by class, but never the first of a class: all stay in the rest.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    order = order[torch.sort(labels[order], stable=True).indices]
    eligible = order[1:][labels[order[1:]] == labels[order[:-1]]]
    chosen = eligible[4::10]
    if not len(chosen):
        reason = f"{len(labels)} train images are too few to hold out a tenth for choosing the learning rate"
        raise UserError(f'{reason}; give one learning rate, more images, or select="test"')
    return torch.zeros_like(labels, dtype=torch.bool).index_fill_(0, chosen, True)


def _check_settings(labels: Tensor, epochs: int, batch: int, lrs: Sequence[float], select: str, norm: str) -> None:
    if len(labels.unique()) < 2:
        raise UserError("the train images are all of one class; a linear probe needs at least two")
    if min(epochs, batch) < 1:
        raise UserError(f"epochs is {epochs} and batch is {batch}; both must be >= 1")
    if not lrs or not all(0 < lr < math.inf for lr in lrs):
        raise UserError(f"learning rates are {list(lrs)}; give at least one, each > 0 and finite")
    for name, value, allowed in (("select", select, ("held_out", "test")), ("norm", norm, ("none", "batch"))):
        if value not in allowed:
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _train(
    recipe: _Recipe, x: Tensor, y: Tensor, chosen: Tensor, eval_x: Tensor, eval_y: Tensor, *, every_epoch: bool
) -> Tensor:
    """Train all R rates on the chosen rows; top-1 and top-5 in percent on the evaluation images.

    -> (epochs or 1, 2, R) on the CPU.
    """
    generator = torch.Generator().manual_seed(recipe.seed)  # on the CPU, so that every device draws the same
    probe = _Probe(recipe, x if recipe.norm == "none" else x[chosen], generator)
    batch, scores = min(recipe.batch, len(chosen)), []
    for epoch in range(recipe.epochs):
        decay = batch / 256 * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
        for rows in chosen[torch.randperm(len(chosen), generator=generator).to(x.device)].split(batch):
            probe.step(x[rows], y[rows], decay)
        if every_epoch or epoch == recipe.epochs - 1:
            scores.append(probe.score(eval_x, eval_y))
    if not probe.weight.isfinite().all(0).view(len(recipe.lrs), -1).all(1).any():
        raise UserError(f'every learning rate of {list(recipe.lrs)} diverged; give lower ones or norm="batch"')
    return torch.stack(scores).cpu()


class _Probe:
    """R linear classifiers of C classes as one: weight (D, R * C), bias (R * C,), the class varying fastest.
    A step of all rates is two matrix products, and no column ever reads another rate's."""

    def __init__(self, recipe: _Recipe, x: Tensor, generator: torch.Generator):
        self.recipe = recipe
        self.norm = Tensor.float
        if recipe.norm == "batch":
            var, mean = torch.var_mean(x.float(), dim=0, correction=0)
            scale = (var + 1e-6).rsqrt()  # the epsilon of MAE's BatchNorm
            self.norm = lambda rows: (rows.float() - mean) * scale
        start = torch.randn(x.shape[1], recipe.classes, generator=generator) * 0.01
        self.weight = start.to(x.device).repeat(1, len(recipe.lrs))
        self.bias = self.weight.new_zeros(self.weight.shape[1])
        self.momenta = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.rates = self.weight.new_tensor(recipe.lrs).repeat_interleave(recipe.classes)

    def logits(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, R, C)."""
        return torch.addmm(self.bias, x, self.weight).view(len(x), -1, self.recipe.classes)

    def step(self, x: Tensor, y: Tensor, decay: float) -> None:
        """One SGD step on features (B, D) and labels (B,) at the rates times `decay`."""
        x = self.norm(x)
        # The gradient of the mean cross-entropy is (softmax - one-hot) / B, without autograd's bookkeeping.
        # Probabilities too small to move a float32 weight are dropped: denormal ones make the product 5 x slower.
        grad = F.threshold(self.logits(x).softmax(-1), 1e-20, 0.0)
        grad[torch.arange(len(x), device=x.device), :, y] -= 1
        grad = grad.div_(len(x)).flatten(1)
        self.momenta[0].addmm_(x.T, grad, beta=self.recipe.momentum)
        self.momenta[1].mul_(self.recipe.momentum).add_(grad.sum(0))
        for parameter, momentum in zip((self.weight, self.bias), self.momenta, strict=True):
            if self.recipe.weight_decay:
                momentum.add_(parameter, alpha=self.recipe.weight_decay)
            parameter.addcmul_(momentum, self.rates * decay, value=-1)

    def score(self, x: Tensor, y: Tensor) -> Tensor:
        """Top-1 and top-5 (of min(5, C) classes) in percent of every rate, (2, R) float64."""
        right = torch.zeros(2, len(self.recipe.lrs), dtype=torch.float64, device=x.device)
        size = max(1, 2**23 // len(self.bias))  # tens of MB of logits at a time
        for rows, labels in zip(x.split(size), y.split(size), strict=True):
            rank = label_rank(self.logits(self.norm(rows)), labels)
            right += torch.stack([(rank < 1).sum(0), (rank < min(5, self.recipe.classes)).sum(0)])
        return right * (100 / len(x))
