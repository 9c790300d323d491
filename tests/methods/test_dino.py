"""DINO: the equations as loops, and the numbers of the authors' code (facebookresearch/dino 7c446df)."""

import pytest
import torch

from conftest import random_views, timm_name, tiny_encoder
from triptych.data.views import View, Views
from triptych.heads import MLP, Prototypes
from triptych.methods import DINOConfig, build
from triptych.optim import OptimConfig, clip_gradients, make_optimizer, parameter_groups, set_rates
from triptych.prototype_loss import other_views, prototype_cross_entropy
from triptych.schedules import Progress, cosine, epoch_warmup, warmup_cosine
from triptych.tokens import TokenSpec

SMALL = DINOConfig(hidden=16, embedding=6, prototypes=20, teacher_temp_warmup=0, teacher_temp=0.04)


def make(config=SMALL, **options):
    torch.manual_seed(0)
    return build(tiny_encoder(TokenSpec(), **options), config).double()


def test_the_loss_is_equation_3_written_as_loops():
    method, views, t = make(), random_views(3), Progress(0, 10)
    method.center.uniform_(-0.3, 0.3)
    S, T = method.encode(views, t, patches=True)
    z_s, z_t = method.student.project(S), method.teacher.project(T)
    g_s, g_t = method.student.prototypes(z_s), method.teacher.prototypes(z_t)
    pairs = []
    for v in range(2):
        for s in range(4):
            if s != v:
                for b in range(3):
                    P_t = torch.softmax((g_t[v, b] - method.center) / 0.04, -1)
                    P_s = torch.softmax(g_s[s, b] / 0.1, -1)
                    pairs.append(sum(-P_t[k] * torch.log(P_s[k]) for k in range(20)))
    torch.testing.assert_close(method.global_loss(z_s, z_t, t).loss, torch.stack(pairs).mean())


def test_loss_gradient_and_centre_equal_the_authors(golden):
    g = golden("dino_loss")
    K, batch, crops = 9, 3, 4
    method = build(tiny_encoder(TokenSpec()), DINOConfig(hidden=4, embedding=K, prototypes=K)).double()
    with torch.no_grad():  # prototypes = identity: embeddings are then the golden logits
        for tower in (method.student, method.teacher):
            tower.prototypes.direction.copy_(torch.eye(K))
    eye = torch.eye(K, dtype=torch.float64)
    temperature = epoch_warmup(float(g["cfg.teacher_temp_warm"]), float(g["cfg.teacher_temp_final"]), 3)
    for epoch in range(6):
        assert temperature(Progress(epoch, 6)) == pytest.approx(float(g["teacher_temp_per_epoch"][epoch]), abs=1e-15)
    for i in range(4):
        step = {k.split(".", 1)[1]: v for k, v in g.items() if k.startswith(f"step{i}.")}
        logits = step["in.student_logits"].clone().requires_grad_()
        teacher = step["in.teacher_logits"].view(2, batch, K)
        loss = prototype_cross_entropy(
            logits.view(crops, batch, K),
            eye,
            teacher,
            eye,
            center=step["center_before"][0],
            student_temp=0.1,
            teacher_temp=temperature(Progress(int(step["epoch"]), 6)),
            weight=other_views(2, crops, batch, like=logits),
        )
        loss.backward()
        torch.testing.assert_close(loss, step["out.loss"], rtol=0, atol=1e-12)
        torch.testing.assert_close(logits.grad, step["grad.student_logits"], rtol=0, atol=1e-12)
        method.center.copy_(step["center_before"][0])
        method.update([{"u_t": teacher.mean((0, 1))}], Progress(0, 6))
        torch.testing.assert_close(method.center[None], step["center_after"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["plain", "bn_free_gain"])
def test_head_output_and_gradients_equal_the_authors(golden, case):
    g = {k.removeprefix(f"{case}."): v for k, v in golden("dino_head").items() if k.startswith(f"{case}.")}
    norm = case != "plain"
    head = torch.nn.Sequential(MLP(12, 16, 16, 6, norm=norm), Prototypes(6, 20, train_gain=norm)).double()
    names = {"fc0": "0.0", "fc1": "0.3" if norm else "0.2", "fc2": "0.6" if norm else "0.4", "bn0": "0.1", "bn1": "0.4"}
    leaves = {"w": "weight", "b": "bias", "v": "direction", "g": "gain"}

    def ours(name: str) -> str:
        part, leaf = name.split(".")
        return f"{names.get(part, '1')}.{leaves.get(leaf, leaf)}"

    head.load_state_dict({ours(k.removeprefix("param.")): v for k, v in g.items() if k.startswith("param.")})
    x = g["in.x"].clone().requires_grad_()
    y = head(x)
    y.backward(g["in.cotangent"])
    torch.testing.assert_close(y, g["out.y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=0, atol=1e-12)
    parameters = dict(head.named_parameters())
    for name, value in g.items():
        if name.startswith("grad.") and name != "grad.x":
            torch.testing.assert_close(parameters[ours(name[5:])].grad, value, rtol=0, atol=1e-11)
        if name.startswith("after."):
            torch.testing.assert_close(head.state_dict()[ours(name[6:])], value, rtol=0, atol=1e-12)


def test_schedules_equal_the_authors_tables(golden):
    g = golden("dino_schedules")
    for name in ("lr", "wd", "ema"):
        base, final, epochs, per_epoch, warm = g[f"cfg.{name}"].tolist()
        total = int(epochs * per_epoch)
        schedule = warmup_cosine(base, final, warm) if warm else cosine(base, final)
        ours = [schedule(Progress(i, total, int(per_epoch))) for i in range(total)]
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), g[name], rtol=0, atol=1e-15)
    temperature = epoch_warmup(0.04, 0.07, 30)
    ours = [temperature(Progress(e, 100)) for e in range(100)]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), g["teacher_temp_30of100"], rtol=0, atol=1e-15)


