"""MTE: the losses over several bases as loops, what each setting means, and removal without a trace.  No code of the
authors is public: nothing here is compared with their numbers."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from conftest import random_views, tiny_encoder, tiny_swin
from triptych.ensemble import TEN, AdaptivePooling, Ensemble, EnsembleConfig
from triptych.heads import MLP
from triptych.methods import (
    METHODS,
    BYOLConfig,
    DINOConfig,
    HSSLConfig,
    MoBYConfig,
    MoCoV3Config,
    MTEConfig,
    SimCLRConfig,
    SupervisedConfig,
    SwAVConfig,
    build,
    iBOTConfig,
)
from triptych.methods.mte import MTE
from triptych.optim import OptimConfig, make_optimizer, set_rates
from triptych.schedules import Progress
from triptych.tokens import Tokens, TokenSpec

PROTOTYPES = {"hidden": 16, "embedding": 6, "prototypes": 8}
TEMPS = {"teacher_temp": 0.05, "teacher_temp_warmup": 0}
DINO = DINOConfig(**PROTOTYPES, **TEMPS)
IBOT = iBOTConfig(**PROTOTYPES, **TEMPS)
CONTRAST = {"hidden": 16, "embedding": 6}
BYOL, MOCOV3, MOBY = BYOLConfig(**CONTRAST), MoCoV3Config(**CONTRAST), MoBYConfig(**CONTRAST, queue=7)
TOKENS = {"aux": 2, "pooled": 2, "pool_kernel": 3}
T = Progress(7, 20, 5)


def make(base, encoder=tiny_encoder, **options):
    """MTE with a teacher that is not the student and centres that are not 0."""
    torch.manual_seed(0)
    config = MTEConfig(base=base, **{**TOKENS, **options})
    method = build(encoder(MTE.token_spec(config)), config).double()
    with torch.no_grad():
        for name, p in method.named_parameters():
            p.add_(0.1 * torch.randn_like(p) if "teacher" in name else 0)
        for name, b in method.named_buffers():
            if name.endswith("center"):
                b.uniform_(-0.3, 0.3)
    return method


def fused(ensemble, tokens):
    """(V, B, P): the mean of every token's own head, (3)."""
    views = []
    for x in tokens:
        a = ensemble.tokens(x)
        views.append(sum(ensemble.heads[i](a[i]) for i in range(len(a))) / len(a))
    return torch.stack(views)


def embeddings(method, views):
    """Student's (z_a, z_g) and the teacher's z_a."""
    S, T = method.base.encode(views, Progress(7, 20, 5), patches=True)
    z_g = torch.stack([method.student.projector(x.global_token) for x in S])
    return fused(method.student_ensemble, S), z_g, fused(method.teacher_ensemble, T)


def dino_loss(base, z_s, z_t, center, same_view=False):
    """Mean over images and pairs of different views, of cross-entropies."""
    w_s, w_t, total, count = base.student.prototypes, base.teacher.prototypes, 0.0, 0
    for u in range(len(z_t)):
        for v in range(len(z_s)):
            if u == v and not same_view:
                continue
            for b in range(z_s.shape[1]):
                P_t = torch.softmax((w_t(z_t[u, b]) - center) / 0.05, -1)
                P_s = torch.softmax(w_s(z_s[v, b]) / 0.1, -1)
                total += sum(-P_t[k] * torch.log(P_s[k]) for k in range(8))
                count += 1
    return total / count


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def byol_loss(q, z):
    B = q.shape[1]
    return sum((2 - 2 * cosine(q[a, b], z[1 - a, b])) / B for a in (0, 1) for b in range(B))


def mocov3_loss(q, z, tau=0.2):
    total, B = 0.0, q.shape[1]
    for a in (0, 1):
        for i in range(B):
            exps = [torch.exp(cosine(q[a, i], z[1 - a, j]) / tau) for j in range(B)]
            total -= 2 * tau * torch.log(exps[i] / sum(exps)) / B
    return total


