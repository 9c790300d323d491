"""Linear probing on augmented images: what the probe sees, in which order, and that held-out images stay held out."""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import tiny_encoder
from triptych.data.batches import Batches
from triptych.data.loader import ViewDataset, ViewsConfig, collate
from triptych.data.sources import open_source
from triptych.data.subsets import Subset
from triptych.data.views import ViewSpec
from triptych.errors import UserError
from triptych.evals.features import extract, labels_of
from triptych.evals.linear import HELD_OUT, ONE, held_out
from triptych.evals.linear_augmented import Plan, clipped_crop, linear_augmented
from triptych.evals.linear_presets import PRESETS
from triptych.evals.probe import Probe
from triptych.evals.selection import select
from triptych.evals.transform import EvalTransform
from triptych.tokens import TokenSpec

TRANSFORM = EvalTransform(16, 18, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
DINO = replace(PRESETS["dino"], epochs=2, batch=8)


def write(folder: Path, images: int, *, plain=False, seed=0, names=("cat", "dog")) -> Path:
    """Two classes of images; plain: each of one colour, which no crop changes."""
    rng = np.random.default_rng(seed)
    for i in range(images):
        name = names[i % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (20, 26, 3), dtype=np.uint8)
        if plain:
            pixels[:] = pixels[0, 0]
        Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return open_source(write(root / "a", 22)), open_source(write(root / "b", 10, seed=1))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return tiny_encoder(TokenSpec(cls_plus=1)).eval()


def run(encoder, sets, preset=DINO, **options):
    return linear_augmented(encoder, *sets, TRANSFORM, preset, **{"workers": 0, **options})


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def steps(monkeypatch):
    """Every step of every probe: [(probe, features, labels, factor)]."""
    seen, step = [], Probe.step

    def recorded(self, x, y, factor):
        seen.append((self, x.clone(), y.clone(), factor))
        step(self, x, y, factor)

    monkeypatch.setattr(Probe, "step", recorded)
    return seen


def test_the_whole_protocol_written_out(encoder, sets):
    """DINO's: views of data/loader.py, frozen features of them, SGD on a linear layer, cosine by the epoch."""
    train, test = sets
    lr, epochs, batch = 2.0, 3, 8
    config = ViewsConfig(
        global_crops=1,
        local_crops=0,
        global_size=16,
        global_scale=(0.08, 1),
        interpolation="bilinear",
        colour="none",
    )
    dataset = ViewDataset(train, config, ViewSpec(global_crops=1, local_crops=False, labels=True), 4, seed=3)
    head = torch.nn.Linear(24, 2)
    head.weight.data.copy_((torch.randn(24, 2, generator=torch.Generator().manual_seed(3)) * 0.01).T)
    head.bias.data.zero_()
    sgd = torch.optim.SGD(head.parameters(), lr=lr * batch / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs)
    mean, std = torch.tensor(TRANSFORM.mean), torch.tensor(TRANSFORM.std)
    x, indices = extract(encoder, test, TRANSFORM, layers=2, workers=0)
    accuracy = []
    for number, rows in enumerate(Batches(len(train), batch, epochs, 3), 1):
        views = collate([dataset[key] for key in rows])[0].on_device(torch.device("cpu"), mean, std)
        with torch.no_grad():
            taps = encoder.layers(views.global_crops[0].images, [0, 1])
        sgd.zero_grad()
        F.cross_entropy(head(torch.cat([tap.cls for tap in taps], 1)), views.labels).backward()
        sgd.step()
        if number % (len(train) // batch) == 0:
            schedule.step()
            accuracy.append(float((head(x).argmax(1) == labels_of(test, indices)).double().mean() * 100))
    result = run(encoder, sets, replace(DINO, lrs=(lr,), epochs=epochs), seed=3)
    assert result.top1 == pytest.approx(accuracy[-1])
    assert result.best_epoch_top1 == pytest.approx(max(accuracy))
    assert (result.selected_on, result.batch, result.train_images, result.test_images) == (ONE, 8, 22, 10)
    assert result.augmentation == "random resized crop 0.08-1 bilinear, flip"


def test_every_epoch_has_fresh_views_of_every_image(encoder, sets, steps):
    run(encoder, sets, replace(DINO, batch=22))
    (_, first, _, _), (_, second, _, _) = steps
    assert first.shape == (22, 24)
    assert torch.cdist(first, second).min() > 1e-4
    assert torch.pdist(first).min() > 1e-4


def test_a_batch_comes_from_several_calls_of_the_encoder(encoder, sets, steps):
    """What a device takes at once decides how much memory, not what the probe learns from."""
    assert Plan.of(replace(DINO, batch=1024), 9469, 256) == Plan(1024, 4, 9, 2)
    assert Plan.of(replace(DINO, batch=16384), 9469, 256) == Plan(9435, 37, 1, 2)
    assert Plan.of(replace(DINO, batch=7), 22, 16) == Plan(7, 1, 3, 2)
    run(encoder, sets, replace(DINO, batch=20))  # 16 at once on a CPU: two calls of 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triptych.evals.linear_augmented.fast_batch", lambda *_: 4)
        run(encoder, sets, replace(DINO, batch=20))
    assert [len(x) for _, x, _, _ in steps] == [20] * 4
    for (_, x, y, factor), (_, x4, y4, factor4) in zip(steps[:2], steps[2:], strict=True):
        torch.testing.assert_close(x, x4, rtol=0, atol=1e-5)
        assert torch.equal(y, y4)
        assert factor == factor4


def test_the_judged_probe_never_sees_a_held_out_image(encoder, tmp_path, steps):
    """Images of one colour have one feature, however they are cropped: it tells which image a row is of."""
    train = open_source(write(tmp_path / "a", 24, plain=True))
    test = open_source(write(tmp_path / "b", 6, plain=True, seed=1))
    result = run(encoder, (train, test), replace(DINO, lrs=(0.1, 1.0)), seed=1)
    assert result.selected_on == HELD_OUT
    x, indices = extract(encoder, train, TRANSFORM, layers=2, workers=0)
    held = held_out(labels_of(train, indices), 1)
    assert held.any()

    def seen(probe):
        rows = torch.cat([x for p, x, _, _ in steps if p is probe])
        distance, nearest = torch.cdist(rows.double(), x.double()).min(1)
        assert distance.max() < 1e-3
        return set(nearest.tolist())

    reported, judged = dict.fromkeys(p for p, *_ in steps)
    assert seen(judged) == set((~held).nonzero()[:, 0].tolist())
    assert seen(reported) == set(range(24))


def test_held_out_images_choose_the_rate_and_are_not_augmented(encoder, sets, monkeypatch):
    train, _ = sets
    held = held_out(labels_of(train, torch.arange(len(train))), 0)
    given, score = [], Probe.score

    def recorded(self, x, y):
        given.append((self, x))
        return score(self, x, y) * 0 + torch.tensor([0.0, 2.0, 1.0]) if len(x) < 10 else score(self, x, y)

    monkeypatch.setattr(Probe, "score", recorded)
    result = run(encoder, sets, replace(DINO, lrs=(0.1, 0.2, 0.3)))
    assert result.lr == 0.2
    x, _ = extract(encoder, train, TRANSFORM, layers=2, workers=0)
    torch.testing.assert_close(given[-1][1], x[held])
    assert given[-1][0] is not given[0][0], "the reported probe has seen them"


def test_an_unreadable_image_is_replaced_but_not_by_a_held_out_one(encoder, tmp_path, steps):
    folder = write(tmp_path / "a", 24, plain=True)
    train, test = open_source(folder), open_source(write(tmp_path / "b", 6, seed=1))
    x, indices = extract(encoder, train, TRANSFORM, layers=2, workers=0)
    held = held_out(labels_of(train, indices), 0)
    before = int(held.nonzero()[0, 0]) - 1
    assert not held[before]
    (folder / train.key(before)).write_bytes(b"no image")
    run(encoder, (train, test), replace(DINO, lrs=(0.1, 1.0), batch=4, epochs=3))
    reported, judged = dict.fromkeys(p for p, *_ in steps)

    def rows(probe):
        return torch.cdist(torch.cat([x for p, x, _, _ in steps if p is probe]).double(), x.double()).min(1).indices

    assert (rows(reported) == before + 1).sum() == 6, "its own turn and that of the unreadable one, in three epochs"
    assert not held[rows(judged)].any()
    assert before not in rows(reported)


@pytest.mark.parametrize("name", ["ibot", "mae", "msn", "udi"])
def test_presets_train_as_they_say(encoder, sets, steps, name):
    preset = replace(PRESETS[name], epochs=11, batch=11)
    result = run(encoder, sets, preset)
    width = {"ibot": 24, "udi": 24, "mae": 12, "msn": 12}[name]
    assert all(x.shape[1] == width for _, x, _, _ in steps)
    assert result.augmentation == PRESETS[name].augmentation.about
    factors = [factor for probe, _, _, factor in steps if probe is steps[0][0]]
    assert len(factors) == 22
    if name == "mae":
        assert factors[:3] == pytest.approx([n / 20 * 11 / 256 for n in range(3)]), "two steps an epoch, 10 of warm-up"
    else:
        assert factors[::2] == factors[1::2]
        assert factors[0] == (1.0 if name == "msn" else 11 / 256)


def test_the_features_of_msn_are_those_before_the_final_norm(encoder, sets, steps):
    run(encoder, sets, replace(PRESETS["msn"], epochs=1, batch=22))
    (_, raw, _, _), *_ = steps
    normed = encoder.trunk.norm(raw)
    run(encoder, sets, replace(PRESETS["msn"], feature="cls", epochs=1, batch=22))
    torch.testing.assert_close(steps[1][1], normed, rtol=0, atol=1e-5)


def test_erasing_puts_noise_into_a_quarter_of_the_images(encoder, tmp_path, monkeypatch):
    source = open_source(write(tmp_path / "a", 64, plain=True))
    noisy = []

    def looked(encoder, images, token, layers):
        noisy.append(images.flatten(2).std(2).mean(1) > 1e-3)
        return select(encoder, images, token, layers)

    monkeypatch.setattr("triptych.evals.linear_augmented.select", looked)
    plain = replace(PRESETS["udi"].augmentation, colour="none")
    run(encoder, (source, source), replace(PRESETS["udi"], augmentation=plain, epochs=8))
    share = torch.cat(noisy).double().mean()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 512)
    noisy.clear()
    run(encoder, (source, source), replace(PRESETS["dino"], epochs=1))
    assert not torch.cat(noisy).any()


def test_maes_crop_is_one_draw_cut_to_the_image():
    height, width = 30, 100
    counts = {"cut": 0, "whole": 0}
    for seed in range(300):
        crop = clipped_crop(height, width, (0.08, 1.0), np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        area = height * width * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        assert (crop.w, crop.h) == (min(w, width), min(h, height))
        assert 0 <= crop.i <= height - crop.h
        assert 0 <= crop.j <= width - crop.w
        counts["cut" if h > height else "whole"] += 1
    assert min(counts.values()) > 50, "both cases were seen"
    assert clipped_crop(1, 1, (0.08, 0.08), np.random.default_rng(0)) == (0, 0, 1, 1)


def test_only_maes_crops_are_clipped(encoder, sets, monkeypatch):
    drawn = []

    def recorded(*args):
        drawn.append(clipped_crop(*args))
        return drawn[-1]

    monkeypatch.setattr("triptych.evals.linear_augmented.clipped_crop", recorded)
    run(encoder, sets)
    assert not drawn
    run(encoder, sets, replace(PRESETS["mae"], epochs=11, batch=11))
    assert len(drawn) == 11 * 22


def test_a_seed_fixes_every_step_whatever_the_workers(encoder, sets, steps):
    preset = replace(PRESETS["udi"], epochs=1, batch=11)
    results = [run(encoder, sets, preset, seed=seed, workers=workers) for seed, workers in ((4, 0), (4, 2), (5, 0))]
    assert results[0] == results[1]
    first, again, other = (torch.cat([x for _, x, _, _ in steps[i : i + 2]]) for i in (0, 2, 4))
    assert torch.equal(first, again)
    assert torch.cdist(first, other).min() > 1e-4


def test_the_encoder_and_the_random_generators_are_left_as_they_were(sets):
    encoder = tiny_encoder(TokenSpec()).train()
    before = {name: x.clone() for name, x in encoder.state_dict().items()}

    def drawn(work):
        torch.manual_seed(11)
        random.seed(11)
        work()
        return torch.rand(1), random.random()

    extraction = drawn(lambda: extract(encoder, sets[1], TRANSFORM, workers=0))  # whose loader draws a number
    assert drawn(lambda: run(encoder, sets, replace(PRESETS["udi"], epochs=1, batch=8))) == extraction
    assert encoder.training
    assert all(torch.equal(x, before[name]) for name, x in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())


def test_token_and_layers_can_be_chosen(encoder, sets, steps):
    for options, width in (({"token": "cls_plus"}, 12), ({"layers": 1}, 12), ({"token": "cls+patch_mean"}, 24)):
        run(encoder, sets, replace(DINO, epochs=1), **options)
        assert steps[-1][1].shape == (8, width)


def test_settings_of_the_preset_can_be_changed_and_the_name_says_so(encoder, sets, steps):
    result = run(encoder, sets, "dino", epochs=2, batch=11, lrs=[0.5], norm="unit")
    assert (result.preset, result.epochs, result.batch, result.lr) == ("dino (changed)", 2, 11, 0.5)
    assert result.norm == "unit"
    assert [len(x) for _, x, _, _ in steps] == [11] * 4


def test_bad_input_is_named(encoder, sets, tmp_path):
    train, test = sets
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "flat" / "a.png")
    flat, one = open_source(tmp_path / "flat"), Subset(train, range(5), " [cats]")
    other = open_source(write(tmp_path / "other", 4, names=("cat", "emu")))
    for pair, options, words in (
        ((flat, flat), {}, "no labels"),
        ((train, other), {}, "same classes"),
        ((one, one), {}, "all of one class"),
        ((train, test), {"preset": "dion"}, "did you mean dino"),
        ((train, test), {"token": "clss"}, "choose one of"),
        ((train, test), {"select": "best"}, "held_out, test, paper"),
        ((train, test), {"preset": "mae", "epochs": 5}, "warm-up"),
    ):
        with pytest.raises(UserError, match=words):
            run(encoder, pair, **options)
