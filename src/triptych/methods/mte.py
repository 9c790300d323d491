"""MTE -- Li, Hu, Yin and Cheng, Multi-Token Enhancing for Vision Representation Learning, 2024.  Wraps any base.

    L = ℓ( z_a^s, z_a^t )  +  ℓ( z_g^s, z_a^t )  +  the base's other losses                             (4) (5) (6)

ℓ is the base's loss between image-level embeddings; z_a the fused vector of the auxiliary tokens (`ensemble.py`), z_g
the projected global token.  What the base keeps from step to step (centre, keys, queue) is made of z_a^t alone.  The
auxiliary tokens are thrown away after pre-training: the encoder that remains is the base's, to the last bit.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from triptych.data.views import Views, ViewSpec
from triptych.encoders.base import Encoder
from triptych.ensemble import Ensemble, EnsembleConfig
from triptych.methods.base import Carry, Method, Siamese, Step, Tower, ema_copy, ema_update, unmasked
from triptych.methods.byol import BYOL, BYOLConfig
from triptych.methods.dino import DINO, DINOConfig
from triptych.methods.hssl import HSSL, HSSLConfig
from triptych.methods.ibot import iBOT, iBOTConfig
from triptych.methods.mcssl import MCSSL, MCSSLConfig
from triptych.methods.mmc import MMC, MMCConfig
from triptych.methods.moby import MoBY, MoBYConfig
from triptych.methods.mocov3 import MoCoV3, MoCoV3Config
from triptych.methods.msn import MSN, MSNConfig
from triptych.methods.simclr import SimCLR, SimCLRConfig
from triptych.methods.sit import SiT, SiTConfig
from triptych.methods.swav import SwAV, SwAVConfig
from triptych.methods.udi import UDI, UDIConfig
from triptych.schedules import Progress
from triptych.tokens import TokenSpec

# Every Siamese method; a test compares this table with METHODS.
BASES: dict[type, type[Method]] = {
    DINOConfig: DINO,
    iBOTConfig: iBOT,
    MoCoV3Config: MoCoV3,
    BYOLConfig: BYOL,
    MoBYConfig: MoBY,
    HSSLConfig: HSSL,
    SwAVConfig: SwAV,
    SimCLRConfig: SimCLR,
    UDIConfig: UDI,
    MMCConfig: MMC,
    SiTConfig: SiT,
    MCSSLConfig: MCSSL,
    MSNConfig: MSN,
}
BaseConfig = Annotated[
    DINOConfig
    | iBOTConfig
    | MoCoV3Config
    | BYOLConfig
    | MoBYConfig
    | HSSLConfig
    | SwAVConfig
    | SimCLRConfig
    | UDIConfig
    | MMCConfig
    | SiTConfig
    | MCSSLConfig
    | MSNConfig,
    Field(discriminator="name"),
]


class MTEConfig(EnsembleConfig):
    name: Literal["mte"] = "mte"
    base: BaseConfig = DINOConfig()
    weights: tuple[float, float] = (1.0, 1.0)  # of (4) and (5); (1, 0) = no distillation
    target: Literal["fused", "own"] = "fused"  # of the global token; "own" with weights (0, 1): the control of Fig. 12
    same_view: bool = False  # the global token also learns from the fused vector of its own crop
    predictor: Literal["own", "shared"] = "own"  # for the fused vector: a second predictor, or the global token's

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.aux + self.pooled:
            raise ValueError("auxiliary tokens are needed: aux or pooled above 0")
        if self.target == "own" and self.weights[0]:
            # Centre and queue hold one kind of target.
            raise ValueError("target own is a control without the auxiliary loss: weights 0 1")
        if self.target == "own" and isinstance(self.base, HSSLConfig | SwAVConfig | SimCLRConfig):
            raise ValueError(f"target own needs a base whose teacher projects the global token, not {self.base.name}")
        if isinstance(self.base, MSNConfig):
            if self.base.drop and self.pooled and self.pooling == "adaptive":
                raise ValueError("msn drops patches, and adaptive pooling needs the whole grid: set pooled 0")
            if self.same_view:
                raise ValueError("msn's targets and anchors share no view: same_view false")
        if isinstance(self.base, MMCConfig):
            self._fits_mmc(self.base)
        return self

    def _fits_mmc(self, base: MMCConfig) -> None:
        if not base.weights[2]:
            raise ValueError("mmc without its class loss has no image-level loss: the third of its weights above 0")
        if self.same_view and (base.pairs, base.local_crops) != ("cross", "student"):
            # The sum would weigh crops that the base pairs in another way.
            raise ValueError("same_view goes with mmc's pairs cross and local_crops student; or set its pairs to both")


class MTE(Method):
    @staticmethod
    def token_spec(config: MTEConfig) -> TokenSpec:
        return BASES[type(config.base)].token_spec(config.base) | config.spec

    @staticmethod
    def view_spec(config: MTEConfig) -> ViewSpec:
        return BASES[type(config.base)].view_spec(config.base)

    def __init__(self, encoder: Encoder, config: MTEConfig):
        super().__init__()
        self.config = config
        base = BASES[type(config.base)](encoder, config.base)  # type: ignore[call-arg]
        assert isinstance(base, Siamese)
        self.base = base
        heads = 1 if config.heads == "shared" else config.aux + config.pooled + base.own_aux
        fresh = [base.student.projector.fresh() for _ in range(heads)]
        self.student_ensemble = Ensemble(encoder, config, fresh, base.own_aux)
        self.teaches_itself = base.teacher is base.student
        if not self.teaches_itself:
            self.teacher_ensemble = ema_copy(self.student_ensemble)
        own = config.predictor == "own" and not isinstance(base.predictor, nn.Identity)
        self.aux_predictor = base.predictor.fresh() if own else None  # type: ignore[operator]
        if config.target == "own":  # nothing trains them
            for part in (self.student_ensemble, self.aux_predictor, encoder.aux_tokens):
                if part is not None:
                    part.requires_grad_(False)

    @property
    def encoder(self) -> Encoder:
        return self.base.encoder

    @property
    def student(self) -> Tower:
        return self.base.student

    @property
    def teacher(self) -> Tower:
        return self.base.teacher

    def forward(self, views: Views, t: Progress) -> Step:
        base, (w_aux, w_distill) = self.base, self.config.weights
        S, T = base.encode(views, t, patches=self.config.target == "fused")
        z_g = base.student.project(S)
        q_g = base.predictor(z_g)
        if self.config.target == "own":
            z_t = base.teacher.project(T)
            own = base.global_loss(q_g, z_t, t)
            return Step(w_distill * own.loss, own.terms, own.carry) + base.other_losses(S, T, z_t, views, t)
        z_a = self.student_ensemble(S)
        z_t = z_a[: len(T)] if self.teaches_itself else self.teacher_ensemble(T)
        aux = base.global_loss((self.aux_predictor or base.predictor)(z_a), z_t, t)  # (4)
        z_t = z_t.detach()  # of a method that teaches itself, the global token must not move the ensemble
        distill = base.global_loss(q_g, z_t, t).loss  # (5)
        if self.config.same_view:  # a mean over all V views, not the V − 1 other ones
            same = base.global_loss(q_g[: len(T)].flip(0), z_t, t).loss
            distill = (distill * (len(q_g) - 1) + same) / len(q_g)
        terms = {"ensemble": torch.as_tensor(aux.loss), "distill": torch.as_tensor(distill)}
        ensemble_and_global = Step(w_aux * aux.loss + w_distill * distill, terms, aux.carry)
        return ensemble_and_global + base.other_losses(S, T, z_t, views, t)  # (6)

    def after_backward(self, t: Progress) -> None:
        self.base.after_backward(t)

    def update(self, carries: list[Carry], t: Progress) -> None:
        self.base.update(carries, t)
        if not self.teaches_itself:
            ema_update(self.teacher_ensemble, self.student_ensemble, self.base.momentum(t))

    @torch.no_grad()
    def predictions(self, views: Views, t: Progress) -> tuple[Tensor, Tensor] | None:
        """The fused vector of the teacher on one view, the student's global token on the other."""
        if type(self.base).probabilities is Method.probabilities:
            # Health is measured on one process alone, where the BatchNorm of other methods' heads would wait for ever.
            return None
        first, second = unmasked([views.global_crops[0], views.global_crops[-1]])
        S, T = self.base.encode(Views([second, first], []), t, patches=True)
        z_t = (self.student_ensemble if self.teaches_itself else self.teacher_ensemble)(T[1:])[0]
        return self.base.probabilities(self.base.predictor(self.base.student.project(S[:1]))[0], z_t, t)
