"""Extraction: tokens, layers, the golden concatenations, the cache."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_encoder, tiny_swin
from triptych.data.sources import open_source
from triptych.errors import UserError
from triptych.evals.features import cached, cached_all, extract, extract_all, labels_of
from triptych.evals.frozen import frozen
from triptych.evals.selection import select, select_all
from triptych.evals.transform import EvalTransform
from triptych.tokens import TokenSpec

TRANSFORM = EvalTransform(16, 18)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for c in ("cat", "dog"):
        (tmp_path / "data" / c).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / c / f"{i}.png")
    return tmp_path / "data"


def test_tokens_and_layers_are_those_of_the_encoder():
    encoder = tiny_encoder(TokenSpec(cls_plus=1), depth=3).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        *_, second, third = encoder.layers(images, [0, 1, 2])
        assert torch.equal(select(encoder, images, "cls"), third.cls)
        assert torch.equal(select(encoder, images, "cls_plus", 2), torch.cat([second.cls_plus, third.cls_plus], -1))
        both = torch.cat([third.cls, third.patch.mean(1)], -1)
        assert torch.equal(select(encoder, images, "cls+patch_mean"), both)
    with pytest.raises(UserError, match="3 blocks"):
        select(encoder, images, "cls", 4)
    with pytest.raises(UserError, match="no class"):
        select(tiny_encoder(TokenSpec()), images, "cls_plus")


def test_concatenations_equal_the_golden_ones(golden):
    """CLS, PAT and Hybrid features of one and four last blocks, as the authors form them."""
    g = golden("knn_heads")
    layers = g["layer_tokens_last4"]  # (4, B, 1 + N, D), each through the final norm

    class Recorded:
        spec, depth = TokenSpec(), 4

        def run(self, inputs, blocks):
            from triptych.tokens import Tokens

            chosen = [layers[b % 4] for b in blocks]
            return [[Tokens(patch=x[:, 1:], patch_raw=x[:, 1:], grid=None, cls=x[:, 0]) for x in chosen]]

    ours = {0: "cls", 1: "patch_mean", 2: "cls+patch_mean"}
    for n in (1, 4):
        for mode, token in ours.items():
            features = select(Recorded(), torch.zeros(layers.shape[1], 1), token, n)
            torch.testing.assert_close(features, g[f"feat_nlast{n}_mode{mode}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("build", [tiny_encoder, tiny_swin])
def test_tokens_of_one_pass_are_those_of_a_pass_for_each(build, layers):
    encoder, images = build(TokenSpec(cls=int(build is tiny_encoder))).eval(), torch.randn(2, 3, 16, 16)
    wanted = ["cls", "patch_mean", "cls+patch_mean"]
    with torch.no_grad():
        together = select_all(encoder, images, wanted, layers)
        assert list(together) == wanted
        for token, x in together.items():
            torch.testing.assert_close(x, select(encoder, images, token, layers), rtol=0, atol=1e-6)


def test_class_tokens_do_without_the_last_blocks_patches():
    """Counted in multiplications: most of the last block's are those of patches."""
    encoder, images = tiny_encoder(TokenSpec()).eval(), torch.randn(1, 3, 16, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as alone:
        select(encoder, images, "cls")
    with torch.no_grad(), FlopCounterMode(display=False) as both:
        select_all(encoder, images, ["cls", "patch_mean"])
    assert alone.get_total_flops() < 0.75 * both.get_total_flops()


def test_one_pass_over_the_images_serves_all_tokens(folder, tmp_path, monkeypatch):
    encoder, source = tiny_encoder(TokenSpec()), open_source(folder)
    options = {"folder": tmp_path / "cache", "workers": 0, "batch": 4}
    passes, run = [], encoder.run
    monkeypatch.setattr(encoder, "run", lambda *a: passes.append(1) or run(*a))
    cls, _ = cached(encoder, source, TRANSFORM, **options)
    assert len(passes) == 3, "10 images in batches of 4"
    found, indices = cached_all(encoder, source, TRANSFORM, ["cls", "patch_mean", "cls+patch_mean"], **options)
    assert len(passes) == 6, "one more pass, for what the cache did not hold"
    assert torch.equal(found["cls"], cls)
    assert torch.equal(found["cls+patch_mean"][:, cls.shape[1] :], found["patch_mean"])
    again, _ = cached(encoder, source, TRANSFORM, token="patch_mean", **options)
    assert torch.equal(again, found["patch_mean"])
    assert len(passes) == 6
    assert indices.tolist() == list(range(10))


@pytest.mark.parametrize("fails", [False, True])
def test_the_encoder_is_left_as_it_was(folder, fails, monkeypatch):
    encoder = tiny_encoder(TokenSpec(), drop_path=0.5).train()
    encoder.vit.norm.eval()  # a part may be in another mode than the whole
    before = {name: (p.clone(), p.dtype, p.requires_grad) for name, p in encoder.named_parameters()}
    modes = [m.training for m in encoder.modules()]
    if fails:
        monkeypatch.setattr(encoder, "run", lambda *_: 1 / 0)
    for precision in (torch.float32, torch.bfloat16):
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            extract(encoder, open_source(folder), TRANSFORM, workers=0, precision=precision)
        assert [m.training for m in encoder.modules()] == modes
        for name, p in encoder.named_parameters():
            value, dtype, grad = before[name]
            assert torch.equal(p, value)
            assert (p.dtype, p.requires_grad, p.grad) == (dtype, grad, None)


def test_features_can_be_trained_on(folder):
    features, _ = extract(tiny_encoder(TokenSpec()), open_source(folder), TRANSFORM, workers=0)
    probe = torch.nn.Linear(features.shape[1], 1)
    probe(features).sum().backward()
    assert probe.weight.grad is not None


def test_bfloat16_keeps_the_direction_of_features(folder):
    torch.manual_seed(0)
    encoder, source = tiny_encoder(TokenSpec(), width=48, depth=8), open_source(folder)
    exact, half = (
        extract_all(encoder, source, TRANSFORM, ["cls", "patch_mean"], workers=0, precision=precision)[0]
        for precision in (torch.float32, torch.bfloat16)
    )
    for token, x in exact.items():
        assert half[token].dtype == torch.float32
        assert not torch.equal(half[token], x)
        assert torch.cosine_similarity(half[token], x).min() > 0.9999


def test_a_lower_precision_converts_every_weight_once():
    encoder, images = tiny_encoder(TokenSpec()), torch.randn(1, 3, 16, 16)

    def conversions(batches: int) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as seen, frozen(encoder, "cpu", torch.bfloat16):
            for _ in range(batches):
                select(encoder, images, "cls")
        return sum(event.count for event in seen.key_averages() if event.key == "aten::_to_copy")

    first, second, third = (conversions(n) for n in (1, 2, 3))
    matrices = sum(isinstance(m, torch.nn.Linear | torch.nn.Conv2d) for m in encoder.modules())
    assert third - second == second - first
    # The last block's queries come of a slice of its weight, which autocast converts each time.
    assert first - (second - first) == 2 * (matrices - 1), "weights and biases in the first batch only"


def test_extraction_goes_image_by_image_whatever_the_batch(folder):
    encoder, source = tiny_encoder(TokenSpec()).eval(), open_source(folder)
    one, indices = extract(encoder, source, TRANSFORM, batch=3, workers=0)
    two, _ = extract(encoder, source, TRANSFORM, batch=10, workers=2)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert labels_of(source, indices).tolist() == [0] * 5 + [1] * 5


def test_unreadable_images_are_left_out(folder):
    (folder / "cat" / "2.png").write_bytes(b"broken")
    features, indices = extract(tiny_encoder(TokenSpec()), open_source(folder), TRANSFORM, workers=0)
    assert len(features) == 9
    assert indices.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]


