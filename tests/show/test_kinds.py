"""What one image becomes, and what the frames of a video share."""

import numpy as np
import pytest
import torch

from conftest import tiny_encoder, tiny_swin
from triptych.pictures import token_sheet
from triptych.show import kinds
from triptych.show.inputs import Picture, Place
from triptych.show.kinds import Viewer
from triptych.tokens import TokenSpec


@pytest.fixture(scope="module")
def viewer():
    torch.manual_seed(0)
    encoder = tiny_encoder(TokenSpec(cls_plus=1)).eval().requires_grad_(False)
    return Viewer(encoder, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def picture(seed: int) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return Picture(f"{seed}", pixels, (16, 24))


def test_images_are_normalised_as_the_encoder_wants_them(viewer):
    x = viewer.images(picture(0))
    assert x.shape == (1, 3, 16, 24)
    for channel, (mean, std) in enumerate(zip(viewer.mean, viewer.std, strict=True)):
        expected = (picture(0).pixels[..., channel] / 255 - mean) / std
        np.testing.assert_allclose(x[0, channel].numpy(), expected, atol=1e-5)


def test_class_and_class_plus_have_a_panel_each_and_heads_a_tile_each(viewer):
    for kind in (kinds.attention(viewer), kinds.mass(viewer)):
        panels = kind.panels(picture(0))
        assert [p.name for p in panels] == ["class token: 0", "class+ token: 0"]
        for panel in panels:
            assert [t.title for t in panel.tiles] == ["image", "mean of heads", "head 1", "head 2", "head 3"]
            assert all(t.pixels.shape == (16, 24, 3) for t in panel.tiles)
        assert (panels[0].tiles[2].pixels != panels[1].tiles[2].pixels).any()


@pytest.mark.parametrize("kind", ["pca", "clusters"])
def test_frames_share_what_is_found_on_a_sample(viewer, kind):
    """So a frame has the same colours whatever else is in the video behind it, and none flickers."""
    make = getattr(kinds, kind)
    shared = make(viewer, lambda: [picture(0), picture(1)])
    alone = make(viewer, each=True, sample=list) if kind == "pca" else make(viewer)
    again = make(viewer, lambda: [picture(0), picture(1)])
    shown = [of.panels(picture(1))[0].tiles[1].pixels for of in (shared, alone, again)]
    assert (shown[0] != shown[1]).any()
    assert (shown[0] == shown[2]).all()


def test_the_click_of_the_first_frame_is_followed(viewer):
    """Later frames are compared with its patch, not with what lies at the same place."""
    at = Place.read("0.0,0.0")
    followed, own = kinds.click(viewer, at, first=True), kinds.click(viewer, at)
    first, second = (followed.panels(picture(seed))[0].tiles for seed in (0, 1))
    tokens = [viewer.patches(picture(seed)) for seed in (0, 1)]
    expected = torch.cosine_similarity(tokens[1], tokens[0][:1], dim=1).reshape(4, 6).numpy()
    assert (second[1].pixels == kinds.heat_tile(expected, (16, 24))).all()
    assert (first[0].pixels != picture(0).pixels).any()  # the ring
    assert (second[0].pixels == picture(1).pixels).all()
    assert (own.panels(picture(0))[0].tiles[1].pixels == first[1].pixels).all()
    assert (own.panels(picture(1))[0].tiles[1].pixels != second[1].pixels).any()


def test_a_runs_sheet_shows_the_tokens_that_there_are(viewer):
    """image, attention of class, of class+, PCA; a Swin has no attention to show."""
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sheets = [token_sheet(e, pixels, images) for e in (viewer.encoder, tiny_swin(TokenSpec(cls=0)).eval())]
    assert sheets[0].width > 4 * 128 > sheets[1].width > 2 * 128
    assert sheets[0].height == sheets[1].height
