"""UPerNet: its structure against the equations and published sizes, and what training needs of it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import tiny_encoder, tiny_swin
from triptych.data.annotated import IGNORE
from triptych.dense.layers import BatchNorm2d
from triptych.dense.maps import with_drop_path
from triptych.dense.upernet import UPerHead, UPerNet
from triptych.encoders.swin_build import SwinConfig
from triptych.encoders.swin_build import build as build_swin
from triptych.errors import UserError
from triptych.optim import OptimConfig, make_optimizer, parameter_groups, set_rates
from triptych.tokens import TokenSpec

CLASSES = 5


def vit(**options):
    return tiny_encoder(TokenSpec(cls_plus=1, register=2), image=32, patch=8, depth=4, **options)


def swin():
    return tiny_swin(TokenSpec(cls=0), image=64, window=2, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4))


def network(encoder=None, **options) -> UPerNet:
    torch.manual_seed(0)
    return UPerNet(encoder or vit(), CLASSES, **({"channels": 16, "aux_channels": 8} | options))


def scene(height=32, width=64, batch=2, seed=0):
    """Images of noise and labels that they tell: the quadrant's class is a constant added to its pixels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (batch, 2, 2), generator=g)
    labels = labels.repeat_interleave(height // 2, 1).repeat_interleave(width // 2, 2)
    images = torch.randn(batch, 3, height, width, generator=g) / 4 + labels[:, None] - 2
    return images, labels


@pytest.mark.parametrize("size", [(32, 32), (32, 96), (40, 72)], ids=["square", "wide", "odd grid"])
@pytest.mark.parametrize("encoder", [vit, swin])
def test_logits_are_on_the_finest_grid(encoder, size):
    size = size if encoder is vit else (size[0] // 8 * 16, size[1] // 8 * 16)
    net = network(encoder())
    stride = net.pyramid.strides[0]
    assert net(torch.zeros(2, 3, *size)).shape == (2, CLASSES, size[0] / stride, size[1] / stride)


def conv(x, layer):
    """Convolution that keeps the size, BatchNorm with its running statistics, ReLU; in terms of torch.nn.functional."""
    weights, norm, _ = layer
    y = F.conv2d(x, weights.weight, None, 1, weights.kernel_size[0] // 2)
    y = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return F.relu(y * norm.weight[:, None, None] + norm.bias[:, None, None])


def pooled(x, scale):
    """Mean over scale x scale cells, whose borders are rounded outwards."""
    h, w = x.shape[-2:]
    y = torch.zeros(*x.shape[:2], scale, scale)
    for i in range(scale):
        for j in range(scale):
            rows = slice(i * h // scale, math.ceil((i + 1) * h / scale))
            y[:, :, i, j] = x[:, :, rows, j * w // scale : math.ceil((j + 1) * w / scale)].mean((2, 3))
    return y


def up(x, like):
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def test_the_head_is_the_equations():
    g = torch.Generator().manual_seed(0)
    x1, x2, x3, x4 = maps = [torch.randn(2, 4 + i, 24 >> i, 40 >> i, generator=g) for i in range(4)]
    head = UPerHead([4, 5, 6, 7], CLASSES, 8, (1, 2, 3, 6), 0.1).eval()
    for norm in head.modules():
        if isinstance(norm, BatchNorm2d):
            for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                value.copy_(torch.rand(value.shape, generator=g) + 0.5)
    pools = [up(conv(pooled(x4, s), pool), x4) for s, pool in zip((1, 2, 3, 6), head.pools, strict=True)]
    l4 = conv(torch.cat([x4, *pools], 1), head.pooled)
    l3 = conv(x3, head.laterals[2]) + up(l4, x3)
    l2 = conv(x2, head.laterals[1]) + up(l3, x2)
    l1 = conv(x1, head.laterals[0]) + up(l2, x1)
    outs = [conv(l, s) for l, s in zip((l1, l2, l3), head.smooth, strict=True)]
    y = conv(torch.cat([up(o, x1) for o in (*outs, l4)], 1), head.fuse)
    expected = (
        torch.einsum("kc,bchw->bkhw", head.classify[1].weight[:, :, 0, 0], y) + head.classify[1].bias[:, None, None]
    )
    torch.testing.assert_close(head(maps), expected)


def count(*parts: nn.Module) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())


def test_a_vit_b_head_has_as_many_parameters_as_mmsegs():
    """A convolution with BatchNorm: k² · in · out + 2 · out."""
    d, classes = 768, 150
    with torch.device("meta"):
        head = UPerHead([d] * 4, classes, d, (1, 2, 3, 6), 0.1)

    def conv(k, inputs):
        return k * k * inputs * d + 2 * d

    pooling = 4 * conv(1, d) + conv(3, 5 * d)
    pyramid = 3 * (conv(1, d) + conv(3, d))
    assert count(head) == pooling + pyramid + conv(3, 4 * d) + d * classes + classes


@pytest.mark.parametrize(
    ("arch", "millions"),
    [
        ("swin_tiny_patch4_window7_224", 60),
        ("swin_base_patch4_window7_224", 121),
    ],
)
def test_a_whole_swin_upernet_has_the_size_that_its_paper_gives(arch, millions):
    """Liu et al. 2021, table 3: UPerNet with 512 channels on ADE20K."""
    with torch.device("meta"):
        net = UPerNet(build_swin(SwinConfig(arch=arch), TokenSpec(cls=0)), 150, channels=512)
    assert round((count(net) - count(net.encoder.trunk.norm)) / 1e6) == millions


@torch.no_grad()
def test_the_loss_is_that_of_the_head_and_two_fifths_of_the_auxiliary_ones():
    net, (images, labels) = network(dropout=0.0).train(), scene()
    labels[0, :9] = IGNORE
    losses = net.losses(images, labels)
    maps = net.pyramid(images)

    def loss(logits):
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False).log_softmax(1)
        seen = labels != IGNORE
        right = logits.gather(1, torch.where(seen, labels, 0)[:, None])[:, 0]
        return -(right * seen).sum() / labels.numel()

    torch.testing.assert_close(losses["segmentation"], loss(net.head(maps)))
    torch.testing.assert_close(losses["aux"], 0.4 * loss(net.aux_head(maps[2])))
    assert losses.keys() == {"segmentation", "aux"}


def test_the_auxiliary_head_can_be_left_out_and_has_no_part_in_the_prediction():
    net, without = network().eval(), network(aux_weight=0.0).eval()
    without.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("aux_head")})
    images, labels = scene()
    assert torch.equal(net(images), without(images))
    assert without.losses(images, labels).keys() == {"segmentation"}


def test_dropout_drops_whole_channels_in_training_only():
    net = network(dropout=0.5)
    drop = net.head.classify[0].train()
    x = torch.ones(2, 64, 3, 3)
    kept = drop(x) != 0
    assert torch.equal(kept.flatten(2).all(2), kept.flatten(2).any(2))
    assert 0 < kept[:, :, 0, 0].float().mean() < 1
    net.eval()
    assert torch.equal(drop(x), x)


@pytest.mark.parametrize("encoder", [vit, swin])
def test_gradients_reach_every_part(encoder):
    net = network(encoder()).train()
    sum(net.losses(*scene(64, 64)).values()).backward()
    unreached = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    own_norm = {"pyramid.encoder.swin.norm.weight", "pyramid.encoder.swin.norm.bias"}  # replaced: one per stage
    assert unreached - {"pyramid.levels.0.0.bias"} == (own_norm if encoder is swin else set())


@pytest.mark.parametrize("encoder", [vit, swin])
def test_the_encoders_rates_fall_with_depth_and_the_heads_do_not(encoder):
    net = network(encoder())
    layers = {id(p): layer for p, layer in net.encoder.layer_numbers()}
    top = net.encoder.depth + 1
    scales = {id(p): g["scale"] for g in parameter_groups(net, "no_tokens", 0.9) for p in g["params"]}
    assert scales.keys() == {id(p) for p in net.parameters()}
    for p in net.parameters():
        assert scales[id(p)] == pytest.approx(0.9 ** (top - layers.get(id(p), top)))
    assert {round(s, 6) for s in scales.values()} == {round(0.9**i, 6) for i in range(top + 1)}


def test_one_image_is_too_few_to_train_on_and_enough_to_predict():
    images, labels = scene(batch=1)
    net = network()
    with pytest.raises(UserError, match="two images"):
        net.train().losses(images, labels)
    assert net.eval()(images).isfinite().all()


@pytest.mark.parametrize("encoder", [vit, swin])
def test_bf16_is_finite_and_close(encoder):
    net, (images, labels) = network(encoder()).train(), scene(64, 64)
    exact = net.losses(images, labels)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = net.losses(images, labels)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert abs(loss.item() - exact[name].item()) < 0.1
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_two_images_are_learned_by_heart():
    net, (images, labels) = network(dropout=0.0).train(), scene()
    with_drop_path(net.encoder, 0.1)
    optimizer = make_optimizer(net, OptimConfig(layer_decay=0.9))
    losses = []
    for _ in range(30):
        loss = sum(net.losses(images, labels).values())
        loss.backward()
        set_rates(optimizer, 1e-2, 0.05)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    with torch.no_grad():
        right = net.eval().full_size(images).argmax(1) == labels
    assert right.float().mean() > 0.8


def test_a_state_dict_holds_all_and_the_encoder_once():
    net, other = network().train(), network()
    net.losses(*scene())
    state = net.state_dict()
    assert len({v.data_ptr() for v in state.values()}) == len(state)
    other.load_state_dict(state)
    images, _ = scene(40, 48)
    assert torch.equal(net.eval()(images), other.eval()(images))
