"""The linear segmenter, and the loss that all of them share."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_encoder, tiny_swin
from triptych.data.annotated import IGNORE
from triptych.dense.segmenters import LinearSegmenter, build_segmenter, pixel_loss, scaled_blocks
from triptych.errors import UserError
from triptych.evals.segmentation_presets import PRESETS
from triptych.tokens import TokenSpec

IMAGES = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))


def encoder(**options):
    torch.manual_seed(0)
    return tiny_encoder(TokenSpec(cls_plus=1), **options)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_logits_and_losses_are_those_of_the_specification(golden, monkeypatch, batch_norm):
    g = golden("seg_linear_head")
    case = f"bn{int(batch_norm)}"
    model = LinearSegmenter(encoder(width=3, heads=1, depth=4), 6, [1, 2, 3, 4], batch_norm=batch_norm).double().train()
    monkeypatch.setattr(model, "_maps", lambda images: list(g["levels"]))
    conv = model.classifier[-1]
    conv.weight.data, conv.bias.data = g["weight"][..., None, None], g["bias"]
    logits = model(torch.zeros(2, 3, 16, 20))
    torch.testing.assert_close(logits, g[f"{case}_logits"])
    full = F.interpolate(logits, (16, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(full, g[f"{case}_upsampled"])
    for average, name in (("all", "all"), ("labelled", "valid")):
        expected = g[f"{case}_loss_mean_over_{name}_pixels"]
        torch.testing.assert_close(pixel_loss(logits, g["label"], average), expected)
    assert model.losses(torch.zeros(2, 3, 16, 20), g["label"]).keys() == {"segmentation"}


def test_an_image_without_any_label_has_loss_zero():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    nothing = torch.full((1, 8, 8), IGNORE)
    for average in ("all", "labelled"):
        loss = pixel_loss(logits, nothing, average)
        assert loss == 0
        loss.backward()
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("norm", [True, False])
def test_the_taps_are_the_patch_tokens_of_the_blocks_by_the_final_norm(norm):
    e = encoder(depth=4)
    model = LinearSegmenter(e, 5, [2, 4], norm=norm, batch_norm=False).eval()
    taps = e.eval().layers(IMAGES, [1, 3])
    tokens = torch.cat([t.patch if norm else t.patch_raw for t in taps], -1)  # (B, N, 2 D)
    weight, bias = model.classifier[-1].weight[..., 0, 0], model.classifier[-1].bias
    expected = (tokens @ weight.T + bias).transpose(1, 2).unflatten(2, (4, 5))
    torch.testing.assert_close(model(IMAGES), expected)


def test_the_encoder_is_frozen_and_stays_in_eval_mode():
    e = encoder(drop_path=0.5).train()
    model = LinearSegmenter(e, 5, [1, 2]).train()
    assert model.training
    assert not any(part.training for part in model.encoder.modules())
    assert not any(p.requires_grad for p in model.encoder.parameters())
    before = {name: p.clone() for name, p in model.encoder.state_dict().items()}
    sum(model.losses(IMAGES, torch.zeros(2, 16, 20, dtype=torch.int64)).values()).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if not n.startswith("encoder.")
    }
    assert all(torch.equal(before[name], p) for name, p in model.encoder.state_dict().items())
    assert e.training  # the one that was given is left as it was


@pytest.mark.parametrize("height_width", [(16, 20), (13, 18), (5, 4), (3, 3)])
def test_images_that_are_no_whole_patches_get_logits_of_their_size(height_width):
    model = LinearSegmenter(encoder(), 5, [1, 2]).eval()
    images = torch.randn(2, 3, *height_width)
    padded = F.pad(images, (0, -height_width[1] % 4, 0, -height_width[0] % 4))
    full = F.interpolate(model(padded), padded.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.full_size(images), full[..., : height_width[0], : height_width[1]])


def test_a_swins_stages_meet_on_the_finest_map():
    torch.manual_seed(0)
    model = LinearSegmenter(tiny_swin(TokenSpec(cls=0)), 5, [1, 4]).eval()
    assert model(torch.randn(2, 3, 16, 24)).shape == (2, 5, 8, 12)  # 2 px per token of the first stage
    assert model.classifier[-1].in_channels == 8 + 16


@pytest.mark.parametrize(
    ("depth", "expected"), [(12, [6, 8, 10, 12]), (24, [12, 16, 20, 24]), (4, [2, 3, 3, 4]), (1, [1, 1, 1, 1])]
)
def test_blocks_are_as_deep_in_encoders_of_any_depth(depth, expected):
    assert scaled_blocks((6, 8, 10, 12), depth) == expected


def test_a_preset_builds_its_head_with_the_blocks_that_are_asked_for():
    preset = PRESETS["mmc"]
    assert build_segmenter(preset, encoder(depth=4), 5).blocks == [1, 2, 3]  # each once
    assert build_segmenter(replace(preset, blocks=(1, 4)), encoder(depth=4), 5).blocks == [0, 3]
    assert isinstance(build_segmenter(PRESETS["ibot"], encoder(), 5).batch_norm, torch.nn.Identity)
    with pytest.raises(UserError, match="--blocks 5: name some of this encoder's 1 to 4"):
        build_segmenter(replace(preset, blocks=(2, 5)), encoder(depth=4), 5)


def test_weights_start_at_a_hundredth():
    model = LinearSegmenter(encoder(width=96), 150, [1, 2])
    assert model.classifier[-1].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.classifier[-1].bias.eq(0).all()
