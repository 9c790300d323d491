"""BYOL: the equations as loops, and the numbers of the authors' code (deepmind-research/byol f5de0ed, JAX)."""

import pytest
import torch
from toy import ToyEncoder, assert_all_close, grads, group, layer, load, view

from conftest import random_views, tiny_encoder
from triptych.data.views import Views
from triptych.methods import BYOLConfig, build
from triptych.methods.byol import BYOL
from triptych.optim import OptimConfig, make_optimizer, set_rates
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

SMALL = BYOLConfig(hidden=16, embedding=6)


def test_the_loss_is_equation_2_written_as_loops():
    torch.manual_seed(0)
    method, views = build(tiny_encoder(TokenSpec()), SMALL).double(), random_views(3)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
        q = [
            method.predictor(method.student.projector(method.student.encoder(v.images).cls)) for v in views.global_crops
        ]
        z = [method.teacher.projector(method.teacher.encoder(v.images).cls) for v in views.global_crops]
    loss = 0.0
    for a, b in ((0, 1), (1, 0)):
        for i in range(3):
            loss += (2 - 2 * (q[a][i] @ z[b][i]) / (q[a][i].norm() * z[b][i].norm())) / 3
    torch.testing.assert_close(method(views, Progress(0, 10)).loss, loss, rtol=0, atol=1e-12)


def test_the_loss_is_the_authors_regression_in_both_directions(golden):
    g, method = golden("byol_loss"), BYOL(ToyEncoder(2, 2), SMALL)
    p, z, t = g["p"].clone().requires_grad_(), g["z"], Progress(0, 1)
    both = method.global_loss(torch.stack([p, p]), torch.stack([z, z]), t).loss
    both.backward()
    torch.testing.assert_close(both / 2, g["mean"], rtol=0, atol=1e-12)
    torch.testing.assert_close(p.grad / 2, g["grad_p"], rtol=0, atol=1e-12)

    def per_row(p):
        pairs = [
            method.global_loss(torch.stack([a, a])[:, None], torch.stack([b, b])[:, None], t)
            for a, b in zip(p, z, strict=True)
        ]
        return torch.stack([step.loss for step in pairs]) / 2

    torch.testing.assert_close(per_row(g["p"]), g["per_row"], rtol=0, atol=1e-12)
    # A prediction of length 0 stays 0: it is 1 away from any target, with a finite gradient.
    torch.testing.assert_close(per_row(g["p_with_zero_row"]), g["per_row_zero"], rtol=0, atol=1e-12)
    p = g["p_with_zero_row"].clone().requires_grad_()
    method.global_loss(torch.stack([p, p]), torch.stack([z, z]), t).loss.backward()
    assert p.grad.isfinite().all()


def tower_name(golden_name: str) -> str | None:
    """'enc.w', 'proj.fc0.w' -> the name in our tower; the authors' unused predictor of the target has none."""
    part, rest = golden_name.split(".", 1)
    if part == "enc":
        return f"encoder.body.{ {'w': 'weight', 'b': 'bias'}[rest] }"
    return f"projector.{layer(rest)}" if part == "proj" else None


def online_name(golden_name: str) -> str:
    in_tower = tower_name(golden_name)
    return f"student.{in_tower}" if in_tower else f"predictor.{layer(golden_name.split('.', 1)[1])}"


def test_three_training_steps_equal_the_authors(golden):
    """Losses, gradients, LARS that leaves biases and BatchNorm alone, EMA after the step."""
    g = golden("byol_train")
    method = BYOL(ToyEncoder(10, 12), SMALL).double()
    load(method.teacher, group(g, "target0.", tower_name))
    method.load_state_dict(group(g, "online0.", online_name), strict=False)
    lr, decay, momentum, trust = g["cfg.lars"].tolist()
    optimizer = make_optimizer(method, OptimConfig(kind="lars", momentum=momentum, trust=trust))
    method.momentum = lambda t: float(g["cfg.tau"])
    for i in range(3):
        t = Progress(i, 3)
        out = method(Views([view(g[f"step{i}.in.x{v}"]) for v in (1, 2)], []), t)
        torch.testing.assert_close(out.loss, g[f"step{i}.out.loss"], rtol=0, atol=1e-9)
        out.loss.backward()
        expected = group(g, f"step{i}.grad.", online_name)
        assert expected.keys() == grads(method).keys()
        assert_all_close(grads(method), expected, 1e-9, f"gradient {i}")
        set_rates(optimizer, lr, decay)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.update([out.carry], t)
        assert_all_close(method.state_dict(), group(g, f"step{i}.online_after.", online_name), 1e-9, f"online {i}")
        target = group(g, f"step{i}.target_after.", tower_name)
        assert_all_close(method.teacher.state_dict(), target, 1e-9, f"target {i}")


def test_the_update_after_a_step_has_that_steps_momentum(golden):
    g = golden("byol_schedules")
    method = BYOL(ToyEncoder(2, 2), SMALL.model_copy(update={"teacher_momentum": float(g["cfg.ema0"])}))
    for step, momentum in zip(g["step"].tolist(), g["ema"].tolist(), strict=True):
        assert method.momentum(Progress(step, int(g["cfg.max_steps"]))) == pytest.approx(momentum, abs=1e-12)