def moby_loss(q, z, queue, tau=0.2):
    total, B = 0.0, q.shape[1]
    for a in (0, 1):
        for i in range(B):
            own = torch.exp(cosine(q[a, i], z[1 - a, i]) / tau)
            others = sum(torch.exp(q[a, i] @ key / q[a, i].norm() / tau) for key in queue[1 - a])  # unit length
            total -= torch.log(own / (own + others)) / B
    return total


def close(ours, expected, tolerance=1e-11):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("base", [DINO, IBOT], ids=["dino", "ibot"])
@pytest.mark.parametrize("same_view", [False, True])
def test_the_loss_over_prototypes_is_equations_4_to_6_written_as_loops(base, same_view):
    """Fused and global student vectors learn from the fused teacher vector, of other views; patches as in the base."""
    method, views = make(base, same_view=same_view), random_views(3)
    with torch.no_grad():
        z_a, z_g, z_t = embeddings(method, views)
        aux = dino_loss(method.base, z_a, z_t, method.base.center)
        distill = dino_loss(method.base, z_g, z_t, method.base.center, same_view)
        step = method(views, T)
    close(step.terms["ensemble"], aux)
    close(step.terms["distill"], distill)
    patch = 0.0
    if base is IBOT:
        alone = METHODS[iBOTConfig](method.base.student.encoder, base).double()
        alone.load_state_dict(method.base.state_dict())
        patch = alone(views, T).terms["patch"]  # tests/methods/test_ibot.py has it as loops
        assert patch > 0
    close(step.loss, aux + distill + patch)


@pytest.mark.parametrize("predictor", ["own", "shared"])
@pytest.mark.parametrize("base", [BYOL, MOCOV3, MOBY], ids=["byol", "mocov3", "moby"])
def test_the_loss_over_predictors_is_equations_4_to_6_written_as_loops(base, predictor):
    """The fused vector has a predictor of its own, after fusion; keys, negatives and queue are fused vectors."""
    method, views = make(base, predictor=predictor), random_views(3)
    ours = method.aux_predictor if predictor == "own" else method.base.predictor
    assert (method.aux_predictor is None) == (predictor == "shared")
    with torch.no_grad():
        z_a, z_g, z_t = embeddings(method, replace(views, local_crops=[]))
        q_a, q_g = (torch.stack([p(z) for z in zs]) for p, zs in ((ours, z_a), (method.base.predictor, z_g)))
        queue = [method.base.queue] if base is MOBY else []
        loss = {BYOL: byol_loss, MOCOV3: mocov3_loss, MOBY: moby_loss}[base]
        close(method(views, T).loss, loss(q_a, z_t, *queue) + loss(q_g, z_t, *queue))


def test_the_centre_is_of_fused_vectors_alone():
    method, views = make(DINO), random_views(3)
    before = method.base.center.clone()
    with torch.no_grad():
        z_t = embeddings(method, views)[2]
        logits = method.teacher.prototypes(z_t)
    method.update([method(views, T).carry], T)
    close(method.base.center, 0.9 * before + 0.1 * logits.mean((0, 1)))


def test_the_patch_centre_is_the_bases():
    method, views = make(IBOT), random_views(3)
    before = method.base.patch_center.clone()
    with torch.no_grad():
        patches = torch.stack([x.patch for x in method.base.encode(views, T, patches=True)[1]])
        logits = method.teacher.prototypes(method.teacher.projector(patches))
    method.update([method(views, T).carry], T)
    close(method.base.patch_center, 0.9 * before + 0.1 * logits.mean((0, 1, 2)))


def test_the_queue_holds_fused_keys_alone():
    method, views = make(MOBY), random_views(3)
    z_t = embeddings(method, replace(views, local_crops=[]))[2]
    method.update([method(views, T).carry], T)
    close(method.base.queue[:, :3], z_t / z_t.norm(dim=-1, keepdim=True))
    assert method.base.oldest == 3


def test_both_losses_have_one_target():
    """With the same student vector in both places, they are the same number."""
    method, views = make(DINO), random_views(3)
    _, z_g, z_t = embeddings(method, views)
    close(method.base.global_loss(z_g, z_t, T).loss, method(views, T).terms["distill"], 1e-12)


