"""Projection heads.  A projector maps (..., D) -> (..., P); Prototypes holds the K directions it is compared with."""

import itertools
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.distributed import all_mean_grad, world_size
from triptych.errors import UserError
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
        if self.training and len(input) * world_size() == 1:
            raise UserError("BatchNorm in the heads needs two images per forward pass: raise --batch / --accumulate")
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
    init: "dino" = truncated normal, σ 0.02, biases 0; "torch" = PyTorch's own.  activation "relu+gelu": ReLU after the
    first layer, GELU after the others (SiT).
    """

    def __init__(
        self,
        *sizes: int,
        activation: Literal["gelu", "relu", "relu+gelu"] = "gelu",
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
                relu = activation == "relu" or (activation == "relu+gelu" and i == 0)
                layers += [BatchNorm(b)] * norm + [nn.ReLU() if relu else nn.GELU()]
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


def sit_head(width: int, hidden: int, embedding: int, *, norm: bool = True) -> MLP:
    """The three-layer head of SiT and MMC: BatchNorm over all views, also after the last layer; or GELU alone."""
    if not norm:
        return MLP(width, hidden, hidden, embedding)
    return MLP(width, hidden, hidden, embedding, activation="relu+gelu", norm=True, joint=True, last_norm="plain")


class PixelHead(nn.Module):
    """Patch tokens (B, N, D) on a grid -> images (B, 3, H, W): linear layers with GELU, then pixels of each token.

    SiT's and GMML's: three layers of the encoder's width; MC-SSL's: two.
    """

    def __init__(self, width: int, patch_size: int, layers: int = 3, hidden: int | None = None):
        super().__init__()
        sizes = [width] + [hidden or width] * layers
        pairs = itertools.pairwise(sizes)
        self.mlp = nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b), nn.GELU())))
        self.pixels = nn.ConvTranspose2d(sizes[-1], 3, patch_size, patch_size)
        init_linear(self)

    def forward(self, patch: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.pixels(self.mlp(patch).transpose(1, 2).unflatten(2, grid))


class Prototypes(nn.Module):
    """K prototypes w_k = gain_k · v_k / |v_k| in the P-dimensional embedding space (DINO's weight-normed last layer).

    train_gain=False is DINO's `norm_last_layer`: every prototype keeps unit length.  exempt: see optim.exempt.
    """

    def __init__(self, embedding: int, count: int, *, train_gain: bool = False, exempt: bool = False):
        super().__init__()
        self.exempt = exempt
        self.direction = nn.Parameter(torch.empty(count, embedding))
        self.gain = nn.Parameter(torch.ones(count, 1), requires_grad=train_gain)
        nn.init.uniform_(self.direction, -(embedding**-0.5), embedding**-0.5)

    @property
    def weight(self) -> Tensor:
        """(K, P)"""
        return self.gain * F.normalize(self.direction, dim=-1)

    def of_mean(self, z: Tensor) -> Tensor:
        """w z (K,): logits, which are linear in the embedding, of a mean embedding z (P,); makes no copy of w."""
        lengths = torch.linalg.vector_norm(self.direction, dim=-1).clamp(min=1e-12)
        return self.gain[:, 0] / lengths * (self.direction @ z)

    def forward(self, z: Tensor) -> Tensor:
        """(..., P) -> (..., K): logits of embeddings, which are put to unit length first."""
        return F.linear(F.normalize(z, dim=-1), self.weight)
