"""A recipe: everything that decides a run but the images, as one typed, frozen value."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from triptych import methods
from triptych.data.loader import LoaderConfig, ViewsConfig
from triptych.encoders import Encoder, ViTConfig
from triptych.encoders import build as build_encoder
from triptych.encoders.load import load_weights
from triptych.errors import UserError
from triptych.methods import METHODS, Method, MethodConfig
from triptych.optim import OptimConfig


class HealthConfig(BaseModel):
    """What is measured at the end of an epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(default=1, ge=0)  # epochs between measurements, 0 = never
    images: int = Field(default=2000, ge=8)  # at most so many images of the data set, always the same ones
    k: int = Field(default=10, ge=1)  # neighbours of the k-NN probe, where labels are known


class CheckpointConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    every: float = Field(default=1.0, gt=0)  # epochs between checkpoints
    keep: int = Field(default=2, ge=1)  # so many of the last ones


class Recipe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    method: MethodConfig
    encoder: ViTConfig = ViTConfig()
    views: ViewsConfig = ViewsConfig()
    optim: OptimConfig = OptimConfig()
    batch: int = Field(default=1024, ge=1)  # images per optimiser step, over all processes
    accumulate: int = Field(default=1, ge=1)  # parts that a step's batch is split into, to fit in memory
    epochs: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware multiplies it fast
    loader: LoaderConfig = LoaderConfig()
    health: HealthConfig = HealthConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


def build_method(recipe: Recipe) -> Method:
    """The recipe's method with its freshly initialised (or loaded) encoder, a function of the seed alone."""
    torch.manual_seed(recipe.seed)
    kind = METHODS[type(recipe.method)]
    encoder = build_encoder(recipe.encoder, kind.tokens, recipe.views.global_size)
    _check_fit(recipe, encoder)
    if recipe.encoder.weights:
        load_weights(encoder, recipe.encoder.weights)
    return methods.build(encoder, recipe.method)


def _check_fit(recipe: Recipe, encoder: Encoder) -> None:
    """What only encoder, views and method together tell: an error now, not in a worker at step 0."""
    spec = METHODS[type(recipe.method)].view_spec(recipe.method)
    views = {"global": (recipe.views.global_size, spec.window_global)}
    if recipe.views.local_crops:
        views["local"] = recipe.views.local_size, spec.window_local
    for name, (size, window) in views.items():
        side = encoder.grid(size, size)[0]
        if window > side:
            raise UserError(
                f"--method.window_{name} {window} is larger than the {side}x{side} patches of a {name} crop"
            )
    heads = getattr(recipe.method, "srs_heads", None)
    if heads and encoder.width % heads:
        raise UserError(f"--method.srs_heads {heads} does not divide the encoder's width of {encoder.width}")