def permute_tokens(method, aux: list[int], pooled: list[int]) -> None:
    """The auxiliary tokens in another order, each with its own head and its own convolutions."""
    with torch.no_grad():
        for tower, ensemble in (
            (method.student, method.student_ensemble),
            (method.teacher, method.teacher_ensemble),
        ):
            tower.encoder.aux_tokens.copy_(tower.encoder.aux_tokens[:, aux].clone())
            heads = [ensemble.heads[i] for i in [*aux, *(len(aux) + i for i in pooled)]]
            ensemble.heads = torch.nn.ModuleList(heads)
            for conv in (ensemble.pool.pointwise, ensemble.pool.depthwise):
                for p in conv.parameters():
                    p.copy_(torch.cat([p.clone().chunk(len(pooled))[i] for i in pooled]))


def test_permuting_tokens_together_with_their_heads_changes_nothing():
    method, views = make(DINO, aux=3, pooled=3), random_views(3)
    before = method(views, T)
    permute_tokens(method, [1, 2, 0], [2, 0, 1])
    close(method(views, T).loss, before.loss)
    method.student_ensemble.heads = torch.nn.ModuleList(reversed(method.student_ensemble.heads))  # but heads alone:
    assert abs(method(views, T).loss - before.loss) > 1e-6


def lone_average(base):
    """MTE on a Swin whose only auxiliary token is its global token, with the global token's head: the mean patch."""
    method = make(base, tiny_swin, aux=0, pooled=1, pooling="average")
    method.student_ensemble.heads[0].load_state_dict(method.student.projector.state_dict())
    if not method.teaches_itself:
        method.teacher_ensemble.heads[0].load_state_dict(method.teacher.projector.state_dict())
    if method.aux_predictor is not None:
        method.aux_predictor.load_state_dict(method.base.predictor.state_dict())
    return method


LONE = {"dino": DINO, "ibot": IBOT, "byol": BYOL, "mocov3": MOCOV3, "moby": MOBY}
LONE |= {"swav": SwAVConfig(**PROTOTYPES), "simclr": SimCLRConfig(**CONTRAST)}


@pytest.mark.parametrize("base", LONE.values(), ids=LONE)
def test_if_the_only_auxiliary_token_is_the_global_token_both_losses_are_the_bases(base):
    method, views = lone_average(base), random_views(4)
    expected = method.base.forward(views, T)
    own = expected.terms["class" if base is IBOT else base.name if base is not DINO else next(iter(expected.terms))]
    step = method(views, T)
    close(step.terms["ensemble"], own, 1e-10)
    close(step.terms["distill"], own, 1e-10)
    assert own > 0.01


def gradients(module):
    return [p.grad for p in module.parameters() if p.requires_grad]


def test_without_distillation_the_global_projector_learns_nothing():
    for weights, learns in (((1, 0), False), ((1, 1), True)):
        method = make(DINO, weights=weights)
        step = method(random_views(3), T)
        step.loss.backward()
        assert any(g is not None and bool(g.any()) for g in gradients(method.student.projector)) == learns
        assert all(bool(g.any()) for g in gradients(method.student_ensemble.heads))
        close(step.loss, step.terms["ensemble"] + (step.terms["distill"] if learns else 0))


@pytest.mark.parametrize("base", [DINO, IBOT, BYOL, MOCOV3, MOBY], ids=lambda c: c.name)
def test_target_own_is_the_base_itself_beside_an_ensemble_that_stands_still(base):
    method, views = make(base, target="own", weights=(0, 1)), random_views(4)
    alone = build(tiny_encoder(MTE.token_spec(method.config)), base).double()
    alone.load_state_dict(method.base.state_dict())
    ensemble = [
        {k: v.clone() for k, v in m.state_dict().items()} for m in (method.student_ensemble, method.teacher_ensemble)
    ]
    parameters = {n for n, p in method.named_parameters() if p.requires_grad}
    assert not any("ensemble" in n or "aux_predictor" in n for n in parameters)
    optimizers = [make_optimizer(m, OptimConfig()) for m in (method, alone)]
    for i in range(3):
        t = Progress(7 + i, 20, 5)
        steps = [m(views, t) for m in (method, alone)]
        assert torch.equal(steps[0].loss, steps[1].loss)
        for m, step, optimizer in zip((method, alone), steps, optimizers, strict=True):
            step.loss.backward()
            set_rates(optimizer, 1e-3, 0.04)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            m.update([step.carry], t)
    running = ("running_mean", "running_var", "num_batches_tracked")
    for module, before in zip((method.student_ensemble, method.teacher_ensemble), ensemble, strict=True):
        for name, value in module.state_dict().items():
            if module is method.student_ensemble and not name.endswith(running):
                assert torch.equal(value, before[name])
    for name, value in alone.state_dict().items():
        assert torch.equal(method.base.state_dict()[name], value), name


