"""One contract over every method of the table."""

import copy

import pytest
import torch

from conftest import random_views, tiny_encoder
from triptych.data.views import View, Views
from triptych.methods import METHODS, build
from triptych.methods.base import Siamese
from triptych.optim import OptimConfig, adamw, clip_gradients, set_rates
from triptych.schedules import Progress

SMALL = {"hidden": 16, "embedding": 8, "prototypes": 24, "teacher_momentum": 0.9}
T = Progress(7, 20, 5)  # past frozen prototypes


def make(config_class, **options):
    torch.manual_seed(0)
    config = config_class(**SMALL, **({"window_global": 2} if config_class.__name__ == "UDIConfig" else {}))
    kind = METHODS[config_class]
    method = build(tiny_encoder(kind.tokens, **options), config).double()
    with torch.no_grad():
        for name, p in method.teacher.named_parameters():  # a teacher that is not the student
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


every_method = pytest.mark.parametrize("config_class", METHODS, ids=lambda c: c.model_fields["name"].default)


@every_method
def test_forward_is_pure(config_class):
    method, views = make(config_class), random_views()
    before = snapshot(method)
    first, second = method(views, T), method(views, T)
    assert torch.equal(first.loss, second.loss)
    assert first.loss.isfinite()
    assert same(before, snapshot(method))


