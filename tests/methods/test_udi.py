"""UDI: the equations as loops, and the numbers of the authors' code (ISL-CV/udi 133c2cb)."""

import numpy as np
import pytest
import torch

import triptych.methods.udi as udi_module
from conftest import random_views, timm_name, tiny_encoder
from triptych.data.views import View, Views, between
from triptych.heads import MLP, Prototypes
from triptych.losses import unit
from triptych.methods import UDIConfig, build
from triptych.methods.udi import CLASS, PATCH, PLUS, SRS, UDI
from triptych.optim import OptimConfig, clip_gradients, make_optimizer, parameter_groups, set_rates
from triptych.schedules import Progress

SMALL = UDIConfig(hidden=16, embedding=8, prototypes=20, teacher_temp_warmup=0, teacher_temp=0.04, window_global=2)
T0 = Progress(0, 10, 1)


def make(config=SMALL, **options):
    torch.manual_seed(0)
    method = build(tiny_encoder(UDI.token_spec(UDIConfig()), **options), config).double()
    method.center.copy_(torch.randn(3, config.prototypes) * 0.1)
    return method


def test_head_output_and_gradients_equal_the_authors(golden):
    g = golden("udi_head")
    head = torch.nn.Sequential(MLP(12, 16, 16, 8), Prototypes(8, 20, train_gain=True)).double()
    names = {"fc1.w": "0.0.weight", "fc1.b": "0.0.bias", "fc2.w": "0.2.weight", "fc2.b": "0.2.bias"}
    names |= {"fc3.w": "0.4.weight", "fc3.b": "0.4.bias", "proto.g": "1.gain", "proto.v": "1.direction"}
    head.load_state_dict({ours: g[f"param.{theirs}"] for theirs, ours in names.items()})
    x = g["in.x"].clone().requires_grad_()
    y = head(x)
    y.backward(g["in.cotangent"])
    torch.testing.assert_close(y, g["out.y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=0, atol=1e-12)
    for theirs, ours in names.items():
        torch.testing.assert_close(dict(head.named_parameters())[ours].grad, g[f"grad.{theirs}"], rtol=0, atol=1e-11)


SRS_NAMES = {"ln_in": "norm_in", "ln_out": "norm_out", "qkv": "qkv", "out": "out"}


def srs_name(theirs: str) -> str:
    part, leaf = theirs.split(".")
    return f"{SRS_NAMES[part]}.{ {'w': 'weight', 'b': 'bias'}[leaf] }"


@pytest.mark.parametrize("case", ["student", "teacher_global", "teacher_local"])
def test_sampled_attention_equals_the_authors(golden, case):
    g = golden("udi_srs")
    srs = SRS(12, int(g["in.heads"])).double()
    srs.load_state_dict({srs_name(k[6:]): v for k, v in g.items() if k.startswith("param.")})
    tokens = g["in.tokens"].clone().requires_grad_()
    maps = g[f"{case}.map"]  # (sets, B, M, N): ours takes the sets side by side along M
    sets, _, m, _ = maps.shape
    out = srs(tokens, maps.transpose(0, 1).flatten(1, 2)).unflatten(1, (sets, m)).transpose(0, 1)
    torch.testing.assert_close(out, g[f"{case}.out"], rtol=0, atol=1e-12)
    out.backward(g[f"{case}.cotangent"])
    torch.testing.assert_close(tokens.grad, g[f"{case}.grad.tokens"], rtol=0, atol=1e-11)
    for name in SRS_NAMES:
        for leaf in "wb":
            ours = dict(srs.named_parameters())[srs_name(f"{name}.{leaf}")]
            torch.testing.assert_close(ours.grad, g[f"{case}.grad.{name}.{leaf}"], rtol=0, atol=1e-11)


def logits_method(K: int, config: dict) -> UDI:
    """A UDI whose prototypes are the identity, so that embeddings are the golden logits."""
    method = build(
        tiny_encoder(UDI.token_spec(UDIConfig())), UDIConfig(hidden=4, embedding=K, prototypes=K, **config)
    ).double()
    with torch.no_grad():
        for tower in (method.student, method.teacher):
            tower.prototypes.direction.copy_(torch.eye(K))
    return method


CASES = ["main.step0", "main.step1", "zero_center.step0", "alpha03_weights.step0", "local_patch.step0"]


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_centres_equal_the_authors(golden, case):
    g, group = golden("udi_loss"), case.split(".")[0]
    step = {k.removeprefix(f"{case}."): v for k, v in g.items() if k.startswith(f"{case}.")}
    cfg = {k.removeprefix(f"{group}.cfg."): v for k, v in g.items() if k.startswith(f"{group}.cfg.")}
    w, B, L, K = cfg["weights"].tolist(), 3, int(cfg["n_local"]), 24
    local_patch = "in.student.local.patch" in step
    method = logits_method(K, {"alpha": float(cfg["alpha"]), "weights": tuple(w), "local_patch": local_patch})
    method.center.copy_(step["center_before"])
    method.teacher_temp = lambda t: float(step["teacher_temp"])
    s = {k[11:]: v.clone().requires_grad_() for k, v in step.items() if k.startswith("in.student.")}

    def cross(x):  # teacher rows come as [view 1, view 0], beside the student's [view 0, view 1]
        return x.unflatten(-3, (2, B)).flip(-4).flatten(-4, -3) if x.dim() > 3 else x

    # Class level: student views [0, 1, l...], teacher views [0, 1].
    t_cls = step["in.teacher.global.cls"][:, 0].view(2, B, K).flip(0)
    s_cls = torch.cat([s["global.cls"].view(2, B, K), s["local.cls"].view(L, B, K)])
    from triptych.prototype_loss import other_views

    loss_cls = method._cross_entropy(s_cls, t_cls, CLASS, other_views(2, 2 + L, B, like=s_cls), T0)
    # Global level: row v of the student beside the other teacher view, as the golden file has them.
    u_g, m_g = step["in.teacher.global.patch"][0][None], step["in.mask.teacher.global"][0, ..., 0][None]
    plus_g, blend_g = method.class_plus_loss(s["global.plus"][:, 0], t_cls.flip(0).flatten(0, 1)[None], u_g, m_g, T0)
    valid_g = step["in.mask.student.global"][0, ..., 0][None]
    patch_g = method.patch_loss(s["global.patch"][0], u_g, valid_g, T0)
    # Local level: (teacher view, local x image, ...)
    u_l = step["in.teacher.local.patch"].unflatten(1, (2, B)).transpose(0, 1).flatten(1, 2)  # [view 1, view 0]
    m_l = step["in.mask.teacher.local"][..., 0].unflatten(1, (2, B)).transpose(0, 1).flatten(1, 2)
    cls_l = t_cls.flip(0)[:, None].expand(2, L, B, K).flatten(1, 2)
    plus_l, blend_l = method.class_plus_loss(s["local.plus"][:, 0], cls_l, u_l, m_l, T0)
    loss_plus = (plus_g + L * plus_l) / (1 + L)
    loss_patch = patch_g
    for name, ours in {"global.plus": plus_g, "local.plus": plus_l, "global.patch": patch_g}.items():
        torch.testing.assert_close(ours, step[f"out.ce.{name}"], rtol=0, atol=1e-12, msg=name)
    if local_patch:
        valid = step["in.mask.student.local"][..., 0]
        student = s["local.patch"]  # (2, L·B, M, K): released rows differ per teacher view
        each = [method.patch_loss(student[v], u_l[v][None], valid[v][None], T0) * valid[v].sum() for v in range(2)]
        patch_l = sum(each) / valid.sum()
        torch.testing.assert_close(patch_l, step["out.ce.local.patch"], rtol=0, atol=1e-12)
        loss_patch = (patch_g + L * patch_l) / (1 + L)
    total = w[0] * loss_cls + w[1] * loss_plus + w[2] * loss_patch
    torch.testing.assert_close(total, step["out.total"], rtol=0, atol=1e-12)
    total.backward()
    for name, x in s.items():
        if not name.startswith("mask"):
            torch.testing.assert_close(x.grad, step[f"grad.student.{name}"], rtol=0, atol=1e-12, msg=name)
    carry = {"class": t_cls.mean((0, 1)), "class+": torch.cat(blend_g + blend_l).mean(0)}
    carry |= method._patch_statistics([(u_g, m_g), (u_l, m_l)])
    method.update([carry], T0)
    torch.testing.assert_close(method.center, step["center_after"], rtol=0, atol=1e-9)


def ours_from_golden(name: str) -> str:
    part, rest = name.split(".", 1)
    if part == "enc":
        return f"encoder.vit.{timm_name(rest)}"
    if part == "srs":
        return f"srs.{srs_name(rest)}"
    layer, leaf = rest.split(".")
    if layer == "proto":
        return f"prototypes.{ {'v': 'direction', 'g': 'gain'}[leaf] }"
    return f"projector.{2 * (int(layer[2:]) - 1)}.{ {'w': 'weight', 'b': 'bias'}[leaf] }"


def split_class_tokens(state: dict) -> dict:
    """The released (1, 2, D) class tokens are timm's class token and our class+, its first register."""
    both = state.pop("encoder.vit.cls_token", None)
    if both is not None:
        state |= {"encoder.vit.cls_token": both[:, :1], "encoder.vit.reg_token": both[:, 1:]}
    return state


def golden_state(g: dict, prefix: str) -> dict:
    return split_class_tokens(
        {ours_from_golden(k.removeprefix(prefix)): v for k, v in g.items() if k.startswith(prefix)}
    )


def test_two_training_steps_equal_the_authors(golden, monkeypatch):
    """Views and maps of the official augmentation -> logits -> losses -> clip -> freeze -> AdamW -> EMA -> centres."""
    g = golden("udi_train_step")
    config = SMALL.model_copy(update={"srs_heads": 3, "freeze_prototypes": 1.0})
    method = make(config, image=28, positions="dino")
    for tower in ("student", "teacher"):
        getattr(method, tower).load_state_dict(golden_state(g, f"{tower}0."))
    method.center.copy_(g["center0"])
    method.teacher_temp = lambda t: float(g["cfg.teacher_temps"][t.epoch])
    method.momentum = lambda t: float(g["cfg.ema"][t.step])
    optimizer = make_optimizer(method, OptimConfig())
    names = {id(p): n for n, p in method.student.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in parameter_groups(method)]
    assert groups[0] == {ours_from_golden(n) for n in g["cfg.decayed"]} | {"encoder.vit.reg_token"}
    assert groups[1] == {ours_from_golden(n) for n in g["cfg.not_decayed"]}
    for step in range(2):
        t = Progress(step, 2, 1)
        x = {k.removeprefix(f"step{step}."): v for k, v in g.items() if k.startswith(f"step{step}.")}
        samples = [x["in.src_map0"].argmax(-1), x["in.src_map1"].argmax(-1)] + [
            torch.zeros(3, 4, dtype=torch.int64)
        ] * 2
        views = [View(x[f"in.view{i}"], x[f"in.box{i}"], torch.zeros(3, 2), samples[i]) for i in range(4)]
        tgt = {(0, 1): 0, (1, 0): 1, (2, 1): 2, (2, 0): 3, (3, 1): 4, (3, 0): 5}
        where = {id(v): i for i, v in enumerate(views)}

        def maps(source, grid_s, target, grid_t, coords, x=x, tgt=tgt, where=where):
            weights = x[f"in.tgt_map{tgt[where[id(source)], where[id(target)]]}"]
            return weights, weights.sum(-1)

        monkeypatch.setattr(udi_module, "between", maps)
        out = method(Views(views[:2], views[2:]), t)
        torch.testing.assert_close(out.loss, x["out.total"], rtol=0, atol=1e-9)
        out.loss.backward()
        parameters = dict(method.student.named_parameters())
        for name, value in golden_state(x, "grad.").items():
            torch.testing.assert_close(parameters[name].grad, value, rtol=0, atol=1e-9, msg=name)
        set_rates(optimizer, float(g["cfg.lr"][step]), float(g["cfg.wd"][step]))
        # The released class and class+ are one tensor, so clipping there takes their joint norm.
        cls, plus = parameters["encoder.vit.cls_token"], parameters["encoder.vit.reg_token"]
        joint = torch.nn.Parameter(torch.cat([cls, plus], 1))
        joint.grad = torch.cat([cls.grad, plus.grad], 1)
        clip_gradients([joint, *(p for p in parameters.values() if p is not cls and p is not plus)], 0.3)
        cls.grad, plus.grad = joint.grad[:, :1].clone(), joint.grad[:, 1:].clone()
        method.after_backward(t)
        none = {n for n, p in parameters.items() if p.grad is None}
        assert none == {ours_from_golden(n) for n in x["grad_is_none_after_freeze"]}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.update([out.carry], t)
        torch.testing.assert_close(method.center, x["center_after"], rtol=0, atol=1e-9)
        for tower in ("student", "teacher"):
            state = getattr(method, tower).state_dict()
            for name, value in golden_state(x, f"{tower}_after.").items():
                torch.testing.assert_close(state[name], value, rtol=0, atol=1e-8, msg=f"{tower} {name} at {step}")


def loops(method, S, T, views, t):
    """Second and third term of (1) with (2), (3) or (3'), one place and one prototype at a time."""
    cfg, tau = method.config, method.teacher_temp(t)
    head_s = lambda z: method.student.prototypes(method.student.projector(z))  # noqa: E731
    head_t = lambda z: method.teacher.prototypes(method.teacher.projector(z))  # noqa: E731
    H = lambda p, g: -(p * torch.log_softmax(g / cfg.student_temp, -1)).sum()  # noqa: E731
    plus, patches = [], []
    for s in range(len(S)):
        for v in range(len(T)):
            if s == v:
                continue
            weights, inside = between(views.all[s], S[s].grid, views.global_crops[v], T[v].grid, cfg.token_coords)
            teacher = head_t(method.teacher.srs(T[v].patch_raw, weights))
            one_hot = torch.nn.functional.one_hot(views.all[s].samples, S[s].patch.shape[1])
            student = head_s(method.student.srs(S[s].patch_raw, one_hot))
            for b in range(len(views)):
                g_cls, valid = head_t(T[v].cls[b]), [m for m in range(inside.shape[1]) if inside[b, m]]
                p_cls = torch.softmax((g_cls - method.center[CLASS]) / tau, -1)
                p = {m: torch.softmax((teacher[b, m] - method.center[PATCH]) / tau, -1) for m in valid}
                if cfg.blend == "probs":
                    mean = sum(p.values()) / len(valid) if valid else p_cls
                    target = cfg.alpha * mean + (1 - cfg.alpha) * p_cls
                else:
                    mean = sum(teacher[b, m] for m in valid) / len(valid) if valid else torch.zeros_like(g_cls)
                    target = torch.softmax((cfg.alpha * mean + (1 - cfg.alpha) * g_cls - method.center[PLUS]) / tau, -1)
                plus.append(H(target, head_s(S[s].cls_plus[b])))
                if s < len(T):
                    patches += [H(p[m], student[b, m]) for m in valid]
    return torch.stack(plus).mean(), torch.stack(patches).mean()


@pytest.mark.parametrize("blend", ["logits", "probs"])
@pytest.mark.parametrize("coords", ["centres", "ends"])
def test_the_loss_is_equation_1_written_as_loops(blend, coords):
    method = make(SMALL.model_copy(update={"blend": blend, "token_coords": coords}))
    views = random_views(4)
    S, T = method.encode(views, T0, patches=True)
    step = method.other_losses(S, T, method.teacher.project(T), views, T0)
    plus, patch = loops(method, S, T, views, T0)
    torch.testing.assert_close(step.terms["class+"], plus, rtol=1e-4, atol=0)  # the released 1e-5 in the mean
    torch.testing.assert_close(step.terms["patch"], patch)
    torch.testing.assert_close(step.loss, (step.terms["class+"] + step.terms["patch"]) / 3)


def apart(views: Views) -> Views:
    """The same batch with boxes that do not meet."""

    def at(v: View, i: int) -> View:
        corner = torch.tensor([0.2 * i, 0.0, 0.2 * i + 0.15, 0.15], dtype=v.box.dtype)
        return View(v.images, corner.expand(len(v.box), 4), v.pixel, v.samples)

    moved = [at(v, i) for i, v in enumerate(views.all)]
    return Views(moved[:2], moved[2:])


@pytest.mark.parametrize("blend", ["logits", "probs"])
def test_crops_that_do_not_meet_give_a_finite_loss_and_leave_the_patch_centre(blend):
    method, views = make(SMALL.model_copy(update={"blend": blend})), apart(random_views(3))
    before = method.center.clone()
    step = method(views, T0)
    step.loss.backward()
    assert step.loss.isfinite()
    assert step.terms["patch"] == 0
    assert all(p.grad.isfinite().all() for p in method.student.parameters() if p.grad is not None)
    method.update([step.carry], T0)
    assert torch.equal(method.center[PATCH], before[PATCH])
    assert not torch.equal(method.center[CLASS], before[CLASS])
    if blend == "probs":  # equation (3) without places is the class target alone
        S, T = method.encode(views, T0, patches=True)
        method.center.copy_(before)
        only_cls = make(SMALL.model_copy(update={"blend": "probs", "alpha": 0.0}))
        torch.testing.assert_close(
            step.terms["class+"], only_cls.other_losses(S, T, method.teacher.project(T), views, T0).terms["class+"]
        )


@pytest.mark.parametrize("n_local", [0, 1, 3])
def test_any_number_of_local_crops_trains(n_local):
    method, views = make(), random_views(3, n_local=n_local)
    step = method(views, T0)
    step.loss.backward()
    assert step.loss.isfinite()
    S, T = method.encode(views, T0, patches=True)
    plus, _ = loops(method, S, T, views, T0)
    torch.testing.assert_close(step.terms["class+"], plus, rtol=1e-4, atol=0)


def test_the_teacher_encoder_runs_once_per_step():
    method, calls = make(), []
    method.teacher.encoder.vit.norm.register_forward_hook(lambda *_: calls.append(1))
    method(random_views(2), T0)
    assert calls == [1]


def test_the_centre_of_class_plus_is_the_mean_of_the_blended_logits():
    method, views = make(), random_views(4)
    S, T = method.encode(views, T0, patches=True)
    w_t, blends = method.teacher.prototypes.weight, []
    seen = method.patches_seen(S, T, views)
    for (_, v), (u, inside) in seen.items():
        share = inside / (inside.sum(1, keepdim=True) + 1e-5)
        logits = (share[..., None] * (u @ w_t.T)).sum(1)
        blends.append(0.5 * logits + 0.5 * unit(method.teacher.projector(T[v].cls)) @ w_t.T)
    step, before = method(views, T0), method.center[PLUS].clone()
    method.update([step.carry], T0)
    torch.testing.assert_close(method.center[PLUS], 0.9 * before + 0.1 * torch.stack(blends).mean((0, 1)))


def test_schedules_equal_the_authors_tables(golden):
    from triptych.schedules import cosine, epoch_warmup, warmup_cosine

    g, at = golden("udi_schedules"), [Progress(i, 1200, 4) for i in range(1200)]
    lr, decay = OptimConfig(lr=5e-4, min_lr=1e-5, warmup=10, weight_decay=0.04, weight_decay_end=0.1).rates(1024)
    for schedule, name in ((lr, "lr"), (decay, "wd"), (cosine(0.996, 1.0), "ema")):
        np.testing.assert_allclose([schedule(t) for t in at], g[name], rtol=0, atol=1e-15)
    np.testing.assert_allclose(
        [epoch_warmup(0.04, 0.07, 30)(Progress(e, 300)) for e in range(300)], g["teacher_temp_per_epoch"], atol=1e-15
    )
    assert warmup_cosine(1.0, 0.0, 0)(Progress(0, 5)) == 1.0
