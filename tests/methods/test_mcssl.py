"""MC-SSL: the equations as loops, and the numbers of the authors' code (Sara-Ahmed/MCSSL 57d8daf)."""

from dataclasses import replace

import pytest
import torch

from conftest import random_views, tiny_encoder
from triptych.data.views import Views
from triptych.methods import MCSSLConfig, MTEConfig, build
from triptych.methods.mcssl import MCSSL
from triptych.methods.mte import MTE
from triptych.optim import OptimConfig, make_optimizer, set_rates
from triptych.schedules import Progress
from triptych.tokens import Tokens, TokenSpec

SMALL = MCSSLConfig(hidden=16, embedding=6, prototypes=20, teacher_temp=0.05, teacher_temp_warmup=0)
T0 = Progress(0, 10)


def make(config=SMALL, **options) -> MCSSL:
    """A teacher that is not the student, and centres that are not 0."""
    torch.manual_seed(0)
    method = build(tiny_encoder(TokenSpec(), **options), config).double()
    with torch.no_grad():
        for p in (*method.teacher.parameters(), *method.student.projector.parameters()):
            p.add_(0.1 * torch.randn_like(p))
        method.center.uniform_(-0.3, 0.3)
        method.patch_center.uniform_(-0.3, 0.3)
    return method


def close(ours, expected) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def cross_entropy(teacher, student, center, t_temp=0.05, s_temp=0.1):
    """H(P_t, P_s) of two logit vectors, one prototype at a time."""
    P_t, P_s = torch.softmax((teacher - center) / t_temp, -1), torch.softmax(student / s_temp, -1)
    return sum(-P_t[k] * torch.log(P_s[k]) for k in range(len(P_t)))


def test_the_loss_is_the_equations_written_as_loops():
    method, views = make(SMALL.model_copy(update={"weights": (2.0, 1.3, 0.7)})), random_views(3)
    S, T, G = method.student, method.teacher, views.global_crops
    with torch.no_grad():
        s = [S.encoder(v.corrupted) for v in G] + [S.encoder(v.images) for v in views.local_crops]
        t = [T.encoder(v.images) for v in G]
        g_s, g_t = ([tower.prototypes(tower.projector(x.cls)) for x in xs] for tower, xs in ((S, s), (T, t)))
        p_s, p_t = ([tower.patch_prototypes(tower.projector(x.patch)) for x in xs] for tower, xs in ((S, s), (T, t)))
        pairs = [(u, v) for u in range(2) for v in range(4) if u != v]
        assert len(pairs) == 6
        of_class = [cross_entropy(g_t[u][b], g_s[v][b], method.center) for u, v in pairs for b in range(3)]
        of_patch = [
            cross_entropy(p_t[v][b, i], p_s[v][b, i], method.patch_center)
            for v in range(2)
            for b in range(3)
            for i in range(16)
        ]
        error = count = 0.0
        for x, v in zip(s[:2], G, strict=True):
            difference = (method.pixels(x.patch, x.grid) - v.images) ** 2
            for b in range(3):
                for i in range(16):
                    for j in range(16):
                        if v.pixel_mask[b, i, j]:
                            error, count = error + difference[b, :, i, j].sum(), count + 3
        step = method(views, T0)
    of_class, of_patch, of_pixels = torch.stack(of_class).mean(), torch.stack(of_patch).mean(), error / count
    close(step.terms["class"], of_class)
    close(step.terms["patch"], of_patch)
    close(step.terms["pixels"], of_pixels)
    close(step.loss, 0.7 * of_class + 1.3 * of_patch + 2.0 * of_pixels)


