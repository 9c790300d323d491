"""What a block computes again instead of keeping: the same numbers, and less memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import tiny_encoder
from triptych.encoders.base import Crops
from triptych.encoders.saving import gelu_linear, norm_linear, packed_linear
from triptych.memory import LiveMemory
from triptych.tokens import TokenSpec


def gradients(y, inputs):
    weights = torch.arange(y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return torch.autograd.grad((y * weights).sum(), inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_plain_autograd(bias):
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(6).double(), nn.Linear(6, 5, bias=bias).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    parts = [torch.randn(b, n, 6, dtype=torch.float64, requires_grad=True) for b, n in ((2, 3), (4, 1))]
    rows = torch.cat([p.flatten(0, 1) for p in parts])
    own = list(linear.parameters())
    for ours, plain, inputs in (
        (norm_linear(norm, linear, x), linear(norm(x)), [x, *norm.parameters(), *own]),
        (gelu_linear(x, linear), linear(F.gelu(x)), [x, *own]),
        (packed_linear(parts, linear), linear(rows), [*parts, *own]),
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
        for a, b in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10)


def test_frozen_weights_get_no_gradient_and_half_precision_comes_close():
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(16), nn.Linear(16, 8)
    linear.requires_grad_(False)
    x = torch.randn(9, 16, requires_grad=True)
    whole = gradients(norm_linear(norm, linear, x), [x])[0]
    assert linear.weight.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_linear(norm, linear, x)
    assert y.dtype == torch.bfloat16
    (half,) = gradients(y, [x])
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half.flatten(), whole.flatten(), dim=0) > 0.999


def views(encoder, images, patches):
    """Tokens of two sizes in one pass."""
    return encoder.many([Crops(images[0], patches=patches), Crops(images[1], patches=patches)])


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("aux", [0, 2])
def test_one_pass_over_two_sizes_is_two_passes(checkpoint, aux):
    torch.manual_seed(0)
    encoder = tiny_encoder(TokenSpec(cls_plus=1, register=1, aux=aux)).double()
    encoder.checkpoint = checkpoint
    images = [torch.randn(b, 3, s, s, dtype=torch.float64) for b, s in ((2, 16), (3, 8))]
    parameters = [p for p in encoder.parameters() if p.requires_grad]

    def loss(tokens):
        used = [(x.cls, x.cls_plus, x.register, x.aux, x.patch) for x in tokens]
        return sum(t.square().sum() * (i + 1) for one in used for i, t in enumerate(one) if t is not None)

    together, apart = views(encoder, images, True), [encoder(x) for x in images]
    results = [torch.autograd.grad(loss(x), parameters, allow_unused=True) for x in (together, apart)]
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("aux", [0, 2])
def test_without_patches_the_other_tokens_and_their_gradients_are_the_same(aux):
    torch.manual_seed(0)
    encoder = tiny_encoder(TokenSpec(cls_plus=1, register=1, aux=aux)).double()
    images = [torch.randn(b, 3, s, s, dtype=torch.float64) for b, s in ((2, 16), (3, 8))]
    results = []
    for patches in (True, False):
        tokens = views(encoder, images, patches)
        assert [x.patch.shape[1] for x in tokens] == ([16, 4] if patches else [0, 0])
        used = [t for x in tokens for t in (x.cls, x.cls_plus, x.register, x.aux) if t is not None]
        total = sum((t * t.detach().roll(1)).sum() for t in used)
        results.append([*used, *(g for g in torch.autograd.grad(total, list(encoder.parameters())))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_block_keeps_less_and_a_checkpointed_one_nearly_nothing():
    encoder = tiny_encoder(TokenSpec(), depth=4, width=48)
    images = [torch.randn(4, 3, 32, 32), torch.randn(8, 3, 16, 16)]

    def kept(change=lambda e: None):
        e = copy.deepcopy(encoder)
        change(e)
        with LiveMemory() as memory:
            tokens = views(e, images, True)
            return memory.live, tokens

    def plain(e):  # what timm's own blocks keep
        with LiveMemory() as memory:
            outs = [e.vit.norm(e.vit.blocks(e._embedded(Crops(x))[0])) for x in images]
            return memory.live, outs

    ours, theirs, checkpointed = kept()[0], plain(encoder)[0], kept(lambda e: setattr(e, "checkpoint", True))[0]
    assert ours < 0.75 * theirs
    assert checkpointed < 0.3 * theirs


def test_skipped_images_are_a_fixed_share_and_the_update_is_right_on_average():
    torch.manual_seed(0)
    encoder = tiny_encoder(TokenSpec(aux=2), depth=1, drop_path=0.0).double()
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    whole = encoder(images)
    block = encoder.blocks[0]
    encoder.skip, block.drop_path1, block.drop_path2 = True, nn.Dropout(), nn.Dropout()
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 0.5
    block.mlp.fc2.weight.data.zero_(), block.mlp.fc2.bias.data.zero_()
    encoder.vit.norm = nn.Identity()
    whole = encoder.eval()(images)
    start = encoder.train()._embed([Crops(images)])[0]
    base, aux = start.base()[0][:, 0], start.private()[0]
    means = [torch.zeros_like(whole.cls), torch.zeros_like(whole.aux)]
    for _ in range(400):
        out = encoder(images)
        kept = ~torch.isclose(out.cls, base).all(-1)
        assert kept.sum() == 4  # of 8
        assert torch.equal(kept, ~torch.isclose(out.aux, aux).all(-1).all(-1))  # private tokens of the same images
        means = [m + x / 400 for m, x in zip(means, (out.cls, out.aux), strict=True)]
    for mean, exact, before in zip(means, (whole.cls, whole.aux), (base, aux), strict=True):
        assert (mean - exact).norm() < 0.15 * (exact - before).norm()