def test_predictions_are_the_fused_target_and_the_global_student_of_whole_views():
    for base in (DINO, IBOT):
        method, views = make(base), random_views(3)
        with torch.no_grad():
            S, T_ = (
                tower.encoder(v.images)
                for tower, v in zip((method.student, method.teacher), views.global_crops[::-1], strict=True)
            )
            z_t, z_g = fused(method.teacher_ensemble, [T_])[0], method.student.projector(S.cls)
            p_t = torch.softmax((method.teacher.prototypes(z_t) - method.base.center) / 0.05, -1)
            p_s = torch.softmax(method.student.prototypes(z_g) / 0.1, -1)
        for ours, expected in zip(method.predictions(views, T), (p_t, p_s), strict=True):
            close(ours, expected)


def test_of_a_base_that_teaches_itself_the_global_token_does_not_move_the_ensemble():
    """SwAV's codes and SimCLR's keys are made of the fused vector of the same network, but held fixed for (5)."""
    for base in (SwAVConfig(**PROTOTYPES), SimCLRConfig(**CONTRAST)):
        method = make(base, weights=(0, 1))
        assert method.teaches_itself
        assert not hasattr(method, "teacher_ensemble")
        method(random_views(4), T).loss.backward()
        assert not any(g is not None and bool(g.any()) for g in gradients(method.student_ensemble))
        assert all(bool(g.any()) for g in gradients(method.student.projector))


# ----- the ensemble -----


def ensemble_of(**options) -> Ensemble:
    torch.manual_seed(0)
    config = EnsembleConfig(**{**TOKENS, **options})
    heads = [MLP(12, 16, 6) for _ in range(1 if config.heads == "shared" else config.aux + config.pooled)]
    ensemble = Ensemble(tiny_encoder(TokenSpec(aux=config.aux)), config, heads).double()
    with torch.no_grad():
        for p in ensemble.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return ensemble


