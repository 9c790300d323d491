"""The signs of health mean what they say."""

import math

import pytest
import torch

from triptych.health import feature_health, prediction_health


def test_rank_counts_directions_in_use():
    g = torch.Generator().manual_seed(0)
    for rank in (1, 3, 10):
        basis = torch.linalg.qr(torch.randn(64, rank, generator=g))[0]
        features = torch.linalg.qr(torch.randn(200, rank, generator=g))[0] @ basis.T
        assert feature_health(features)["rankme"] == pytest.approx(rank, rel=0.01)


def test_a_collapsed_encoder_has_no_spread():
    same = torch.ones(50, 16) + 1e-6 * torch.randn(50, 16)
    assert feature_health(same)["feature_std"] < 1e-3
    assert feature_health(torch.randn(500, 16))["feature_std"] == pytest.approx(1, abs=0.1)


def test_entropies_tell_the_two_kinds_of_collapse_apart():
    K, N = 8, 64
    uniform = torch.full((N, K), 1 / K)
    one = torch.eye(K)[torch.zeros(N, dtype=torch.int64)]
    spread = torch.eye(K)[torch.arange(N) % K]
    assert prediction_health(uniform, uniform)["teacher_entropy"] == pytest.approx(math.log(K))
    assert prediction_health(uniform, uniform)["teacher_entropy_share"] == pytest.approx(1)
    assert prediction_health(one, one)["batch_entropy_share"] == pytest.approx(0, abs=1e-6)
    healthy = prediction_health(spread, spread)
    assert healthy["teacher_entropy_share"] == pytest.approx(0, abs=1e-6)
    assert healthy["batch_entropy_share"] == pytest.approx(1)
    assert healthy["agreement"] == 1
    assert prediction_health(spread, spread.roll(1, 0))["agreement"] == 0
