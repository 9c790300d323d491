"""One contract over every method of the table."""

import copy

import pytest
import torch

from conftest import of_images, random_views, tiny_encoder, tiny_swin
from triptych.data.views import Views
from triptych.methods import (
    BASES,
    METHODS,
    BYOLConfig,
    DINOConfig,
    GMMLConfig,
    HSSLConfig,
    MAEConfig,
    MCSSLConfig,
    MMCConfig,
    MoBYConfig,
    MoCoV3Config,
    MSNConfig,
    MTEConfig,
    SimCLRConfig,
    SiTConfig,
    SupervisedConfig,
    SwAVConfig,
    UDIConfig,
    build,
    iBOTConfig,
)
from triptych.methods.base import Siamese
from triptych.optim import OptimConfig, clip_gradients, make_optimizer, set_rates
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

PROTOTYPES = {"hidden": 16, "embedding": 8, "prototypes": 24}
CONTRAST = {"hidden": 16, "embedding": 8}
MOMENTUM = {"teacher_momentum": 0.9}
BASE_CONFIGS = {
    "dino": DINOConfig(**PROTOTYPES, **MOMENTUM),
    "udi": UDIConfig(**PROTOTYPES, **MOMENTUM, window_global=2),
    "ibot": iBOTConfig(**PROTOTYPES, **MOMENTUM),
    "hssl": HSSLConfig(**PROTOTYPES, **MOMENTUM, head_kernel=3, head_drop_path=0.0),
    "swav": SwAVConfig(**PROTOTYPES, queue=8, queue_start=0),
    "byol": BYOLConfig(**CONTRAST, **MOMENTUM),
    "mocov3": MoCoV3Config(**CONTRAST, **MOMENTUM),
    "moby": MoBYConfig(**CONTRAST, **MOMENTUM, queue=16),
    "simclr": SimCLRConfig(**CONTRAST),
    "mmc": MMCConfig(**CONTRAST, **MOMENTUM, predictor=True),
    "sit": SiTConfig(**CONTRAST, **MOMENTUM),
    "mcssl": MCSSLConfig(**PROTOTYPES, **MOMENTUM),
    "msn": MSNConfig(**PROTOTYPES, **MOMENTUM, drop=0.375),
}
# MMC's other readings: its patches meet those of all images, on all processes.
READINGS = {"negatives": "all_positions", "scored": "share", "pairs": "both", "local_crops": "teacher"}
ENSEMBLE = {"aux": 2, "pooled": 2, "pool_kernel": 3}
NO_GRID = {"msn": {"pooled": 0}}  # patches are dropped
CASES = (
    {name: (config, "vit") for name, config in BASE_CONFIGS.items()}
    | {
        f"mte-{name}": (MTEConfig(base=config, **ENSEMBLE | NO_GRID.get(name, {})), "vit")
        for name, config in BASE_CONFIGS.items()
    }
    | {
        "mae": (MAEConfig(drop=0.375, decoder_width=8, decoder_depth=1, decoder_heads=2), "vit"),
        "gmml": (GMMLConfig(blocks=(1, 2)), "vit"),
        "supervised": (SupervisedConfig(classes=3, mixup=0, cutmix=0, average=0.9), "vit"),
        "mte-supervised": (SupervisedConfig(classes=3, mixup=0, cutmix=0, average=0.9, **ENSEMBLE), "vit"),
        "mmc-readings": (MMCConfig(**CONTRAST, **MOMENTUM, **READINGS), "vit"),
        "dino-swin": (BASE_CONFIGS["dino"], "swin"),
        "ibot-swin": (BASE_CONFIGS["ibot"], "swin"),
        "mmc-swin": (BASE_CONFIGS["mmc"], "swin"),
        "mte-dino-swin": (MTEConfig(base=BASE_CONFIGS["dino"], aux=0, pooled=2, pool_kernel=3), "swin"),
        "mte-moby-swin": (MTEConfig(base=BASE_CONFIGS["moby"], aux=0, pooled=2, pool_kernel=3), "swin"),
        "mte-ibot-swin": (MTEConfig(base=BASE_CONFIGS["ibot"], aux=0, pooled=2, pool_kernel=3), "swin"),
    }
)
T = Progress(7, 20, 5)  # past frozen prototypes


def test_every_method_has_a_case_and_mte_wraps_every_siamese_one():
    assert {type(c) for c, _ in CASES.values()} == set(METHODS)
    assert {type(c.base) for c, _ in CASES.values() if isinstance(c, MTEConfig)} == set(BASES)
    siamese = {type(c) for name, (c, _) in CASES.items() if isinstance(make(name), Siamese)}
    assert siamese == set(BASES)