def test_the_cache_is_read_for_the_same_weights_and_images_only(folder, tmp_path, monkeypatch):
    encoder, source, cache = tiny_encoder(TokenSpec()), open_source(folder), tmp_path / "cache"
    first, _ = cached(encoder, source, TRANSFORM, folder=cache, workers=0)
    monkeypatch.setattr("triptych.evals.features.extract_all", lambda *a, **k: pytest.fail("extracted again"))
    again, _ = cached(encoder, source, TRANSFORM, folder=cache, workers=0)
    assert torch.equal(first, again)
    changed = tiny_encoder(TokenSpec())
    changes = [
        lambda: cached(changed, source, TRANSFORM, folder=cache, workers=0),
        lambda: cached(encoder, source, EvalTransform(16, 20), folder=cache, workers=0),
        lambda: cached(encoder, source, TRANSFORM, folder=cache, workers=0, token="patch_mean"),
        lambda: cached(encoder, open_source(folder / "cat"), TRANSFORM, folder=cache, workers=0),
    ]
    for change in changes:
        with pytest.raises(pytest.fail.Exception):
            change()


def test_the_transform_resizes_the_shorter_side_and_crops_the_middle():
    y, x = np.mgrid[0:64, 0:128]
    image = Image.fromarray(np.stack([y * 4, x * 2, 0 * x], -1).astype(np.uint8))
    pixels = EvalTransform.of(56).pixels(image).float()
    assert pixels.shape == (3, 56, 56)
    assert abs(pixels[0].mean() - 126) < 1
    assert abs(pixels[1].mean() - 127) < 1
    assert EvalTransform.of(224).resize == 256


@pytest.mark.parametrize(("height", "width"), [(80, 80), (90, 131), (203, 64), (700, 900)])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_pixels_are_those_of_the_field_s_transforms(tmp_path, height, width, kind):
    """torchvision's Resize and CenterCrop on PIL images; a large JPEG file is decoded at a quarter of its size."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(y / 9), np.cos(x / 7), np.sin((x + y) / 11)], -1) * 100 + 128
    Image.fromarray(waves.astype(np.uint8)).save(tmp_path / f"image.{kind}")
    source, transform = open_source(tmp_path), EvalTransform.of(56)
    theirs = v1.Compose([v1.Resize(64, v1.InterpolationMode.BICUBIC), v1.CenterCrop(56), v1.PILToTensor()])
    expected = theirs(source.image(0).convert("RGB")).int()
    reduced = kind == "jpg" and height == 700
    for pixels in (transform.pixels(source.image(0).convert("RGB")), transform.read(source, 0)):
        assert pixels.shape == (3, 56, 56)
        difference = (pixels.int() - expected).abs()
        assert difference.max() <= (3 if reduced else 1)
        assert difference.float().mean() <= (0.7 if reduced else 0.02)
