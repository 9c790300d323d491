"""HSSL: the equations as loops, and the numbers of the authors' loss (NK-JittorCV/Self-Supervised 3bff4b8)."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import random_views, tiny_encoder
from triptych.methods import HSSLConfig, build
from triptych.methods.hssl import ConvHead, ConvNeXtBlock
from triptych.optim import OptimConfig, make_optimizer, set_rates
from triptych.prototype_loss import masked_cross_entropy, other_views, prototype_cross_entropy
from triptych.schedules import Progress, epoch_warmup
from triptych.tokens import Tokens, TokenSpec

SMALL = HSSLConfig(hidden=16, embedding=6, prototypes=20, head_kernel=3, head_drop_path=0.0, teacher_temp_warmup=0)


def make(config=SMALL):
    torch.manual_seed(0)
    method = build(tiny_encoder(TokenSpec(mask=True)), config).double()
    with torch.no_grad():
        for p in (*method.teacher.parameters(), *method.student.projector.parameters()):
            p.add_(0.1 * torch.randn_like(p))
        method.center.uniform_(-0.3, 0.3)
        method.patch_center.uniform_(-0.3, 0.3)
    return method


def cross_entropy(teacher, student, center, t_temp=0.07, s_temp=0.1):
    P_t, P_s = torch.softmax((teacher - center) / t_temp, -1), torch.softmax(student / s_temp, -1)
    return sum(-P_t[k] * torch.log(P_s[k]) for k in range(len(P_t)))


def test_the_loss_is_the_equation_written_as_loops():
    """The teacher's head teaches the student's class token and the student's head; patches teach patches."""
    method, views = make(), random_views(3)
    S, T, masks = method.student, method.teacher, [v.mask for v in views.global_crops]
    with torch.no_grad():
        s = [S.encoder(v.images, v.mask) for v in views.global_crops] + [S.encoder(v.images) for v in views.local_crops]
        teach = [T.encoder(v.images) for v in views.global_crops]
        base = [S.prototypes(S.projector(x.cls)) for x in s]
        head = [S.prototypes(S.head_projector(S.head(x))) for x in s]
        target = [T.prototypes(T.head_projector(T.head(x))) for x in teach]
        p_s, p_t = [S.prototypes(S.projector(x.patch)) for x in s], [T.prototypes(T.projector(x.patch)) for x in teach]
    loss = 0.0
    for u in range(2):
        for v in range(4):
            for b in range(3):
                if u != v:
                    for student in (base, head):
                        loss += 0.5 * cross_entropy(target[u][b], student[v][b], method.center) / (6 * 3)
        for b in range(3):
            places = masks[u][b].nonzero()[:, 0].tolist()
            for i in places:
                loss += cross_entropy(p_t[u][b, i], p_s[u][b, i], method.patch_center) / len(places) / (2 * 3)
    torch.testing.assert_close(method(views, Progress(0, 10)).loss, loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["global", "local"])