def make(case, **options):
    torch.manual_seed(0)
    config, kind = CASES[case]
    build_encoder = tiny_encoder if kind == "vit" else tiny_swin
    method = build(build_encoder(METHODS[type(config)].token_spec(config), **options), config).double()
    with torch.no_grad():
        for name, p in method.named_parameters():
            if not p.requires_grad and ("teacher" in name or "average" in name):  # a teacher that is not the student
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return method


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one_step(method, optimizer, views, t, parts=None):
    carries = []
    parts = parts or [views]
    for part in parts:
        out = method(part, t)
        (out.loss / len(parts)).backward()
        carries.append(out.carry)
    method.after_backward(t)
    clip_gradients(method.parameters(), 3.0)
    set_rates(optimizer, 1e-3, 0.04)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    method.update(carries, t)
    return out


every_method = pytest.mark.parametrize("case", CASES)


def averages(method):
    """(what the optimiser trains, its moving average) of every kind that a method may have."""
    names = ("student", "teacher"), ("student_ensemble", "teacher_ensemble"), ("model", "average")
    found = [(getattr(method, a, None), getattr(method, b, None)) for a, b in names]
    return [(a, b) for a, b in found if a is not None and b is not None and a is not b]


def state(method):
    """Everything but BatchNorm's running statistics, which no loss reads."""
    running = ("running_mean", "running_var", "num_batches_tracked")
    return {k: v for k, v in snapshot(method).items() if not k.endswith(running)}


@every_method
def test_forward_is_pure(case):
    method, views = make(case), random_views()
    before = state(method)
    first, second = method(views, T), method(views, T)
    assert torch.equal(first.loss, second.loss)
    assert first.loss.isfinite()
    assert same(before, state(method))


@every_method
def test_no_gradient_reaches_an_average_and_every_trained_parameter_gets_one(case):
    method = make(case)
    method(random_views(), T).loss.backward()
    for _, average in averages(method):
        assert all(p.grad is None and not p.requires_grad for p in average.parameters())
    without = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # DDP would refuse a parameter that takes no part


@every_method
def test_update_moves_averages_towards_what_is_trained_and_nothing_else_of_it(case):
    method, views = make(case), random_views()

    def gaps():
        return [
            sum((a - b).norm() for a, b in zip(trained.parameters(), average.parameters(), strict=True))
            for trained, average in averages(method)
        ]

    trained = {n: p.clone() for n, p in method.named_parameters() if p.requires_grad}
    before, buffers = gaps(), {n: b.clone() for n, b in method.named_buffers()}
    method.update([method(views, T).carry], T)
    config = method.config
    momentum = config.average if isinstance(config, SupervisedConfig) else None
    for after, gap in zip(gaps(), before, strict=True):
        m = getattr(method, "base", method).momentum(T) if momentum is None else momentum
        torch.testing.assert_close(after / gap, torch.tensor(m, dtype=torch.float64))
    for name, p in method.named_parameters():  # SwAV puts prototypes to unit length, where these are
        if name in trained:
            torch.testing.assert_close(p, trained[name], rtol=0, atol=1e-6)
    for name, buffer in method.named_buffers():
        if name.split(".")[-1] in ("center", "patch_center", "queue"):
            assert not torch.equal(buffer, buffers[name])


@every_method
def test_stopped_and_reloaded_is_never_stopped(case):
    views = [random_views(seed=i) for i in range(4)]
    straight = make(case, drop_path=0.2)
    optimizer = make_optimizer(straight, OptimConfig())
    for i in range(4):
        if i == 2:
            saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
        torch.manual_seed(i)
        one_step(straight, optimizer, views[i], Progress(i, 20, 2))
    resumed = make(case, drop_path=0.2)
    optimizer = make_optimizer(resumed, OptimConfig())
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for i in (2, 3):
        torch.manual_seed(i)
        one_step(resumed, optimizer, views[i], Progress(i, 20, 2))
    assert same(snapshot(straight), snapshot(resumed))


@every_method
def test_against_a_target_that_stands_still_the_loss_falls(case):
    """With update() left out teacher and centre do not move.  (In training they do, and the loss is no progress bar.)"""
    method, views = make(case), random_views()
    optimizer = make_optimizer(method, OptimConfig())
    losses = []
    for _ in range(60):
        out = method(views, T)
        out.loss.backward()
        set_rates(optimizer, 3e-3, 0.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - (0.02 if case == "gmml" else 0.1)  # random pixels cannot be guessed


@every_method
def test_the_step_is_the_same_for_the_reversed_batch(case):
    method, views = make(case), random_views()
    reverse = of_images(views, lambda x: x.flip(0))
    torch.testing.assert_close(method(views, T).loss, method(reverse, T).loss)


@every_method
def test_predictions_are_probabilities_of_each_image(case):
    predictions = make(case).predictions(random_views(3), T)
    if predictions is None:  # methods without prototypes
        assert not any("center" in n for n, _ in make(case).named_buffers())
        return
    for p in predictions:
        assert p.shape == (3, 24)
        torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=torch.float64))


@every_method
def test_bf16_autocast_gives_nearly_the_same_loss(case):
    method = make(case).float()
    views = random_views(16, dtype=torch.float32)
    plain = method(views, T).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = method(views, T).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0.05)


@every_method
def test_views_of_any_two_sizes_train(case):
    views = random_views(2, size=24, local=12, patch=4, windows=(2, 1))
    assert make(case)(views, T).loss.isfinite()


