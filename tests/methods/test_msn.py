"""MSN: the equation as loops, and the numbers of the authors' code (facebookresearch/msn 4388dc1)."""

import math

import pytest
import torch
from pydantic import ValidationError

from conftest import random_views, tiny_encoder
from triptych.data.views import Views
from triptych.losses import balanced
from triptych.methods import MSNConfig, MTEConfig, build
from triptych.methods.msn import MSN
from triptych.optim import OptimConfig, exempt, parameter_groups
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

SMALL = {"hidden": 16, "embedding": 6, "prototypes": 8}
T0 = Progress(0, 10)
CASES = ["c0", "c1", "c2", "c3"]


def make(**options) -> MSN:
    torch.manual_seed(0)
    method = build(tiny_encoder(TokenSpec()), MSNConfig(**{**SMALL, **options})).double()
    with torch.no_grad():  # a teacher that is not the student, heads whose vectors differ
        for p in (*method.teacher.parameters(), *method.student.projector.parameters()):
            p.add_(0.1 * torch.randn_like(p))
    return method


def test_the_loss_is_the_equation_written_as_loops():
    method, views = make(sharpen=0.5, weight_memax=0.7), random_views(3)
    S, T = method.student, method.teacher
    (target, anchor), K = views.global_crops, 8
    tokens = [S.encoder(anchor.images, keep=anchor.keep).cls, *(S.encoder(v.images).cls for v in views.local_crops)]
    z = S.projector(torch.cat(tokens)).unflatten(0, (3, 3))  # one batch of BatchNorm for all anchors
    z_t = T.projector(T.encoder(target.images).cls)
    w = method.prototypes.direction

    def assign(v):
        e = [torch.exp(v @ w[k] / (v.norm() * w[k].norm()) / 0.1) for k in range(K)]
        return [x / sum(e) for x in e]

    match, mean = 0.0, [0.0] * K
    for a in range(3):
        for b in range(3):
            p, q = assign(z[a, b]), [x**2 for x in assign(z_t[b])]
            match -= sum(q[k] / sum(q) * torch.log(p[k]) for k in range(K)) / 9
            mean = [mean[k] + p[k] / 9 for k in range(K)]
    memax = math.log(K) + sum(m * torch.log(m) for m in mean)
    out = method(views, T0)
    torch.testing.assert_close(out.terms["match"], match, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.terms["memax"], memax, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.loss, match + 0.7 * memax, rtol=0, atol=1e-12)


def authors(golden, case, **changes):
    """The golden case, and the method with its settings and prototypes, which are stored as they are, not unit."""
    g = {k[3:]: v for k, v in golden("msn_loss").items() if k.startswith(case)}
    K, P = g["prototypes"].shape
    # Their labels are fp32: 1 − s + s/K on the diagonal, s/K beside it, both rounded.
    off = round(K * g["proto_labels"][0, 1].item(), 6)
    expected = (1 - off) * torch.eye(K).double() + off / K
    torch.testing.assert_close(g["proto_labels"], expected, rtol=0, atol=1e-7 if off else 0)
    settings = {
        "prototypes": K,
        "embedding": P,
        "temperature": float(g["tau"]),
        "sharpen": float(g["sharpen"]),
        "sinkhorn": 3 if g["sinkhorn"] else 0,
        "weight_memax": float(g["w_memax"]),
        "weight_entropy": float(g["w_entropy"]),
        "smoothing": off,
    }
    method = make(**{**settings, **changes})
    with torch.no_grad():
        method.prototypes.direction.copy_(g["prototypes"])
    anchors = g["anchors"].clone().requires_grad_()
    return g, method, anchors, anchors.unflatten(0, (int(g["num_views"]), -1))


def plain_assign(method, z):
    """p without smoothing."""
    w = method.prototypes.direction
    return ((z @ w.T) / (z.norm(dim=-1, keepdim=True) * w.norm(dim=-1)) / method.config.temperature).softmax(-1)


