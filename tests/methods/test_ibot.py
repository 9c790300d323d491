"""iBOT: the equations as loops, and the numbers of the authors' code (bytedance/ibot da316d8)."""

from dataclasses import replace

import pytest
import torch

from conftest import random_views, timm_name, tiny_encoder
from triptych.data.views import View, Views
from triptych.methods import build, iBOTConfig
from triptych.methods.ibot import patch_prototypes
from triptych.optim import OptimConfig, clip_gradients, make_optimizer, parameter_groups, set_rates
from triptych.prototype_loss import masked_cross_entropy, other_views, prototype_cross_entropy
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

SMALL = iBOTConfig(hidden=16, embedding=6, prototypes=20, teacher_temp_warmup=0)


def make(config=SMALL, **options):
    torch.manual_seed(0)
    method = build(tiny_encoder(TokenSpec(mask=True), **options), config).double()
    with torch.no_grad():  # a teacher that is not the student, prototypes that differ
        for p in (*method.teacher.parameters(), *method.student.projector.parameters()):
            p.add_(0.1 * torch.randn_like(p))
        method.center.uniform_(-0.3, 0.3)
        method.patch_center.uniform_(-0.3, 0.3)
    return method


def cross_entropy(teacher, student, center, t_temp, s_temp=0.1):
    """H(P_t, P_s) of two logit vectors, one prototype at a time."""
    P_t, P_s = torch.softmax((teacher - center) / t_temp, -1), torch.softmax(student / s_temp, -1)
    return sum(-P_t[k] * torch.log(P_s[k]) for k in range(len(P_t)))


