"""MMC -- Wu et al., Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding, 2023.

    L = L_MIM + L_PAT + L_CLS                                                                                     (4)
    L_MIM = Σ m |g_rec(f_s(x̃)) − x| / Σ m                          over pixels; m = 1 where x̃ replaces them        (1)
    L_PAT = mean −log  e^{s(p_i, t_i)} / ( e^{s(p_i, t_i)} + Σ_{patches j of other images} e^{s(p_i, t_j)} )      (2)
    L_CLS = −log softmax_b'( s(c_b^v, k_b'^u) )[b]                   c^v: student, crop v;  k^u: teacher, crop u  (3)
    s(a, b) = a·b / (|a||b| τ)

The student sees corrupted crops x̃, the teacher clean ones x.  p, t: heads on patches of a crop; c, k: on class tokens.
The stored paper has lost its formulas: what is open is a setting (docs/methods/mmc.md).
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from triptych.data.corruption import CorruptionConfig
from triptych.data.views import Views, ViewSpec
from triptych.distributed import all_mean
from triptych.encoders.base import Encoder
from triptych.errors import UserError
from triptych.heads import MLP, PixelHead, sit_head
from triptych.losses import contrast, gathered_keys, unit
from triptych.methods.base import Carry, Method, Step, Tower, ema_copy, ema_update, pixel_error
from triptych.patch_contrast import Negatives, patch_contrast
from triptych.schedules import Progress, cosine
from triptych.tokens import Tokens

Weight = Annotated[float, Field(ge=0)]


class MMCConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["mmc"] = "mmc"
    weights: tuple[Weight, Weight, Weight] = (1.0, 1.0, 1.0)  # of L_MIM, L_PAT, L_CLS; 0 leaves a loss out
    corruption: CorruptionConfig = CorruptionConfig()  # three quarters noise, or 30 % of another image
    temperature: float = Field(default=0.2, gt=0)  # τ
    scale: float | None = Field(default=None, gt=0)  # of L_PAT and L_CLS; None = 2τ (SiT, MoCo v3)
    # L_PAT
    negatives: Negatives = "same_position"
    scored: Literal["all", "masked", "share"] = "all"  # patches: those at least half replaced; weighted by their share
    # L_CLS
    pairs: Literal["cross", "same", "both"] = "cross"  # of crops v, u
    directions: Literal["sum", "mean"] = "sum"  # of the pairs of global crops
    local_crops: Literal["student", "teacher"] = "student"  # who sees them
    local_weight: float = Field(default=1.0, ge=0)  # λ_loc of a pair with a local crop, beside 1 of global crops
    # heads
    hidden: int = Field(default=4096, ge=1)
    embedding: int = Field(default=256, ge=1)
    head_norm: bool = True  # BatchNorm in the heads
    predictor: bool = False  # a further two-layer head of the student's
    pixel_layers: int = Field(default=3, ge=0)  # of g_rec before the pixels
    pixel_hidden: int | None = Field(default=None, ge=1)  # their width; None = the encoder's
    pixel_blocks: tuple[int, ...] = ()  # g_rec reads the mean of these blocks (GMML: 6 8 10 12), counted from 1
    pixel_error: Literal["l1", "l2"] = "l1"
    teacher_momentum: float = Field(default=0.996, ge=0, le=1)  # at step 0; cosine to 1

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if not any(self.weights):
            raise ValueError("weights 0 0 0 leave no loss: set at least one of them above 0")
        return self


class MMC(Method):
    @staticmethod
    def view_spec(config: MMCConfig) -> ViewSpec:
        return ViewSpec(corruption=config.corruption, local_crops=config.weights[2] > 0)

    def __init__(self, encoder: Encoder, config: MMCConfig):
        super().__init__()
        self.config = c = config
        encoder.check_blocks(c.pixel_blocks)
        if c.pixel_blocks and max(c.pixel_blocks) < encoder.depth and not any(c.weights[1:]):
            raise UserError(f"pixel_blocks up to {max(c.pixel_blocks)} leave block {encoder.depth} untrained: add it")

        def head() -> MLP:
            return sit_head(encoder.width, c.hidden, c.embedding, norm=c.head_norm)

        def predictor() -> nn.Module:
            return (
                MLP(c.embedding, c.hidden, c.embedding, norm=c.head_norm, joint=True) if c.predictor else nn.Identity()
            )

        self.student = Tower(encoder, projector=head(), patch_projector=head())
        self.teacher = ema_copy(self.student)
        self.predictor, self.patch_predictor = predictor(), predictor()
        self.pixels = PixelHead(encoder.width, encoder.patch_size, c.pixel_layers, c.pixel_hidden)  # g_rec
        self.momentum = cosine(c.teacher_momentum, 1.0)
        for weight, parts in zip(c.weights, self._parts(), strict=True):
            if not weight:  # nothing trains them, which DDP must know
                for part in parts:
                    part.requires_grad_(False)

    def _parts(self) -> list[list[nn.Module]]:
        """What only L_MIM, L_PAT and L_CLS train."""
        s = self.student
        return [[self.pixels], [s.patch_projector, self.patch_predictor], [s.projector, self.predictor]]

    @property
    def encoder(self) -> Encoder:
        return self.teacher.encoder

    def forward(self, views: Views, t: Progress) -> Step:
        S, T = self.encode(views, t)
        if not self.config.weights[2]:
            return self.other_losses(S, T, None, views, t)
        z_t = self.teacher.project(T)
        q_s = self.predictor(self.student.project(S))
        return self.global_loss(q_s, z_t, t) + self.other_losses(S, T, z_t, views, t)

    def encode(self, views: Views, t: Progress, *, patches: bool = False) -> tuple[list[Tokens], list[Tokens]]:
        """Global crops first, corrupted for the student; local crops are seen whole, by one of the two."""
        crops, local, c = views.global_crops, views.local_crops, self.config
        by_student, mixed = c.local_crops == "student", c.pixel_blocks if c.weights[0] else ()
        read = [patches or any(c.weights[:2])] * len(crops) + [patches] * len(local) * by_student
        S = self.student.encode(crops + local * by_student, see="corrupted", mixed=mixed, patches=read)
        seen = crops + local * (not by_student)
        return S, self.teacher.encode(seen, patches=patches or bool(c.weights[1])) if any(c.weights[1:]) else []

    def global_loss(self, q_s: Tensor, z_t: Tensor, t: Progress) -> Step:
        """(3): q_s (Vs, B, P) after the predictor, z_t (Vt, B, P).  One of the two may hold local crops, at the end."""
        c = self.config
        weights = {
            (v, u): 1.0 if v < 2 and u < 2 else c.local_weight
            for v in range(len(q_s))
            for u in range(len(z_t))
            if max(v, u) > 1 or c.pairs == "both" or (v == u) == (c.pairs == "same")
        }
        directions = sum(v < 2 and u < 2 for v, u in weights) if c.directions == "sum" else 1
        keys = gathered_keys(z_t)
        total = torch.stack([w * contrast(q_s[v], keys[u], c.temperature) for (v, u), w in weights.items() if w]).sum()
        loss = self.scale * directions * total / sum(weights.values())
        return Step(c.weights[2] * loss, {"class": loss})

    def other_losses(self, S: list[Tokens], T: list[Tokens], z_t: Tensor | None, views: Views, t: Progress) -> Step:
        w_mim, w_pat, _ = self.config.weights
        crops, step = len(views.global_crops), Step(0.0, {})
        if w_mim:
            mim = pixel_error(self.pixels, S[:crops], views, self.config.pixel_error)  # (1)
            step = step + Step(w_mim * mim, {"pixels": mim})
        if w_pat:
            pat = self.distillation(S[:crops], T[:crops], views)
            step = step + Step(w_pat * pat, {"patch": pat})
        return step

    def distillation(self, S: list[Tokens], T: list[Tokens], views: Views) -> Tensor:
        """(2), of the patches of corrupted and clean versions of the same crop."""
        c = self.config

        def embed(head: nn.Module, tokens: list[Tokens]) -> Tensor:
            patches = torch.stack([x.patch for x in tokens])  # (V, B, N, D): one BatchNorm over all of them
            return head(patches.flatten(0, 2)).unflatten(0, patches.shape[:3])

        p = embed(nn.Sequential(self.student.patch_projector, self.patch_predictor), S)
        k = embed(self.teacher.patch_projector, T)
        losses = patch_contrast(unit(p), unit(k), c.temperature, c.negatives)  # (V, B, N)
        if c.scored == "all":
            return self.scale * losses.mean()
        share = torch.stack([v.replaced_share(self.student.encoder.patch_size) for v in views.global_crops])
        weight = (share >= 0.5).to(share.dtype) if c.scored == "masked" else share
        return self.scale * (weight * losses).sum() / all_mean(weight.sum()).clamp(min=1e-6)

    @property
    def scale(self) -> float:
        return 2 * self.config.temperature if self.config.scale is None else self.config.scale

    @torch.no_grad()
    def update(self, carries: list[Carry], t: Progress) -> None:
        ema_update(self.teacher, self.student, self.momentum(t))
