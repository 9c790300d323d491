"""MoBY: the equations as loops, and the numbers of the authors' code (SwinTransformer/Transformer-SSL 4510de1)."""

import pytest
import torch
from toy import ToyEncoder, assert_all_close, grads, group, layer, load, view

from conftest import random_views, tiny_encoder
from triptych.data.views import Views
from triptych.heads import MLP
from triptych.methods import MoBYConfig, build
from triptych.methods.moby import MoBY
from triptych.optim import OptimConfig, make_optimizer, set_rates
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

SMALL = MoBYConfig(hidden=16, embedding=6, queue=7)


def test_the_loss_is_the_equation_written_as_loops():
    """Negatives are the queue's keys alone: no other image of the batch is one."""
    torch.manual_seed(0)
    method, views = build(tiny_encoder(TokenSpec()), SMALL).double(), random_views(3)
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
            unit_q, unit_k = q[a][i] / q[a][i].norm(), k[b][i] / k[b][i].norm()
            own = torch.exp(unit_q @ unit_k / 0.2)
            others = sum(torch.exp(unit_q @ method.queue[b][j] / 0.2) for j in range(7))
            loss -= torch.log(own / (own + others)) / 3
    torch.testing.assert_close(method(views, Progress(0, 10)).loss, loss, rtol=0, atol=1e-12)


def test_new_keys_replace_the_oldest_and_wrap_around():
    method = MoBY(ToyEncoder(2, 2), SMALL.model_copy(update={"embedding": 1}))
    method.queue.zero_()
    now = torch.arange(1.0, 13.0).view(3, 1, 4, 1).expand(3, 2, 4, 1)  # keys 1..12, four a step
    method.update([{"keys": now[0]}], Progress(0, 9))
    assert method.queue[..., 0].tolist() == [[1, 2, 3, 4, 0, 0, 0]] * 2
    method.update([{"keys": now[1]}], Progress(1, 9))
    assert method.queue[..., 0].tolist() == [[8, 2, 3, 4, 5, 6, 7]] * 2
    method.update([{"keys": now[2, :, :2]}, {"keys": now[2, :, 2:]}], Progress(2, 9))  # two accumulated batches
    assert method.queue[..., 0].tolist() == [[8, 9, 10, 11, 12, 6, 7]] * 2


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_heads_equal_the_authors(golden, layers):
    g = {
        k.removeprefix(f"layers{layers}."): v
        for k, v in golden("moby_heads").items()
        if k.startswith(f"layers{layers}")
    }
    head = MLP(6, *[9] * (layers - 1), 5, activation="relu", norm=True, init="torch").double()
    names = {"fc0": 0, "bn0": 1, "fc1h": 3, "bn1": 4, "fc_out": 3 * (layers - 1)}
    leaves = {"w": "weight", "b": "bias"}

    def ours(name: str) -> str:
        part, leaf = name.split(".")
        return f"{names[part]}.{leaves[leaf]}"

    load(head, group(g, "param.", ours))
    x = g["in.x"].clone().requires_grad_()
    y = head(x)
    torch.testing.assert_close(y, g["out.y"], rtol=0, atol=1e-12)
    y.backward(g["in.cotangent"])
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=0, atol=1e-12)


def name(golden_name: str) -> str:
    """'online.proj.fc0.w', 'target.enc.body.w', 'pred.fc_out.b' -> the name in our method."""
    role, rest = golden_name.split(".", 1)
    if role == "pred":
        return f"predictor.{layer(rest)}"
    tower = {"online": "student", "target": "teacher"}[role]
    part, rest = rest.split(".", 1)
    if part == "enc":
        return f"{tower}.encoder.body.{ {'w': 'weight', 'b': 'bias'}[rest.split('.')[1]] }"
    return f"{tower}.projector.{layer(rest)}"


def test_five_training_steps_equal_the_authors(golden):
    """Losses, gradients, AdamW, EMA by its own schedule, both queues and the place of their next key."""
    g = golden("moby_train")
    temperature, length, start = float(g["cfg.temperature"]), int(g["cfg.queue_length"]), float(g["cfg.base_ema"])
    config = MoBYConfig(hidden=16, embedding=8, queue=length, temperature=temperature, teacher_momentum=start)
    method = MoBY(ToyEncoder(10, 12), config).double()
    state = {k: v for k, v in g.items() if not k.startswith("state0.queue")}
    method.load_state_dict(group(state, "state0.", name), strict=False)
    for kept, value in method.student.state_dict().items():
        assert torch.equal(value, method.teacher.state_dict()[kept])  # so the authors' EMA before step 0 moves nothing
    method.queue.copy_(torch.stack([g["state0.queue1"].T, g["state0.queue2"].T]))
    optimizer = make_optimizer(method, OptimConfig(decay="all"))
    total = int(g["cfg.total_updates"])
    for i in range(5):
        t = Progress(i, total)
        if i:  # they move the teacher before a step's keys, we after the step before
            assert method.momentum(Progress(i - 1, total)) == pytest.approx(float(g[f"step{i}.ema"]), abs=1e-15)
        out = method(Views([view(g[f"step{i}.in.x{v}"]) for v in (1, 2)], []), t)
        torch.testing.assert_close(out.loss, g[f"step{i}.out.loss"], rtol=0, atol=1e-9)
        keys = torch.stack([g[f"step{i}.out.k{v}"] for v in (1, 2)])
        torch.testing.assert_close(out.carry["keys"], keys, rtol=0, atol=1e-9)
        out.loss.backward()
        if f"step{i}.grad.pred.fc0.w" in g:  # kept for the first and the last step
            expected = group(g, f"step{i}.grad.", name)
            assert expected.keys() == grads(method).keys()
            assert_all_close(grads(method), expected, 1e-9, f"gradient {i}")
        set_rates(optimizer, *g["cfg.adamw"].tolist())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if f"step{i}.state_after.pred.fc0.w" in g:
            expected = group(g, f"step{i}.state_after.", name)
            # Biases before BatchNorm have no gradient but round-off, which Adam makes steps of: they agree less well.
            idle = {k: expected.pop(k) for k in list(expected) if k.endswith(("projector.0.bias", "predictor.0.bias"))}
            assert_all_close(method.state_dict(), expected, 1e-9, f"state {i}")
            assert_all_close(method.state_dict(), idle, 1e-7, f"state {i}")
        method.update([out.carry], t)
        queues = torch.stack([g[f"step{i}.queue1_after"].T, g[f"step{i}.queue2_after"].T])
        torch.testing.assert_close(method.queue, queues, rtol=0, atol=1e-9)
        assert method.oldest == g[f"step{i}.queue_ptr_after"][0]
