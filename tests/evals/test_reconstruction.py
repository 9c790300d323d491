"""Reconstruction from any block: what the method's own loss sees, and nothing else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import random_views, tiny_encoder, tiny_swin
from triptych.cli import main
from triptych.data.corruption import CorruptionConfig
from triptych.data.sources import open_source
from triptych.data.views import View
from triptych.errors import UserError
from triptych.evals.reconstruction import corrupted_view, reconstruct, with_pixel_head
from triptych.evals.transform import EvalTransform
from triptych.losses import masked_error
from triptych.methods import (
    DINOConfig,
    GMMLConfig,
    MAEConfig,
    MCSSLConfig,
    MMCConfig,
    MSNConfig,
    MTEConfig,
    SiTConfig,
    build,
)
from triptych.methods.base import Method
from triptych.methods.mte import MTE
from triptych.pictures import reconstruction_sheet
from triptych.schedules import Progress
from triptych.show.sheet import LINE, MARGIN, wide
from triptych.tokens import TokenSpec

SMALL = {"hidden": 16, "embedding": 6}
MMC = MMCConfig(**SMALL)
CONFIGS = {
    "mmc": MMC,
    "mmc of two blocks": MMCConfig(**SMALL, pixel_blocks=(1, 2)),
    "sit": SiTConfig(**SMALL),
    "gmml": GMMLConfig(blocks=(1, 2)),
    "mcssl": MCSSLConfig(**SMALL, prototypes=8),
    "mte": MTEConfig(base=MMC, aux=2, pooled=0),
}
T0 = Progress(0, 10)


def make(config, encoder=None) -> Method:
    torch.manual_seed(0)
    spec = MTE.token_spec(config) if isinstance(config, MTEConfig) else TokenSpec()
    method = build(encoder or tiny_encoder(spec), config).double()
    with torch.no_grad():  # a teacher that is not the student, and tokens whose size the norm changes
        for p in method.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return method


def both_crops(views) -> View:
    """The two global crops of a batch as one view."""
    first, second = views.global_crops
    names = ("images", "corrupted", "pixel_mask", "box", "pixel")
    return View(**{n: torch.cat([getattr(first, n), getattr(second, n)]) for n in names})


@pytest.mark.parametrize("name", CONFIGS)
def test_the_error_of_what_the_head_was_trained_on_is_the_methods_own_loss(name):
    method, views = make(CONFIGS[name]), random_views(3, n_local=0)
    view = both_crops(views)
    result = reconstruct(method, view)
    ours = torch.tensor(result.trained_error, dtype=torch.float64)
    if name == "mcssl":  # trained on squares
        ours = masked_error(result.trained, view.images, view.pixel_mask, "l2")
    torch.testing.assert_close(ours, method(views, T0).terms["pixels"].detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_block_is_what_the_loss_sees_unless_the_head_reads_a_mean(name):
    method, view = make(CONFIGS[name]), random_views(3).global_crops[0]
    result = reconstruct(method, view, [2, 1, 2])
    assert result.blocks == (1, 2)
    reads_a_mean = name in ("gmml", "mmc of two blocks")
    assert result.read == ((1, 2) if reads_a_mean else (2,))
    assert torch.equal(result.images[-1], result.trained) is not reads_a_mean
    assert result.images.shape == (2, 3, 3, 16, 16)
    for images, error in zip(result.images, result.errors, strict=True):
        hidden = view.pixel_mask[:, None].expand_as(images)
        assert error == pytest.approx(float((images - view.images).abs()[hidden].mean()))
    expected = (result.images[1] - result.images[0]).abs().mean(1)
    torch.testing.assert_close(result.differences, expected[None])


@torch.no_grad()
def test_a_block_is_read_as_if_the_encoder_ended_there():
    method, view = make(MMC), random_views(3).global_crops[0]
    first = reconstruct(method, view, [1]).images[0]
    raw = reconstruct(method, view, [1], norm=False).images[0]
    encoder = method.student.encoder
    encoder.vit.blocks = encoder.vit.blocks[:1]
    tokens = encoder(view.corrupted)
    assert torch.equal(first, method.pixels(tokens.patch, tokens.grid))
    assert torch.equal(raw, method.pixels(tokens.patch_raw, tokens.grid))
    assert not torch.allclose(first, raw)


def test_it_is_the_student_in_eval_mode_that_is_looked_at_and_its_mode_is_kept():
    method, view = make(MMC, tiny_encoder(TokenSpec(), drop_path=0.9)).train(), random_views(3).global_crops[0]
    expected = reconstruct(method, view).images
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.zero_()
    assert torch.equal(reconstruct(method, view).images, expected)
    assert method.student.encoder.training


def test_the_upper_half_of_the_blocks_is_the_default():
    view = random_views(2).global_crops[0]
    assert reconstruct(make(MMC, tiny_encoder(TokenSpec(), depth=12)), view).blocks == (7, 8, 9, 10, 11, 12)
    assert reconstruct(make(MMC, tiny_encoder(TokenSpec(), depth=3)), view).blocks == (2, 3)


@pytest.mark.parametrize("block", [0, -1, 3])
def test_blocks_out_of_range_are_refused(block):
    with pytest.raises(UserError, match="blocks 1 to 2"):
        reconstruct(make(MMC), random_views(2).global_crops[0], [2, block])


def test_blocks_of_a_swins_earlier_stages_are_refused():
    method, view = make(MMC, tiny_swin(TokenSpec(cls=0))), random_views(2).global_crops[0]
    assert reconstruct(method, view).blocks == (3, 4)
    with pytest.raises(UserError, match="block 2: a Swin's earlier stages"):
        reconstruct(method, view, [2, 4])


NO_HEAD = {
    "dino": DINOConfig(**SMALL, prototypes=8),
    "mae": MAEConfig(decoder_width=8, decoder_heads=2, decoder_depth=1),
    "msn": MTEConfig(base=MSNConfig(**SMALL, prototypes=8, drop=0.0), aux=1, pooled=0),
}


@pytest.mark.parametrize("name", NO_HEAD)
def test_methods_without_a_pixel_head_are_refused_by_name(name):
    with pytest.raises(UserError, match=rf"this run \({name}\) has no pixel head: mmc, sit, gmml and mcssl"):
        with_pixel_head(make(NO_HEAD[name]))


def test_a_head_that_was_never_trained_is_refused():
    with pytest.raises(UserError, match="never trained"):
        with_pixel_head(make(MMCConfig(**SMALL, weights=(0.0, 1.0, 1.0))))


# --- the images ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "5.png").write_text("no image")
    return folder


@pytest.mark.parametrize("kinds", [("noise",), ("zeros",), ("self",), ("other",)])
def test_the_view_is_a_function_of_the_seed_and_differs_from_its_images_where_it_is_marked(folder, kinds):
    config, transform = CorruptionConfig(kinds=kinds, replace=0.0), EvalTransform(16, 18)
    before = torch.get_rng_state()
    view = corrupted_view(open_source(folder), config, transform, images=9, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert view.images.shape == (5, 3, 16, 16)  # the sixth cannot be read
    hidden = view.pixel_mask[:, None].expand_as(view.images)
    assert torch.equal(view.images[~hidden], view.corrupted[~hidden])
    changed = [(a != b)[h].double().mean() for a, b, h in zip(view.images, view.corrupted, hidden, strict=True)]
    assert min(changed) > 0.8  # "self" may copy a block onto itself
    assert 0.5 <= hidden.double().mean() < 0.9
    again = corrupted_view(open_source(folder), config, transform, images=9, seed=3)
    assert torch.equal(again.corrupted, view.corrupted)
    other = corrupted_view(open_source(folder), config, transform, images=9, seed=4)
    assert not torch.equal(other.corrupted, view.corrupted)


def test_no_images_are_an_error(folder, tmp_path):
    options = (CorruptionConfig(), EvalTransform(16, 18))
    with pytest.raises(UserError, match="at least one image"):
        corrupted_view(open_source(folder), *options, images=0)
    (tmp_path / "0.png").write_text("no image")
    with pytest.raises(UserError, match="no image of"):
        corrupted_view(open_source(tmp_path), *options)


@pytest.mark.parametrize("name", ["sit", "gmml"])
def test_the_picture_has_a_row_per_image_and_shows_its_pixels(folder, name):
    transform = EvalTransform(16, 18, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    view = corrupted_view(open_source(folder), CorruptionConfig(), transform, images=3)
    result = reconstruct(make(CONFIGS[name]).float(), view, [1, 2])
    sheet = reconstruction_sheet(result, view, transform.mean, transform.std, side=16)
    titles = ["image", "corrupted", "block 1", "block 2", *(["mean 1 2"] if name == "gmml" else []), "|2 - 1|"]
    widths = [max(16, wide(title)) + MARGIN for title in titles]
    assert sheet.size == (sum(widths) + MARGIN, LINE + 3 * (16 + MARGIN) + LINE + 3 * MARGIN)  # below, a scale
    left, top = MARGIN + (wide("image") - 16) // 2, MARGIN + LINE + 16 + MARGIN
    tile = np.asarray(sheet)[top : top + 16, left : left + 16]
    expected = view.images[1] * torch.tensor(transform.std)[:, None, None] + torch.tensor(transform.mean)[:, None, None]
    assert np.abs(tile - 255 * expected.permute(1, 2, 0).numpy()).max() < 0.51
    whole = replace(result, blocks=(2,), images=result.images[1:])  # one block alone has no differences
    alone = reconstruction_sheet(whole, view, transform.mean, transform.std, side=16)
    assert alone.width == sheet.width - widths[2] - widths[-1]


# --- the command ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny = "--data scenes:8 --batch 4 --epochs 1 --loader.workers 0 --health.every 0 --views.global_size 32"
    tiny += " --encoder.width 24 --encoder.depth 2 --encoder.heads 3 --method.hidden 16 --method.embedding 8"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "--recipe", "mmc_small", *tiny.split(), "--out", "run"])
        main(["train", "--recipe", "dino_small", *tiny.split(), "--method.prototypes", "16", "--out", "dino"])
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")


def test_the_command_writes_the_picture_and_prints_the_errors(here, capsys):
    main("eval reconstruction run --data scenes:8 --out new/picture.png --images 3 --blocks 1 2".split())
    said = " ".join(capsys.readouterr().out.split())
    for expected in ("masked L1", "3 images of scenes:8 [test], run@2 (student)", "block 1", "as trained: block 2"):
        assert expected in said
    first = Path("new/picture.png").read_bytes()
    assert Image.open("new/picture.png").size == (5 * 134 + 6, 18 + 3 * 134 + 24 + 12)
    main("eval reconstruction run --data scenes:8 --out again.png --images 3 --blocks 1 2".split())
    assert Path("again.png").read_bytes() == first
    main("eval reconstruction run --data scenes:8 --out again.png --images 3 --blocks 1 2 --no-norm".split())
    assert Path("again.png").read_bytes() != first


MISTAKES = {
    "block": ("run --data scenes:8 --blocks 3", "blocks 1 to 2"),
    "method": ("dino --data scenes:8", "this run (dino) has no pixel head"),
    "no run": ("vit_tiny_patch16_224 --data scenes:8", "is not a Triptych run"),
    "images": ("run --data scenes:8 --images 0", "at least one image"),
    "seed": ("run --data scenes:8 --seed -1", "--seed"),
    "kind of picture": ("run --data scenes:8 --out picture.doc", "name a picture file"),
    "no such data": ("run --data nowhere", "'nowhere' is neither"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_its_remedy_and_exit_code_2(here, name, capsys):
    words, expected = MISTAKES[name]
    with pytest.raises(SystemExit) as stop:
        main(["eval", "reconstruction", *words.split()])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert expected in said.err + said.out
    assert not Path("reconstruction.png").exists()
