"""Projection heads.  A projector maps (..., D) -> (..., P); Prototypes holds the K directions it is compared with."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def init_linear(module: nn.Module, std: float = 0.02) -> None:
    """DINO's initialisation: weights truncated-normal with σ = std, biases zero."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def mlp(*sizes: int, batch_norm: bool = False) -> nn.Sequential:
    """Linear layers with GELU between: mlp(D, hidden, hidden, P).  batch_norm: before each GELU, on (B, D) input."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        if i < len(sizes) - 2:
            layers += [nn.BatchNorm1d(b)] * batch_norm + [nn.GELU()]
    head = nn.Sequential(*layers)
    init_linear(head)
    return head


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
