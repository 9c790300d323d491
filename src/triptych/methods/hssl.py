"""HSSL -- Li et al., Enhancing Representations through Heterogeneous Self-Supervised Learning, 2023.

    L = ½ [ ℓ(z_base^s, z_head^t) + ℓ(z_head^s, z_head^t) ] + ℓ_patch(base, base)
    head(x) = LN( mean over the grid of three ConvNeXt blocks on the encoder's last patches )

ℓ and ℓ_patch are iBOT's.  The convolutional head sees what attention does not; the class token learns from it, and it
is dropped after pre-training.  Two projectors (base, head), one set of prototypes.
"""

from dataclasses import replace
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from timm.layers import DropPath
from torch import Tensor, nn

from triptych.data.views import MaskSpec, Views, ViewSpec
from triptych.depthwise import depthwise
from triptych.encoders.base import Encoder
from triptych.heads import MLP, Prototypes, init_linear
from triptych.losses import both_probabilities, unit
from triptych.methods.base import (
    Carry,
    Method,
    Step,
    Tower,
    carried_mean,
    ema_copy,
    ema_update,
    hidden_patches,
    unmasked,
)
from triptych.prototype_loss import masked_cross_entropy, other_views, prototype_cross_entropy
from triptych.schedules import Progress, cosine, epoch_warmup
from triptych.tokens import Tokens, TokenSpec


class HSSLConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["hssl"] = "hssl"
    hidden: int = Field(default=2048, ge=1)  # width of both projectors' two hidden layers
    embedding: int = Field(default=256, ge=1)  # P
    prototypes: int = Field(default=8192, ge=2)  # K, of base and head, class tokens and patches
    norm_last_layer: bool = False  # prototypes keep unit length
    head_depth: int = Field(default=3, ge=1)  # ConvNeXt blocks
    head_kernel: int = Field(default=7, ge=1)  # patches, odd
    head_drop_path: float = Field(default=0.1, ge=0, lt=1)  # of every block but the first; student only
    mask_ratios: tuple[float, ...] = (0.0, 0.3)  # as iBOT's
    mask_variations: tuple[float, ...] = (0.0, 0.2)
    mask_shape: Literal["block", "random"] = "block"
    student_temp: float = Field(default=0.1, gt=0)  # τ_s
    teacher_temp: float = Field(default=0.07, gt=0)  # τ_t, reached from ...
    teacher_temp_start: float = Field(default=0.04, gt=0)
    teacher_temp_warmup: int = Field(default=30, ge=0)  # ... in so many epochs
    center_momentum: float = Field(default=0.9, ge=0, le=1)
    teacher_momentum: float = Field(default=0.996, ge=0, le=1)  # at step 0; cosine to 1
    freeze_prototypes: float = Field(default=1, ge=0)  # epochs

    @field_validator("head_kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError("a kernel that keeps the grid's size is odd")
        return kernel


class ConvNeXtBlock(nn.Module):
    """(B, D, H, W): depth-wise convolution, LayerNorm over channels, two-layer MLP; optionally x + that."""

    def __init__(self, width: int, kernel: int, drop_path: float, residual: bool):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop_path, self.residual = DropPath(drop_path), residual
        init_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        y = depthwise(x, self.depthwise.weight, cast(Tensor, self.depthwise.bias))
        y = self.mlp(self.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + self.drop_path(y) if self.residual else y


class ConvHead(nn.Module):
    """Tokens -> (B, D): the heterogeneous view of the encoder's last patches, before its final norm."""

    def __init__(self, width: int, config: HSSLConfig):
        super().__init__()
        # The first block has no residual: the head must not pass the encoder's tokens on.
        self.blocks = nn.Sequential(
            *(
                ConvNeXtBlock(width, config.head_kernel, config.head_drop_path if i else 0.0, residual=i > 0)
                for i in range(config.head_depth)
            )
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tokens) -> Tensor:
        assert x.grid is not None, "a convolution needs the whole grid: no patch may be dropped"
        grid = x.patch_raw.transpose(1, 2).unflatten(2, x.grid)
        return self.norm(self.blocks(grid).mean((2, 3)))


class HSSL(Method):
    center: Tensor
    patch_center: Tensor
    own_aux = 1

    @staticmethod
    def token_spec(config: HSSLConfig) -> TokenSpec:
        return TokenSpec(mask=True)

    @staticmethod
    def view_spec(config: HSSLConfig) -> ViewSpec:
        return ViewSpec(mask=MaskSpec(config.mask_ratios, config.mask_variations, config.mask_shape))

    def __init__(self, encoder: Encoder, config: HSSLConfig):
        super().__init__()
        self.config = c = config
        projector = MLP(encoder.width, c.hidden, c.hidden, c.embedding)
        self.student = Tower(
            encoder,
            projector=projector,
            prototypes=Prototypes(c.embedding, c.prototypes, train_gain=not c.norm_last_layer),
            head=ConvHead(encoder.width, c),
            head_projector=projector.fresh(),
        )
        self.teacher = ema_copy(self.student)
        self.predictor = nn.Identity()
        self.register_buffer("center", torch.zeros(c.prototypes))
        self.register_buffer("patch_center", torch.zeros(c.prototypes))
        self.teacher_temp = epoch_warmup(c.teacher_temp_start, c.teacher_temp, c.teacher_temp_warmup)
        self.momentum = cosine(c.teacher_momentum, 1.0)

    @property
    def encoder(self) -> Encoder:
        return self.teacher.encoder

    def forward(self, views: Views, t: Progress) -> Step:
        S, T = self.encode(views, t)
        z_t = self.project_head(self.teacher, T)
        return self.global_loss(self.student.project(S), z_t, t) + self.other_losses(S, T, z_t, views, t)

    def encode(self, views: Views, t: Progress, *, patches: bool = False) -> tuple[list[Tokens], list[Tokens]]:
        """iBOT's, with the head's token as the last auxiliary one."""

        def with_head(tower: Tower, tokens: list[Tokens]) -> list[Tokens]:
            heads = [tower.get_submodule("head")(x)[:, None] for x in tokens]
            return [
                replace(x, aux=h if x.aux is None else torch.cat([x.aux, h], 1))
                for x, h in zip(tokens, heads, strict=True)
            ]

        return with_head(self.student, self.student.encode(views.all, see="masked")), with_head(
            self.teacher, self.teacher.encode(views.global_crops)
        )

    def project_head(self, tower: Tower, tokens: list[Tokens]) -> Tensor:
        """(V, B, P): the projected head token of every view."""
        return tower.get_submodule("head_projector")(torch.stack([cast(Tensor, x.aux)[:, -1] for x in tokens]))

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """½ ℓ.  q_s (Vs, B, P), z_t (Vt, B, P); teacher and student view v are one crop."""
        u_s, u_t = unit(q_s), unit(z_t)
        loss = prototype_cross_entropy(
            u_s,
            self.student.prototypes,
            u_t,
            self.teacher.prototypes,
            center=self.center,
            student_temp=self.config.student_temp,
            teacher_temp=self.teacher_temp(t),
            weight=other_views(len(u_t), len(u_s), u_s.shape[1], like=u_s),
        )
        return Step(0.5 * loss, {"class": loss}, {"class": u_t.mean((0, 1))})

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor, views: Views, t: Progress) -> Step:
        head = self.global_loss(self.project_head(self.student, S), z_t, t)
        u_t = unit(self.teacher.projector(torch.stack([x.patch for x in T])))  # (V, B, N, P)
        mask, hidden = hidden_patches(views.global_crops)
        patches = torch.stack([x.patch for x in S[: len(T)]])
        patch = masked_cross_entropy(
            unit(self.student.projector(patches.flatten(0, 2)[hidden])),
            self.student.prototypes,
            u_t,
            self.teacher.prototypes,
            mask,
            hidden,
            center=self.patch_center,
            student_temp=self.config.student_temp,
            teacher_temp=self.teacher_temp(t),
        )
        terms = {"head": head.terms["class"], "patch": patch}
        return Step(head.loss + patch, terms, {"patch": u_t.mean((0, 1, 2))})

    def after_backward(self, t: Progress) -> None:
        if t.step < self.config.freeze_prototypes * t.steps_per_epoch:
            for p in self.student.prototypes.parameters():
                p.grad = None

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        # Logits are linear in the embedding: their mean is the prototypes' product with the mean embedding.
        w_t, rate = self.teacher.prototypes, 1 - self.config.center_momentum
        self.center.lerp_(w_t.of_mean(carried_mean(carries, "class")), rate)
        self.patch_center.lerp_(w_t.of_mean(carried_mean(carries, "patch")), rate)
        ema_update(self.teacher, self.student, self.momentum(t))

    @torch.no_grad()
    def predictions(self, views: Views, t: Progress) -> tuple[Tensor, Tensor]:
        """The teacher's head on one view, the student's class token on the other."""
        first, second = unmasked([views.global_crops[0], views.global_crops[-1]])
        S, T = self.encode(Views([second, first], []), t)
        return self.probabilities(self.student.project(S[:1])[0], self.project_head(self.teacher, T[1:])[0], t)

    def probabilities(self, q_s: Tensor, z_t: Tensor, t: Progress) -> tuple[Tensor, Tensor]:
        """(B, P), (B, P) -> (teacher, student) probabilities (B, K)."""
        w_t, w_s = self.teacher.prototypes.weight, self.student.prototypes.weight
        temps = self.teacher_temp(t), self.config.student_temp
        return both_probabilities(unit(z_t), w_t, unit(q_s), w_s, self.center, temps)
