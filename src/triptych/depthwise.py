"""Depth-wise convolution whose backward pass suits CPUs."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, H, W), weight (C, 1, k, k) with k odd, bias (C,) -> (B, C, H, W), zeros around the grid.

    On CPUs PyTorch's gradient of large kernels takes most of the time of a convolution; elsewhere it is kept.
    """
    if x.device.type == "cpu" and torch.is_grad_enabled():
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return cast(Tensor, _Depthwise.apply(x.to(dtype), weight.to(dtype), bias.to(dtype)))
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        (x, weight), grad = ctx.saved_tensors, grads[0].contiguous()
        (B, C, H, W), pad = x.shape, weight.shape[-1] // 2
        grad_x = F.conv2d(grad, weight.flip(-1, -2), padding=pad, groups=C) if ctx.needs_input_grad[0] else None
        # The weight's gradient is a correlation too: every image's and channel's own, with the gradient as kernel.
        padded = F.pad(x, [pad] * 4).reshape(1, B * C, H + 2 * pad, -1)
        own = F.conv2d(padded, grad.view(B * C, 1, H, W), groups=B * C)
        return grad_x, own.view(B, C, 1, 2 * pad + 1, -1).sum(0), grad.sum((0, 2, 3))