@pytest.mark.parametrize("case", CASES)
def test_loss_targets_and_gradients_equal_the_authors(golden, case):
    g, method, anchors, by_view = authors(golden, case)
    if method.config.smoothing:  # the same to 1e-7, the rounding of their labels; with the rounded ones, exactly
        ours, smooth = method.global_loss(by_view, g["targets"][None], T0).loss, method.assign
        torch.testing.assert_close(ours, g["total"], rtol=0, atol=1e-6)
        torch.testing.assert_close(
            smooth(anchors), plain_assign(method, anchors) @ g["proto_labels"], rtol=0, atol=1e-7
        )
        method.assign = lambda z: plain_assign(method, z) @ g["proto_labels"]
    out = method.global_loss(by_view, g["targets"][None], T0)
    out.loss.backward()
    torch.testing.assert_close(out.terms["match"], g["ce"], rtol=0, atol=1e-12)
    torch.testing.assert_close(out.terms["memax"], g["memax"], rtol=0, atol=1e-12)
    torch.testing.assert_close(out.loss, g["total"], rtol=0, atol=1e-12)
    if g["w_entropy"]:
        torch.testing.assert_close(out.terms["entropy"], g["entropy"], rtol=0, atol=1e-12)
    targets = method.targets(g["targets"])
    tiled = targets.repeat(int(g["num_views"]), 1)  # view by view, like the anchors
    torch.testing.assert_close(tiled, g["assignments_tiled"], rtol=0, atol=1e-12)
    assert len(set(targets.argmax(1).tolist())) == int(g["num_used_protos"])
    torch.testing.assert_close(anchors.grad, g["grad_anchors"], rtol=0, atol=1e-12)
    torch.testing.assert_close(method.prototypes.direction.grad, g["grad_prototypes"], rtol=0, atol=1e-12)


def test_the_entropy_term_equals_the_authors_where_its_weight_is_0(golden):
    g, method, _, by_view = authors(golden, "c1", weight_entropy=1.0)
    torch.testing.assert_close(
        method.global_loss(by_view, g["targets"][None], T0).terms["entropy"], g["entropy"], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_balanced_targets_equal_the_authors(golden, iterations):
    g = golden("msn_sinkhorn")
    codes = balanced(g["scores"], iterations)
    torch.testing.assert_close(codes, g[f"out_iters{iterations}"], rtol=0, atol=1e-12)


def test_learning_rate_weight_decay_and_momentum_equal_the_authors(golden):
    """A schedule of 1.25 runs, cut off; rate and decay are one step ahead, the momentum is not."""
    g = {k: v if v.ndim else v.item() for k, v in golden("msn_schedules").items()}
    optim = OptimConfig(
        lr=g["peak_lr"],
        min_lr=g["final_lr"],
        warmup=g["warmup_epochs"],
        warmup_start=g["start_lr"],
        weight_decay=g["wd0"],
        weight_decay_end=g["wd1"],
        schedule="msn",
        horizon=g["horizon_factor"],
    )
    assert g["ema1"] == 1
    method = make(teacher_momentum=g["ema0"], momentum_horizon=g["horizon_factor"])
    total = g["epochs"] * g["iters_per_epoch"]
    for schedule, key in zip((*optim.rates(256), method.momentum), ("lr", "wd", "ema"), strict=True):
        ours = [schedule(Progress(s, total, g["iters_per_epoch"])) for s in range(total)]
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), g[key], rtol=0, atol=1e-12)


def test_me_max_is_0_for_a_uniform_mean_and_ln_k_for_a_collapsed_one():
    method = make(temperature=0.01, prototypes=6)
    with torch.no_grad():
        method.prototypes.direction.copy_(torch.eye(6))
    every, one = torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)[:1].expand(6, -1)
    assert method.global_loss(every[None], every[None], T0).terms["memax"].item() == pytest.approx(0, abs=1e-12)
    collapsed = method.global_loss(one[None], one[None], T0)
    assert collapsed.terms["memax"].item() == pytest.approx(math.log(6), abs=1e-12)
    assert collapsed.terms["match"].item() == pytest.approx(0, abs=1e-12)
    blind = make(prototypes=6, temperature=1e6)  # every answer is the uniform one
    terms = blind.global_loss(every[None], every[None], T0).terms
    assert terms["match"].item() == pytest.approx(math.log(6), abs=1e-6)
    assert terms["memax"].item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_reaches_encoder_and_prototypes_through_anchors_only():
    method, views = make(), random_views(3)
    S, T = method.encode(views, T0, patches=True)
    z_s, z_t = method.student.project(S), method.teacher.project(T)
    assert z_s.requires_grad
    assert not z_t.requires_grad
    assert not method.targets(z_t[0].requires_grad_()).requires_grad
    method.global_loss(z_s.detach(), z_t, T0).loss.backward()  # anchors still meet trained prototypes
    alone = method.prototypes.direction.grad.clone()
    assert alone.any()
    assert z_t.grad is None
    # The same with targets of another, untrained set of prototypes: they add nothing.
    fixed = method.targets(z_t[0]).detach()
    method.zero_grad()
    match = -(fixed * method.assign(z_s.detach()).log()).sum(-1).mean()
    mean = method.assign(z_s.detach()).mean((0, 1))
    (match + (mean * mean.log()).sum()).backward()
    torch.testing.assert_close(method.prototypes.direction.grad, alone, rtol=0, atol=1e-12)


