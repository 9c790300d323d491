"""MMC: the equations as loops, the readings of the specification, and the numbers of SiT's code (Sara-Ahmed/SiT 7f22e9c).

No official MMC code exists: `mmc_spec_losses` holds the team's own evaluation of each reading, a check of consistency.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import random_views, tiny_encoder
from triptych.data.views import Views
from triptych.encoders.vit import ViT
from triptych.errors import UserError
from triptych.heads import PixelHead, sit_head
from triptych.losses import contrast, masked_error, unit
from triptych.methods import MMCConfig, build
from triptych.methods.mmc import MMC
from triptych.patch_contrast import log_sum_exp, patch_contrast
from triptych.schedules import Progress
from triptych.tokens import Tokens, TokenSpec

SMALL = {"hidden": 16, "embedding": 6}
T0 = Progress(0, 10)
READINGS = {
    "same_position": "patch_other_images_same_position",
    "all_positions": "patch_other_images_all_positions",
    "everything": "patch_every_other_patch",
}


def make(**options) -> MMC:
    torch.manual_seed(0)
    method = build(tiny_encoder(TokenSpec()), MMCConfig(**SMALL, **options)).double()
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return method


def test_the_loss_is_the_papers_three_written_as_loops():
    method, views, tau = make(), random_views(3, n_local=0), 0.2
    S, T, G = method.student, method.teacher, views.global_crops
    loss = method(views, T0).loss
    s = [S.encoder(v.corrupted) for v in G]
    t = [T.encoder(v.images) for v in G]

    mim = count = 0.0  # (1): pixel by pixel
    for x, v in zip(s, G, strict=True):
        error = (method.pixels(x.patch, x.grid) - v.images).abs()
        for b in range(3):
            for i in range(16):
                for j in range(16):
                    if v.pixel_mask[b, i, j]:
                        mim, count = mim + error[b, :, i, j].sum(), count + 3
    mim = mim / count

    p = S.patch_projector(torch.cat([x.patch for x in s]).flatten(0, 1)).unflatten(0, (2, 3, 16))
    k = T.patch_projector(torch.cat([x.patch for x in t]).flatten(0, 1)).unflatten(0, (2, 3, 16))
    pat = 0.0  # (2)
    for v in range(2):
        for b in range(3):
            for i in range(16):
                e = [math.e ** (F.cosine_similarity(p[v, b, i], k[v, c, i], dim=0) / tau) for c in range(3)]
                pat -= torch.log(e[b] / sum(e)) / (2 * 3 * 16)

    c = S.projector(torch.cat([x.cls for x in s])).unflatten(0, (2, 3))
    g = T.projector(torch.cat([x.cls for x in t])).unflatten(0, (2, 3))
    cls = 0.0  # (3)
    for v, u in ((0, 1), (1, 0)):
        for b in range(3):
            e = [math.e ** (F.cosine_similarity(c[v, b], g[u, a], dim=0) / tau) for a in range(3)]
            cls -= torch.log(e[b] / sum(e)) / 3
    torch.testing.assert_close(loss, mim + 2 * tau * pat + 2 * tau * cls, rtol=0, atol=1e-12)


@pytest.mark.parametrize("negatives", READINGS)
@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_patch_contrast_is_its_definition_however_it_is_cut_into_blocks(golden, negatives, block):
    g = golden("mmc_spec_losses")
    p = unit(g["student_tokens"]).requires_grad_()
    elements = patch_contrast(p, unit(g["teacher_tokens"]), float(g["temp"]), negatives, block)
    torch.testing.assert_close(elements, g[f"{READINGS[negatives]}_elements"], rtol=0, atol=1e-12)
    torch.testing.assert_close(elements.mean(), g[f"{READINGS[negatives]}_mean_all"], rtol=0, atol=1e-12)
    of_masked = elements[g["masked"]].mean()
    torch.testing.assert_close(of_masked, g[f"{READINGS[negatives]}_mean_masked"], rtol=0, atol=1e-12)
    weight = torch.randn_like(elements)
    (grad,) = torch.autograd.grad((elements * weight).sum(), p)
    (expected,) = torch.autograd.grad((whole(p, unit(g["teacher_tokens"]), negatives) * weight).sum(), p)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def whole(p, t, negatives):
    """The same from the matrix of all pairs."""
    B, N = p.shape[1:3]
    scores = torch.einsum("vbip,vcjp->vbicj", p, t) / 0.2
    b, i, c, j = torch.meshgrid(*(torch.arange(n) for n in (B, N, B, N)), indexing="ij")
    own = (b == c) & (i == j)
    keys = {"same_position": i == j, "all_positions": (b != c) | own, "everything": own | True}[negatives]
    lse = scores.masked_fill(~keys, -math.inf).flatten(3).logsumexp(-1)
    return lse - (p * t).sum(-1) / 0.2


def test_the_log_sum_exp_passes_gradcheck_and_holds_no_matrix_of_all_pairs():
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 7, 3, dtype=torch.float64)
    groups = torch.arange(5) % 3, torch.arange(7) % 3
    for which in (None, groups):
        assert torch.autograd.gradcheck(lambda q, which=which: log_sum_exp(q, k, 0.3, which, 4), q)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        log_sum_exp(q, k, 0.3)
    assert saved == [q.shape]  # one mean key per row


def test_an_image_alone_has_no_negatives_and_is_refused():
    p = unit(torch.randn(2, 1, 4, 5))
    for negatives in ("same_position", "all_positions"):
        with pytest.raises(UserError, match="needs two images"):
            patch_contrast(p, p, 0.2, negatives)
    with pytest.raises(UserError, match="needs two images"):
        make(weights=(1, 0, 1), head_norm=False)(random_views(1), T0)
    assert patch_contrast(p, p, 0.2, "everything").gt(0).all()  # other patches of the image are negatives too


@pytest.mark.parametrize(("scored", "key"), [("all", "mean_all"), ("masked", "mean_masked")])
def test_which_patches_are_scored(golden, scored, key):
    g = golden("mmc_spec_losses")
    method = make(scored=scored, scale=1.0)
    for tower in (method.student, method.teacher):
        tower.patch_projector = torch.nn.Identity()
    tokens = [[Tokens(patch=x, patch_raw=x, grid=(2, 3)) for x in g[f"{who}_tokens"]] for who in ("student", "teacher")]
    views = random_views(5, size=12, n_local=0)

    def place(view, masked):  # the golden file has 2 x 3 patches, of 4 pixels each here
        shown = masked.unflatten(1, (2, 3)).repeat_interleave(4, 1).repeat_interleave(4, 2)
        return view.__class__(**vars(view) | {"pixel_mask": shown})

    views = Views([place(v, m) for v, m in zip(views.global_crops, g["masked"], strict=True)], [])
    loss = method.distillation(*tokens, views)
    torch.testing.assert_close(loss, g[f"patch_other_images_same_position_{key}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("pairs", "key"), [("cross", "cls_cross_view_sum"), ("same", "cls_same_view_sum")])
def test_global_contrast_in_each_reading(golden, pairs, key):
    g = golden("mmc_spec_losses")
    q, k = g["student_cls"], g["teacher_cls"]
    plain = make(pairs=pairs, scale=1.0).global_loss(q, k, T0).loss
    torch.testing.assert_close(plain, g[key], rtol=0, atol=1e-12)
    scaled = make(pairs=pairs).global_loss(q, k, T0).loss
    torch.testing.assert_close(scaled, g["two_temp_factor"] * g[key], rtol=0, atol=1e-12)
    mean = make(pairs=pairs, scale=1.0, directions="mean").global_loss(q, k, T0).loss
    torch.testing.assert_close(mean, g[key] / 2, rtol=0, atol=1e-12)
    both = make(pairs="both", scale=1.0).global_loss(q, k, T0).loss
    torch.testing.assert_close(both, g["cls_cross_view_sum"] + g["cls_same_view_sum"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_global_contrast_and_gradient_equal_sits(golden, case):
    g = golden("sit_contrast")
    q = g[f"{case}_student"].clone().requires_grad_()
    loss = make(temperature=float(g[f"{case}_temp"])).global_loss(
        q.unflatten(0, (2, -1)), g[f"{case}_teacher"].unflatten(0, (2, -1)), T0
    )
    loss.loss.backward()
    torch.testing.assert_close(loss.loss, g[f"{case}_loss"], rtol=0, atol=1e-12)
    torch.testing.assert_close(q.grad, g[f"{case}_grad_student"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_local_crops_meet_both_global_crops(who):
    """M1: queries of the student; M2: keys of the teacher.  The mean over all pairs, times the two directions."""
    torch.manual_seed(1)
    method = make(local_crops=who, local_weight=0.5, scale=1.0)
    q, k = (torch.randn(4 if who == name else 2, 3, 6, dtype=torch.float64) for name in ("student", "teacher"))
    keys = unit(k)
    local = [contrast(q[a], keys[b], 0.2) for a in range(len(q)) for b in range(len(k)) if a > 1 or b > 1]
    whole = contrast(q[0], keys[1], 0.2) + contrast(q[1], keys[0], 0.2)
    assert len(local) == 4
    expected = 2 * (whole + 0.5 * sum(local)) / (2 + 0.5 * 4)
    torch.testing.assert_close(method.global_loss(q, k, T0).loss, expected, rtol=0, atol=1e-12)
    S, T = method.encode(random_views(3), T0)
    assert [len(S), len(T)] == ([4, 2] if who == "student" else [2, 4])


def test_the_student_sees_what_is_corrupted_and_the_teacher_what_is_not():
    method, views = make(), random_views(3)
    S, T = method.encode(views, T0, patches=True)
    for v, s, t in zip(views.global_crops, S, T, strict=False):
        torch.testing.assert_close(s.cls, method.student.encoder(v.corrupted).cls, rtol=0, atol=1e-12)
        torch.testing.assert_close(t.cls, method.teacher.encoder(v.images).cls, rtol=0, atol=1e-12)
    torch.testing.assert_close(S[2].cls, method.student.encoder(views.local_crops[0].images).cls, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (2, 3, 4)])
def test_every_combination_of_losses_trains_all_that_it_has(weights):
    """Heads of a loss that is left out are not trained, and what is trained gets a gradient: DDP asks for both."""
    method, views = make(weights=weights), random_views(3, n_local=0)
    out = method(views, T0)
    out.loss.backward()
    assert [p.grad is not None for p in method.parameters()] == [p.requires_grad for p in method.parameters()]
    names = [n for n, w in zip(("pixels", "patch", "class"), weights, strict=True) if w]
    assert set(out.terms) == set(names)
    ran = []
    teacher = method.teacher.encoder.vit.norm  # of every pass through the encoder
    for module in (teacher, method.student.projector, method.teacher.projector):
        module.register_forward_hook(lambda m, *_: ran.append(m))
    method(views, T0)
    assert (teacher in ran) == bool(weights[1] or weights[2])  # and what is left out costs nothing
    assert (method.student.projector in ran) == (method.teacher.projector in ran) == bool(weights[2])
    scaled = [w * out.terms[n] for n, w in zip(("pixels", "patch", "class"), weights, strict=True) if w]
    torch.testing.assert_close(out.loss, sum(scaled))


def test_no_loss_at_all_is_refused():
    with pytest.raises(ValueError, match="leave no loss"):
        MMCConfig(weights=(0, 0, 0))


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_masked_reconstruction_and_its_gradient_equal_sits(golden, kind):
    g = golden("sit_masked_recon")
    x = g["pred"].clone().requires_grad_()
    loss = masked_error(x, g["target"], g["mask"][:, 0].bool(), kind)
    torch.testing.assert_close(loss, g["l1" if kind == "l1" else "mse"], rtol=0, atol=1e-12)
    if kind == "l1":
        loss.backward()
        torch.testing.assert_close(x.grad, g["grad_pred_l1"], rtol=0, atol=1e-12)


def test_the_projection_head_equals_sits(golden):
    """Linear, BN, ReLU, Linear, BN, GELU, Linear, BN without scale; in train mode."""
    g = golden("sit_projection_head")
    head = sit_head(6, 10, 5).double()
    with torch.no_grad():
        for index in (0, 1, 3, 4, 6):
            head[index].weight.copy_(g[f"p.layer{index}.w"])
            head[index].bias.copy_(g[f"p.layer{index}.b"])
    x = g["x"].clone().requires_grad_()
    torch.testing.assert_close(head(x), g["out"], rtol=0, atol=1e-12)
    # One BatchNorm over all views.
    torch.testing.assert_close(head(x[:6].unflatten(0, (2, 3))).flatten(0, 1), head(x[:6]), rtol=0, atol=1e-12)


def test_the_pixel_head_equals_sits(golden):
    g = golden("sit_recon_head")
    head = PixelHead(6, int(g["patch"])).double()
    with torch.no_grad():
        for index in (0, 2, 4):
            head.mlp[index].weight.copy_(g[f"p.layer{index}.w"])
            head.mlp[index].bias.copy_(g[f"p.layer{index}.b"])
        head.pixels.weight.copy_(g["p.unfold.w"])
        head.pixels.bias.copy_(g["p.unfold.b"])
    torch.testing.assert_close(head(g["tokens"], (int(g["grid"]),) * 2), g["image"], rtol=0, atol=1e-12)


def test_pixels_may_be_read_from_several_blocks():
    """GMML's reading: the mean of blocks before the final norm, which follows."""
    encoder: ViT = tiny_encoder(TokenSpec()).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    taps = encoder.layers(images, [0, 1])
    mixed = encoder.mixed(images, (1, 2))
    torch.testing.assert_close(mixed.mixed, encoder.vit.norm((taps[0].patch_raw + taps[1].patch_raw) / 2))
    assert torch.equal(mixed.patch, encoder(images).patch)
    with pytest.raises(UserError, match="block 3: this encoder has blocks 1 to 2"):
        make(pixel_blocks=(2, 3))
    with pytest.raises(UserError, match="leave block 2 untrained"):
        make(pixel_blocks=(1,), weights=(1, 0, 0))
    assert make(pixel_blocks=(1, 2))(random_views(3), T0).loss.isfinite()
