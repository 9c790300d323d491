"""The loop that trains heads: what it promises about resuming, mistakes and numbers that are not finite."""

import json
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from triptych import checkpoint
from triptych.data.images import UnreadableImage
from triptych.dense.feed import examples
from triptych.dense.fit import Fit, fit
from triptych.errors import NonFinite, UserError

CPU = torch.device("cpu")


class Line(nn.Module):
    """y = a x, with dropout so that randomness matters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.drop = nn.Linear(3, 1), nn.Dropout(0.5)

    def forward(self, batch):
        x, y = batch
        return {"squared": (self.linear(self.drop(x)) - y).square().mean(), "small": 0.01 * self.linear.weight.norm()}


def point(index, rng):
    x = torch.from_numpy(rng.normal(size=3)).float()
    return x, x.sum(0, keepdim=True) + index % 2


def stack(items):
    return [torch.stack(column) for column in zip(*items, strict=True)]


def feed(start, **options):
    return examples(point, 10, batch=4, seed=1, start=start, collate=stack, workers=0, **options)


def trained(out, steps=8, about=None, model=None, **settings):
    model = model or Line()
    given = {"lr": 0.05, "rate": lambda step: 1 - step / 8, "save_every": 3} | settings
    console = Console(quiet=True)
    about = {"lr": 0.05} if about is None else about
    fit(model, feed, Fit(steps=steps, **given), out=out, about=about, seed=1, device=CPU, console=console)
    return model


def test_stopped_and_gone_on_with_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole")
    from triptych.errors import Interrupted

    calls = iter(range(100))
    monkeypatch.setattr("triptych.distributed.any_process", lambda flag, device: next(calls) == 4)
    with pytest.raises(Interrupted):
        trained(tmp_path / "parts")
    assert checkpoint.steps(tmp_path / "parts" / "checkpoints") == [5]
    monkeypatch.undo()
    parts = trained(tmp_path / "parts")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(8))
    again = trained(tmp_path / "parts")  # finished: the weights come back, nothing is trained
    assert torch.equal(again.linear.weight, parts.linear.weight)


def test_the_sum_of_the_losses_falls_and_each_is_written_down(tmp_path):
    trained(tmp_path / "run", steps=60, lr=0.1, rate=lambda step: 1.0)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["loss"] == pytest.approx(row["squared"] + row["small"], rel=1e-5)
    assert np.mean([row["loss"] for row in rows[-10:]]) < 0.7 * np.mean([row["loss"] for row in rows[:5]])


def test_a_folder_of_another_training_is_refused_and_left_alone(tmp_path):
    trained(tmp_path / "run", steps=2)
    with pytest.raises(UserError, match=r"lr: 0.05 there, 0.1 now"):
        trained(tmp_path / "run", steps=2, about={"lr": 0.1})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no training"):
        trained(tmp_path / "other")


def test_a_loss_that_is_not_finite_is_named_and_never_saved(tmp_path):
    class Bad(Line):
        def forward(self, batch):
            losses = super().forward(batch)
            return losses | {"broken": losses["squared"] * float("nan")}

    with pytest.raises(NonFinite, match=r"'broken' is nan at step 0; nothing was saved"):
        trained(tmp_path / "run", model=Bad())


class Root(Line):
    """Finite losses; at step 3 the gradient of √0 is not."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, batch):
        self.calls += 1
        return {"root": (self.linear.weight * (self.calls != 4)).square().sum().sqrt()}


@pytest.mark.parametrize("steps", [4, 6])
def test_weights_that_are_not_finite_are_never_saved_and_the_last_good_ones_are_kept(tmp_path, steps):
    with pytest.raises(NonFinite, match="weights are not finite after step 4; the checkpoint of step 2 is kept"):
        trained(tmp_path / "run", steps=steps, model=Root(), save_every=2)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]


def test_a_training_that_failed_before_its_first_checkpoint_may_be_begun_anew(tmp_path):
    class Bad(Line):
        def forward(self, batch):
            raise UserError("too small")

    with pytest.raises(UserError, match="too small"):
        trained(tmp_path / "run", model=Bad(), about={"size": 1})
    trained(tmp_path / "run", steps=2, about={"size": 2})


def test_frozen_parameters_stay_as_they_are(tmp_path):
    model = Line()
    model.linear.bias.requires_grad_(False)
    before = model.linear.bias.clone()
    assert torch.equal(trained(tmp_path / "run", model=model).linear.bias, before)


def test_batches_from_a_later_step_are_those_of_an_unbroken_feed():
    whole = list(islice(feed(0), 7))
    late = list(islice(feed(4), 3))
    for (a, _), (b, _) in zip(whole[4:], late, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def unreadable_third(index, rng, broken=(3,)):
    if index in broken:
        raise UnreadableImage(str(index), "broken")
    return torch.tensor(index)


def test_an_image_that_cannot_be_read_is_replaced_and_none_at_all_is_an_error():
    seen = list(islice(examples(unreadable_third, 8, batch=4, seed=0, collate=torch.stack, workers=0), 6))
    assert 3 not in torch.cat([batch for batch, _ in seen]).tolist()
    assert [said.split(":")[0] for _, reasons in seen for said in reasons] == ["3"] * 3  # once in each epoch
    every = partial(unreadable_third, broken=tuple(range(8)))
    with pytest.raises(UserError, match="in a row cannot be read"):
        next(examples(every, 8, batch=4, seed=0, collate=torch.stack, workers=0))


def test_a_batch_larger_than_the_set_is_an_error():
    with pytest.raises(UserError, match="has 10 images, fewer"):
        examples(point, 10, batch=11, seed=0, collate=stack, workers=0)
