"""GMML: the equation as loops.  Its corruption is compared with the authors' code in tests/data/test_corruption.py,
its reconstruction error and pixel head in test_mmc.py."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from conftest import random_views, tiny_encoder, tiny_swin
from triptych.errors import UserError
from triptych.methods import BASES, GMMLConfig, MTEConfig, build
from triptych.methods.base import Siamese
from triptych.methods.gmml import GMML
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

T0 = Progress(0, 10)


def make(blocks=(1, 2), encoder=tiny_encoder, **options) -> GMML:
    torch.manual_seed(0)
    method = build(encoder(TokenSpec(), **options), GMMLConfig(blocks=blocks)).double()
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return method


def test_the_loss_is_the_equation_written_as_loops():
    """Patches after each block, their mean, LayerNorm, pixels; the error of replaced pixels of both crops."""
    method, views = make((1, 3), depth=3), random_views(3)
    vit = method.backbone.vit
    error = count = 0.0
    for v in views.global_crops:
        x, after = vit.patch_embed(v.corrupted), []
        x = torch.cat([vit.cls_token.expand(3, -1, -1), x.flatten(1, 2) if x.ndim == 4 else x], 1) + vit.pos_embed
        for block in vit.blocks:
            x = block(x)
            after.append(x[:, 1:])
        mean = (after[0] + after[2]) / 2
        tokens = F.layer_norm(mean, mean.shape[-1:], vit.norm.weight, vit.norm.bias, vit.norm.eps)
        difference = (method.pixels(tokens, (4, 4)) - v.images).abs()
        for b in range(3):
            for i in range(16):
                for j in range(16):
                    if v.pixel_mask[b, i, j]:
                        error, count = error + difference[b, :, i, j].sum(), count + 3
    step = method(views, T0)
    torch.testing.assert_close(step.loss, error / count, rtol=0, atol=1e-12)
    assert set(step.terms) == {"pixels"}
    assert torch.equal(step.loss, step.terms["pixels"])


def test_the_mean_is_taken_before_the_final_norm():
    method, v = make(), random_views(3).global_crops[0]
    taps = method.backbone.layers(v.corrupted, [0, 1])
    mixed = method.backbone.mixed(v.corrupted, (1, 2)).mixed
    before = method.backbone.vit.norm((taps[0].patch_raw + taps[1].patch_raw) / 2)
    torch.testing.assert_close(mixed, before, rtol=0, atol=1e-12)
    assert (mixed - (taps[0].patch + taps[1].patch) / 2).abs().max() > 0.01


def test_there_is_one_network_and_all_of_it_learns():
    method, views = make(), random_views(3)
    assert method.encoder is method.backbone
    assert all(p.requires_grad for p in method.parameters())
    before = {k: v.clone() for k, v in method.state_dict().items()}
    step = method(views, T0)
    step.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())
    method.update([step.carry], T0)  # nothing moves but by the optimiser
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert method.predictions(views, T0) is None


def test_what_is_evaluated_is_the_last_block_alone():
    method, images = make(), random_views(3).global_crops[0].images
    torch.testing.assert_close(method.encoder(images).patch, method.backbone.layers(images, [-1])[0].patch)
    assert (method.encoder(images).patch - method.backbone.mixed(images, (1, 2)).mixed).abs().max() > 0.01


def test_local_crops_are_not_asked_for():
    spec = GMML.view_spec(GMMLConfig())
    assert not spec.local_crops
    assert spec.corruption == GMMLConfig().corruption


@pytest.mark.parametrize(("blocks", "wrong"), [((6, 8, 10, 12), 6), ((1, 3), 3), ((0, 1), 0), ((-1,), -1)])
def test_blocks_that_the_encoder_lacks_are_refused_by_their_number(blocks, wrong):
    with pytest.raises(UserError, match=f"block {wrong}: this encoder has blocks 1 to 2"):
        make(blocks)


def test_the_last_block_must_be_read():
    """What is evaluated is its output: it would stay as it started, and DDP waits for its gradient."""
    with pytest.raises(UserError, match="blocks up to 2 leave block 3 untrained: add it"):
        make((1, 2), depth=3)


def test_blocks_of_other_widths_are_refused():
    """A Swin's stages have patches of their own size; those of the last stage can be averaged."""
    with pytest.raises(UserError, match="earlier stages have patches of another size; choose from 3 to 4"):
        make((1, 4), tiny_swin)(random_views(3), T0)
    assert make((3, 4), tiny_swin)(random_views(3), T0).loss.isfinite()


def test_mte_cannot_wrap_it():
    """It has no image-level loss: it is no Siamese, and no base of MTE's."""
    assert not isinstance(make(), Siamese)
    assert GMMLConfig not in BASES
    with pytest.raises(ValidationError, match="gmml"):
        MTEConfig(base={"name": "gmml"})