def test_losses_gradients_and_centres_equal_the_authors(golden):
    """Twelve crops, four patches of two; one division each, by pairs x images and by crops x images x patches.

    The method's own losses, with the identity for projector and prototypes.  Embeddings, which it puts to unit length,
    are then logits up to a factor: the golden ones get an eighth dimension in which all vectors are made equally long,
    which no prototype reads, and temperatures and centres shrink by that length.
    """
    g = golden("mcssl_loss")
    crops, images, K = int(g["num_student_crops"]), int(g["batch"]), 7
    logits = {k: g[k] for k in ("student_cls", "teacher_cls", "student_tokens", "teacher_tokens")}
    length = 1 + max(float(x.norm(dim=-1).max()) for x in logits.values())
    temps = {name: float(g[f"{name}_temp"]) / length for name in ("student", "teacher")}
    config = MCSSLConfig(
        hidden=4,
        embedding=K + 1,
        prototypes=K,
        student_temp=temps["student"],
        teacher_temp=temps["teacher"],
        teacher_temp_warmup=0,
        center_momentum=float(g["center_momentum"]),
    )
    method = make(config, width=K + 1, heads=2)
    with torch.no_grad():
        for tower in (method.student, method.teacher):
            tower.projector = torch.nn.Identity()
            for prototypes in (tower.prototypes, tower.patch_prototypes):
                prototypes.direction.copy_(torch.eye(K, K + 1))
                prototypes.gain.fill_(1)
        method.center.copy_(g["center_before"][0] / length)
        method.patch_center.copy_(g["center_data_before"][0, 0] / length)

    def long(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, (length**2 - x.square().sum(-1, keepdim=True)).sqrt()], -1)

    inputs = {name: logits[name].clone().requires_grad_() for name in ("student_cls", "student_tokens")}
    q_s = long(inputs["student_cls"]).unflatten(0, (crops, images))
    z_t = long(logits["teacher_cls"]).unflatten(0, (2, images))

    def tokens(x: torch.Tensor) -> list[Tokens]:
        return [Tokens(patch=v, patch_raw=v, grid=(2, 2)) for v in long(x).unflatten(0, (2, images))]

    S, T = tokens(inputs["student_tokens"]), tokens(logits["teacher_tokens"])
    of_class = method.global_loss(q_s, z_t, T0)
    others = method.other_losses(S, T, z_t, random_views(images, size=8, n_local=0), T0)
    close(of_class.terms["class"], g["loss_cls"])
    close(others.terms["patch"], g["loss_tokens"])
    close(of_class.loss + others.loss, g["loss_cls"] + g["loss_tokens"] + others.terms["pixels"])  # unit weights
    (of_class.terms["class"] + others.terms["patch"]).backward()
    for name, x in inputs.items():
        close(x.grad, g[f"grad_{name}"])
    method.update([of_class.carry | others.carry], T0)
    close(length * method.center, g["center_after"][0])
    close(length * method.patch_center, g["center_data_after"][0, 0])


def test_the_student_sees_corrupted_crops_and_the_teacher_clean_ones():
    method, views = make(), random_views(3)
    S, T = method.encode(views, T0, patches=True)
    assert [len(S), len(T)] == [4, 2]
    for v, s, t in zip(views.global_crops, S, T, strict=False):
        close(s.cls, method.student.encoder(v.corrupted).cls)
        close(t.cls, method.teacher.encoder(v.images).cls)
    for v, s in zip(views.local_crops, S[2:], strict=True):
        close(s.cls, method.student.encoder(v.images).cls)


def test_local_crops_reach_only_the_class_loss():
    method, views = make(), random_views(3)
    other = random_views(3, seed=1).local_crops
    ours, changed, none = (
        method(Views(views.global_crops, local), T0).terms for local in (views.local_crops, other, [])
    )
    for name, depends in (("class", True), ("patch", False), ("pixels", False)):
        for terms in (changed, none):
            assert (abs(terms[name] - ours[name]) > 1e-6) == depends, name


def test_all_patches_are_scored_not_only_the_corrupted_ones():
    method, views = make(), random_views(3)
    none = [torch.zeros_like(v.pixel_mask) for v in views.global_crops]
    whole = [replace(v, pixel_mask=m) for v, m in zip(views.global_crops, none, strict=True)]
    ours, without = (method(Views(crops, views.local_crops), T0).terms for crops in (views.global_crops, whole))
    assert torch.equal(ours["patch"], without["patch"])
    assert without["pixels"] == 0
    S, T = method.encode(views, T0, patches=True)
    for x in S[:2]:
        x.patch.retain_grad()
    method.other_losses(S, T, method.teacher.project(T), Views(whole, []), T0).terms["patch"].backward()
    assert all(x.patch.grad.any(-1).all() for x in S[:2])