def test_prototypes_are_neither_decayed_nor_clipped():
    method = make()
    decayed, plain = ({id(p) for p in group["params"]} for group in parameter_groups(method))
    prototypes = method.prototypes.direction
    assert id(prototypes) in plain - decayed
    assert id(method.student.projector[0].weight) in decayed
    trained = {id(p) for p in method.parameters() if p.requires_grad}
    assert exempt(method) & trained == {id(prototypes)}
    assert not method.prototypes.gain.requires_grad  # unit length in the loss, whatever is stored
    with torch.no_grad():
        prototypes.mul_(7)
    torch.testing.assert_close(method.prototypes.weight.norm(dim=-1), torch.ones(8).double())


def test_the_target_is_whole_and_the_anchor_sees_its_kept_patches_only():
    method, views = make(), random_views(3)
    S, T = method.encode(views, T0, patches=True)
    (target, anchor), local = views.global_crops, views.local_crops
    assert (len(S), len(T)) == (3, 1)
    torch.testing.assert_close(T[0].cls, method.teacher.encoder(target.images).cls, rtol=0, atol=1e-12)
    expected = method.student.encoder(anchor.images, keep=anchor.keep).cls
    torch.testing.assert_close(S[0].cls, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(S[1].cls, method.student.encoder(local[0].images).cls, rtol=0, atol=1e-12)
    assert S[0].patch.shape[1] == anchor.keep.shape[1] < T[0].patch.shape[1]
    assert MSN.view_spec(MSNConfig(drop=0.3)).drop == 0.3
    assert MSN.view_spec(MSNConfig(drop=0)).drop is None


def test_with_shared_drop_all_images_lose_the_patches_of_the_first():
    views = random_views(3)
    keep = views.global_crops[1].keep
    assert not torch.equal(keep[0], keep[1])
    alone, shared = (make(shared_drop=on).encode(views, T0)[0][0].cls for on in (False, True))
    method = make(shared_drop=True)
    expected = method.student.encoder(views.global_crops[1].images, keep=keep[:1].expand(3, -1)).cls
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(alone[0], shared[0], rtol=0, atol=1e-12)
    assert not torch.allclose(alone[1], shared[1])
    assert torch.equal(views.global_crops[1].keep, keep)  # the batch itself is left as it is


def test_without_local_crops_and_without_dropping_the_second_crop_is_the_only_anchor():
    views = random_views(3, n_local=0)
    bare = Views([v.__class__(**vars(v) | {"keep": None}) for v in views.global_crops], [])
    method = make(drop=0, shared_drop=True)
    S, _ = method.encode(bare, T0)
    assert len(S) == 1
    torch.testing.assert_close(S[0].cls, method.student.encoder(bare.global_crops[1].images).cls)
    assert method(bare, T0).loss.isfinite()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.005},
        {"sharpen": 0.02},
        {"sharpen": 0.02, "temperature": 10.0},
        {"sharpen": 0.02, "sinkhorn": 3},  # prototypes that no target comes near: whole columns of zeros
        {"temperature": 0.02, "sinkhorn": 3},
    ],
)
def test_extreme_temperatures_stay_finite_in_single_precision(options):
    """A probability that rounds to 0, and one whose power does: neither takes the loss or a gradient with it."""
    method, views = make(**options, prototypes=64).float(), random_views(3, dtype=torch.float32)
    out = method(views, T0)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    with torch.no_grad():
        targets = method.targets(method.teacher.project(method.encode(views, T0, patches=True)[1])[0])
    torch.testing.assert_close(targets.sum(-1), torch.ones(3))


def test_the_teacher_moves_and_the_prototypes_have_none():
    method, views = make(teacher_momentum=0.5, momentum_horizon=1.0), random_views(3)
    before = [p.clone() for p in method.teacher.parameters()]
    directions = method.prototypes.direction.clone()
    method.update([method(views, T0).carry], T0)
    for old, new, p in zip(before, method.teacher.parameters(), method.student.parameters(), strict=True):
        torch.testing.assert_close(new, (old + p) / 2, rtol=0, atol=1e-12)
    assert torch.equal(method.prototypes.direction, directions)
    assert not any("prototypes" in n for n, _ in method.teacher.named_parameters())


def test_mte_refuses_pooled_tokens_and_pairs_of_one_view():
    base = MSNConfig(**SMALL)
    with pytest.raises(ValidationError, match="set pooled 0"):
        MTEConfig(base=base, aux=2, pooled=2)
    with pytest.raises(ValidationError, match="same_view false"):
        MTEConfig(base=base, aux=2, pooled=0, same_view=True)
    assert MTEConfig(base=base, aux=2, pooled=0).base == base
    assert MTEConfig(base=base.model_copy(update={"drop": 0.0}), aux=2, pooled=2).pooled == 2
