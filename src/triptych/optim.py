"""Optimiser, parameter groups and gradient clipping."""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from triptych.schedules import cosine, warmup_cosine

Share = Annotated[float, Field(ge=0, lt=1)]
Clipping = Literal["per_parameter", "global"]


class OptimConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = Field(default=5e-4, ge=0)  # peak, per 256 images: scaled by images per step / 256
    min_lr: float = Field(default=1e-6, ge=0)  # end of the cosine, not scaled
    warmup: float = Field(default=10, ge=0)  # epochs
    weight_decay: float = Field(default=0.04, ge=0)  # start ...
    weight_decay_end: float = Field(default=0.4, ge=0)  # ... cosine to
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip: float | None = Field(default=3.0, gt=0)  # norm that a gradient may have; None = no clipping
    clipping: Clipping = "per_parameter"  # of each parameter tensor (DINO) or of all together

    def rates(self, images_per_step: int):
        """(learning rate, weight decay) as schedules."""
        lr = warmup_cosine(self.lr * images_per_step / 256, self.min_lr, self.warmup)
        return lr, cosine(self.weight_decay, self.weight_decay_end)


def parameter_groups(model: nn.Module) -> list[dict]:
    """Trained parameters in two groups: decayed, and not (biases and vectors).

    As DINO's: class tokens, positions and a trained gain of the prototypes are decayed.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.ndim == 1 or name.endswith(".bias"))]
    return [{"params": decayed, "decay": True}, {"params": plain, "decay": False, "weight_decay": 0.0}]


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; rates are set at every step by `set_rates`."""
    return torch.optim.AdamW(parameter_groups(model), lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = weight_decay


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float, how: Clipping = "per_parameter") -> None:
    """g <- g · min(1, limit / (|g| + 1e-6)), per parameter tensor or with the norm of all.  No device sync."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return
    norms = torch.stack(torch._foreach_norm(grads))
    if how == "global":
        norms = norms.norm().expand_as(norms)
    torch._foreach_mul_(grads, list((limit / (norms + 1e-6)).clamp(max=1).unbind()))
