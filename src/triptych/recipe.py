"""A recipe: everything that decides a run but the images, as one typed, frozen value."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from triptych import methods
from triptych.data.loader import LoaderConfig, ViewsConfig
from triptych.encoders import ViTConfig
from triptych.encoders import build as build_encoder
from triptych.encoders.load import load_weights
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
    for size in (recipe.views.global_size, recipe.views.local_size)[: 2 if recipe.views.local_crops else 1]:
        encoder.grid(size, size)  # a crop that does not divide into patches is an error now, not in a worker
    if recipe.encoder.weights:
        load_weights(encoder, recipe.encoder.weights)
    return methods.build(encoder, recipe.method)
