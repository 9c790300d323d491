"""Pictures over time: always of the same images, of any encoder, and never at a run's expense."""

import numpy as np
import pytest
import torch
import yaml
from made_runs import small_recipe
from PIL import Image
from rich.console import Console

from conftest import tiny_encoder, tiny_swin
from triptych import checkpoint, snapshots
from triptych.data.sources import open_source
from triptych.snapshots import Snapshots, fixed_pixels, picture_size
from triptych.tokens import TokenSpec
from triptych.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of two epochs of two steps, with pictures and without: settings that one decides are all they share."""
    place, found = tmp_path_factory.mktemp("runs"), {}
    for pictures in (2, 0):
        found[pictures] = place / f"of{pictures}"
        train(
            small_recipe(f"--health.pictures {pictures}"), open_source("scenes:8"), found[pictures], Console(quiet=True)
        )
    return found


def test_they_are_taken_at_the_start_and_whenever_health_is_measured(runs):
    assert snapshots.steps(runs[2]) == [0, 2, 4]
    assert snapshots.steps(runs[0]) == []
    before, after = (np.asarray(Image.open(snapshots.path_of(runs[2], step))) for step in (0, 4))
    assert before.shape == after.shape
    assert (before != after).any()


def test_a_runs_bits_are_the_same_with_and_without_them(runs):
    states = [checkpoint.load(checkpoint.path_of(run / "checkpoints", 4)) for run in runs.values()]
    weights, others = (state["method"] for state in states)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_run_from_before_there_were_any_goes_on(runs, tmp_path):
    old = yaml.safe_load((runs[0] / "recipe.yaml").read_text())
    del old["health"]["pictures"]
    (runs[0] / "recipe.yaml").write_text(yaml.safe_dump(old))
    (runs[0] / "checkpoints" / "step_000000004.pt").unlink()  # as if it had been killed after the first epoch
    train(small_recipe(), open_source("scenes:8"), runs[0], Console(quiet=True))
    assert snapshots.steps(runs[0]) == [4]


ENCODERS = {
    "class and class+": lambda: tiny_encoder(TokenSpec(cls_plus=1)),
    "registers and auxiliary tokens": lambda: tiny_encoder(TokenSpec(register=2, aux=3, mask=True)),
    "no class token": lambda: tiny_encoder(TokenSpec()).without("prefix"),
    "swin": lambda: tiny_swin(TokenSpec(cls=0)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_any_encoder_has_its_picture_and_stays_as_it_was(name, tmp_path):
    encoder, recipe, said = ENCODERS[name]().train(), small_recipe("--views.global_size 16"), []
    torch.manual_seed(3)
    state = torch.get_rng_state()
    Snapshots(recipe, open_source("scenes:8"), tmp_path, CPU, said.append).take(encoder, 7)
    assert not said
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in encoder.modules())
    columns = 2 + encoder.spec.cls + encoder.spec.cls_plus  # image, attention, PCA
    width = Image.open(snapshots.path_of(tmp_path, 7)).width
    assert columns * 128 < width < (columns + 1) * 128


def test_what_fails_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(snapshots, "token_sheet", fail)
    said = []
    shots = Snapshots(small_recipe(), open_source("scenes:8"), tmp_path, CPU, said.append)
    shots.take(tiny_encoder(TokenSpec()), 0)
    shots.take(tiny_encoder(TokenSpec()), 4)
    assert said == ["no more pictures of this run are taken (RuntimeError: out of memory)"]
    assert snapshots.steps(tmp_path) == []


def test_the_seed_chooses_the_images_and_unreadable_ones_give_way(tmp_path):
    for i in range(6):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    source = open_source(tmp_path)
    chosen = fixed_pixels(source, 16, 5, seed=1)
    assert chosen.shape == (5, 3, 16, 16)
    assert sorted(chosen[:, 0, 0, 0].tolist()) == [0, 40, 120, 160, 200]
    assert torch.equal(chosen, fixed_pixels(source, 16, 5, seed=1))
    assert not torch.equal(fixed_pixels(source, 16, 2, seed=1), fixed_pixels(source, 16, 2, seed=2))


def test_the_grid_is_twice_that_of_training_unless_that_is_too_fine():
    encoder = tiny_encoder(TokenSpec(), patch=4)
    assert picture_size(encoder, 64) == 128  # 32 x 32 patches
    assert picture_size(encoder, 68) == 68
