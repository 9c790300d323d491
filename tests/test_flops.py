"""Model FLOPs are those of the formula, however they are computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from triptych.flops import Flops, repeated


def of(run) -> int:
    with Flops() as flops:
        run()
    return flops.total


def test_forward_is_two_per_multiply_add_and_backward_twice_that():
    mlp, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(3, 4, requires_grad=True)
    forward = 2 * 3 * (4 * 8 + 8 * 2)
    assert of(lambda: mlp(x)) == forward
    assert of(lambda: mlp(x).sum().backward()) == 3 * forward
    with torch.no_grad():
        assert of(lambda: mlp(x)) == forward


def test_checkpointing_adds_nothing():
    mlp, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(3, 4, requires_grad=True)
    plain = of(lambda: mlp(x).sum().backward())
    for reentrant in (False, True):
        assert of(lambda r=reentrant: checkpoint(mlp, x, use_reentrant=r).sum().backward()) == plain


def test_what_is_marked_as_repeated_adds_nothing():
    x = torch.randn(3, 4)

    def run():
        x @ x.T
        with repeated():
            x @ x.T

    assert of(run) == of(lambda: x @ x.T)


@pytest.mark.parametrize("train", [False, True])
def test_fused_attention_costs_what_plain_attention_does(train):
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=train) for _ in range(3))

    def run(attention):
        out = attention(q, k, v)
        return out.sum().backward() if train else out

    def plain(q, k, v):
        return (q @ k.mT / 2).softmax(-1) @ v

    assert (
        of(lambda: run(F.scaled_dot_product_attention))
        == of(lambda: run(plain))
        == (3 if train else 1) * 2 * 2 * 2 * 3 * 5 * 5 * 4
    )


def test_convolutions_count():
    conv, x = nn.Conv2d(3, 5, 2, 2), torch.randn(1, 3, 4, 4)
    assert of(lambda: conv(x)) == 2 * 4 * 5 * 3 * 2 * 2