@every_method
def test_no_gradient_reaches_the_teacher_and_every_student_parameter_gets_one(config_class):
    method = make(config_class)
    method(random_views(), T).loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    without = [n for n, p in method.student.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # DDP would refuse a parameter that takes no part


@every_method
def test_update_moves_the_teacher_towards_the_student_and_the_centre_towards_the_batch(config_class):
    method, views = make(config_class), random_views()
    gap = sum((a - b).norm() for a, b in zip(method.teacher.parameters(), method.student.parameters(), strict=True))
    center = method.center.clone()
    method.update([method(views, T).carry], T)
    after = sum((a - b).norm() for a, b in zip(method.teacher.parameters(), method.student.parameters(), strict=True))
    momentum = method.momentum(T)
    torch.testing.assert_close(after / gap, torch.tensor(momentum, dtype=torch.float64))
    assert (method.center != center).any()


@every_method
def test_stopped_and_reloaded_is_never_stopped(config_class):
    views = [random_views(seed=i) for i in range(4)]
    straight = make(config_class, drop_path=0.2)
    optimizer = adamw(straight, OptimConfig())
    for i in range(4):
        if i == 2:
            saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
        torch.manual_seed(i)
        one_step(straight, optimizer, views[i], Progress(i, 20, 2))
    resumed = make(config_class, drop_path=0.2)
    optimizer = adamw(resumed, OptimConfig())
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for i in (2, 3):
        torch.manual_seed(i)
        one_step(resumed, optimizer, views[i], Progress(i, 20, 2))
    assert same(snapshot(straight), snapshot(resumed))


@every_method
def test_against_a_target_that_stands_still_the_loss_falls(config_class):
    """With update() left out teacher and centre do not move.  (In training they do, and the loss is no progress bar.)"""
    method, views = make(config_class), random_views()
    optimizer = adamw(method, OptimConfig())
    losses = []
    for _ in range(60):
        out = method(views, T)
        out.loss.backward()
        set_rates(optimizer, 3e-3, 0.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - 0.1


@every_method
def test_the_step_is_the_same_for_the_reversed_batch(config_class):
    method, views = make(config_class), random_views()
    reverse = views.map(lambda x: x.flip(0))
    torch.testing.assert_close(method(views, T).loss, method(reverse, T).loss)


@every_method
def test_predictions_are_probabilities_of_each_image(config_class):
    p_t, p_s = make(config_class).predictions(random_views(3), T)
    for p in (p_t, p_s):
        assert p.shape == (3, SMALL["prototypes"])
        torch.testing.assert_close(p.sum(-1), torch.ones(3, dtype=torch.float64))


@every_method
def test_bf16_autocast_gives_nearly_the_same_loss(config_class):
    method = make(config_class).float()
    views = random_views(dtype=torch.float32)
    plain = method(views, T).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = method(views, T).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0.05)


@every_method
def test_it_is_what_mte_can_wrap(config_class):
    assert isinstance(make(config_class), Siamese)


@every_method
def test_views_of_any_two_sizes_train(config_class):
    views = random_views(2, size=24, local=12, patch=4, windows=(2, 1))
    assert make(config_class)(views, T).loss.isfinite()


def halves(views: Views) -> list[Views]:
    def part(v: View, i: int) -> View:
        n = len(v.images) // 2
        return v.map(lambda x: x[i * n : (i + 1) * n])

    return [Views([part(v, i) for v in views.global_crops], [part(v, i) for v in views.local_crops]) for i in (0, 1)]


def _process(rank: int, folder: str) -> None:
    """One of two processes: three DDP steps of every method on its half of each batch, in float64."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for config_class in METHODS:
        method = make(config_class)
        wrapped = torch.nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
        optimizer = adamw(method, OptimConfig())
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
        torch.save(method.state_dict(), f"{folder}/{config_class.__name__}.{rank}.pt")
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
    method = identity(DINO(tiny_encoder(DINO.tokens), DINOConfig(hidden=4, embedding=5, prototypes=5)))
    for step in range(2):
        method.update([{"u_t": g[f"rank{rank}.step{step}.in.teacher"].mean(0)}], Progress(0, 2))
        torch.testing.assert_close(method.center[None], g[f"rank{rank}.step{step}.center_after"], rtol=0, atol=1e-12)
    with np.load(GOLDEN / "udi_center_2ranks.npz") as file:
        g = {
            k.removeprefix(f"rank{rank}."): torch.from_numpy(file[k]) for k in file.files if k.startswith(f"rank{rank}")
        }
    config = UDIConfig(hidden=4, embedding=10, prototypes=10, rank_weighting="rank_mean")
    method = identity(UDI(tiny_encoder(UDI.tokens), config))
    method.center.copy_(g["before"])
    places = [(g[f"{level}.patch"], g[f"{level}.patch_mask"][..., 0]) for level in ("global", "local")]
    plus = torch.cat([g["global.plus"].flatten(0, 1), g["local.plus"].flatten(0, 1)]).mean(0)
    carry = {"class": g["global.cls"].mean((0, 1)), "class+": plus, **method._patch_statistics(places)}
    method.update([carry], Progress(0, 2))
    torch.testing.assert_close(method.center, g["after"], rtol=0, atol=1e-9)


def test_two_processes_equal_one_on_the_joint_batch(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    for config_class in METHODS:
        single = make(config_class)
        optimizer = adamw(single, OptimConfig())
        for i in range(3):
            one_step(single, optimizer, random_views(seed=i), Progress(i, 20, 2))
        ranks = [torch.load(tmp_path / f"{config_class.__name__}.{r}.pt", weights_only=True) for r in (0, 1)]
        assert same(*ranks)
        for name, value in single.state_dict().items():
            torch.testing.assert_close(ranks[0][name], value, rtol=0, atol=1e-9, msg=f"{config_class.__name__} {name}")


@every_method
def test_accumulated_halves_nearly_equal_the_whole_batch(config_class):
    """Exactly so for DINO; UDI's patch term is a mean over the valid places of each part."""
    whole, parts = make(config_class), make(config_class)
    views = random_views()
    one_step(whole, adamw(whole, OptimConfig()), views, T)
    one_step(parts, adamw(parts, OptimConfig()), views, T, halves(views))
    exact = config_class.model_fields["name"].default == "dino"
    for (name, a), (_, b) in zip(whole.state_dict().items(), parts.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 if exact else 3e-3, msg=name)
