"""Supervised training, plain (DeiT, MAE's from-scratch recipe) or with MTE's ensemble (Li et al. 2024, section 3.5).

    o_a = mean_i W_iᵀ a_i,   o_g = Wᵀ g                                                                   (7) (8)
    L = CE( o_a, y ) + CE( o_g, softmax(sg[o_a]) )            with auxiliary tokens                           (9)
    L = CE( o_g, y )                                          without (aux = pooled = 0)

y: labels, smoothed and mixed by mixup and cutmix.  Inference uses o_g alone.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from triptych.data.views import Views, ViewSpec
from triptych.encoders.base import Encoder
from triptych.ensemble import Ensemble, EnsembleConfig
from triptych.errors import UserError
from triptych.heads import init_linear
from triptych.losses import full_precision
from triptych.methods.base import Carry, Method, Step, ema_copy, ema_update
from triptych.schedules import Progress
from triptych.tokens import Tokens, TokenSpec


class SupervisedConfig(EnsembleConfig):
    name: Literal["supervised"] = "supervised"
    classes: int | None = Field(default=None, ge=2)  # None = what the data has
    aux: int = Field(default=0, ge=0)  # MTE: 4
    pooled: int = Field(default=0, ge=0)  # MTE: 6
    token: Literal["cls", "patch_mean", "cls+patch_mean"] = "cls"  # what o_g reads (MMC's fine-tuning: the last)
    fc_norm: bool = False  # patch_mean: the final norm starts afresh and comes after the mean (MAE's fine-tuning)
    projection: int = Field(
        default=0, ge=0
    )  # width of the pre-training head's first layer, kept with its GELU; 0: none
    classifier: Literal["new", "kept"] = "new"  # kept: that of the supervised run in encoder.weights (a second size)
    head_std: float = Field(default=0.02, gt=0)  # σ of a new classifier's weights: MAE's 2e-5 is iBOT's 0.02 x 0.001
    logits: Literal["mean", "sum"] = "mean"  # o_a of the M classifiers
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    mixup: float = Field(default=0.8, ge=0)  # α of Beta(α, α); 0 = off
    cutmix: float = Field(default=1.0, ge=0)
    erase: float = Field(default=0.0, ge=0, le=1)  # probability of random erasing
    average: float = Field(default=0.9999, ge=0, lt=1)  # momentum of the weights' moving average; 0 = none

    @model_validator(mode="after")
    def _one_fusion(self):
        if self.fusion != "mean":
            raise ValueError("logits are fused as they are: fusion mean, see logits")
        return self

    @model_validator(mode="after")
    def _one_reading(self):
        if self.fc_norm and (self.token != "patch_mean" or self.aux + self.pooled):
            raise ValueError("fc_norm is the norm of the mean patch: token patch_mean, aux 0, pooled 0")
        if self.projection and self.token != "cls":
            raise ValueError("a projection kept from pre-training reads the class token: token cls")
        return self


class Classifier(nn.Module):
    """Encoder and a linear classifier of its class token, mean patch or both: what inference uses."""

    def __init__(self, encoder: Encoder, config: SupervisedConfig):
        super().__init__()
        assert config.classes, "the loop fills in the data's number of classes"
        self.token, self.fc_norm, self.encoder = config.token, config.fc_norm, encoder
        self.projection = nn.Linear(encoder.width, config.projection) if config.projection else None
        width = config.projection or encoder.width * (1 + config.token.count("+"))
        self.head = nn.Linear(width, config.classes)
        if self.projection is not None:
            init_linear(self.projection)
        init_linear(self.head, config.head_std)
        if config.fc_norm:
            self.norm.reset_parameters()

    @property
    def norm(self) -> nn.LayerNorm:
        """The encoder's final norm."""
        return cast(nn.LayerNorm, self.encoder.trunk.norm)

    def forward(self, images: Tensor) -> tuple[Tokens, Tensor]:
        """(B, 3, H, W) -> tokens, o_g (B, C): (8)"""
        tokens = self.encoder(images)
        return tokens, self.logits(tokens)

    def logits(self, tokens: Tokens) -> Tensor:
        """(B, C)"""
        read = self.read(tokens)
        if self.projection is not None:
            read = F.gelu(self.projection(read))
        return full_precision(self.head(read))

    def read(self, tokens: Tokens) -> Tensor:
        """(B, D), of "cls+patch_mean" (B, 2D)"""
        if self.token == "cls":
            return tokens.global_token
        if self.fc_norm:
            return self.norm(tokens.patch_raw.mean(1))
        mean = tokens.patch.mean(1)
        return mean if self.token == "patch_mean" else torch.cat([tokens.global_token, mean], -1)


