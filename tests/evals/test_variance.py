"""Feature variance against its definition, with every feature stored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import InterpolationMode

from conftest import tiny_encoder
from triptych.cli import main
from triptych.data.corruption import block_cover, draw_blocks
from triptych.data.crops import random_crop
from triptych.data.sources import load_rgb, open_source
from triptych.errors import UserError
from triptych.evals.transform import EvalTransform
from triptych.evals.variance import streamed_variance, variance
from triptych.tokens import Tokens, TokenSpec

TRANSFORM = EvalTransform(16, 18)
RUN = "--recipe mmc_small --data scenes:8 --batch 4 --epochs 1 --loader.workers 0 --health.every 0 --out run"
RUN += " --encoder.width 24 --encoder.depth 2 --encoder.heads 3 --views.global_size 32"
RUN += " --method.hidden 16 --method.embedding 8"


class Pixels(nn.Module):
    """An encoder whose patch tokens are the pixels it sees, and whose class token is their mean."""

    def forward(self, images):
        patch = images.flatten(2).transpose(1, 2)
        return Tokens(patch=patch, patch_raw=patch, grid=(16, 16), cls=patch.mean(1))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (30 + i, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return open_source(folder)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return tiny_encoder(TokenSpec())


def numbers(*arguments, **options) -> tuple[float, float]:
    result = variance(*arguments, **{"views": 10, "workers": 0, **options})
    return result.image, result.patch


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("mean", [0.0, 1e7])
def test_the_streamed_variance_is_that_of_all_rows_at_once(rows, mean):
    x = torch.randn(50, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + mean
    torch.testing.assert_close(streamed_variance(x.split(rows)), x.var(0), rtol=1e-8, atol=0)


@torch.no_grad()
def test_it_is_the_definition_with_every_feature_stored(source, encoder):
    mean, std = (torch.tensor(x)[:, None, None] for x in (TRANSFORM.mean, TRANSFORM.std))
    image, patch = [], []
    for index in range(4):
        rng, picture = np.random.default_rng([5, index]), load_rgb(source, index)
        pixels, crops, covers = F.pil_to_tensor(picture), [], []
        for _ in range(10):
            crop = random_crop(*pixels.shape[1:], (0.3, 0.9), rng)
            crops.append(F.resized_crop(pixels, *crop, [16, 16], InterpolationMode.BICUBIC, antialias=True))
            covers.append(torch.from_numpy(block_cover(draw_blocks(0.5, 16, 16, rng), 16, 16)))
        noise = torch.Generator().manual_seed(int(rng.integers(2**63)))
        clean = (TRANSFORM.pixels(picture) / 255 - mean) / std
        hidden = [torch.where(c, torch.randn(3, 16, 16, generator=noise), clean) for c in covers]
        image.append(encoder((torch.stack(crops) / 255 - mean) / std).cls.var(0).mean())
        patch.append(encoder(torch.stack(hidden)).patch.var(0).mean())
    expected = (float(torch.stack(image).mean()), float(torch.stack(patch).mean()))
    assert numbers(encoder, source, TRANSFORM, seed=5, scale=(0.3, 0.9)) == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 1e-6


def test_neither_the_batch_nor_workers_change_a_number(source, encoder):
    expected = numbers(encoder, source, TRANSFORM)
    for options in ({"batch": 3}, {"batch": 1}, {"workers": 2}):
        assert numbers(encoder, source, TRANSFORM, **options) == pytest.approx(expected, rel=1e-5)
    assert numbers(encoder, source, TRANSFORM) == expected
    assert numbers(encoder, source, TRANSFORM, seed=1) != expected


def test_an_encoder_that_ignores_its_input_has_variance_0(source):
    blind = tiny_encoder(TokenSpec())
    nn.init.zeros_(blind.vit.patch_embed.proj.weight)
    assert numbers(blind, source, TRANSFORM, batch=4) == pytest.approx((0, 0), abs=1e-12)


def test_crops_of_an_even_image_do_not_vary_and_its_masked_pixels_do_by_the_hidden_half(tmp_path):
    colour = tuple(round(255 * m) for m in TRANSFORM.mean)  # near 0 once normalised, so that noise alone varies
    Image.new("RGB", (32, 32), colour).save(tmp_path / "even.png")
    image, patch = numbers(Pixels(), open_source(tmp_path), TRANSFORM, views=128)
    assert image == pytest.approx(0, abs=1e-12)
    assert 0.48 < patch < 0.56  # N(0, 1) in one half; the last block overshoots a little


def test_a_sample_of_the_images_is_drawn_once(source, encoder):
    result = variance(encoder, source, TRANSFORM, views=5, images=2, workers=0)
    assert (result.images, result.unreadable, result.views, result.size) == (2, 0, 5, 16)
    assert variance(encoder, source, TRANSFORM, views=5, images=2, workers=0) == result
    whole = variance(encoder, source, TRANSFORM, views=5, workers=0)
    assert result.patch != whole.patch
    assert variance(encoder, source, TRANSFORM, views=5, images=99, workers=0) == whole


def test_the_numbers_are_means_of_those_that_each_image_has_alone_and_unreadable_ones_are_counted(
    source, encoder, tmp_path
):
    alone = []
    for index in range(4):
        folder = tmp_path / str(index)
        folder.mkdir()
        for i in range(4):
            (folder / f"{i}.png").write_text("no image")
        load_rgb(source, index).save(folder / f"{index}.png")
        result = variance(encoder, open_source(folder), TRANSFORM, views=5, workers=0)
        assert (result.images, result.unreadable) == (1, 3)
        alone.append((result.image, result.patch))
    assert numbers(encoder, source, TRANSFORM, views=5) == pytest.approx(tuple(np.mean(alone, 0)))
    assert len(set(alone)) == 4


def test_no_readable_image_is_an_error(encoder, tmp_path):
    (tmp_path / "0.png").write_text("no image")
    with pytest.raises(UserError, match="no image of"):
        variance(encoder, open_source(tmp_path), TRANSFORM, views=5, workers=0)


def test_the_encoder_keeps_its_mode_and_is_measured_without_stochastic_depth(source):
    encoder = tiny_encoder(TokenSpec(), drop_path=0.5).train()
    assert numbers(encoder, source, TRANSFORM) == numbers(encoder, source, TRANSFORM)
    assert encoder.training


WRONG = {
    "views": (1, "at least 2"),
    "scale": ((0.5, 0.2), "smallest"),
    "images": (0, "at least 1"),
    "seed": (-1, "0 or"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_mean_nothing_are_refused(source, encoder, name):
    value, expected = WRONG[name]
    with pytest.raises(UserError, match=expected):
        variance(encoder, source, TRANSFORM, **{name: value})


# --- the command ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", *RUN.split()])
        (folder / "flat").mkdir()
        for i in range(2):
            load_rgb(open_source("scenes:8"), i).save(folder / "flat" / f"{i}.png")
        (folder / "flat" / "2.png").write_text("no image")
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")


def test_the_command_prints_and_appends_both_numbers(here, capsys):
    main("eval variance run --data scenes:8 --views 4 --images 3 --weights student --seed 2".split())
    said = " ".join(capsys.readouterr().out.split())
    assert "3 images of scenes:8 [test], run@2 (student)" in said
    row = json.loads(Path("results.jsonl").read_text().splitlines()[-1])
    assert f"{row['image']:.4f}" in said
    assert f"{row['patch']:.4f}" in said
    wanted = {"protocol": "variance", "images": 3, "views": 4, "size": 32, "scale": [0.25, 1.0], "seed": 2}
    assert wanted.items() <= row.items()


def test_images_without_labels_will_do_and_unreadable_ones_are_said(here, capsys):
    main("eval variance run --data flat --views 3 --size 64 --scale 0.5 0.9 --out flat.jsonl".split())
    assert "1 of 3 images of flat cannot be read: left out" in capsys.readouterr().out
    row = json.loads(Path("flat.jsonl").read_text())
    assert (row["images"], row["size"], row["scale"]) == (2, 64, [0.5, 0.9])


MISTAKES = {
    "views": ("run --data scenes:8 --views 1", "at least 2"),
    "scale": ("run --data scenes:8 --scale 0.5 2", "shares of the image's area"),
    "size": ("run --data scenes:8 --size 33", "33x33"),
    "images": ("run --data scenes:8 --images 0", "at least 1"),
    "no such model": ("nowhere --data scenes:8", "'nowhere' is neither"),
    "no such data": ("run --data nowhere", "'nowhere' is neither"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_its_remedy_and_exit_code_2(here, name, capsys):
    words, expected = MISTAKES[name]
    with pytest.raises(SystemExit) as stop:
        main(["eval", "variance", *words.split()])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert expected in said.err + said.out