def random_tokens(grid=(2, 3), aux=2) -> Tokens:
    g = torch.Generator().manual_seed(3)
    names = {"patch": grid[0] * grid[1], "patch_raw": grid[0] * grid[1], "aux": aux, "aux_raw": aux}
    tensors = {name: torch.randn(4, n, 12, generator=g, dtype=torch.float64) for name, n in names.items()}
    return Tokens(**tensors, grid=grid, cls=torch.randn(4, 12, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("residual", [True, False])
def test_ten_is_attention_of_auxiliary_tokens_to_patches_then_an_mlp(residual):
    ten, x = ensemble_of(ten_residual=residual).ten, random_tokens()
    assert isinstance(ten, TEN)
    keep, d = float(residual), 12 // ten.heads
    k, v = ten.kv(ten.norm_kv(x.patch_raw)).chunk(2, -1)
    q = ten.q(ten.norm_q(x.aux_raw))
    out = ten(x.aux_raw, x.patch_raw)
    for b in range(4):
        for i in range(2):
            parts = []
            for h in range(ten.heads):
                at = slice(h * d, (h + 1) * d)
                scores = torch.stack([q[b, i, at] @ k[b, n, at] / math.sqrt(d) for n in range(6)]).softmax(0)
                parts.append(sum(scores[n] * v[b, n, at] for n in range(6)))
            u = keep * x.aux_raw[b, i] + ten.out(torch.cat(parts))
            close(out[b, i], ten.norm_out(keep * u + ten.mlp(ten.norm_mlp(u))), 1e-12)


def test_without_ten_a_token_is_the_encoders():
    x = random_tokens()
    assert torch.equal(ensemble_of(ten=False, pooled=0).tokens(x), x.aux.transpose(0, 1))


@pytest.mark.parametrize("read", ["raw", "normed"])
def test_ten_reads_tokens_before_or_after_the_final_norm(read):
    ensemble, x = ensemble_of(ten_input=read, pooled=0), random_tokens()
    other = ("aux", "patch") if read == "raw" else ("aux_raw", "patch_raw")
    spoilt = replace(x, **{name: torch.full_like(getattr(x, name), torch.nan) for name in other})
    assert torch.equal(ensemble.tokens(x), ensemble.tokens(spoilt))


@pytest.mark.parametrize("read", ["raw", "normed"])
def test_pooling_reads_patches_before_or_after_the_final_norm(read):
    other = "patch" if read == "raw" else "patch_raw"
    for pooling in ("adaptive", "average", "max"):
        ensemble, x = ensemble_of(pool_input=read, aux=0, pooling=pooling), random_tokens()
        spoilt = replace(x, **{other: torch.full_like(x.patch, torch.nan)})
        assert torch.equal(ensemble.tokens(x), ensemble.tokens(spoilt))


@pytest.mark.parametrize("pointwise", ["own", "shared"])
@pytest.mark.parametrize("weights", ["channels", "map"])
@pytest.mark.parametrize("gelu", [True, False])
def test_adaptive_pooling_is_equation_2_written_as_loops(pointwise, weights, gelu):
    """Point-wise convolution, activation, depth-wise convolution with zeros around the grid, product, mean."""
    ensemble = ensemble_of(aux=0, pool_pointwise=pointwise, pool_weights=weights, pool_gelu=gelu)
    pool, D, (H, W), k = ensemble.pool, 12, (2, 3), 3
    assert isinstance(pool, AdaptivePooling)
    X = random_tokens().patch[:1]
    out = pool(X, (H, W))
    pw, pb = pool.pointwise.weight[:, :, 0, 0], pool.pointwise.bias
    dw, db = pool.depthwise.weight[:, 0], pool.depthwise.bias
    for i in range(2):
        own = slice(i * D, (i + 1) * D)
        here = slice(0, D) if pointwise == "shared" else own
        a = {(r, c): pw[here] @ X[0, r * W + c] + pb[here] for r in range(H) for c in range(W)}
        a = {at: F.gelu(v) if gelu else v for at, v in a.items()}
        p = torch.zeros(D, dtype=torch.float64)
        for r in range(H):
            for c in range(W):
                A = db[own].clone()
                for m in range(k):
                    for n in range(k):
                        if (r + m - 1, c + n - 1) in a:
                            A = A + dw[own][:, m, n] * a[r + m - 1, c + n - 1]
                if weights == "map":  # one weight per place
                    A = pool.to_map.weight[i, :, 0, 0] @ A + pool.to_map.bias[i]
                p = p + A * X[0, r * W + c] / (H * W)
        close(out[0, i], p, 1e-12)


@pytest.mark.parametrize("pointwise", ["own", "shared"])
@pytest.mark.parametrize("weights", ["channels", "map"])
@pytest.mark.parametrize("softmax", [True, False])
def test_pooling_with_constant_weights_is_the_mean_patch(pointwise, weights, softmax):
    ensemble, x = (
        ensemble_of(aux=0, pool_pointwise=pointwise, pool_weights=weights, pool_softmax=softmax),
        random_tokens(),
    )
    with torch.no_grad():
        for conv in (ensemble.pool.pointwise, ensemble.pool.depthwise, ensemble.pool.to_map):
            if conv is not None:
                conv.weight.zero_()
                conv.bias.fill_(1)
    # Softmax weights go through fp32, where a sixth is not a sixth.
    close(ensemble.tokens(x), x.patch.mean(1).expand(2, -1, -1), 1e-6 if softmax else 1e-12)
    average = ensemble_of(aux=0, pooling="average")
    assert average.pool is None
    close(average.tokens(x), x.patch.mean(1).expand(2, -1, -1), 1e-12)


def test_maximum_pooling_is_of_each_channel():
    x = random_tokens()
    tokens = ensemble_of(aux=0, pooling="max").tokens(x)
    for b in range(4):
        for d in range(12):
            assert tokens[0, b, d] == tokens[1, b, d] == max(x.patch[b, n, d] for n in range(6))


@pytest.mark.parametrize("weights", ["channels", "map"])
def test_softmax_weights_sum_to_the_number_of_places(weights):
    x = random_tokens()
    ensemble = ensemble_of(aux=0, pool_softmax=True, pool_weights=weights)
    a = ensemble.pool.weights(x.patch, x.grid)
    assert a.shape == (4, 2, 12 if weights == "channels" else 1, 6)
    assert (a > 0).all()
    close(a.sum(-1), torch.full_like(a.sum(-1), 6), 1e-5)
    assert a.std(-1).max() > 0.01


@pytest.mark.parametrize("heads", ["own", "shared"])
@pytest.mark.parametrize("fusion", ["mean", "unit"])
def test_fusion_is_the_mean_of_raw_or_unit_length_projections(heads, fusion):
    ensemble, x = ensemble_of(heads=heads, fusion=fusion), random_tokens()
    a = ensemble.tokens(x)
    assert len(a) == len(ensemble.names()) == 4
    assert len(ensemble.heads) == (1 if heads == "shared" else 4)
    for b in range(4):
        z = [ensemble.heads[0 if heads == "shared" else i](a[i, b]) for i in range(4)]
        z = [v / v.norm() if fusion == "unit" else v for v in z]
        close(ensemble([x])[0, b], sum(z) / 4, 1e-12)


ABLATIONS = [
    {"aux": 0},
    {"pooled": 0},
    {"aux_sees": "not_global"},
    {"aux_sees": "patches"},
    {"aux_sees": "uncut"},
    {"ten": False},
    {"ten_input": "normed"},
    {"ten_residual": False},
    {"pooling": "average"},
    {"pooling": "max"},
    {"pool_input": "raw"},
    {"pool_kernel": 5},
    {"pool_pointwise": "shared"},
    {"pool_gelu": False},
    {"pool_weights": "map"},
    {"pool_softmax": True},
    {"heads": "shared"},
    {"fusion": "unit"},
]


def test_every_setting_of_the_ensemble_has_an_ablation():
    assert {name for options in ABLATIONS for name in options} == set(EnsembleConfig.model_fields)


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_every_ablation_trains_and_means_something(options):
    """The same weights wherever they fit, so that it is the setting that changes the loss."""
    default, views = make(DINO), random_views(3)
    changed = make(DINO, **options)
    own = changed.state_dict()
    changed.load_state_dict(
        own | {k: v for k, v in default.state_dict().items() if k in own and v.shape == own[k].shape}
    )
    step = changed(views, T)
    assert abs(step.loss - default(views, T).loss) > 1e-6
    step.loss.backward()
    trained = {n: p for n, p in changed.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    silent = {n for n, p in trained.items() if not p.grad.any()}
    # A constant of the scores is no part of a softmax.
    assert {n for n in silent if not n.endswith("depthwise.bias")} == set()


# ----- settings that do not go together -----


def test_a_base_that_cannot_be_wrapped_is_refused_with_the_names_of_those_that_can():
    with pytest.raises(
        ValidationError, match=r"'dino', 'ibot', 'mocov3', 'byol', 'moby', 'hssl', 'swav', 'simclr', 'udi'"
    ):
        MTEConfig(base=SupervisedConfig(classes=3))
    with pytest.raises(ValidationError, match="'supervised'"):
        MTEConfig(base={"name": "supervised", "classes": 3})
    with pytest.raises(ValidationError, match="'dino'"):
        MTEConfig(base=MTEConfig())


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValidationError, match="aux or pooled above 0"):
        MTEConfig(aux=0, pooled=0)
    with pytest.raises(ValidationError, match="weights 0 1"):
        MTEConfig(target="own")
    for base in (HSSLConfig(), SwAVConfig(), SimCLRConfig()):
        with pytest.raises(ValidationError, match=base.name):
            MTEConfig(target="own", weights=(0, 1), base=base)
    with pytest.raises(ValidationError, match="odd"):
        MTEConfig(pool_kernel=4)


# ----- removal -----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (8, 8)], ids=["native", "rectangular", "local"])
@pytest.mark.parametrize("sees", ["all", "not_global", "patches"])
def test_the_exported_encoder_gives_the_same_bits_without_auxiliary_tokens(dtype, size, sees):
    method = make(DINO, aux=3, aux_sees=sees).to(dtype)
    images = torch.randn(3, 3, *size, dtype=dtype)
    with torch.no_grad():
        kept, plain = method.encoder(images), method.encoder.without("aux")(images)
    assert plain.aux is None
    for role in ("cls", "patch", "patch_raw"):
        assert torch.equal(getattr(kept, role), getattr(plain, role)), role


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (8, 8)], ids=["native", "rectangular", "local"])
def test_uncut_auxiliary_tokens_cannot_be_removed_without_a_trace(size):
    """Table 16's ablation."""
    method, images = make(DINO, aux=3, aux_sees="uncut"), torch.randn(3, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        kept, plain = method.encoder(images), method.encoder.without("aux")(images)
    assert (kept.cls - plain.cls).abs().max() > 1e-3
    assert (kept.patch - plain.patch).abs().max() > 1e-3


def test_the_exported_encoder_has_the_keys_of_a_plain_one():
    method = make(DINO, aux=3)
    plain = tiny_encoder(TokenSpec())
    assert method.encoder.state_dict().keys() - plain.state_dict().keys() == {"aux_tokens"}
    plain.load_state_dict(method.encoder.without("aux").state_dict())


@pytest.mark.parametrize("sees", ["all", "not_global", "patches"])
def test_no_gradient_flows_from_kept_tokens_to_auxiliary_ones(sees):
    encoder = tiny_encoder(TokenSpec(aux=3, aux_sees=sees))
    x = encoder(torch.randn(2, 3, 16, 16))
    (grad,) = torch.autograd.grad(
        x.cls.square().sum() + x.patch.square().sum(), [encoder.aux_tokens], allow_unused=True
    )
    assert grad is None or not grad.any()


SEEN = {  # by an auxiliary token, beside itself: class token, register, patches, other auxiliary tokens
    "all": (True, True, True, True),
    "not_global": (False, False, True, True),
    "patches": (False, False, True, False),
    "uncut": (True, True, True, True),
}


@pytest.mark.parametrize("sees", SEEN)
def test_an_auxiliary_token_sees_what_aux_sees_says(sees):
    """One block, in which seeing is direct: NaN in what a token sees makes it NaN, and a gradient flows back there."""

    def encoder_with(nan: str | None = None):
        torch.manual_seed(0)
        encoder = tiny_encoder(TokenSpec(aux=3, register=1, aux_sees=sees), depth=1).double()
        images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        with torch.no_grad():
            at = {
                "class": encoder.vit.cls_token[:, 0],
                "register": encoder.vit.reg_token[:, 0],
                "patch": images[..., :4, :4],
            }
            at |= {"other": encoder.aux_tokens[:, 1], "itself": encoder.aux_tokens[:, 0]}
            if nan:
                at[nan].fill_(torch.nan)
        return encoder, images.requires_grad_()

    def is_nan(nan):
        encoder, images = encoder_with(nan)
        return bool(encoder(images).aux[:, 0].isnan().any())

    assert tuple(is_nan(what) for what in ("class", "register", "patch", "other")) == SEEN[sees]
    assert is_nan("itself")
    encoder, images = encoder_with()
    sources = [encoder.vit.cls_token, encoder.vit.reg_token, images, encoder.aux_tokens]
    weights = torch.randn(12, dtype=torch.float64)
    grads = torch.autograd.grad((encoder(images).aux[:, 0] * weights).sum(), sources, allow_unused=True)
    cls, register, patch, aux = (torch.zeros(1) if g is None else g for g in grads)
    assert (bool(cls.any()), bool(register.any()), bool(patch.any()), bool(aux[:, 1:].any())) == SEEN[sees]
    assert aux[:, 0].any()
    with torch.no_grad():  # does anything see it?
        seen = bool(encoder_with("itself")[0](images).cls.isnan().any())
    assert seen == (sees == "uncut")
