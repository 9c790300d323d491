"""Maps of patch tokens, and encoders as dense tasks want them."""

import pytest
import torch

from conftest import tiny_encoder, tiny_swin
from triptych.dense.maps import feature_maps, pad_to_multiple, patch_map, to_train
from triptych.tokens import TokenSpec

IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def test_a_map_holds_the_patch_tokens_row_by_row():
    encoder = tiny_encoder(TokenSpec(cls_plus=1, register=1)).eval()
    x, tokens = patch_map(encoder, IMAGES), encoder(IMAGES).patch
    assert x.shape == (2, encoder.width, 4, 6)
    for row in range(4):
        for column in range(6):
            assert torch.equal(x[:, :, row, column], tokens[:, row * 6 + column])


@pytest.mark.parametrize("norm", [True, False])
def test_maps_of_several_blocks_pass_the_final_norm_if_so_wanted(norm):
    encoder = tiny_encoder(TokenSpec()).eval()
    first, last = feature_maps(encoder, IMAGES, [0, -1], norm=norm)
    taps = encoder.layers(IMAGES, [0, -1])
    for found, tap in zip((first, last), taps, strict=True):
        expected = tap.patch if norm else tap.patch_raw
        assert torch.equal(found.flatten(2).transpose(1, 2), expected)


def test_a_swin_gives_each_stage_on_its_own_grid():
    maps = feature_maps(tiny_swin(TokenSpec(cls=0)).eval(), IMAGES, [0, -1])
    assert [x.shape[1:] for x in maps] == [(8, 8, 12), (16, 4, 6)]


def test_padding_adds_zeros_below_and_right_only():
    x = pad_to_multiple(torch.ones(3, 5, 8), 4)
    assert x.shape == (3, 8, 8)
    assert x[:, :5].eq(1).all()
    assert x[:, 5:].eq(0).all()


def test_stochastic_depth_grows_linearly_and_the_original_stays_as_it_was():
    encoder = tiny_encoder(TokenSpec(), depth=3).requires_grad_(False)
    own = to_train(encoder, 0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in own.vit.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])
    assert all(p.requires_grad for p in own.parameters())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not hasattr(encoder.vit.blocks[2].drop_path1, "drop_prob")


def test_without_prefix_no_class_token_takes_part():
    """The same as an encoder whose blocks attend to patches alone: class tokens no longer change anything."""
    encoder = tiny_encoder(TokenSpec(cls_plus=1, register=1)).eval()
    bare = encoder.without("prefix")
    assert (bare.spec.cls, bare.spec.cls_plus, bare.spec.register) == (0, 0, 0)
    x = bare(IMAGES)
    assert x.cls is None
    assert x.patch.shape == encoder(IMAGES).patch.shape
    assert not torch.allclose(x.patch, encoder(IMAGES).patch)
    with torch.no_grad():
        encoder.vit.cls_token.add_(1.0)
        encoder.vit.pos_embed[:, 0].add_(1.0)
    assert torch.equal(encoder.without("prefix")(IMAGES).patch, x.patch)
    names = [name for name, _ in bare.named_parameters()]
    assert not any("cls_token" in name or "reg_token" in name for name in names)


def test_without_prefix_of_one_patch_embedding_is_the_same_arithmetic():
    """One block, by hand: embedding + positions of the patches, attention among them."""
    encoder = tiny_encoder(TokenSpec(), depth=1, heads=1).eval()
    bare, vit = encoder.without("prefix"), encoder.vit
    images = IMAGES[:, :, :16, :16]
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
    expected = vit.norm(vit.blocks[0](x))
    assert torch.allclose(bare(images).patch, expected, atol=1e-5)