class Supervised(Method):
    @staticmethod
    def token_spec(config: SupervisedConfig) -> TokenSpec:
        return config.spec | TokenSpec()

    @staticmethod
    def view_spec(config: SupervisedConfig) -> ViewSpec:
        return ViewSpec(global_crops=1, local_crops=False, labels=True)

    def __init__(self, encoder: Encoder, config: SupervisedConfig):
        super().__init__()
        self.config = c = config
        if c.token == "cls+patch_mean" and not encoder.spec.cls:
            raise UserError(f"token {c.token}: this encoder has no class token beside its mean patch: set it to cls")
        self.model = Classifier(encoder, c)
        assert config.classes
        self.average = ema_copy(self.model) if c.average else None
        self.ensemble = None
        if c.aux + c.pooled:
            heads = [nn.Linear(encoder.width, config.classes) for _ in range(c.aux + c.pooled)]
            for head in heads:
                init_linear(head)
            self.ensemble = Ensemble(encoder, c, heads if c.heads == "own" else heads[:1])
        self.erase = RandomErasing(c.erase, mode="pixel", device="cpu") if c.erase else None
        self.mix = None
        if c.mixup or c.cutmix:
            options = {"label_smoothing": c.label_smoothing, "num_classes": config.classes}
            self.mix = Mixup(mixup_alpha=c.mixup, cutmix_alpha=c.cutmix, **options)

    @property
    def encoder(self) -> Encoder:
        return self.classifier.encoder

    @property
    def classifier(self) -> Classifier:
        """The one that is evaluated."""
        return self.average or self.model

    def forward(self, views: Views, t: Progress) -> Step:
        images, y = self.augment(views.global_crops[0].images, views.labels)
        tokens, o_g = self.model(images)
        if self.ensemble is None:
            loss = F.cross_entropy(o_g, y)
            return Step(loss, {"classes": loss})
        o_a = full_precision(self.ensemble([tokens])[0])  # (7)
        if self.config.logits == "sum":
            o_a = o_a * self.ensemble.count
        aux, distill = F.cross_entropy(o_a, y), F.cross_entropy(o_g, o_a.detach().softmax(-1))
        return Step(aux + distill, {"ensemble": aux, "distill": distill})  # (9)

    def augment(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> images, targets (B, C).  timm draws from Python's and numpy's generators, which the loop seeds."""
        assert labels is not None, "`view_spec` asks for labels"
        assert self.config.classes
        if self.erase is not None:
            # Where timm draws its noise: drawn on the host, the GPU would wait for it.
            self.erase.device = images.device  # type: ignore[assignment]
            images = self.erase(images.clone())
        if self.mix is not None:  # the batch with itself in reverse
            if len(images) % 2:
                raise UserError(f"mixup pairs images, and a process has {len(images)} of them: choose an even --batch")
            return self.mix(images.clone(), labels)
        off = self.config.label_smoothing / self.config.classes
        return images, F.one_hot(labels, self.config.classes) * (1 - self.config.label_smoothing) + off

    def update(self, carries: list[Carry], t: Progress) -> None:
        if self.average is not None:
            ema_update(self.average, self.model, self.config.average)
