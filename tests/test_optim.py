"""LARS, its relatives and the tables of the learning rate: the numbers of the authors' code."""

import copy

import pytest
import torch
from torch import nn

from conftest import timm_name, tiny_encoder, tiny_swin
from triptych.methods.supervised import Classifier, SupervisedConfig
from triptych.optim import LARS, OptimConfig, make_optimizer, parameter_groups, set_rates
from triptych.schedules import Progress, cosine, warmup_cosine
from triptych.tokens import TokenSpec


def table(schedule, steps, total, steps_per_epoch=1):
    return torch.tensor([schedule(Progress(s, total, steps_per_epoch)) for s in steps], dtype=torch.float64)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def one_step(model, optimizer, x, lr=0.1, weight_decay=0.05):
    set_rates(optimizer, lr, weight_decay)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("file", "trust"), [("dino_lars", "cfg.eta"), ("mocov3_lars", "cfg.trust")])
def test_lars_equals_the_authors(golden, file, trust):
    """A matrix, a vector (neither decayed nor adapted to) and a matrix of zeros (adapted to once it has left zero)."""
    g = golden(file)
    model = nn.ParameterList([g[f"p{i}.step0"].clone() for i in range(3)])
    optimizer = make_optimizer(
        model, OptimConfig(kind="lars", momentum=float(g["cfg.momentum"]), trust=float(g[trust]))
    )
    for step in range(3):
        for i, p in enumerate(model):
            p.grad = g[f"p{i}.grad{step}"].clone()
        set_rates(optimizer, float(g["cfg.lr"]), float(g["cfg.wd"]))
        optimizer.step()
        for i, p in enumerate(model):
            torch.testing.assert_close(p.detach(), g[f"p{i}.step{step + 1}"], rtol=0, atol=1e-15)


def test_on_all_parameters_lars_is_the_larc_of_swav_up_to_where_decay_enters_the_norm():
    """LARC written as loops: every parameter is decayed and adapted to, with |g| + λ|θ| where LARS has |g + λθ|."""
    model, lr, eta, momentum, weight_decay = small_model(), 4.8, 1e-3, 0.9, 1e-6
    ours = copy.deepcopy(model)
    config = OptimConfig(kind="lars", momentum=momentum, trust=eta, decay="all")
    optimizer, buffers = make_optimizer(ours, config), [torch.zeros_like(p) for p in model.parameters()]
    for step in range(5):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        grads = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        with torch.no_grad():
            for p, g, m in zip(model.parameters(), grads, buffers, strict=True):
                u = g.clone()
                if p.norm() != 0 and g.norm() != 0:
                    u = (g + weight_decay * p) * eta * p.norm() / (g.norm() + weight_decay * p.norm())
                m.mul_(momentum).add_(u)
                p.sub_(lr * m)
        one_step(ours, optimizer, x, lr, weight_decay)
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "lars", "sgd"])
def test_a_restored_optimizer_goes_on_with_the_same_bits(kind):
    x = torch.randn(8, 4, dtype=torch.float64)
    straight, config = small_model(), OptimConfig(kind=kind)
    optimizer = make_optimizer(straight, config)
    one_step(straight, optimizer, x)
    resumed, saved = copy.deepcopy(straight), copy.deepcopy(optimizer.state_dict())
    again = make_optimizer(resumed, config)
    again.load_state_dict(saved)
    for _ in range(2):
        one_step(straight, optimizer, x)
        one_step(resumed, again, x)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "lars", "sgd"])
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_decay_alone_shrinks_exactly_the_parameters_that_it_names(kind, decay):
    model = small_model()
    nn.init.ones_(model.get_parameter("0.bias"))
    before = copy.deepcopy(model)
    optimizer = make_optimizer(model, OptimConfig(kind=kind, decay=decay))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    set_rates(optimizer, 0.1, 0.5)
    optimizer.step()
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        shrinks = (decay == "all" or p.ndim > 1) and q.norm() > 0
        assert (p.norm() < q.norm()) == shrinks, name


