"""The probe's optimisers, norms and schedules against the authors' numbers and torch's own layers, and the presets."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import tiny_encoder, tiny_swin
from triptych.errors import UserError
from triptych.evals.linear import ONE, PAPER, PAPER_RATES, linear
from triptych.evals.linear_presets import PRESETS, preset_of
from triptych.evals.probe import Probe
from triptych.optim import LARS
from triptych.schedules import Progress
from triptych.tokens import TokenSpec


def probe_of(preset, *, width=8, classes=4, dtype=torch.float32):
    probe = Probe(preset, width, classes, torch.Generator().manual_seed(0), "cpu")
    probe.weight, probe.bias, probe.rates = probe.weight.to(dtype), probe.bias.to(dtype), probe.rates.to(dtype)
    probe.momenta = tuple(m.to(dtype) for m in probe.momenta)
    return probe


def features(images, *, width=8, classes=4, noise=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + noise * torch.randn(images, width, generator=g), labels


@pytest.mark.parametrize("rates", [1, 3])
@pytest.mark.parametrize(("matrix", "vector"), [("w", "b"), ("z", None)])
def test_lars_equals_the_authors_for_a_matrix_a_bias_and_a_matrix_of_zeros(golden, matrix, vector, rates):
    """One column block per rate; the last rate is the golden one, the others differ and must not leak into it."""
    g = golden("mae_lars")
    start = g[f"{matrix}0"]
    classes, width = start.shape
    lrs = [float(g["lr"]) / 2**n for n in range(rates)]
    preset = replace(
        PRESETS["mae"],
        lrs=lrs,
        momentum=float(g["momentum"]),
        trust=float(g["trust"]),
        weight_decay=float(g["weight_decay"]),
    )
    probe = probe_of(preset, width=width, classes=classes, dtype=torch.float64)
    probe.rates = torch.tensor(preset.lrs, dtype=torch.float64).repeat_interleave(classes)
    probe.weight.copy_(start.T.repeat(1, rates))
    if vector:
        probe.bias.copy_(g["b0"].repeat(rates))
    noise = torch.Generator().manual_seed(1)
    for step in range(5):
        wide = torch.randn(width, classes * rates, dtype=torch.float64, generator=noise)
        wide[:, -classes:] = g[f"grad_{matrix}_{step}"].T
        bias = g[f"grad_b_{step}"] if vector else torch.zeros(classes, dtype=torch.float64)
        probe.update(wide, bias.repeat(rates), 1.0)
        torch.testing.assert_close(probe.weight[:, -classes:].T, g[f"{matrix}_after_{step}"], rtol=0, atol=1e-12)
        if vector:
            torch.testing.assert_close(probe.bias[-classes:], g[f"b_after_{step}"], rtol=0, atol=1e-12)


def test_maes_head_equals_batch_norm_and_a_linear_layer_trained_by_lars():
    """Every layer torch's own, gradients by autograd; batch statistics in training, running ones in the test."""
    preset = replace(PRESETS["mae"], lrs=(0.3, 20.0), weight_decay=0.01)
    probe, (x, y), (test, z) = probe_of(preset), features(64), features(200, seed=1)
    x, test = x * 3 + 1, test * 3 + 1
    for column, lr in enumerate(preset.lrs):
        head = nn.Sequential(nn.BatchNorm1d(8, affine=False, eps=1e-6), nn.Linear(8, 4))
        head[1].weight.data.copy_(probe_of(preset).weight[:, :4].T)
        head[1].bias.data.zero_()
        groups = [
            {"params": [head[1].weight], "weight_decay": 0.01, "decay": True},
            {"params": [head[1].bias], "decay": False},
        ]
        lars = LARS(groups, lr=lr)
        for step in range(6):
            rows = slice(step * 10, step * 10 + 10)
            lars.zero_grad()
            F.cross_entropy(head(x[rows]), y[rows]).backward()
            lars.step()
            if column == 0:
                with torch.no_grad():
                    probe.step(x[rows], y[rows], 1.0)
        torch.testing.assert_close(probe.weight.view(8, 2, 4)[:, column].T, head[1].weight.data, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(probe.bias.view(2, 4)[column], head[1].bias.data, rtol=1e-4, atol=1e-7)
        right = (head.eval()(test).argmax(1) == z).double().mean() * 100
        assert float(probe.score(test, z)[0, column]) == pytest.approx(float(right))
    assert probe.norm.training


def test_msns_head_centres_each_row_and_puts_it_to_unit_length():
    x, y = features(20)
    probe = probe_of(PRESETS["msn"])
    rows = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(probe.norm(x), rows / rows.norm(dim=1, keepdim=True), rtol=0, atol=1e-5)
    other = probe_of(PRESETS["msn"])
    for part, factor in ((probe, 1.0), (other, 1.0)):
        part.step(x if part is probe else x * 1000 + 50, y, factor)
    torch.testing.assert_close(probe.weight, other.weight, rtol=0, atol=1e-3)


def test_the_schedule_equals_maes_at_every_iteration(golden):
    """Its floor of 1e-5 is 0 in the linear probe."""
    g, steps = golden("mae_lr_schedule"), 4
    preset = replace(PRESETS["mae"], warmup=int(g["warmup"]), epochs=int(g["total"]))
    ours = torch.tensor(
        [preset.schedule(Progress(s, preset.epochs * steps, steps)) for s in range(preset.epochs * steps)],
        dtype=torch.float64,
    )
    warm, peak, floor = g["epoch"] < preset.warmup, g["peak"], g["floor"]
    authors = torch.where(warm, g["lr"] / peak, (g["lr"] - floor) / (peak - floor))
    torch.testing.assert_close(ours, authors, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["dino", "ibot", "msn", "udi", "sweep"])
def test_the_others_fall_by_a_cosine_once_an_epoch(name):
    schedule = replace(PRESETS[name], epochs=4).schedule
    by_hand = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 4))).item() for epoch in range(4)]
    ours = [schedule(Progress(step, 12, 3)) for step in range(12)]
    assert ours == pytest.approx([value for value in by_hand for _ in range(3)])


