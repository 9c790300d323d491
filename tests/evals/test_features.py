"""Extraction: tokens, layers, the golden concatenations, the cache."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_encoder, tiny_swin
from triptych.data.sources import open_source
from triptych.errors import UserError
from triptych.evals.features import (
    HASHED,
    cached,
    cached_all,
    content_hash,
    extract,
    extract_all,
    labels_of,
    multiscale,
)
from triptych.evals.frozen import frozen
from triptych.evals.selection import select, select_all
from triptych.evals.transform import EvalTransform, batches
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


# --- squares, longest sides, several scales ---


def test_a_square_takes_the_whole_image(tmp_path):
    y, x = np.mgrid[0:60, 0:90]
    image = Image.fromarray(np.stack([y * 4, x * 2, 0 * x], -1).astype(np.uint8))
    image.save(tmp_path / "image.png")
    transform = EvalTransform(30, 0, shape="square")
    expected = v1.PILToTensor()(image.resize((30, 30), Image.Resampling.BICUBIC)).int()
    for pixels in (transform.pixels(image), transform.read(open_source(tmp_path), 0)):
        assert (pixels.int() - expected).abs().max() <= 1


def test_bilinear_is_the_resize_of_msn():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    theirs = v1.Compose([v1.Resize(64, v1.InterpolationMode.BILINEAR), v1.CenterCrop(56), v1.PILToTensor()])
    bilinear, bicubic = (replace(EvalTransform.of(56), interpolation=i).pixels(image) for i in ("bilinear", "bicubic"))
    assert (bilinear.int() - theirs(image).int()).abs().max() <= 1
    assert (bicubic.int() - theirs(image).int()).abs().max() > 10


@pytest.mark.parametrize("longest", [50, 97, 224])
def test_the_longest_side_is_pillow_s_thumbnail(longest):
    """The same size for each of many shapes, none enlarged."""
    transform = EvalTransform(longest, 0, shape="longest")
    for height in (1, 7, 33, 50, 64, 100, 149, 300):
        for width in (1, 2, 49, 50, 51, 97, 101, 223, 640):
            theirs = Image.new("1", (width, height))
            theirs.thumbnail((longest, longest))
            assert transform.resized(height, width) == theirs.size[::-1]


def test_images_of_unlike_sizes_come_in_the_order_of_the_source(tmp_path):
    """Grouped by size within a batch; each as it would be alone, without the rows and columns that fill no patch."""
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(20, 16), (16, 40), (20, 16), (9, 9), (16, 40), (20, 17)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    encoder, source = tiny_encoder(TokenSpec()).eval(), open_source(tmp_path)
    transform = EvalTransform(24, 0, shape="longest")
    together, indices = extract(encoder, source, transform, token="cls+patch_mean", workers=0, batch=4)
    assert indices.tolist() == [0, 2, 3, 4, 5]
    mean, std = (torch.tensor(x)[:, None, None] for x in (transform.mean, transform.std))
    for row, index in enumerate(indices.tolist()):
        pixels = (transform.read(source, index) / 255 - mean) / std
        cut_down = pixels[None, :, : pixels.shape[1] // 4 * 4, : pixels.shape[2] // 4 * 4]
        with torch.no_grad():
            alone = select(encoder, cut_down, "cls+patch_mean")[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="smaller than a patch of 4 px"):
        extract(encoder, source, EvalTransform(3, 0, shape="longest"), workers=0)


def test_descriptors_of_several_scales_are_those_of_dino(golden):
    g = golden("retrieval_multiscale")

    def convolution(images):
        return {"x": torch.nn.functional.conv2d(images, g["kernel"]).mean((2, 3))}

    out = multiscale(convolution, g["image"], g["scales"].tolist(), patch=1)["x"]
    torch.testing.assert_close(out, g["out"], rtol=0, atol=1e-6)
    batch = torch.cat([g["image"], 3 * g["image"].flip(3)])
    torch.testing.assert_close(
        multiscale(convolution, batch, g["scales"].tolist(), 1)["x"][:1], g["out"], rtol=0, atol=1e-6
    )
    with pytest.raises(UserError, match="each above 0"):
        multiscale(convolution, g["image"], (), 1)


def test_extraction_at_several_scales_is_the_mean_of_descriptors_then_unit_length(folder):
    encoder, source, transform = tiny_encoder(TokenSpec()).eval(), open_source(folder), EvalTransform(16, 16)
    found, _ = extract_all(
        encoder, source, transform, ["cls", "patch_mean"], workers=0, scales=(1.0, 0.7, 0.5), batch=3
    )
    images = torch.cat([x for _, x in batches(source, transform, batch=3, device=torch.device("cpu"), workers=0)])
    total = 0
    with torch.no_grad():
        for scale, side in ((1.0, 16), (0.7, 8), (0.5, 8)):  # 0.7 gives 11 px, of which two patches are 8
            smaller = (
                images if scale == 1 else torch.nn.functional.interpolate(images, scale_factor=scale, mode="bilinear")
            )
            total = total + select(encoder, smaller[..., :side, :side], "cls")
    torch.testing.assert_close(found["cls"], total / total.norm(dim=1, keepdim=True), rtol=0, atol=1e-5)
    assert found["patch_mean"].norm(dim=1).tolist() == pytest.approx([1] * 10)


def test_the_cache_tells_shapes_and_scales_apart(folder, tmp_path, monkeypatch):
    encoder, source = tiny_encoder(TokenSpec()), open_source(folder)
    options = {"folder": tmp_path / "cache", "workers": 0}
    forms = [(TRANSFORM, (1.0,)), (TRANSFORM, (1.0, 0.5))]
    forms += [(replace(TRANSFORM, shape=shape), (1.0,)) for shape in ("square", "longest")]
    forms += [(replace(TRANSFORM, interpolation="bilinear"), (1.0,))]
    first = [cached(encoder, source, t, scales=s, **options)[0] for t, s in forms]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    monkeypatch.setattr("triptych.evals.features.extract_all", lambda *a, **k: pytest.fail("extracted again"))
    again = [cached(encoder, source, t, scales=s, **options)[0] for t, s in forms]
    assert all(map(torch.equal, first, again))


def test_an_image_that_changes_without_changing_its_size_is_extracted_again(tmp_path):
    for i, value in enumerate((0, 100, 200)):
        Image.new("RGB", (20, 20), (value, value, value)).save(tmp_path / f"{i}.bmp")
    encoder, options = tiny_encoder(TokenSpec()), {"folder": tmp_path / "cache", "workers": 0}
    before, _ = cached(encoder, open_source(tmp_path), TRANSFORM, **options)
    fingerprint = open_source(tmp_path).fingerprint()
    Image.new("RGB", (20, 20), (250, 0, 0)).save(tmp_path / "1.bmp")
    assert open_source(tmp_path).fingerprint() == fingerprint
    after, _ = cached(encoder, open_source(tmp_path), TRANSFORM, **options)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_content_is_sampled_evenly_from_large_sources():
    read = []

    class Large:
        fingerprint = staticmethod(lambda: "same")
        __len__ = staticmethod(lambda: 100_000)

        def stored(self, index):
            read.append(index)
            return np.zeros((2, 2, 3), np.uint8) if index % 2 else b"file"

    content_hash(Large())
    assert len(read) == HASHED
    assert (read[0], read[-1]) == (0, 99_999)
    assert max(np.diff(read)) <= 101


def test_a_cache_file_says_what_it_holds(folder, tmp_path):
    cached_all(
        tiny_encoder(TokenSpec()), open_source(folder), TRANSFORM, ["cls", "cls+gem"], folder=tmp_path, workers=0
    )
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert [name.rpartition("-")[0] for name in names] == ["cls+gem", "cls"]
    with safe_open(tmp_path / names[0], "pt") as file:
        about = file.metadata()
    key = json.loads(about["key"])
    assert about["source"] == str(folder)
    assert (key["token"], key["transform"]["size"], key["scales"]) == ("cls+gem", 16, [1.0])


def test_encoders_that_differ_in_more_than_their_weights_do_not_share_features(folder, tmp_path):
    """Their activation, say: timm has CLIP's ViTs twice, with the same weights."""
    source = open_source(folder)
    encoder = tiny_encoder(TokenSpec()).eval()
    first, _ = cached(encoder, source, TRANSFORM, folder=tmp_path / "cache")
    for block in encoder.vit.blocks:
        block.mlp.act = torch.nn.ReLU()
    again, _ = cached(encoder, source, TRANSFORM, folder=tmp_path / "cache")
    assert not torch.allclose(first, again)