def test_every_trained_parameter_is_in_one_group_and_frozen_ones_in_none():
    model = small_model()
    model.get_parameter("2.weight").requires_grad_(False)
    for decay in ("matrices", "all"):
        grouped = [id(p) for group in parameter_groups(model, decay) for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_layer_decay_is_maes(golden):
    """Rate's scale and weight decay of every parameter of a ViT of 12 blocks with a classifier."""
    g = golden("mae_layer_decay")
    classifier = Classifier(tiny_encoder(TokenSpec(), depth=int(g["depth"])), SupervisedConfig(classes=3))
    found = {}
    for gamma in (65, 75):
        optimizer = make_optimizer(classifier, OptimConfig(layer_decay=gamma / 100, decay="no_tokens"))
        set_rates(optimizer, 1.0, 0.05)
        for group in optimizer.param_groups:
            found |= {(id(p), gamma): (group["lr"], group["weight_decay"]) for p in group["params"]}
    names = dict(classifier.named_parameters())
    for i, name in enumerate(g["names"].tolist()):
        leaf = {"w": "weight", "b": "bias"}.get(name[-1])
        ours = f"head.{leaf}" if name.startswith("head") else f"encoder.vit.{timm_name(name.removeprefix('enc.'))}"
        for gamma in (65, 75):
            expected = g[f"scale_{gamma}"][i].item(), g[f"wd_{gamma}"][i].item()
            assert found[id(names.pop(ours) if gamma == 75 else names[ours]), gamma] == pytest.approx(expected), ours
    assert not names


def test_a_swins_layers_are_counted_through_its_stages():
    encoder = tiny_swin(TokenSpec(cls=0))
    layers = {id(p): n for p, n in encoder.layer_numbers()}
    numbers = {name: layers[id(p)] for name, p in encoder.named_parameters()}
    assert numbers["swin.patch_embed.proj.weight"] == 0
    assert numbers["swin.layers.0.blocks.1.attn.qkv.weight"] == 2
    assert numbers["swin.layers.1.downsample.norm.weight"] == 3
    assert numbers["swin.layers.1.blocks.1.attn.qkv.weight"] == 4
    assert numbers["swin.norm.weight"] == 5


def test_parameters_without_gradient_stand_still_under_lars():
    moves, stands = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer = LARS([moves, stands], lr=0.1, weight_decay=0.5)
    moves.grad = torch.ones_like(moves)
    optimizer.step()
    assert torch.equal(stands, torch.ones(2, 3))
    assert not torch.equal(moves, torch.ones(2, 3))
    assert list(optimizer.state_dict()["state"]) == [0]


def test_the_rate_of_mocov3_equals_the_authors_at_fractional_epochs(golden):
    g = golden("mocov3_schedules")
    epochs, steps = int(g["cfg.epochs"]), [round(e * 100) for e in g["epoch"].tolist()]
    config = OptimConfig(lr=float(g["cfg.base_lr"]), min_lr=0, warmup=float(g["cfg.warmup"]), schedule="mocov3")
    ours = table(config.rates(int(g["cfg.batch"]))[0], steps, epochs * 100, 100)
    torch.testing.assert_close(ours, g["lr"], rtol=0, atol=1e-12)


def test_the_rate_of_byol_equals_the_authors(golden):
    g = golden("byol_schedules")
    config = OptimConfig(lr=float(g["cfg.base_lr"]), min_lr=0, warmup=float(g["cfg.warmup_steps"]), schedule="mocov3")
    ours = table(config.rates(int(g["cfg.batch"]))[0], g["step"].tolist(), int(g["cfg.max_steps"]))
    torch.testing.assert_close(ours.float(), g["lr"], rtol=1e-6, atol=1e-6)  # the file is float32


def test_the_rate_of_moby_equals_the_authors(golden):
    """The file lists what is set *after* each step: the authors' rate is one step late, ours is not."""
    g = golden("moby_lr")
    per_epoch = int(g["cfg.iters_per_epoch"])
    total = int(g["cfg.epochs"]) * per_epoch
    base, low, start = (float(g[f"cfg.{name}"]) for name in ("base", "min", "warm_start"))
    warmup = float(g["cfg.warmup_epochs"])
    config = OptimConfig(lr=base / 2, min_lr=low, warmup=warmup, warmup_start=start / 2, schedule="moby")
    ours = table(config.rates(512)[0], range(total), total, per_epoch)
    torch.testing.assert_close(ours, g["lr_after_step_update"], rtol=0, atol=1e-12)


def test_the_rate_of_swav_equals_the_authors(golden):
    g = golden("swav_schedule")
    start, base, final, epochs, warmup, per_epoch = g["cfg"].tolist()
    config = OptimConfig(lr=base / 16, min_lr=final, warmup=warmup, warmup_start=start / 16)
    total = int(epochs * per_epoch)
    ours = table(config.rates(4096)[0], range(total), total, int(per_epoch))
    torch.testing.assert_close(ours, g["lr"], rtol=0, atol=1e-12)


def test_the_momentum_of_mocov3_and_byol_is_the_cosine_at_this_step(golden):
    """MoCo v3 moves its keys *before* it uses them, with the value of the step that begins: update() asks t.next."""
    g = golden("mocov3_schedules")
    steps = [round(e * 100) for e in g["epoch"].tolist()]
    ours = table(cosine(float(g["cfg.ema0"]), 1.0), steps, int(g["cfg.epochs"]) * 100)
    torch.testing.assert_close(ours, g["ema"], rtol=0, atol=1e-12)
    g = golden("byol_schedules")
    ours = table(cosine(float(g["cfg.ema0"]), 1.0), g["step"].tolist(), int(g["cfg.max_steps"]))
    torch.testing.assert_close(ours, g["ema"], rtol=0, atol=1e-12)


def test_the_momentum_of_moby_is_the_cosine_of_the_updates_made_before():
    """moby_train.npz, stepN.ema: base 0.9, 6 updates in all.  Moved before the keys, so update() asks t.next here too."""
    authors = torch.tensor([0.9, 0.906698729810778, 0.925, 0.95, 0.975], dtype=torch.float64)
    torch.testing.assert_close(table(cosine(0.9, 1.0), range(5), 6), authors, rtol=0, atol=1e-12)
    assert Progress(4, 6, 2).next == Progress(5, 6, 2)


@pytest.mark.parametrize("kind", ["dino", "mocov3", "moby"])
def test_every_shape_starts_at_its_start_and_never_exceeds_the_peak(kind):
    rate = warmup_cosine(1.0, 0.01, 2, 0.1, kind)
    values = table(rate, range(40), 40, 4)
    assert values[0] == pytest.approx(0.1)
    assert values.max() <= 1
    assert (values[:8].diff() > 0).all()
    assert (values[8:].diff() < 0).all()
    assert (values[7] == 1) == (kind == "dino")
    assert (values[8] == 1) == (kind != "moby")


def test_a_warm_up_may_be_absent_one_step_or_longer_than_the_run():
    for kind in ("dino", "mocov3", "moby"):
        assert warmup_cosine(1.0, 0.0, 0, 0.1, kind)(Progress(0, 10)) == 1
        assert warmup_cosine(1.0, 0.0, 1, 0.1, kind)(Progress(0, 10)) == 0.1
        longer = table(warmup_cosine(1.0, 0.0, 50, 0.0, kind), range(10), 10)
        assert (longer.diff() > 0).all()