@pytest.mark.parametrize("own", [None, 14])
def test_the_loss_is_the_equation_written_as_loops(own):
    settings = {"patch_prototypes": own, "weights": (0.8, 1.3), "teacher_temp": 0.05, "teacher_patch_temp": 0.06}
    method, views, t = make(SMALL.model_copy(update=settings)), random_views(3), Progress(0, 10)
    S, T = method.student, method.teacher
    hidden = [v.mask for v in views.global_crops]
    assert not hidden[0][0].any(), "the loop must meet an image without a masked patch"
    with torch.no_grad():
        s = [S.encoder(v.images, v.mask) for v in views.global_crops] + [S.encoder(v.images) for v in views.local_crops]
        teach = [T.encoder(v.images) for v in views.global_crops]
        g_s, g_t = ([tower.prototypes(tower.projector(x.cls)) for x in xs] for tower, xs in ((S, s), (T, teach)))
        p_s, p_t = (
            [patch_prototypes(tower)(tower.projector(x.patch)) for x in xs] for tower, xs in ((S, s), (T, teach))
        )
        pairs = [(u, v) for u in range(2) for v in range(4) if u != v]
        of_class = [cross_entropy(g_t[u][b], g_s[v][b], method.center, 0.05) for u, v in pairs for b in range(3)]
        of_patches = torch.zeros((), dtype=torch.float64)
        for u in range(2):
            for b in range(3):
                places = hidden[u][b].nonzero()[:, 0].tolist()
                for i in places:
                    h = cross_entropy(p_t[u][b, i], p_s[u][b, i], method.patch_center, 0.06)
                    of_patches += h / len(places) / 3 / 2
    step = method(views, t)
    torch.testing.assert_close(step.terms["class"], torch.stack(of_class).mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(step.terms["patch"], of_patches, rtol=0, atol=1e-12)
    torch.testing.assert_close(step.loss, 0.8 * torch.stack(of_class).mean() + 1.3 * of_patches, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["shared", "separate"])
def test_head_output_and_gradients_equal_the_authors(golden, case):
    g = {k.removeprefix(f"{case}."): v for k, v in golden("ibot_head").items() if k.startswith(f"{case}.")}
    own = 14 if case == "separate" else None
    tower = make(SMALL.model_copy(update={"patch_prototypes": own, "norm_last_layer": True})).student
    tower.load_state_dict({head_name(k[6:]): v for k, v in g.items() if k.startswith("param.")}, strict=False)
    tokens = g["in.tokens"].clone().requires_grad_()
    u = tower.projector(tokens)
    cls, patch = tower.prototypes(u[:, 0]), patch_prototypes(tower)(u[:, 1:])
    torch.testing.assert_close(cls, g["out.cls"], rtol=0, atol=1e-12)
    torch.testing.assert_close(patch, g["out.patch"], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        tower.prototypes(tower.projector(tokens[:, 0])), g["out.vector_input"], rtol=0, atol=1e-12
    )
    torch.autograd.backward([cls, patch], [g["in.cot_cls"], g["in.cot_patch"]])
    torch.testing.assert_close(tokens.grad, g["grad.tokens"], rtol=0, atol=1e-12)
    grads = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
    expected = {head_name(k[5:]): v for k, v in g.items() if k.startswith("grad.") and k != "grad.tokens"}
    assert grads.keys() == expected.keys()  # no gradient of a gain that is not trained
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", ["ibot_loss", "ibot_loss_latemask"])
def test_loss_gradients_temperatures_and_centres_equal_the_authors(golden, case):
    """λ = (0.8, 1.3), two kinds of prototypes, local crops, an image without masked patches, late masking."""
    g = golden(case)
    start, crops, rows = int(g["cfg.mim_start_epoch"]), 2 + int(g["cfg.n_local"]), 3
    settings = {"hidden": 4, "embedding": 9, "prototypes": 9, "teacher_temp_warmup": 2, "mask_start": start}
    # One `teacher_temp_start` serves both tables; the authors' call has two.
    of_class = make(iBOTConfig(**settings, teacher_temp_start=0.04, teacher_temp=0.07)).teacher_temp
    of_patches = make(iBOTConfig(**settings, teacher_temp_start=0.05, teacher_patch_temp=0.06)).patch_temp
    for epoch in range(5):
        t = Progress(3 * epoch + 2, 15, 3)
        assert of_class(t) == pytest.approx(float(g["temp_cls_per_epoch"][epoch]), abs=1e-15)
        assert of_patches(t) == pytest.approx(float(g["temp_patch_per_epoch"][epoch]), abs=1e-15)
    eye = {n: torch.eye(n, dtype=torch.float64) for n in (9, 7)}  # prototypes: embeddings are then the golden logits
    centres = identity_prototypes(iBOTConfig(hidden=4, embedding=9, prototypes=9, patch_prototypes=7))
    for i in range(3):
        step = {k.split(".", 1)[1]: v for k, v in g.items() if k.startswith(f"step{i}.")}
        t = Progress(int(step["epoch"]), 5)
        inputs = {k[3:]: v.clone().requires_grad_() for k, v in step.items() if k.startswith("in.student")}
        cls = torch.cat([v for k, v in inputs.items() if k != "student_patch"]).view(crops, rows, 9)
        mask = step["in.mask"][:2].flatten(2)
        teacher, teacher_patch = step["in.teacher_cls"].view(2, rows, 9), step["in.teacher_patch"].view(2, rows, 4, 7)
        of_cls = prototype_cross_entropy(
            cls,
            eye[9],
            teacher,
            eye[9],
            center=step["center_cls_before"][0],
            student_temp=0.1,
            teacher_temp=of_class(t),
            weight=other_views(2, crops, rows, like=cls),
        )
        of_patch = masked_cross_entropy(
            inputs["student_patch"].view(2, rows, 4, 7)[mask],
            eye[7],
            teacher_patch,
            eye[7],
            mask,
            mask.flatten().nonzero()[:, 0],
            center=step["center_patch_before"][0, 0],
            student_temp=0.1,
            teacher_temp=of_patches(t),
        )
        # The authors' terms have their weights in them.
        torch.testing.assert_close(0.8 * of_cls, step["out.cls"], rtol=0, atol=1e-12)
        torch.testing.assert_close(1.3 * of_patch, step["out.patch"], rtol=0, atol=1e-12)
        (0.8 * of_cls + 1.3 * of_patch).backward()
        for name, x in inputs.items():
            torch.testing.assert_close(x.grad, step[f"grad.{name}"], rtol=0, atol=1e-12, msg=name)
        centres.center.copy_(step["center_cls_before"][0])
        centres.patch_center.copy_(step["center_patch_before"][0, 0])
        # Nine-dimensional embeddings: the patches' logits are the first seven of them.
        patch_mean = torch.nn.functional.pad(teacher_patch.mean((0, 1, 2)), (0, 2))
        centres.update([{"class": teacher.mean((0, 1)), "patch": patch_mean}], t)
        torch.testing.assert_close(centres.center, step["center_cls_after"][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(centres.patch_center, step["center_patch_after"][0, 0], rtol=0, atol=1e-12)


def identity_prototypes(config):
    method = build(tiny_encoder(TokenSpec(mask=True)), config).double()
    with torch.no_grad():
        for tower in (method.student, method.teacher):
            for prototypes in (tower.prototypes, patch_prototypes(tower)):
                prototypes.direction.copy_(torch.eye(*prototypes.direction.shape))
    return method


@pytest.mark.parametrize("case", ["native", "small"])
def test_masked_encoder_equals_the_authors(golden, case):
    g = golden("ibot_vit_masked")
    encoder = tiny_encoder(TokenSpec(mask=True), positions="dino").double()
    load(encoder, g, "param.", encoder_name)
    images = g[f"{case}.image"].clone().requires_grad_()
    x = encoder(images, g[f"{case}.mask"].flatten(1))
    tokens = torch.cat([x.cls[:, None], x.patch], 1)
    torch.testing.assert_close(tokens, g[f"{case}.tokens"], rtol=0, atol=1e-12)
    tokens.backward(g[f"{case}.cotangent"])
    torch.testing.assert_close(images.grad, g[f"{case}.grad.image"], rtol=0, atol=1e-12)
    torch.testing.assert_close(encoder.mask_token.grad[0], g[f"{case}.grad.mask_token"], rtol=0, atol=1e-12)
    torch.testing.assert_close(encoder.vit.pos_embed.grad, g[f"{case}.grad.pos"], rtol=0, atol=1e-12)


def encoder_name(name: str) -> str:
    return "mask_token" if name == "mask_token" else f"vit.{timm_name(name)}"


def head_name(name: str) -> str:
    """'fc0.w', 'proto.g', 'proto_patch.v' -> the name in our tower."""
    layer, leaf = name.split(".")
    if layer.startswith("proto"):
        module = "patch_prototypes" if layer == "proto_patch" else "prototypes"
        return f"{module}.{ {'v': 'direction', 'g': 'gain'}[leaf] }"
    return f"projector.{2 * int(layer[2:])}.{ {'w': 'weight', 'b': 'bias'}[leaf] }"


def tower_name(name: str) -> str:
    part, rest = name.split(".", 1)
    return f"encoder.{encoder_name(rest)}" if part == "enc" else head_name(rest)


def load(module, g, prefix, our_name):
    """Golden parameters into a module; the authors keep the mask token as (1, D)."""
    own = module.state_dict()
    state = {our_name(k.removeprefix(prefix)): v for k, v in g.items() if k.startswith(prefix)}
    module.load_state_dict({name: value.view_as(own[name]) for name, value in state.items()})


def test_four_training_steps_equal_the_authors(golden):
    """Losses, gradients, clipping, freezing, AdamW groups, EMA and both centres over 2 epochs of 2 iterations."""
    g = golden("ibot_train")
    config = SMALL.model_copy(update={"freeze_prototypes": 1.0})
    method = build(tiny_encoder(TokenSpec(mask=True), positions="dino"), config).double()
    for tower in (method.student, method.teacher):
        load(tower, g, "student0.", tower_name)
    optimizer = make_optimizer(method, OptimConfig())
    names = {id(p): n for n, p in method.student.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in parameter_groups(method)]
    assert groups == [{tower_name(n) for n in g[kind]} for kind in ("decayed", "undecayed")]
    method.teacher_temp = lambda t: float(g["cfg.teacher_temp_cls"][t.epoch])
    method.patch_temp = lambda t: float(g["cfg.teacher_temp_patch"][t.epoch])
    method.momentum = lambda t: float(g["ema"][t.step])
    seen = 0
    for step in range(4):
        t = Progress(step, 4, 2)
        box, pixel = torch.tensor([[0.0, 0, 1, 1]]).expand(4, 4), torch.ones(4, 2)
        crops = [View(g[f"step{step}.in.crop{i}"].double(), box, pixel) for i in range(4)]
        masked = [replace(crops[i], mask=g[f"step{step}.in.mask{i}"].flatten(1)) for i in range(2)]
        out = method(Views(masked, crops[2:]), t)
        torch.testing.assert_close(out.loss, g[f"step{step}.out.loss"], rtol=0, atol=1e-9)
        torch.testing.assert_close(out.terms["class"], g[f"step{step}.out.cls"], rtol=0, atol=1e-9)
        torch.testing.assert_close(out.terms["patch"], g[f"step{step}.out.patch"], rtol=0, atol=1e-9)
        out.loss.backward()
        grads = {n: p.grad for n, p in method.student.named_parameters()}
        for key in [k for k in g if k.startswith(f"step{step}.grad.")]:
            ours = tower_name(key.removeprefix(f"step{step}.grad."))
            torch.testing.assert_close(grads[ours], g[key].view_as(grads[ours]), rtol=0, atol=1e-9, msg=ours)
            seen += 1
        set_rates(optimizer, float(g["lr"][step]), float(g["wd"][step]))
        clip_gradients(method.parameters(), float(g["cfg.clip"]))
        method.after_backward(t)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.update([out.carry], t)
        torch.testing.assert_close(method.center, g[f"step{step}.center_cls_after"][0], rtol=0, atol=1e-9)
        torch.testing.assert_close(method.patch_center, g[f"step{step}.center_patch_after"][0, 0], rtol=0, atol=1e-9)
        for tower in ("student", "teacher"):
            state = getattr(method, tower).state_dict()
            prefix = f"step{step}.{tower}_after."
            for key in [k for k in g if k.startswith(prefix)]:
                ours = tower_name(key.removeprefix(prefix))
                message = f"{tower} {ours} at {step}"
                torch.testing.assert_close(state[ours], g[key].view_as(state[ours]), rtol=0, atol=1e-9, msg=message)
                seen += 1
    assert seen == 39 + 2 * (39 + 38)  # the authors' teacher has no mask token


def test_before_mask_start_nothing_is_hidden_and_patches_teach_nothing():
    method, views = make(SMALL.model_copy(update={"mask_start": 2.0})), random_views(3)
    plain = Views([replace(v, mask=torch.zeros_like(v.mask)) for v in views.global_crops], views.local_crops)
    early, late = Progress(7, 40, 4), Progress(8, 40, 4)
    assert torch.equal(method(views, early).loss, method(plain, early).loss)
    assert method(views, early).terms["patch"] == 0
    assert method(views, late).terms["patch"] > 0
    assert not torch.equal(method(views, late).terms["class"], method(views, early).terms["class"])


@pytest.mark.parametrize("own", [None, 14])
def test_frozen_prototypes_neither_move_nor_decay(own):
    config = SMALL.model_copy(update={"freeze_prototypes": 1.0, "patch_prototypes": own})
    method, t = make(config), Progress(4, 10, 5)
    watched = (method.student.prototypes, patch_prototypes(method.student))
    before = [m.direction.detach().clone() for m in watched]
    optimizer = make_optimizer(method, OptimConfig())
    for step in (t, t.next):
        method(random_views(3), step).loss.backward()
        method.after_backward(step)
        set_rates(optimizer, 0.1, 0.4)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        still = [torch.equal(m.direction, b) for m, b in zip(watched, before, strict=True)]
        assert still == ([True, True] if step is t else [False, False])
