"""Heads: BatchNorm, fresh copies, prototypes.  (BatchNorm over two processes: tests/contract.)"""

import pytest
import torch

from triptych.heads import MLP, BatchNorm


@pytest.mark.parametrize("training", [True, False])
def test_on_one_process_batch_norm_is_torchs(training):
    torch.manual_seed(0)
    ours, theirs = BatchNorm(5).double().train(training), torch.nn.BatchNorm1d(5).double().train(training)
    for _ in range(2):
        x = torch.randn(7, 5, dtype=torch.float64) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_a_fresh_head_has_the_same_shape_and_other_weights():
    torch.manual_seed(0)
    head = MLP(6, 8, 8, 4, norm=True, activation="relu", bias=False, last_bias=False, last_norm="plain", init="torch")
    fresh = head.fresh()
    assert str(fresh) == str(head)
    assert all(
        not torch.equal(a.weight, b.weight) for a, b in zip(head, fresh, strict=True) if hasattr(a, "in_features")
    )


def test_the_last_norm_scales_without_an_offset_or_not_at_all():
    scale, plain = MLP(6, 8, 4, norm=True, last_norm="scale"), MLP(6, 8, 4, norm=True, last_norm="plain")
    assert scale[-1].weight.requires_grad
    assert not scale[-1].bias.requires_grad
    assert not scale[-1].bias.any()
    assert plain[-1].weight is None
