"""Extraction: tokens, layers, the golden concatenations, the cache."""

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_encoder
from triptych.data.sources import open_source
from triptych.errors import UserError
from triptych.evals.features import EvalTransform, cached, extract, labels_of, select
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

        def layers(self, images, blocks):
            from triptych.tokens import Tokens

            chosen = [layers[b % 4] for b in blocks]
            return [Tokens(patch=x[:, 1:], patch_raw=x[:, 1:], grid=None, cls=x[:, 0]) for x in chosen]

    ours = {0: "cls", 1: "patch_mean", 2: "cls+patch_mean"}
    for n in (1, 4):
        for mode, token in ours.items():
            features = select(Recorded(), torch.zeros(layers.shape[1], 1), token, n)
            torch.testing.assert_close(features, g[f"feat_nlast{n}_mode{mode}"], rtol=0, atol=1e-6)


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
    monkeypatch.setattr("triptych.evals.features.extract", lambda *a, **k: pytest.fail("extracted again"))
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
