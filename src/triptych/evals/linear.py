"""Linear probe on frozen features: a sweep of learning rates trained side by side (DINO's protocol, iBOT's sweep).

`linear_presets` has every paper's settings; `linear_augmented` trains on augmented images instead of stored features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.evals.knn import check_sets
from triptych.evals.linear_presets import LinearPreset, Norm, preset_of
from triptych.evals.probe import Probe
from triptych.progress import progress
from triptych.schedules import Progress

HELD_OUT, TEST, ONE = "held-out tenth of train", "test", "one rate, nothing to select"
PAPER, PAPER_RATES = "test: best epoch (the paper's way)", "test: best epoch and rate (the paper's way)"
Select = Literal["held_out", "test", "paper"]


@dataclass(frozen=True)
class LinearResult:
    """Accuracies in percent (0 to 100); rates as given, that is for batch 256 but for presets that do not scale them.

    top1, top5: test accuracy of the chosen rate `lr` after epoch `epoch` (1 = the first).  per_lr: test top-1 of every
    rate at the last epoch (0 for a rate that diverged).  best_epoch_top1: maximum over epochs and rates on the test
    images, the papers' habit and an optimistic number.  selected_on: what chose rate and epoch.  preset: its name, with
    "(changed)" where its settings are not the preset's.  augmentation: of the train images, "none" = stored features.
    batch: as used, at most train_images.
    """

    top1: float
    top5: float
    lr: float
    epoch: int
    per_lr: dict[float, float]
    selected_on: str
    best_epoch_top1: float
    preset: str
    optimiser: str
    norm: str
    augmentation: str
    epochs: int
    batch: int
    train_images: int
    test_images: int
    classes: int


@torch.no_grad()
def linear(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    preset: str | LinearPreset = "sweep",
    epochs: int | None = None,
    batch: int | None = None,
    lrs: Sequence[float] | None = None,
    norm: Norm | None = None,
    select: Select = "held_out",
    seed: int = 0,
) -> LinearResult:
    """Train a linear classifier on `train` (M, D) for every rate and report its accuracy on `test` (T, D).

    preset: whose head, optimiser, rates, schedule, batch and epochs, by name or as a value; "sweep" is SGD at eleven
    rates.  epochs, batch, lrs, norm: instead of the preset's.  Runs on the device of `train` in float32; a seed fixes
    the result.  norm "batch" standardises each feature with mean and variance of the train images, the frozen-feature
    equivalent of MAE's BatchNorm without affine.

    select "held_out" takes the rate that is best on a seeded, stratified tenth of the train images when trained on the
    others (the lowest of equals), then trains on all of them, and reports the last epoch; the test labels do not take
    part.  "test" takes the rate that is best on the test images after the last epoch.  "paper" reports what the
    preset's authors do: of most, the best of all epochs and rates on the test images.

    Labels are int64 ids >= 0.  Raises UserError for bad features or labels (as `knn`), fewer than two classes in train,
    epochs or batch < 1, no rate or one <= 0, unknown names, too few images to hold some out, all rates diverged.
    """
    classes = check_sets(train, train_labels, test, test_labels)
    chosen = changed(preset_of(preset), epochs=epochs, batch=batch, lrs=lrs, norm=norm)
    check_choice(train_labels, select)
    test = test.to(train.device)
    train_labels, test_labels = (y.to(train.device, torch.int64) for y in (train_labels, test_labels))
    every = torch.arange(len(train), device=train.device)
    scores = _train(chosen, train, train_labels, every, test, test_labels, classes, seed, every_epoch=True)
    judge = None
    if select == "held_out" and len(chosen.lrs) > 1:
        held = held_out(train_labels, seed)
        tenth = train[held], train_labels[held]
        judge = _train(chosen, train, train_labels, every[~held], *tenth, classes, seed, every_epoch=False)[-1, 0]
    return result_of(
        chosen,
        select,
        scores,
        judge,
        augmentation="none",
        batch=min(chosen.batch, len(train)),
        train_images=len(train),
        test_images=len(test),
        classes=classes,
    )


def changed(preset: LinearPreset, **settings: Any) -> LinearPreset:
    """The preset with those settings that are not None, named so where they differ from its own."""
    new = replace(preset, **{name: value for name, value in settings.items() if value is not None})
    return preset if new == preset else replace(new, name=f"{preset.name} (changed)")


def check_choice(labels: Tensor, select: str) -> None:
    """Raises UserError for train labels of one class, or an unknown way to select."""
    if len(labels.unique()) < 2:
        raise UserError("the train images are all of one class; a linear probe needs at least two")
    if select not in ("held_out", "test", "paper"):
        raise UserError(f"select is {select!r}; it must be one of held_out, test, paper")


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


def result_of(
    preset: LinearPreset, select: Select, scores: Tensor, judge: Tensor | None, **counts: Any
) -> LinearResult:
    """The rate and epoch to report.

    scores: (epochs, 2, R), test top-1 and top-5 in percent.  judge: (R,), accuracy of every rate on held-out images, or
    None where none are to be asked.  counts: the other fields of the result.
    """
    top1, several = scores[:, 0], len(preset.lrs) > 1
    epoch = len(scores) - 1
    if select == "paper" and preset.reported == "max":
        rate, epoch = divmod(int(top1.T.argmax()), len(scores))  # of equals the lowest rate, then the first epoch
        selected_on = PAPER_RATES if several else PAPER
    else:
        rate = int((top1[-1] if judge is None else judge).argmax())
        selected_on = ONE if not several else TEST if judge is None else HELD_OUT
    return LinearResult(
        top1=float(scores[epoch, 0, rate]),
        top5=float(scores[epoch, 1, rate]),
        lr=preset.lrs[rate],
        epoch=epoch + 1,
        per_lr=dict(zip(preset.lrs, top1[-1].tolist(), strict=True)),
        selected_on=selected_on,
        best_epoch_top1=float(top1.max()),
        preset=preset.name,
        optimiser=preset.optimiser,
        norm=preset.norm,
        epochs=preset.epochs,
        **counts,
    )


def _train(
    preset: LinearPreset,
    x: Tensor,
    y: Tensor,
    chosen: Tensor,
    eval_x: Tensor,
    eval_y: Tensor,
    classes: int,
    seed: int,
    *,
    every_epoch: bool,
) -> Tensor:
    """Train all R rates on the chosen rows; top-1 and top-5 in percent on the evaluation images.

    -> (epochs or 1, 2, R) on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    probe = Probe(preset, x.shape[1], classes, generator, x.device)
    probe.fix_statistics(x if preset.norm != "batch" else x[chosen])
    batch, scores = min(preset.batch, len(chosen)), []
    schedule, steps = preset.schedule, -(-len(chosen) // batch)
    for epoch in progress(range(preset.epochs), "linear probe, epoch", preset.epochs):
        rows = chosen[torch.randperm(len(chosen), generator=generator).to(x.device)].split(batch)
        for step, part in enumerate(rows, epoch * steps):
            factor = schedule(Progress(step, preset.epochs * steps, steps))
            probe.step(x.index_select(0, part), y[part], preset.scale(batch) * factor)
        if every_epoch or epoch == preset.epochs - 1:
            scores.append(probe.score(eval_x, eval_y))
    probe.check()
    return torch.stack(scores).cpu()
