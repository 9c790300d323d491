"""Semantic FPN: its structure against the equations, and the two-process training of dense networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import tiny_encoder, tiny_swin
from triptych.dense.layers import BatchNorm2d
from triptych.dense.maps import feature_maps
from triptych.dense.semantic_fpn import SemanticFPN
from triptych.dense.upernet import UPerNet
from triptych.errors import UserError
from triptych.optim import OptimConfig, make_optimizer, parameter_groups, set_rates
from triptych.tokens import TokenSpec

CLASSES = 5


def vit(**options):
    return tiny_encoder(TokenSpec(cls_plus=1, register=2), image=32, patch=8, depth=4, **options)


def swin():
    return tiny_swin(TokenSpec(cls=0), image=64, window=2, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4))


def network(encoder=None, **options) -> SemanticFPN:
    torch.manual_seed(0)
    return SemanticFPN(encoder or vit(), CLASSES, **({"fpn_channels": 16, "channels": 8} | options))


def scene(height=32, width=64, batch=2, seed=0):
    """Images of noise and labels that they tell: the quadrant's class is a constant added to its pixels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (batch, 2, 2), generator=g)
    labels = labels.repeat_interleave(height // 2, 1).repeat_interleave(width // 2, 2)
    return torch.randn(batch, 3, height, width, generator=g) / 4 + labels[:, None] - 2, labels


NETWORKS = {
    "flat": lambda: network(),
    "pyramid": lambda: network(pyramid=True),
    "without class tokens": lambda: network(vit().without("prefix")),
    "swin": lambda: network(swin()),
}


@pytest.mark.parametrize("size", [(64, 64), (64, 160), (80, 112)], ids=["square", "wide", "odd grid"])
@pytest.mark.parametrize(("kind", "stride"), [("flat", 8), ("pyramid", 4), ("without class tokens", 8), ("swin", 2)])
def test_logits_are_on_the_finest_grid(kind, stride, size):
    assert NETWORKS[kind]()(torch.zeros(2, 3, *size)).shape == (2, CLASSES, size[0] // stride, size[1] // stride)


def conv(x, layer):
    """Convolution that keeps the size, BatchNorm with its running statistics, ReLU; in terms of torch.nn.functional."""
    weights, norm, _ = layer
    y = F.conv2d(x, weights.weight, None, 1, 1)
    y = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return F.relu(y * norm.weight[:, None, None] + norm.bias[:, None, None])


def up(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def nearest(x, like):
    """The cell of x under each cell of `like`."""
    rows = [i * x.shape[2] // like.shape[2] for i in range(like.shape[2])]
    columns = [j * x.shape[3] // like.shape[3] for j in range(like.shape[3])]
    return x[:, :, rows][..., columns]


@pytest.mark.parametrize("size", [(64, 64), (80, 112)], ids=["square", "odd grid"])
@pytest.mark.parametrize("kind", ["flat", "pyramid"])
@torch.no_grad()
def test_the_network_is_the_equations(kind, size):
    net = NETWORKS[kind]().eval()
    g = torch.Generator().manual_seed(0)
    for norm in net.scales.modules():
        if isinstance(norm, BatchNorm2d):
            for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                value.copy_(torch.rand(value.shape, generator=g) + 0.5)
    images = torch.randn(2, 3, *size, generator=g)
    maps = net.maps(images)
    inner = [block[0] for block in net.fpn.inner_blocks]
    outer = [block[0] for block in net.fpn.layer_blocks]
    levels = [F.conv2d(maps[3], inner[3].weight, inner[3].bias)]
    for i in (2, 1, 0):
        levels.insert(0, F.conv2d(maps[i], inner[i].weight, inner[i].bias) + nearest(levels[0], maps[i]))
    total = 0
    for i, level in enumerate(levels):
        z = F.conv2d(level, outer[i].weight, outer[i].bias, padding=1)
        layers = [m for m in net.scales[i].modules() if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Conv2d)]
        assert len(layers) == max(1, i)
        for layer in layers:
            z = conv(z, layer)
            z = up(z, (2 * z.shape[2], 2 * z.shape[3])) if i else z
        total = total + up(z, maps[0].shape[-2:])
    weights = net.classify[1]
    expected = torch.einsum("kc,bchw->bkhw", weights.weight[:, :, 0, 0], total) + weights.bias[:, None, None]
    torch.testing.assert_close(net(images), expected)


def test_udis_maps_are_the_quarters_of_the_depth_before_the_final_norm():
    encoder = tiny_encoder(TokenSpec(), image=32, patch=8, depth=12)
    images, _ = scene()
    for found, expected in zip(
        network(encoder).maps(images), feature_maps(encoder, images, [2, 5, 8, 11], norm=False), strict=True
    ):
        assert torch.equal(found, expected)


def test_a_head_has_as_many_parameters_as_mmsegs():
    """FPN: 1 x 1 and 3 x 3 with bias; head: 1 + 1 + 2 + 3 convolutions of 3 x 3 with BatchNorm."""
    with torch.device("meta"):
        encoder = tiny_encoder(TokenSpec(), image=32, patch=8, depth=4)
        net = SemanticFPN(encoder, 150)
    d = encoder.width
    fpn = 4 * ((d * 256 + 256) + (9 * 256 * 256 + 256))
    head = 4 * (9 * 256 * 128 + 2 * 128) + 3 * (9 * 128 * 128 + 2 * 128) + 128 * 150 + 150
    assert sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in encoder.parameters()) == fpn + head


@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_reach_all_but_the_final_norm(kind):
    net = NETWORKS[kind]().train()
    sum(net.losses(*scene(64, 64)).values()).backward()
    unreached = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    trunk = f"maps.encoder.{'swin' if kind == 'swin' else 'vit'}.norm"
    assert unreached - {"maps.levels.0.0.bias"} == {f"{trunk}.weight", f"{trunk}.bias"}


@pytest.mark.parametrize("kind", ["flat", "swin"])
def test_the_encoders_rates_fall_with_depth_and_the_heads_do_not(kind):
    net = NETWORKS[kind]()
    layers = {id(p): layer for p, layer in net.encoder.layer_numbers()}
    top = net.encoder.depth + 1
    for group in parameter_groups(net, "no_tokens", 0.75):
        for p in group["params"]:
            assert group["scale"] == pytest.approx(0.75 ** (top - layers.get(id(p), top)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_bf16_is_finite_and_close(kind):
    net, (images, labels) = NETWORKS[kind]().train(), scene(64, 64)
    exact = net.losses(images, labels)["segmentation"].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net.losses(images, labels)["segmentation"]
    loss.backward()
    assert abs(loss.item() - exact) < 0.1
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_two_images_are_learned_by_heart():
    net, (images, labels) = network(dropout=0.0).train(), scene()
    optimizer = make_optimizer(net, OptimConfig())
    losses = [one_step(net.losses, optimizer, images, labels, lr=1e-2) for _ in range(40)]
    assert losses[-1] < losses[0] / 3
    with torch.no_grad():
        right = net.eval().full_size(images).argmax(1) == labels
    assert right.float().mean() > 0.8


def one_step(losses, optimizer, images, labels, lr) -> float:
    loss = sum(losses(images, labels).values())
    loss.backward()
    set_rates(optimizer, lr, 0.05)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def test_a_state_dict_holds_all_and_the_encoder_once():
    net, other = network(pyramid=True).train(), network(pyramid=True)
    net.losses(*scene())
    state = net.state_dict()
    assert len({v.data_ptr() for v in state.values()}) == len(state)
    other.load_state_dict(state)
    images, _ = scene(40, 48)
    assert torch.equal(net.eval()(images), other.eval()(images))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="name four blocks"):
        network(blocks=(3, 4))
    with pytest.raises(UserError, match="blocks 1 to 4"):
        network(blocks=(3, 6, 9, 12))
    with pytest.raises(UserError, match="leave it out"):
        network(swin(), blocks=(1, 2, 3, 4))


class Losses(nn.Module):
    """What DDP wraps."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images, labels):
        return self.network.losses(images, labels)


def doubles() -> dict[str, Losses]:
    """Networks whose BatchNorm meets every kind of map, in float64."""
    torch.manual_seed(0)
    upernet = UPerNet(vit(), CLASSES, channels=8, aux_channels=8, dropout=0.0)
    return {"upernet": Losses(upernet).double(), "fpn": Losses(network(dropout=0.0)).double()}


def batches(rank=None):
    for seed in range(2):
        images, labels = scene(batch=4, seed=seed)
        mine = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        yield images.double()[mine], labels[mine]


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for name, model in doubles().items():
        wrapped = nn.parallel.DistributedDataParallel(model.train(), find_unused_parameters=True)
        optimizer = make_optimizer(model, OptimConfig(kind="sgd"))
        for images, labels in batches(rank):
            one_step(wrapped, optimizer, images, labels, lr=0.1)
        torch.save(model.state_dict(), f"{folder}/{name}.{rank}.pt")
    uneven(rank, folder)
    torch.distributed.destroy_process_group()


def uneven(rank: int, folder: str) -> None:
    """BatchNorm2d of images of another size on each process."""
    norm, x = BatchNorm2d(3).double().train(), parts()[rank].requires_grad_()
    y = norm(x)
    (y * torch.arange(y.numel()).view(y.shape) / 100).sum().backward()
    torch.save([y.detach(), x.grad, norm.state_dict()], f"{folder}/norm.{rank}.pt")


def parts() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1 + i, 3, 4 + i, 5, generator=g, dtype=torch.float64) + i for i in (0, 1)]


def test_two_processes_equal_one_on_the_joint_batch(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    for name, model in doubles().items():
        optimizer = make_optimizer(model.train(), OptimConfig(kind="sgd"))
        for images, labels in batches():
            one_step(model, optimizer, images, labels, lr=0.1)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True)
            for key, value in model.state_dict().items():
                torch.testing.assert_close(found[key], value, rtol=0, atol=1e-7, msg=f"{name} {key}")
    check_uneven(tmp_path)


def check_uneven(folder) -> None:
    norm, xs = nn.BatchNorm1d(3).double().train(), [x.requires_grad_() for x in parts()]
    rows = norm(torch.cat([x.movedim(1, -1).flatten(0, -2) for x in xs]))
    ys = [
        y.unflatten(0, x.movedim(1, -1).shape[:-1]).movedim(-1, 1)
        for x, y in zip(xs, rows.split([20, 50]), strict=True)
    ]
    sum((y * torch.arange(y.numel()).view(y.shape) / 100).sum() for y in ys).backward()
    for rank in (0, 1):
        y, grad, state = torch.load(folder / f"norm.{rank}.pt", weights_only=True)
        torch.testing.assert_close(y, ys[rank].detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(grad, xs[rank].grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(state["running_var"], norm.running_var, rtol=0, atol=1e-12)
        torch.testing.assert_close(state["running_mean"], norm.running_mean, rtol=0, atol=1e-12)