def ours_from_golden(name: str) -> str:
    """'enc.blocks.0.ln1.w' / 'head.fc0.w' / 'head.proto.g' -> the name in our tower."""
    part, rest = name.split(".", 1)
    if part == "enc":
        return f"encoder.vit.{timm_name(rest)}"
    layer, leaf = rest.split(".")
    if layer == "proto":
        return f"prototypes.{ {'v': 'direction', 'g': 'gain'}[leaf] }"
    return f"projector.{2 * int(layer[2:])}.{ {'w': 'weight', 'b': 'bias'}[leaf] }"


@pytest.mark.parametrize("case", ["freegain", "fixedgain"])
def test_six_training_steps_equal_the_authors(golden, case):
    """Losses, gradients, clipping, freezing, AdamW groups, EMA and centre over 3 epochs of 2 iterations."""
    g = golden(f"dino_train_{case}")
    config = SMALL.model_copy(update={"norm_last_layer": case == "fixedgain", "freeze_prototypes": 1.0})
    method = make(config, positions="dino")
    start = {ours_from_golden(k[9:]): v for k, v in g.items() if k.startswith("student0.")}
    for tower in (method.student, method.teacher):
        tower.load_state_dict(start)
    optimizer = make_optimizer(method, OptimConfig())
    names = {id(p): n for n, p in method.student.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in parameter_groups(method)]
    assert groups[0] == {ours_from_golden(n) for n in g["decayed"]}
    assert groups[1] == {ours_from_golden(n) for n in g["undecayed"]}
    temperatures = [float(x) for x in g["cfg.teacher_temp"]]
    method.teacher_temp = lambda t: temperatures[t.epoch]
    method.momentum = lambda t: float(g["ema"][t.step])
    for step in range(6):
        t = Progress(step, 6, 2)
        box, pixel = torch.tensor([[0.0, 0, 1, 1]]).expand(4, 4), torch.ones(4, 2)
        crops = [View(g[f"step{step}.in.crop{i}"].double(), box, pixel) for i in range(4)]
        out = method(Views(crops[:2], crops[2:]), t)
        torch.testing.assert_close(out.loss, g[f"step{step}.out.loss"], rtol=0, atol=1e-9)
        out.loss.backward()
        for name, p in method.student.named_parameters():
            expected = {ours_from_golden(k.split(".grad.")[1]): v for k, v in g.items() if f"step{step}.grad." in k}
            if name in expected:
                torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=1e-9, msg=name)
        set_rates(optimizer, float(g["lr"][step]), float(g["wd"][step]))
        clip_gradients(method.parameters(), float(g["cfg.clip"]))
        method.after_backward(t)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.update([out.carry], t)
        torch.testing.assert_close(method.center[None], g[f"step{step}.center_after"], rtol=0, atol=1e-9)
        for tower in ("student", "teacher"):
            state = getattr(method, tower).state_dict()
            prefix = f"step{step}.{tower}_after."
            for key in [k for k in g if k.startswith(prefix)]:
                ours = ours_from_golden(key.removeprefix(prefix))
                torch.testing.assert_close(state[ours], g[key], rtol=0, atol=1e-9, msg=f"{tower} {ours} at {step}")


def test_frozen_prototypes_neither_move_nor_decay():
    method, t = make(SMALL.model_copy(update={"freeze_prototypes": 1.0})), Progress(0, 10, 5)
    before = method.student.prototypes.direction.detach().clone()
    optimizer = make_optimizer(method, OptimConfig())
    method(random_views(3), t).loss.backward()
    method.after_backward(t)
    set_rates(optimizer, 0.1, 0.4)
    optimizer.step()
    assert torch.equal(method.student.prototypes.direction, before)