def test_terms_gradients_and_centres_equal_the_authors(golden, case):
    """Which output teaches which, the factor ½, and the update of both centres."""
    g = golden(f"hssl_loss_{case}")
    eye, crops = torch.eye(9, dtype=torch.float64), 2 + int(g["cfg.n_local"])
    temperature = epoch_warmup(0.04, 0.07, 2)
    centres = make(HSSLConfig(hidden=4, embedding=9, prototypes=9, head_kernel=3))
    with torch.no_grad():  # prototypes = identity: embeddings are then the golden logits
        for tower in (centres.student, centres.teacher):
            tower.prototypes.direction.copy_(eye)
            tower.prototypes.gain.fill_(1)
    for i in range(3):
        step = {k.split(".", 1)[1]: v for k, v in g.items() if k.startswith(f"step{i}.")}
        t_temp = temperature(Progress(int(step["epoch"]), 5))
        assert t_temp == pytest.approx(float(g["temp_cls_per_epoch"][int(step["epoch"])]), abs=1e-15)
        inputs = {k[3:]: v.clone().requires_grad_() for k, v in step.items() if k.startswith("in.student")}

        def student(who, inputs=inputs):
            parts = [inputs[f"student_{who}_{kind}"] for kind in ("cls", "local") if f"student_{who}_{kind}" in inputs]
            return torch.cat(parts).view(crops, 3, 9)

        target = step["in.teacher_aux_cls"].view(2, 3, 9)
        patches, patch_target = (
            inputs["student_base_patch"].view(2, 3, 4, 9),
            step["in.teacher_base_patch"].view(2, 3, 4, 9),
        )
        mask = step["in.mask"][:2].flatten(2)
        temps = {"student_temp": float(g["cfg.student_temp"]), "teacher_temp": t_temp}
        base, head = (
            prototype_cross_entropy(
                student(who),
                eye,
                target,
                eye,
                center=step["center_cls_before"][0],
                weight=other_views(2, crops, 3, like=target),
                **temps,
            )
            for who in ("base", "aux")
        )
        patch = masked_cross_entropy(
            patches[mask],
            eye,
            patch_target,
            eye,
            mask,
            mask.flatten().nonzero()[:, 0],
            center=step["center_patch_before"][0, 0],
            **temps,
        )
        loss = 0.5 * (base + head) + patch
        torch.testing.assert_close(base, step["out.cls_base"], rtol=0, atol=1e-12)
        torch.testing.assert_close(head, step["out.cls_aux"], rtol=0, atol=1e-12)
        torch.testing.assert_close(patch, step["out.patch"], rtol=0, atol=1e-12)
        torch.testing.assert_close(loss, step["out.loss"], rtol=0, atol=1e-12)
        loss.backward()
        for name, x in inputs.items():
            torch.testing.assert_close(x.grad, step[f"grad.{name}"], rtol=0, atol=1e-12, msg=name)
        centres.center.copy_(step["center_cls_before"][0])
        centres.patch_center.copy_(step["center_patch_before"][0, 0])
        carry = {"class": target.mean((0, 1)), "patch": patch_target.mean((0, 1, 2))}
        centres.update([carry], Progress(0, 5))
        torch.testing.assert_close(centres.center, step["center_cls_after"][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(centres.patch_center, step["center_patch_after"][0, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("residual", [True, False])
def test_a_block_is_a_convolution_a_norm_and_an_mlp_at_every_place(residual):
    torch.manual_seed(0)
    D, H, W, k = 2, 3, 4, 3
    block = ConvNeXtBlock(D, k, 0.0, residual).double()
    with torch.no_grad():
        for p in block.parameters():
            p.normal_()
        x = torch.randn(1, D, H, W, dtype=torch.float64)
        y = block(x)[0]
        (w, b), norm, fc0, fc1 = block.depthwise.parameters(), block.norm, block.mlp[0], block.mlp[2]
        for i in range(H):
            for j in range(W):
                c = [b[d].item() for d in range(D)]
                for d in range(D):
                    for m in range(k):
                        for n in range(k):
                            if 0 <= i + m - 1 < H and 0 <= j + n - 1 < W:  # zeros around the grid
                                c[d] += (w[d, 0, m, n] * x[0, d, i + m - 1, j + n - 1]).item()
                mean = sum(c) / D
                std = math.sqrt(sum((v - mean) ** 2 for v in c) / D + 1e-6)
                h = torch.tensor([(v - mean) / std for v in c], dtype=torch.float64) * norm.weight + norm.bias
                h = fc1.weight @ F.gelu(fc0.weight @ h + fc0.bias) + fc1.bias
                expected = x[0, :, i, j] + h if residual else h
                torch.testing.assert_close(y[:, i, j], expected, rtol=0, atol=1e-12)


def test_the_heads_token_is_the_normed_mean_over_places_and_its_first_block_has_no_residual():
    torch.manual_seed(0)
    head = ConvHead(12, HSSLConfig(head_kernel=3, head_drop_path=0.3)).double()
    assert [b.residual for b in head.blocks] == [False, True, True]
    assert head.blocks[0].drop_path.drop_prob == 0
    assert head.blocks[1].drop_path.drop_prob == 0.3
    head.eval()
    raw = torch.randn(2, 15, 12, dtype=torch.float64)
    x = Tokens(patch=torch.full_like(raw, torch.nan), patch_raw=raw, grid=(3, 5))  # the tokens before the final norm
    maps = raw.transpose(1, 2).reshape(2, 12, 3, 5)
    for block in head.blocks:
        maps = block(maps)
    mean = torch.stack([maps[:, :, i, j] for i in range(3) for j in range(5)]).mean(0)
    torch.testing.assert_close(head(x), head.norm(mean), rtol=0, atol=1e-12)


def test_the_teacher_has_no_stochastic_depth_in_its_head():
    method = make(SMALL.model_copy(update={"head_drop_path": 0.5}))
    x = Tokens(patch=torch.randn(16, 16, 12).double(), patch_raw=torch.randn(16, 16, 12).double(), grid=(4, 4))
    assert torch.equal(method.teacher.head(x), method.teacher.head(x))
    assert not torch.equal(method.student.head(x), method.student.head(x))


def test_the_exported_encoder_has_nothing_of_the_head():
    method = make()
    plain = tiny_encoder(TokenSpec(mask=True))
    assert method.encoder.state_dict().keys() == plain.state_dict().keys()


def test_frozen_prototypes_neither_move_nor_decay():
    method, t = make(SMALL.model_copy(update={"freeze_prototypes": 1.0})), Progress(4, 10, 5)
    before = method.student.prototypes.direction.detach().clone()
    optimizer = make_optimizer(method, OptimConfig())
    for step in (t, t.next):
        method(random_views(3), step).loss.backward()
        method.after_backward(step)
        set_rates(optimizer, 0.1, 0.4)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert torch.equal(method.student.prototypes.direction, before) == (step is t)