def test_rates_are_for_256_images_but_msns():
    assert [PRESETS[name].lrs[0] * PRESETS[name].scale(512) for name in ("dino", "mae", "udi", "msn")] == pytest.approx(
        [2e-3, 0.2, 0.04, 6.4]
    )


def test_ibot_sweeps_1_to_9_in_five_decades():
    assert len(PRESETS["ibot"].lrs) == 45
    exact = sorted(float(f"{n}e{power}") for power in range(-4, 1) for n in range(1, 10))
    assert list(PRESETS["ibot"].lrs) == pytest.approx(exact, rel=1e-15)


def test_features_are_chosen_by_architecture():
    """ViT-S: class tokens of the last four blocks; ViT-B: class and mean patch; Swin: mean patches of four blocks."""
    small, base = (tiny_encoder(TokenSpec(), width=width, depth=5) for width in (12, 768))
    for name in ("dino", "ibot", "udi"):
        assert PRESETS[name].features(small) == ("cls", 4)
        assert PRESETS[name].features(base) == ("cls+patch_mean", 1)
        assert PRESETS[name].features(tiny_swin(TokenSpec(cls=0))) == ("cls", 4)
        assert PRESETS[name].features(tiny_encoder(TokenSpec(cls=0), width=768, depth=5)) == ("cls", 4)
        assert PRESETS[name].features(tiny_encoder(TokenSpec(), depth=2)) == ("cls", 2)
    assert PRESETS["mae"].features(base) == ("cls", 1)
    assert PRESETS["msn"].features(base) == ("cls_raw", 1)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns_and_names_what_it_did(name):
    sets = *features(400, noise=0.3), *features(100, noise=0.3, seed=1)
    epochs, rates = (90, (3.0,)) if name == "mae" else (30, PRESETS[name].lrs)  # its own moves W little for 400 images
    result = linear(*sets, preset=replace(PRESETS[name], epochs=epochs, lrs=rates))
    assert result.top1 > 90
    assert (result.preset, result.augmentation, result.epoch) == (name, "none", epochs)
    assert (result.optimiser, result.norm) == (PRESETS[name].optimiser, PRESETS[name].norm)
    assert result.batch == min(PRESETS[name].batch, 400)


def test_a_paper_that_takes_its_best_epoch_on_the_test_images_says_so():
    sets = *features(200), *features(60, seed=1)
    for name, words in (("dino", PAPER), ("ibot", PAPER_RATES), ("msn", PAPER), ("udi", PAPER)):
        preset = replace(PRESETS[name], epochs=8)
        paper, honest = (linear(*sets, preset=preset, select=select) for select in ("paper", "held_out"))
        assert paper.selected_on == words
        assert paper.top1 == paper.best_epoch_top1 >= honest.top1
        assert honest.selected_on not in (PAPER, PAPER_RATES)
        assert honest.epoch == 8
    mae = linear(*sets, preset=replace(PRESETS["mae"], epochs=12), select="paper")
    assert (mae.selected_on, mae.epoch) == (ONE, 12)


def test_the_best_epoch_is_the_one_whose_accuracy_a_shorter_look_finds():
    """The schedule knows the length, so stop by hand: scores of every epoch, recorded on the way."""
    sets = *features(200, classes=8), *features(60, classes=8, seed=1)
    preset = replace(PRESETS["dino"], epochs=12, lrs=(3.0,), batch=32)
    seen = []
    score = Probe.score

    def recorded(self, *args):
        seen.append(score(self, *args)[:, 0])
        return seen[-1][:, None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "score", recorded)
        result = linear(*sets, preset=preset, select="paper")
    best = max(range(12), key=lambda epoch: float(seen[epoch][0]))
    assert (result.epoch, result.top1, result.top5) == (best + 1, float(seen[best][0]), float(seen[best][1]))
    assert 1 < result.epoch < 12, "a test that could not tell first or last from best"
    assert result.top5 != float(seen[-1][1])


def test_a_setting_that_is_not_the_presets_shows_in_the_name():
    sets = *features(60), *features(20, seed=1)
    assert linear(*sets, preset="dino", epochs=2).preset == "dino (changed)"
    assert linear(*sets, preset=replace(PRESETS["dino"], epochs=2), epochs=2, batch=1024).preset == "dino"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 10}, "10 of warm-up"),
        ({"norm": "group"}, "none, batch, unit"),
        ({"lrs": ()}, "at least one"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_bad_presets_are_named(change, words):
    with pytest.raises(UserError, match=words):
        replace(PRESETS["mae"], **change)
    with pytest.raises(UserError, match="did you mean dino"):
        preset_of("dinoo")
