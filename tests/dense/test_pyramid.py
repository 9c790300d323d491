"""Pyramids of ViT and Swin: what each level is, its size, and what trains it."""

import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_encoder, tiny_swin
from triptych.dense.layers import BatchNorm2d
from triptych.dense.maps import feature_maps
from triptych.dense.pyramid import Pyramid
from triptych.encoders.swin import Swin
from triptych.errors import UserError
from triptych.tokens import TokenSpec

SPECS = {
    "class": TokenSpec(),
    "class+": TokenSpec(cls_plus=1),
    "registers": TokenSpec(register=3),
    "none": TokenSpec(cls=0),
}


def vit(spec=SPECS["class"], *, patch=16, depth=6, **options):
    encoder = tiny_encoder(TokenSpec(**{**vars(spec), "cls": 1}), image=4 * patch, patch=patch, depth=depth, **options)
    return encoder if spec.cls else encoder.without("prefix")


def swin(**options) -> Swin:
    return tiny_swin(TokenSpec(cls=0), image=64, window=2, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), **options)


def pictures(height, width, batch=2, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [(64, 64), (64, 160), (80, 112)], ids=["square", "wide", "odd grid"])
def test_a_vit_gives_strides_of_a_quarter_to_twice_its_patch(spec, size):
    pyramid = Pyramid(vit(SPECS[spec]))
    assert pyramid.strides == [4, 8, 16, 32]
    assert [x.shape for x in pyramid(pictures(*size))] == [(2, 12, size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]


@pytest.mark.parametrize(
    ("patch", "strides"), [(4, [2, 4, 8, 16]), (8, [4, 8, 16, 32]), (14, [3.5, 7, 14, 28]), (32, [8, 16, 32, 64])]
)
def test_a_patch_of_8_px_has_the_strides_of_one_of_16(patch, strides):
    pyramid = Pyramid(vit(patch=patch))
    assert pyramid.strides == strides
    maps = pyramid(pictures(4 * patch, 8 * patch))
    assert [x.shape[2:] for x in maps] == [(4 * patch // s, 8 * patch // s) for s in strides]


def test_a_swin_gives_its_four_stages():
    pyramid = Pyramid(swin())
    assert pyramid.channels == [8, 16, 32, 64]
    assert pyramid.strides == [2, 4, 8, 16]  # an ordinary Swin embeds 4 px, this one 2
    assert [x.shape for x in pyramid(pictures(64, 96))] == [(2, 8 << i, 32 >> i, 48 >> i) for i in range(4)]


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, [4, 6, 8, 12]), (24, [8, 12, 16, 24]), (4, [1, 2, 3, 4]), (6, [2, 3, 4, 6])]
)
def test_blocks_are_a_third_half_two_thirds_and_all_of_the_depth(depth, blocks):
    assert [b + 1 for b in Pyramid(vit(depth=depth)).blocks] == blocks


@pytest.mark.parametrize("norm", [True, False])
def test_the_level_at_the_patch_stride_is_the_tap_itself(norm):
    encoder = vit(SPECS["class+"])
    tokens = encoder.layers(pictures(80, 64), [4])[0]
    patches = tokens.patch if norm else tokens.patch_raw
    level = Pyramid(encoder, (1, 2, 5, 6), norm=norm)(pictures(80, 64))[2]
    for row in range(5):
        for column in range(4):
            assert torch.equal(level[:, :, row, column], patches[:, 4 * row + column])


def doubled(x, deconv):
    """Transposed convolution, 2 x 2 with stride 2, cell by cell."""
    b, _, h, w = x.shape
    y = torch.zeros(b, deconv.out_channels, 2 * h, 2 * w)
    for i in range(2 * h):
        for j in range(2 * w):
            y[:, :, i, j] = x[:, :, i // 2, j // 2] @ deconv.weight[:, :, i % 2, j % 2] + deconv.bias
    return y


@torch.no_grad()
def test_levels_are_the_equations():
    pyramid = Pyramid(vit(), (1, 2, 3, 6)).train()
    x1, x2, x3, x4 = feature_maps(pyramid.encoder, pictures(64, 80), [0, 1, 2, 5])
    first, norm, _, second = pyramid.levels[0]
    inner = doubled(x1, first)
    mean, var = inner.mean((0, 2, 3)), inner.var((0, 2, 3), correction=0)
    inner = (inner - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]  # scale 1, offset 0 at the start
    pooled = torch.stack(
        [
            torch.stack([x4[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].amax((2, 3)) for j in range(2)], -1)
            for i in range(2)
        ],
        2,
    )
    expected = [doubled(F.gelu(inner), second), doubled(x2, pyramid.levels[1]), x3, pooled]
    for level, other in zip(pyramid(pictures(64, 80)), expected, strict=True):
        torch.testing.assert_close(level, other, rtol=0, atol=2e-6)
    assert isinstance(norm, BatchNorm2d)


def test_a_swins_level_is_the_norm_of_what_timms_stage_gives():
    encoder = swin()
    pyramid = Pyramid(encoder)
    x = pictures(64, 64)
    stages = encoder.swin.forward_intermediates(x, norm=False, intermediates_only=True)
    for level, stage in zip(pyramid(x), stages, strict=True):
        rows = stage.permute(0, 2, 3, 1)
        expected = F.layer_norm(rows, rows.shape[-1:], eps=encoder.norm_eps).permute(0, 3, 1, 2)
        torch.testing.assert_close(level, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_gradients_reach_all_but_the_norm_that_no_map_passes(kind, norm):
    encoder = vit(SPECS["registers"]) if kind == "vit" else swin()
    pyramid = Pyramid(encoder, norm=norm)
    g = torch.Generator().manual_seed(1)
    sum((x * torch.randn(x.shape, generator=g)).sum() for x in pyramid(pictures(64, 64))).backward()
    without = {name for name, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()}
    trunk = "encoder.vit.norm" if kind == "vit" else "encoder.swin.norm"
    # A constant before BatchNorm cannot be seen behind it: round-off alone gives that bias a gradient.
    assert without - {"levels.0.0.bias"} == (set() if norm and kind == "vit" else {f"{trunk}.weight", f"{trunk}.bias"})


def test_weights_and_statistics_survive_a_state_dict():
    pyramid, other = (Pyramid(vit()) for _ in range(2))
    pyramid.train()(pictures(64, 64))
    other.load_state_dict(pyramid.state_dict())
    for a, b in zip(pyramid.eval()(pictures(64, 96)), other.eval()(pictures(64, 96)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pyramid(vit(), (3, 6)), "name four blocks"),
        (lambda: Pyramid(vit(), (2, 3, 4, 7)), "this encoder has blocks 1 to 6"),
        (lambda: Pyramid(swin(), (1, 2, 3, 4)), "leave it out"),
        (lambda: Pyramid(tiny_swin(TokenSpec(cls=0))), "this Swin has 2 stages"),
        (lambda: Pyramid(vit())(pictures(64, 16)), "at least 32 px"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_batch_norm_on_one_process_is_torchs():
    ours, theirs = BatchNorm2d(3).train(), torch.nn.BatchNorm2d(3).train()
    for seed in range(2):
        x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(ours(x), theirs(x))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
