"""Projection heads.  A projector maps (..., D) -> (..., P); Prototypes holds the K directions it is compared with."""

import itertools
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.distributed import all_mean_grad, world_size
from triptych.losses import full_precision


def init_linear(module: nn.Module, std: float = 0.02) -> None:
    """DINO's initialisation: weights truncated-normal with σ = std, biases zero."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm of (B, features) whose batch is that of all processes, on any device.

    (torch's SyncBatchNorm runs on GPUs only.)  Every process must hold equally many rows.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = full_precision(input)
        mean = all_mean_grad(x.mean(0))
        var = all_mean_grad((x - mean).square().mean(0))
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            n, m = len(x) * world_size(), self.momentum or 0.0
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean), m)
                self.running_var.lerp_((var * n / max(n - 1, 1)).to(self.running_var), m)
        y = (x - mean) * (var + self.eps).rsqrt()
        return (y if self.weight is None else y * self.weight + self.bias).to(input.dtype)


class MLP(nn.Sequential):
    """Linear layers with an activation between: MLP(D, hidden, hidden, P) maps (B, D) or (V, B, D) to as many of P.

    norm: BatchNorm before each activation, whose batch is one view or, if joint, all V.  last_norm: what follows the
    last linear layer, BatchNorm without scale and offset ("plain", MoCo v3) or with scale only ("scale", SimCLR).
    init: "dino" = truncated normal, σ 0.02, biases 0; "torch" = PyTorch's own.
    """

    def __init__(
        self,
        *sizes: int,
        activation: Literal["gelu", "relu"] = "gelu",
        norm: bool = False,
        joint: bool = False,
        bias: bool = True,
        last_bias: bool = True,
        last_norm: Literal["none", "plain", "scale"] = "none",
        init: Literal["dino", "torch"] = "dino",
    ):
        options: dict[str, Any] = {"activation": activation, "norm": norm, "joint": joint, "bias": bias}
        options |= {"last_bias": last_bias, "last_norm": last_norm, "init": init}
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            last = i == len(sizes) - 2
            layers.append(nn.Linear(a, b, bias=last_bias if last else bias))
            if not last:
                layers += [BatchNorm(b)] * norm + [nn.GELU() if activation == "gelu" else nn.ReLU()]
        if last_norm != "none":
            layers.append(BatchNorm(sizes[-1], affine=last_norm == "scale"))
        super().__init__(*layers)
        self.sizes, self.options = sizes, options
        if last_norm == "scale":
            cast(nn.Parameter, layers[-1].bias).requires_grad_(False)
        if init == "dino":
            init_linear(self)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 2 or not self.options["norm"]:
            return super().forward(input)
        if self.options["joint"]:
            return super().forward(input.flatten(0, 1)).unflatten(0, input.shape[:2])
        return torch.stack([nn.Sequential.forward(self, view) for view in input])

    def fresh(self) -> "MLP":
        """The same architecture with new weights."""
        return MLP(*self.sizes, **self.options)


class Prototypes(nn.Module):
    """K prototypes w_k = gain_k · v_k / |v_k| in the P-dimensional embedding space (DINO's weight-normed last layer).

    train_gain=False is DINO's `norm_last_layer`: every prototype keeps unit length.
    """

    def __init__(self, embedding: int, count: int, *, train_gain: bool = False):
        super().__init__()
        self.direction = nn.Parameter(torch.empty(count, embedding))
        self.gain = nn.Parameter(torch.ones(count, 1), requires_grad=train_gain)
        nn.init.uniform_(self.direction, -(embedding**-0.5), embedding**-0.5)

    @property
    def weight(self) -> Tensor:
        """(K, P)"""
        return self.gain * F.normalize(self.direction, dim=-1)

    def forward(self, z: Tensor) -> Tensor:
        """(..., P) -> (..., K): logits of embeddings, which are put to unit length first."""
        return F.linear(F.normalize(z, dim=-1), self.weight)
