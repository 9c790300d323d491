"""Maps of attention: DINO's masks, the encoder's last block, UDI's sampling."""

import pytest
import torch

from conftest import tiny_encoder, tiny_swin
from triptych.errors import UserError
from triptych.methods.udi import SRS
from triptych.show.attention import attends, attention_maps, mass_masks, srs_map_of, srs_maps
from triptych.tokens import TokenSpec

IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_the_masks_are_those_of_dinos_script(golden, share):
    g = golden("seg_attention_mass")
    rows, columns = int(g["grid_h"]), int(g["grid_w"])
    maps = g["attention"][0, :, 0, 1:].unflatten(-1, (rows, columns))
    expected = g[f"mask_keep{share * 100:.0f}"].bool()
    assert torch.equal(mass_masks(maps, share), expected)
    assert 0 < expected.sum() < expected.numel()


def test_a_mask_keeps_the_fewest_patches_that_hold_the_share():
    maps = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(1))
    for of, mask in zip(maps, mass_masks(maps, 0.7), strict=True):
        kept, whole = of[mask], of.sum()
        assert kept.sum() >= 0.7 * whole
        assert kept.sum() - kept.min() < 0.7 * whole  # one less would not do
        assert kept.min() > of[~mask].max()


@pytest.mark.parametrize("share", [0, 1.5, -1])
def test_a_share_is_above_0_and_at_most_1(share):
    with pytest.raises(UserError, match=r"0\.6"):
        mass_masks(torch.ones(2, 2), share)
    assert mass_masks(torch.ones(2, 2), 1).all()


def test_the_maps_are_rows_of_the_last_blocks_attention_patch_by_patch():
    encoder = tiny_encoder(TokenSpec(cls_plus=1, register=2)).eval()
    whole, maps = encoder.last_attention(IMAGES), attention_maps(encoder, IMAGES)
    assert list(maps) == ["class", "class+"]
    for row, of in enumerate(maps.values()):
        assert of.shape == (2, 3, 4, 6)
        for head in range(3):
            for r in range(4):
                for c in range(6):  # 4 tokens before the patches
                    expected = whole[:, head, row, 4 + 6 * r + c]
                    torch.testing.assert_close(of[:, head, r, c], expected, rtol=0, atol=1e-6)


def test_a_swin_says_what_to_show_instead():
    swin, vit = tiny_swin(TokenSpec(cls=0)), tiny_encoder(TokenSpec())
    assert (attends(swin), attends(vit)) == (False, True)
    with pytest.raises(UserError, match=r"a Swin.*pca, clusters, click"):
        attention_maps(swin, torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("case", ["student", "teacher_global", "teacher_local"])
def test_the_sampling_maps_are_those_of_udis_module(golden, case):
    g = golden("udi_srs")
    srs = SRS(12, int(g["in.heads"])).double()
    names = {"ln_in": "norm_in", "ln_out": "norm_out", "qkv": "qkv", "out": "out"}
    leaves = {"w": "weight", "b": "bias"}
    state = {f"{names[k.split('.')[1]]}.{leaves[k.split('.')[2]]}": v for k, v in g.items() if k.startswith("param.")}
    srs.load_state_dict(state)
    maps = g[f"{case}.map"]  # (sets, B, M, N)
    for at, expected in zip(maps, g[f"{case}.attn_masked"], strict=True):
        seen = srs_maps(srs, g["in.tokens"], at)
        inside = (at.sum(-1) > 0)[:, None, :, None].expand_as(seen)
        assert inside.any()
        torch.testing.assert_close(seen[inside], expected[inside], rtol=0, atol=1e-12)


def test_the_output_of_the_sampling_is_the_mean_of_values_under_its_map():
    """The map is what the module computes with: mixing the values by it gives the module's own output."""
    torch.manual_seed(0)
    srs, patch = SRS(12, 3).double(), torch.randn(2, 6, 12, dtype=torch.float64)
    at = torch.eye(6, dtype=torch.float64)[[4]].expand(2, 1, 6)
    u = srs.norm_in(patch)
    value = srs.qkv(u)[..., 24:].unflatten(2, (3, 4))
    mixed = torch.einsum("bhmn,bnhd->bmhd", srs_maps(srs, patch, at), value).flatten(2)
    torch.testing.assert_close(srs.norm_out(srs.out(mixed) + u[:, [4]]), srs(patch, at))


def test_a_queried_patch_is_found_by_row_and_column():
    torch.manual_seed(0)
    encoder, srs = tiny_encoder(TokenSpec(cls_plus=1)).eval(), SRS(12, 3)
    maps = srs_map_of(srs, encoder, IMAGES, (2, 5))
    at = torch.eye(24)[[2 * 6 + 5]].expand(2, 1, 24)
    expected = srs_maps(srs, encoder(IMAGES).patch_raw, at)[:, :, 0].reshape(2, 3, 4, 6)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 3))
