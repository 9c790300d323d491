"""The depth-wise convolution is torch's, and so are its gradients."""

import pytest
import torch
import torch.nn.functional as F

from triptych.depthwise import depthwise


@pytest.mark.parametrize(("grid", "kernel"), [((5, 3), 11), ((14, 14), 11), ((6, 7), 3), ((2, 2), 1)])
def test_values_and_gradients_are_those_of_torch(grid, kernel):
    x = torch.randn(3, 4, *grid, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    results = []
    for y in (depthwise(x, w, b), F.conv2d(x, w, b, padding=kernel // 2, groups=4)):
        results.append((y, *torch.autograd.grad((y * torch.arange(y.numel()).view_as(y)).sum(), (x, w, b))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-9)


def test_tokens_that_lie_channels_last_will_do():
    tokens = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)  # (B, N, C)
    w, b = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True), torch.zeros(4, dtype=torch.float64)
    x = tokens.transpose(1, 2).unflatten(2, (2, 3))
    ours, theirs = depthwise(x, w, b), F.conv2d(x, w, b, padding=1, groups=4)
    for a, c in zip(*(torch.autograd.grad(y.square().sum(), (tokens, w)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
