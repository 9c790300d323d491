"""No method's step makes the host wait for the device: neither its loss, gradients, optimiser nor teacher."""

import pytest
import torch
from test_methods import CASES, T, make, one_step

from conftest import random_views, tiny_encoder
from triptych.methods import METHODS, SupervisedConfig, build
from triptych.optim import OptimConfig, clip_gradients, make_optimizer, set_rates
from triptych.syncs import host_syncs


def step_of(method, dtype=torch.float64):
    optimizer, views = make_optimizer(method, OptimConfig()), random_views(dtype=dtype)
    return lambda: one_step(method, optimizer, views, T)


@pytest.mark.parametrize("case", CASES)
def test_a_step_never_waits(case):
    assert host_syncs(step_of(make(case, drop_path=0.2))) == []


@pytest.mark.parametrize("kind", ["adamw", "lars", "sgd"])
@pytest.mark.parametrize("clipping", ["per_parameter", "global"])
def test_no_optimiser_and_no_clipping_waits(kind, clipping):
    method, views = make("dino"), random_views()
    optimizer = make_optimizer(method, OptimConfig(kind=kind))

    def step():
        method(views, T).loss.backward()
        clip_gradients(method.parameters(), 0.01, clipping)
        set_rates(optimizer, 1e-3, 0.04)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    assert host_syncs(step) == []


def test_fine_tuning_with_all_its_augmentations_never_waits():
    config = SupervisedConfig(classes=3, mixup=0.8, cutmix=1.0, erase=1.0)
    encoder = tiny_encoder(METHODS[SupervisedConfig].token_spec(config))
    assert host_syncs(step_of(build(encoder, config), dtype=torch.float32)) == []
