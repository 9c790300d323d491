"""Optimisers, parameter groups, rates and gradient clipping."""

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from triptych.encoders.base import Encoder
from triptych.schedules import WarmUp, ahead, cosine, stretched, warmup_cosine

Share = Annotated[float, Field(ge=0, lt=1)]
Clipping = Literal["per_parameter", "global"]
Decay = Literal["matrices", "no_tokens", "all"]
TOKENS = ("cls_token", "reg_token", "pos_embed", "mask_token", "aux_tokens")


class OptimConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["adamw", "lars", "sgd"] = "adamw"
    lr: float = Field(default=5e-4, ge=0)  # peak, per 256 images: scaled by images per step / 256
    min_lr: float = Field(default=1e-6, ge=0)  # end of the cosine, not scaled
    warmup: float = Field(default=10, ge=0)  # epochs
    warmup_start: float = Field(default=0.0, ge=0)  # learning rate at step 0, per 256 images
    schedule: WarmUp = "dino"  # whose shape the learning rate has; see schedules.warmup_cosine
    horizon: float = Field(default=1.0, ge=1)  # both schedules end after so many runs, that is, are cut off (MSN: 1.25)
    weight_decay: float = Field(default=0.04, ge=0)  # start ...
    weight_decay_end: float = Field(default=0.4, ge=0)  # ... cosine to
    # What decays and what LARS adapts to: no biases and vectors; nor tokens and positions (fine-tuning); or all.
    decay: Decay = "matrices"
    layer_decay: float = Field(default=1.0, gt=0, le=1)  # γ: the rate is γ times that of the layer above (fine-tuning)
    betas: tuple[Share, Share] = (0.9, 0.999)  # adamw
    eps: float = Field(default=1e-8, gt=0)  # adamw
    momentum: Share = 0.9  # lars, sgd
    trust: float = Field(default=0.001, gt=0)  # lars: η
    clip: float | None = Field(default=3.0, gt=0)  # norm that a gradient may have; None = no clipping
    clipping: Clipping = "per_parameter"  # of each parameter tensor (DINO) or of all together

    def rates(self, images_per_step: int):
        """(learning rate, weight decay) as schedules."""
        scale = images_per_step / 256
        start = self.warmup_start * scale
        lr = warmup_cosine(self.lr * scale, self.min_lr, self.warmup, start, self.schedule)
        decay = cosine(self.weight_decay, self.weight_decay_end)
        decay = ahead(decay) if self.schedule == "msn" else decay
        return stretched(lr, self.horizon), stretched(decay, self.horizon)


def parameter_groups(model: nn.Module, decay: Decay = "matrices", layer_decay: float = 1.0) -> list[dict]:
    """Trained parameters: "matrices" gives two groups, decayed and not (biases and vectors); "all" gives one, decayed.

    As DINO's, "matrices" are all that is not 1-D: class tokens, positions and a trained gain of prototypes too.
    layer_decay below 1 makes such groups for every layer of the encoder, with `scale` γ^(L + 1 − layer), 1 outside it.
    """
    layers = layer_numbers(model) if layer_decay < 1 else {}
    last, free = max(layers.values(), default=0), exempt(model)
    groups: dict[tuple[int, bool], list[Tensor]] = {(last, True): []} | ({} if decay == "all" else {(last, False): []})
    for name, p in model.named_parameters():
        if p.requires_grad:
            leaf = name.rpartition(".")[2]
            spared = p.ndim == 1 or leaf == "bias" or (decay == "no_tokens" and leaf in TOKENS)
            decayed = id(p) not in free and (decay == "all" or not spared)
            groups.setdefault((layers.get(id(p), last), decayed), []).append(p)
    return [
        {"params": params, "decay": decayed, "scale": layer_decay ** (last - layer), "weight_decay": 0.0}
        for (layer, decayed), params in groups.items()
    ]


def layer_numbers(model: nn.Module) -> dict[int, int]:
    """Layer of every parameter of the trained encoder by identity: 0 embeds, i is block i, then the final norm."""
    encoders = [m for m in model.modules() if isinstance(m, Encoder) and any(p.requires_grad for p in m.parameters())]
    return {id(p): number for encoder in encoders for p, number in encoder.layer_numbers()}


def exempt(model: nn.Module) -> set[int]:
    """Identities of parameters that are neither decayed nor clipped: of modules marked so (MSN's prototypes)."""
    return {id(p) for module in model.modules() if getattr(module, "exempt", False) for p in module.parameters()}


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over `parameter_groups`; rates are set at every step by `set_rates`."""
    groups = parameter_groups(model, config.decay, config.layer_decay)
    if config.kind == "lars":
        return LARS(groups, momentum=config.momentum, trust=config.trust)
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You, Gitman and Ginsburg 2017), as DINO, MoCo v3, BYOL and MAE have it.

        u = g + λθ;    u <- u · η|θ|/|u|  where neither norm is 0;    m <- μm + u;    θ <- θ − lr · m

    A group with decay=False (biases and vectors) skips the first two: plain momentum.
    SwAV's LARC adapts to every parameter (decay="all") and has |g| + λ|θ| for |u|: a relative difference of at most
    about 2λ|θ|/|g|, with its λ = 1e-6.
    """

    def __init__(self, params, lr: float = 0.0, momentum: float = 0.9, trust: float = 0.001, weight_decay: float = 0.0):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay, "decay": True}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = [p.grad for p in params]
            if group["decay"]:
                updates = list(torch._foreach_add(updates, params, alpha=group["weight_decay"]))
                torch._foreach_mul_(updates, trust_ratios(params, updates, group["trust"]))
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            moments = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(moments, group["momentum"])
            torch._foreach_add_(moments, updates)
            torch._foreach_add_(params, moments, alpha=-group["lr"])
        return loss


def trust_ratios(params: list[Tensor], updates: list[Tensor], trust: float) -> list[Tensor]:
    """η|θ|/|u| of every tensor, 1 where a norm is 0 (a tensor that starts at zero must be able to leave it)."""
    size, change = (torch.stack(torch._foreach_norm(x)) for x in (params, updates))
    # torch.where, not an if: reading a norm would wait for the GPU.
    return list(torch.where((size > 0) & (change > 0), trust * size / change, 1.0).unbind())


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)  # restored from an older checkpoint: no scale
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