def test_centres_of_class_token_and_patches_move_separately():
    method, views = make(), random_views(3)
    before = method.center.clone(), method.patch_center.clone()
    with torch.no_grad():
        T = method.teacher
        x = [T.encoder(v.images) for v in views.global_crops]
        of_class = torch.stack([T.prototypes(T.projector(t.cls)) for t in x]).mean((0, 1))
        of_patch = torch.stack([T.patch_prototypes(T.projector(t.patch)) for t in x]).mean((0, 1, 2))
    carry = method(views, T0).carry
    assert all(not v.requires_grad and v.numel() == 6 for v in carry.values())  # embeddings, not logits
    method.update([carry], T0)
    close(method.center, 0.9 * before[0] + 0.1 * of_class)
    close(method.patch_center, 0.9 * before[1] + 0.1 * of_patch)
    assert (method.center - method.patch_center).abs().max() > 0.01


def test_prototypes_are_frozen_for_the_first_epoch_and_move_in_the_second():
    method, t = make(SMALL.model_copy(update={"freeze_prototypes": 1.0})), Progress(4, 10, 5)
    watched = method.student.prototypes, method.student.patch_prototypes
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


def test_one_projector_serves_both_and_prototypes_do_not():
    method = make()
    names = {n.split(".")[0] for n, _ in method.student.named_parameters()}
    assert names == {"encoder", "projector", "prototypes", "patch_prototypes"}
    for term, own, others in (("class", "prototypes", "patch_prototypes"), ("patch", "patch_prototypes", "prototypes")):
        method.zero_grad(set_to_none=True)
        method(random_views(3), T0).terms[term].backward()
        assert method.student.projector[0].weight.grad.any()
        assert getattr(method.student, own).direction.grad.any()
        assert getattr(method.student, others).direction.grad is None


def test_everything_gets_a_gradient_and_no_loss_can_be_left_out():
    """DDP asks for the first; heads that nothing trains would look as if something had."""
    method = make(SMALL)
    method(random_views(3), T0).loss.backward()
    assert [p.grad is not None for p in method.parameters()] == [p.requires_grad for p in method.parameters()]
    for weights in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="greater than 0"):
            MCSSLConfig(weights=weights)


def test_one_changed_setting_of_the_corruption_leaves_the_others():
    """Not those of MMC and GMML, which share its fields."""
    corruption = MCSSLConfig.model_validate({"corruption": {"align": 8}}).corruption
    assert (corruption.align, corruption.kinds, corruption.share) == (8, ("zeros",), 0.5)


def test_mte_wraps_it():
    """The fused vector takes the class token's place in L_CLS and its centre; patches and pixels are added once."""
    torch.manual_seed(0)
    config = MTEConfig(base=SMALL, aux=2, pooled=2, pool_kernel=3)
    method = build(tiny_encoder(MTE.token_spec(config)), config).double()
    views = random_views(3)
    with torch.no_grad():
        S, T = method.base.encode(views, T0, patches=True)
        z_a, z_t = method.student_ensemble(S), method.teacher_ensemble(T)
        step, alone = method(views, T0), method.base(views, T0)
        logits = method.teacher.prototypes(z_t).mean((0, 1))
        assert set(step.terms) == {"ensemble", "distill", "patch", "pixels"}
        close(step.terms["ensemble"], method.base.global_loss(z_a, z_t, T0).loss)
        close(step.terms["distill"], method.base.global_loss(method.student.project(S), z_t, T0).loss)
        close(step.terms["patch"], alone.terms["patch"])
        close(step.terms["pixels"], alone.terms["pixels"])
        close(step.loss, sum(step.terms.values()))
        method.update([step.carry], T0)
    close(method.base.center, 0.1 * logits)
