"""MoCo v3: the equations as loops, and the numbers of the authors' code (facebookresearch/moco-v3 c349e6e)."""

import pytest
import torch
from toy import ToyEncoder, assert_all_close, grads, group, layer, load, view

from conftest import random_views, tiny_encoder
from triptych.data.views import Views
from triptych.losses import contrast, gathered_keys
from triptych.methods import MoCoV3Config, build
from triptych.methods.mocov3 import MoCoV3
from triptych.optim import OptimConfig, make_optimizer, set_rates
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

SMALL = MoCoV3Config(hidden=16, embedding=6)


def test_the_loss_is_algorithm_1_written_as_loops():
    torch.manual_seed(0)
    method, views, t = build(tiny_encoder(TokenSpec()), SMALL).double(), random_views(3), Progress(0, 10)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
        q = [
            method.predictor(method.student.projector(method.student.encoder(v.images).cls)) for v in views.global_crops
        ]
        k = [method.teacher.projector(method.teacher.encoder(v.images).cls) for v in views.global_crops]
    loss = 0.0
    for a, b in ((0, 1), (1, 0)):
        for i in range(3):
            exps = [torch.exp(q[a][i] @ k[b][j] / (q[a][i].norm() * k[b][j].norm()) / 0.2) for j in range(3)]
            loss -= 2 * 0.2 * torch.log(exps[i] / sum(exps)) / 3
    torch.testing.assert_close(method(views, t).loss, loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_contrastive_loss_and_gradient_equal_the_authors(golden, case):
    g = golden("mocov3_loss")
    tau = float(g["cfg.temperature"])
    q = g[f"{case}.q"].clone().requires_grad_()
    loss = 2 * tau * contrast(q, gathered_keys(g[f"{case}.k"][None])[0], tau)
    loss.backward()
    torch.testing.assert_close(loss, g[f"{case}.loss"], rtol=0, atol=1e-12)
    torch.testing.assert_close(q.grad, g[f"{case}.grad.q"], rtol=0, atol=1e-12)


def name(golden_name: str) -> str:
    """'online.proj.fc0.w', 'target.body.w', 'pred.bn1.running_var' -> the name in our method."""
    role, rest = golden_name.split(".", 1)
    if role == "pred":
        return f"predictor.{layer(rest)}"
    tower = {"online": "student", "target": "teacher"}[role]
    part, rest = rest.split(".", 1)
    if part == "body":
        return f"{tower}.encoder.body.{ {'w': 'weight', 'b': 'bias'}[rest] }"
    return f"{tower}.projector.{layer(rest)}"


def test_three_training_steps_equal_the_authors(golden):
    """Losses, gradients, AdamW with every parameter decayed, EMA, BatchNorm's statistics per view."""
    g = golden("mocov3_train")
    config = MoCoV3Config(hidden=16, embedding=6, temperature=float(g["cfg.temperature"]))
    method = MoCoV3(ToyEncoder(10, 12), config).double()
    load(method, group(g, "state0.", name))
    optimizer = make_optimizer(method, OptimConfig(decay="all"))
    # The authors move the teacher before they compute the keys: our update after a step is the next one's.  Nothing
    # comes before the very first, which moves nothing: both networks start alike.
    momenta = [float(g[f"step{i}.ema"]) for i in range(3)]
    for name_s, value in method.student.state_dict().items():
        assert torch.equal(value, method.teacher.state_dict()[name_s])
    method.momentum = lambda t: momenta[min(t.step + 1, 2)]
    for i in range(3):
        t = Progress(i, 3)
        out = method(Views([view(g[f"step{i}.in.x{v}"]) for v in (1, 2)], []), t)
        torch.testing.assert_close(out.loss, g[f"step{i}.out.loss"], rtol=0, atol=1e-9)
        out.loss.backward()
        expected = group(g, f"step{i}.grad.", name)
        assert expected.keys() == grads(method).keys()
        assert_all_close(grads(method), expected, 1e-9, f"gradient {i}")
        set_rates(optimizer, *g["cfg.adamw"].tolist())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert_all_close(method.state_dict(), group(g, f"step{i}.state_after.", name), 1e-9, f"state {i}")
        method.update([out.carry], t)


def test_the_update_after_a_step_has_the_next_steps_momentum(golden):
    """The authors': moved before the keys of the step at this (fractional) epoch."""
    g = golden("mocov3_schedules")
    config, epochs = SMALL.model_copy(update={"teacher_momentum": float(g["cfg.ema0"])}), int(g["cfg.epochs"])
    method = MoCoV3(ToyEncoder(2, 2), config)
    for epoch, momentum in zip(g["epoch"].tolist(), g["ema"].tolist(), strict=True):
        if epoch:
            before = Progress(round(epoch * 100) - 1, epochs * 100, 100)
            assert method.momentum(before) == pytest.approx(momentum, abs=1e-12)