def halves(views: Views) -> list[Views]:
    n = len(views) // 2
    return [of_images(views, lambda x, i=i: x[i * n : (i + 1) * n]) for i in (0, 1)]


def _process(rank: int, folder: str) -> None:
    """One of two processes: three DDP steps of every method on its half of each batch, in float64."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for case in CASES:
        method = make(case)
        wrapped = torch.nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
        optimizer = make_optimizer(method, OptimConfig())
        for i in range(3):
            t = Progress(i, 20, 2)
            out = wrapped(halves(random_views(seed=i))[rank], t)
            out.loss.backward()
            method.after_backward(t)
            clip_gradients(method.parameters(), 3.0)
            set_rates(optimizer, 1e-3, 0.04)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            method.update([out.carry], t)
        torch.save(method.state_dict(), f"{folder}/{case}.{rank}.pt")
        if rank == 0:  # health is measured there alone: nothing in it may wait for the other process
            method.predictions(random_views(2), T)
    _golden_centres(rank, folder)
    torch.distributed.destroy_process_group()


def _golden_centres(rank: int, folder: str) -> None:
    """The centre updates of the authors' two-process runs (dino_center_2ranks, udi_center_2ranks)."""
    import numpy as np

    from conftest import GOLDEN
    from triptych.methods import DINOConfig, UDIConfig
    from triptych.methods.dino import DINO
    from triptych.methods.udi import UDI

    def identity(method):
        with torch.no_grad():
            for tower in (method.student, method.teacher):
                tower.prototypes.direction.copy_(torch.eye(len(tower.prototypes.direction)))
        return method.double()

    with np.load(GOLDEN / "dino_center_2ranks.npz") as file:
        g = {k: torch.from_numpy(file[k]) for k in file.files}
    method = identity(DINO(tiny_encoder(TokenSpec()), DINOConfig(hidden=4, embedding=5, prototypes=5)))
    for step in range(2):
        method.update([{"u_t": g[f"rank{rank}.step{step}.in.teacher"].mean(0)}], Progress(0, 2))
        torch.testing.assert_close(method.center[None], g[f"rank{rank}.step{step}.center_after"], rtol=0, atol=1e-12)
    with np.load(GOLDEN / "udi_center_2ranks.npz") as file:
        g = {
            k.removeprefix(f"rank{rank}."): torch.from_numpy(file[k]) for k in file.files if k.startswith(f"rank{rank}")
        }
    config = UDIConfig(hidden=4, embedding=10, prototypes=10, rank_weighting="rank_mean")
    method = identity(UDI(tiny_encoder(UDI.token_spec(config)), config))
    method.center.copy_(g["before"])
    places = [(g[f"{level}.patch"], g[f"{level}.patch_mask"][..., 0]) for level in ("global", "local")]
    plus = torch.cat([g["global.plus"].flatten(0, 1), g["local.plus"].flatten(0, 1)]).mean(0)
    carry = {"class": g["global.cls"].mean((0, 1)), "class+": plus, **method._patch_statistics(places)}
    method.update([carry], Progress(0, 2))
    torch.testing.assert_close(method.center, g["after"], rtol=0, atol=1e-9)


def test_two_processes_equal_one_on_the_joint_batch(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    for case in CASES:
        single = make(case)
        optimizer = make_optimizer(single, OptimConfig())
        for i in range(3):
            one_step(single, optimizer, random_views(seed=i), Progress(i, 20, 2))
        ranks = [torch.load(tmp_path / f"{case}.{r}.pt", weights_only=True) for r in (0, 1)]
        assert same(*ranks)
        # Adam turns round-off into steps where the true gradient is 0: biases in front of BatchNorm.
        # And timm resamples positions, which local crops need, in fp32.
        tolerance = 1e-6 if any(isinstance(m, torch.nn.BatchNorm1d) for m in single.modules()) else 1e-7
        for name, value in single.state_dict().items():
            torch.testing.assert_close(ranks[0][name], value, rtol=0, atol=tolerance, msg=f"{case} {name}")


PER_IMAGE = [
    "dino",
    "ibot",
    "hssl",
    "mae",
    "supervised",
    "dino-swin",
    "ibot-swin",
]  # no BatchNorm, no other image's keys
PER_IMAGE += ["udi", *(f"mte-{name}" for name in PER_IMAGE)]


@pytest.mark.parametrize("case", [c for c in PER_IMAGE if c in CASES])
def test_accumulated_halves_equal_the_whole_batch_where_images_do_not_meet(case):
    """UDI's patch term is a mean over the valid places of each part: nearly equal."""
    whole, parts = make(case), make(case)
    views = random_views()
    one_step(whole, make_optimizer(whole, OptimConfig()), views, T)
    one_step(parts, make_optimizer(parts, OptimConfig()), views, T, halves(views))
    for (name, a), (_, b) in zip(whole.state_dict().items(), parts.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-3 if case == "udi" else 1e-9, msg=name)
