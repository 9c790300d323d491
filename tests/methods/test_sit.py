"""SiT: the equations as loops, and the numbers of the authors' code (Sara-Ahmed/SiT 7f22e9c).

Masked reconstruction and the two heads are compared with the authors' in test_mmc.py.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import random_views, tiny_encoder
from triptych.data.loader import ViewDataset, ViewsConfig, collate
from triptych.data.sources import open_source
from triptych.methods import MTEConfig, SiTConfig, build
from triptych.methods.mte import MTE
from triptych.methods.sit import SiT
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

SMALL = {"hidden": 16, "embedding": 6}
T0 = Progress(0, 10)


def make(**options) -> SiT:
    torch.manual_seed(0)
    method = build(tiny_encoder(TokenSpec()), SiTConfig(**SMALL, **options)).double()
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return method


@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_the_loss_is_the_equations_written_as_loops(weight):
    method, views, tau = make(weight_pixels=weight, temperature=0.3), random_views(3, n_local=0), 0.3
    S, T, G = method.student, method.teacher, views.global_crops
    s = [S.encoder(v.corrupted) for v in G]

    error = count = 0.0
    for x, v in zip(s, G, strict=True):
        difference = (method.pixels(x.patch, x.grid) - v.images).abs()
        for b in range(3):
            for i in range(16):
                for j in range(16):
                    if v.pixel_mask[b, i, j]:
                        error, count = error + difference[b, :, i, j].sum(), count + 3

    c = S.projector(torch.cat([x.cls for x in s])).unflatten(0, (2, 3))
    k = T.projector(torch.cat([T.encoder(v.images).cls for v in G])).unflatten(0, (2, 3))
    of_class = 0.0
    for v, u in ((0, 1), (1, 0)):
        for b in range(3):
            e = [math.e ** (F.cosine_similarity(c[v, b], k[u, a], dim=0) / tau) for a in range(3)]
            of_class -= 2 * tau * torch.log(e[b] / sum(e)) / 3
    step = method(views, T0)
    torch.testing.assert_close(step.terms["class"], of_class, rtol=0, atol=1e-12)
    torch.testing.assert_close(step.terms["pixels"], error / count, rtol=0, atol=1e-12)
    torch.testing.assert_close(step.loss, of_class + weight * error / count, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_the_contrast_and_its_gradient_equal_the_authors(golden, case):
    g = {k.removeprefix(f"{case}_"): v for k, v in golden("sit_contrast").items() if k.startswith(case)}
    student = g["student"].clone().requires_grad_()
    q, k = (x.unflatten(0, (2, int(g["batch"]))) for x in (student, g["teacher"]))
    loss = make(temperature=float(g["temp"])).global_loss(q, k, T0).loss
    loss.backward()
    torch.testing.assert_close(loss, g["loss"], rtol=0, atol=1e-12)
    torch.testing.assert_close(student.grad, g["grad_student"], rtol=0, atol=1e-12)


def test_embeddings_that_are_alike_cost_4_tau_ln_b():
    q = torch.ones(2, 7, 6, dtype=torch.float64)
    loss = make(temperature=0.2).global_loss(q, q, T0).loss
    assert loss.item() == pytest.approx(4 * 0.2 * math.log(7), abs=1e-12)


def test_the_student_sees_corrupted_crops_and_the_teacher_clean_ones():
    method, views = make(), random_views(3, n_local=0)
    S, T = method.encode(views, T0, patches=True)
    assert len(S) == len(T) == 2
    for v, s, t in zip(views.global_crops, S, T, strict=True):
        torch.testing.assert_close(s.cls, method.student.encoder(v.corrupted).cls, rtol=0, atol=1e-12)
        torch.testing.assert_close(t.cls, method.teacher.encoder(v.images).cls, rtol=0, atol=1e-12)


def test_what_is_kept_is_not_reconstructed():
    """The error is of replaced pixels: another image under the kept ones changes the targets of nothing."""
    method, views = make(), random_views(3, n_local=0)
    S, T = method.encode(views, T0, patches=True)

    def pixels(at_replaced: bool) -> torch.Tensor:
        crops = []
        for v in views.global_crops:
            where = v.pixel_mask if at_replaced else ~v.pixel_mask
            crops.append(replace(v, images=v.images + 3.0 * where[:, None]))
        z_t = method.teacher.project(T)
        return method.other_losses(S, T, z_t, replace(views, global_crops=crops), T0).loss

    unchanged = method(views, T0).terms["pixels"]
    torch.testing.assert_close(pixels(at_replaced=False), unchanged, rtol=0, atol=1e-12)
    assert abs(pixels(at_replaced=True) - unchanged) > 0.1


def test_the_default_puts_exact_zeros_of_normalised_space_or_another_image():
    views = ViewsConfig(global_size=32, local_crops=0)
    data = ViewDataset(open_source("scenes:8"), views, SiT.view_spec(SiTConfig()), 8, 0)
    batch, _ = collate([data[0, i] for i in range(8)])
    raw = batch.global_crops[0]
    view = batch.on_device(torch.device("cpu"), torch.tensor(views.mean), torch.tensor(views.std)).global_crops[0]
    zeroed = 0
    for b in range(8):
        replaced = view.corrupted[b][:, view.pixel_mask[b]]
        assert replaced.numel()
        if (replaced == 0).all():
            zeroed += 1
            assert 0.5 <= view.pixel_mask[b].float().mean() < 0.6
        else:  # the same pixels of another image of the batch, at most 0.3 of them and a little over
            assert any(torch.equal(replaced, view.images[a][:, view.pixel_mask[b]]) for a in range(8))
            assert 0.3 <= view.pixel_mask[b].float().mean() < 0.4
    assert 0 < zeroed < 8
    assert set(raw.pixel_mask.unique().tolist()) == {0, 1, 3}  # kept, copied, zeros: no noise


def test_everything_but_the_teacher_learns_and_the_teacher_follows():
    method, views = make(teacher_momentum=0.9), random_views(3, n_local=0)
    step = method(views, T0)
    step.loss.backward()
    for name, p in method.named_parameters():
        assert (p.grad is not None) == (not name.startswith("teacher.")), name
    before = [p.clone() for p in method.teacher.parameters()]
    method.update([step.carry], T0)
    for t, old, s in zip(method.teacher.parameters(), before, method.student.parameters(), strict=True):
        torch.testing.assert_close(t, 0.9 * old + 0.1 * s, rtol=0, atol=1e-12)
    assert method.encoder is method.teacher.encoder


def test_one_changed_setting_of_the_corruption_leaves_the_others():
    """Not those of MMC and GMML, which share its fields."""
    corruption = SiTConfig.model_validate({"corruption": {"align": 8}}).corruption
    assert (corruption.align, corruption.kinds, corruption.share) == (8, ("zeros",), 0.5)


def test_mte_wraps_it():
    """Both losses between image-level vectors are SiT's contrast; the pixels are added once."""
    torch.manual_seed(0)
    config = MTEConfig(base=SiTConfig(**SMALL, weight_pixels=3.0), aux=2, pooled=2, pool_kernel=3)
    method = build(tiny_encoder(MTE.token_spec(config)), config).double()
    views = random_views(3, n_local=0)
    S, T = method.base.encode(views, T0, patches=True)
    z_a, z_t = method.student_ensemble(S), method.teacher_ensemble(T)
    step = method(views, T0)
    assert set(step.terms) == {"ensemble", "distill", "pixels"}
    for name, q in (("ensemble", z_a), ("distill", method.student.project(S))):
        expected = method.base.global_loss(q, z_t, T0).loss
        torch.testing.assert_close(step.terms[name], expected, rtol=0, atol=1e-12)
    pixels = method.base(views, T0).terms["pixels"]
    torch.testing.assert_close(step.terms["pixels"], pixels, rtol=0, atol=1e-12)
    total = step.terms["ensemble"] + step.terms["distill"] + 3 * pixels
    torch.testing.assert_close(step.loss, total, rtol=0, atol=1e-12)
