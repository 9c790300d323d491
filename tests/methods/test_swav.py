"""SwAV: the equations as loops, and the numbers of the authors' code (facebookresearch/swav)."""

import pytest
import torch
from toy import ToyEncoder, assert_all_close, grads, group, layer, load, view

from conftest import random_views, tiny_encoder
from triptych.data.views import Views
from triptych.methods import SwAVConfig, build
from triptych.methods.swav import SwAV
from triptych.optim import OptimConfig, make_optimizer, set_rates
from triptych.prototype_loss import sinkhorn_center
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

SMALL = SwAVConfig(hidden=12, embedding=5, prototypes=7)


def sinkhorn_loops(scores, epsilon, iterations):
    B, K = scores.shape
    Q = [[float(torch.exp(scores[b, k] / epsilon)) for k in range(K)] for b in range(B)]
    for _ in range(iterations):
        columns = [sum(Q[b][k] for b in range(B)) for k in range(K)]
        Q = [[Q[b][k] / columns[k] / K for k in range(K)] for b in range(B)]
        Q = [[q / sum(row) / B for q in row] for row in Q]
    return torch.tensor([[q * B for q in row] for row in Q], dtype=torch.float64)


def test_the_loss_is_equation_1_written_as_loops():
    torch.manual_seed(0)
    method, views = build(tiny_encoder(TokenSpec()), SMALL).double(), random_views(3)
    with torch.no_grad():
        tokens = torch.cat([method.student.encoder(v.images).cls for v in views.all])
        z = method.student.projector(tokens).view(4, 3, 5)  # BatchNorm's batch: all views of all images
        u, w = z / z.norm(dim=-1, keepdim=True), method.student.prototypes.weight
        loss = 0.0
        for i in range(2):
            code = sinkhorn_loops(u[i] @ w.T, 0.05, 3)
            for v in range(4):
                if v != i:
                    p = torch.softmax(u[v] @ w.T / 0.1, -1)
                    loss -= sum(code[b, k] * torch.log(p[b, k]) for b in range(3) for k in range(7)) / (3 * 3 * 2)
    torch.testing.assert_close(method(views, Progress(0, 10)).loss, loss, rtol=0, atol=1e-12)


def codes_of(scores, epsilon, iterations):
    eye = torch.eye(scores.shape[1], dtype=scores.dtype)  # prototypes: embeddings are then the scores
    return ((scores - sinkhorn_center(scores, eye, epsilon, iterations)) / epsilon).softmax(-1)


def test_codes_equal_the_authors(golden):
    g = golden("swav_sinkhorn")
    for iterations in (1, 3, 10):
        codes = codes_of(g["scores"], float(g["cfg.epsilon"]), iterations)
        torch.testing.assert_close(codes, g[f"codes_iter{iterations}"], rtol=0, atol=1e-12)


def test_with_enough_iterations_rows_sum_to_one_and_prototypes_are_used_alike():
    codes = codes_of(torch.randn(12, 4, dtype=torch.float64), 0.5, 200)
    torch.testing.assert_close(codes.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64))


def name(golden_name: str) -> str:
    part, leaf = golden_name.split(".")
    if part == "enc":
        return f"student.encoder.body.{ {'w': 'weight', 'b': 'bias'}[leaf] }"
    return "student.prototypes.weight" if part == "proto" else f"student.projector.{layer(golden_name)}"


@pytest.mark.parametrize("queue", [0, 8])
def test_training_steps_equal_the_authors(golden, queue):
    """Losses, codes, gradients, SGD, prototypes of unit length that wait for one step, BatchNorm, the queue."""
    g = golden("swav_train_queue" if queue else "swav_train_noqueue")
    config = SMALL.model_copy(
        update={
            "temperature": float(g["cfg.temperature"]),
            "epsilon": float(g["cfg.epsilon"]),
            "iterations": int(g["cfg.iterations"]),
            "freeze_prototypes": float(g["cfg.freeze_iters"]),  # an epoch is one step here
            "queue": queue,
            "queue_start": 0,
        }
    )
    method = SwAV(ToyEncoder(6, 10), config).double()
    load(method, {"queue": method.queue, "queued": method.queued, **group(g, "state0.", name)})
    with torch.no_grad():  # the authors do it at the start of every step
        w = method.student.prototypes.weight
        w.div_(w.norm(dim=1, keepdim=True))
    momentum, decay = g["cfg.sgd"].tolist()
    optimizer = make_optimizer(method, OptimConfig(kind="sgd", momentum=momentum, decay="all"))
    codes = []

    def balance(u, view):
        center = SwAV.balance(method, u, view)
        codes.append(((u @ method.student.prototypes.weight.T - center) / config.epsilon).softmax(-1))
        return center

    method.balance = balance
    steps = 4 if queue else 3
    for i in range(steps):
        t = Progress(i, steps)
        torch.testing.assert_close(method.student.prototypes.weight, g[f"step{i}.proto_used"], rtol=0, atol=1e-9)
        crops = [view(g[f"step{i}.in.crop{v}"]) for v in range(4)]
        out = method(Views(crops[:2], crops[2:]), t)
        torch.testing.assert_close(out.loss, g[f"step{i}.out.loss"], rtol=0, atol=1e-9)
        for v in (0, 1):
            full = g[f"step{i}.codes{v}_full"]  # the queue's rows, then the batch's
            assert len(full) == (12 if queue and i >= 2 else 4)
            torch.testing.assert_close(codes[-2 + v], full[-4:], rtol=0, atol=1e-9)
        out.loss.backward()
        method.after_backward(t)
        expected = group(g, f"step{i}.grad_used.", name)
        assert expected.keys() == grads(method).keys()
        assert ("student.prototypes.weight" in expected) == (i > 0)
        assert_all_close(grads(method), expected, 1e-9, f"gradient {i}")
        set_rates(optimizer, float(g["lr"][i]), decay)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert_all_close(method.state_dict(), group(g, f"step{i}.state_after.", name), 1e-9, f"state {i}")
        method.update([out.carry], t)
        if queue:
            torch.testing.assert_close(method.queue, g[f"step{i}.queue_after"], rtol=0, atol=1e-9)


def test_the_queue_begins_at_its_epoch_and_helps_once_it_is_full():
    config = SMALL.model_copy(update={"queue": 6, "queue_start": 1.0})
    method, per_epoch = build(tiny_encoder(TokenSpec()), config).double(), 2
    filled, helps = [], []
    for step in range(5):
        t, views = Progress(step, 20, per_epoch), random_views(3, seed=step)
        out = method(views, t)
        filled.append(int(method.queue.any(-1)[0].sum()))
        kept, method.queue = method.queue, torch.zeros_like(method.queue)
        helps.append(not torch.equal(method(views, t).loss, out.loss))  # does anything change without its content?
        method.queue = kept
        method.update([out.carry], t)
    assert filled == [0, 0, 0, 3, 6]
    assert helps == [False, False, False, False, True]


def test_accumulated_batches_enter_the_queue_together_newest_first():
    config = SMALL.model_copy(update={"queue": 6, "queue_start": 0})
    method = build(tiny_encoder(TokenSpec()), config).double()
    parts = [method(random_views(2, seed=i), Progress(0, 9)).carry for i in (0, 1)]
    method.update(parts, Progress(0, 9))
    assert torch.equal(method.queue[:, :4], torch.cat([p["u_t"] for p in parts], 1))
    assert int(method.queued) == 4