def test_rows_of_all_tokens_are_of_the_same_images(folder, tmp_path):
    """Also where an image could be read at one time and not at another."""
    encoder, source = tiny_encoder(TokenSpec()).eval(), open_source(folder)
    options = {"folder": tmp_path / "cache", "images": "the same, as far as anybody can tell"}
    broken = next(folder.rglob("*.png"))
    whole = broken.read_bytes()
    broken.write_bytes(b"x" * len(whole))
    short, kept = cached_all(encoder, source, TRANSFORM, ["cls"], **options)
    assert len(kept) == 9
    broken.write_bytes(whole)
    both, indices = cached_all(encoder, source, TRANSFORM, ["patch_mean"], **options)
    both, indices = cached_all(encoder, source, TRANSFORM, ["cls", "patch_mean"], **options)
    assert len(indices) == len(both["cls"]) == len(both["patch_mean"]) == 10
    assert len(short["cls"]) == 9


def test_features_that_are_too_many_for_memory_are_put_down_in_a_file(folder, monkeypatch):
    encoder, source = tiny_encoder(TokenSpec()).eval(), open_source(folder)
    whole, _ = extract(encoder, source, TRANSFORM)
    next(folder.rglob("*.png")).write_bytes(b"no image")
    monkeypatch.setattr("triptych.evals.features.IN_MEMORY", 10)
    rest, indices = extract(encoder, open_source(folder), TRANSFORM)
    assert torch.equal(rest, whole[indices])
    assert len(indices) == 9
