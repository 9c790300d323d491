"""A block's norms and MLP that keep less for the backward pass: what is cheap to compute is computed again.

Plain autograd keeps, of every token, the input of each linear layer beside that of the norm or activation before it.
Here the outputs of LayerNorm and GELU, and joint copies of several sizes' tokens, are made anew; no matrix product is
repeated.  Values and gradients are those of plain autograd.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def norm_linear(norm: nn.Module, linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(norm(x)).  x (R, D)"""
    if not isinstance(norm, nn.LayerNorm) or not torch.is_grad_enabled():
        return linear(norm(x))
    return cast(Tensor, _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias))


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """linear(GELU(x)).  x (R, hidden)"""
    if not torch.is_grad_enabled():
        return linear(F.gelu(x))
    return cast(Tensor, _GELULinear.apply(x, linear.weight, linear.bias))


def packed_linear(parts: Sequence[Tensor], linear: nn.Linear) -> Tensor:
    """linear of the rows of all parts, each (B_i, T_i, D) -> (Σ B_i T_i, P)"""
    if len(parts) == 1 or not torch.is_grad_enabled():
        return linear(_rows(parts))
    return cast(Tensor, _PackedLinear.apply(linear.weight, linear.bias, *parts))


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *parts: Tensor):
        ctx.save_for_backward(weight, *parts)
        return F.linear(_rows(parts), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        weight, *parts = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = _linear_backward(grads[0], _rows(parts), weight)
        of_parts = grad_x.to(parts[0].dtype).split([p.shape[0] * p.shape[1] for p in parts])
        shaped = [g.view_as(p) for g, p in zip(of_parts, parts, strict=True)]
        return grad_weight, grad_bias if ctx.needs_input_grad[1] else None, *shaped


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor | None):
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], scale, shift, eps)
        ctx.save_for_backward(x, mean, rstd, scale, shift, weight)
        ctx.eps = eps
        return F.linear(y, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, mean, rstd, scale, shift, weight = ctx.saved_tensors
        y = torch.native_layer_norm(x, x.shape[-1:], scale, shift, ctx.eps)[0]
        grad_y, grad_weight, grad_bias = _linear_backward(grads[0], y, weight)
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_layer_norm_backward(
            grad_y.to(x.dtype), x, x.shape[-1:], mean, rstd, scale, shift, [True, True, True]
        )
        return grad_x, grad_scale, grad_shift, None, grad_weight, grad_bias if ctx.needs_input_grad[5] else None


class _GELULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, weight = ctx.saved_tensors
        grad_y, grad_weight, grad_bias = _linear_backward(grads[0], F.gelu(x), weight)
        grad_x = torch.ops.aten.gelu_backward(grad_y.to(x.dtype), x)
        return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None


def _rows(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.flatten(0, 1) for p in parts]) if len(parts) > 1 else parts[0].flatten(0, 1)


def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias in F.linear; products in the dtype of `grad`, which under autocast is half."""
    of_weight = (grad.T @ x.to(grad.dtype)).to(weight.dtype)
    return grad @ weight.to(grad.dtype), of_weight, grad.sum(0, dtype=weight.dtype)
