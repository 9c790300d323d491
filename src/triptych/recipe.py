"""A recipe: everything that decides a run but the images, as one typed, frozen value."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from triptych import methods
from triptych.data.loader import LoaderConfig, ViewsConfig
from triptych.data.sources import Source
from triptych.encoders import Encoder, EncoderConfig, ViTConfig
from triptych.encoders import build as build_encoder
from triptych.encoders.load import load_weights
from triptych.encoders.swin import Swin
from triptych.errors import UserError
from triptych.kept_head import keep_head
from triptych.methods import METHODS, Method, MethodConfig, SupervisedConfig
from triptych.methods.supervised import Supervised
from triptych.optim import OptimConfig


class HealthConfig(BaseModel):
    """What is measured at the end of an epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every: int = Field(default=1, ge=0)  # epochs between measurements, 0 = never
    images: int = Field(default=2000, ge=8)  # at most so many images of the data set, always the same ones
    k: int = Field(default=10, ge=1)  # neighbours of the k-NN probe, where labels are known
    pictures: int = Field(default=4, ge=0, le=64)  # images drawn then, at the start and the end; 0 = none


class CheckpointConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every: float = Field(default=1.0, gt=0)  # epochs between checkpoints
    keep: int = Field(default=2, ge=1)  # so many of the last ones


class Recipe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    method: MethodConfig
    encoder: EncoderConfig = ViTConfig()
    views: ViewsConfig = ViewsConfig()
    optim: OptimConfig = OptimConfig()
    batch: int = Field(default=1024, ge=1)  # images per optimiser step, over all processes
    accumulate: int = Field(default=1, ge=1)  # parts that a step's batch is split into, to fit in memory
    epochs: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware multiplies it fast
    compile: Literal["off", "on", "auto"] = "off"  # torch.compile; auto: where it is measured to be faster here
    loader: LoaderConfig = LoaderConfig()
    health: HealthConfig = HealthConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


def build_method(recipe: Recipe) -> Method:
    """The recipe's method with its freshly initialised (or loaded) encoder, a function of the seed alone."""
    torch.manual_seed(recipe.seed)
    kind = METHODS[type(recipe.method)]
    encoder = build_encoder(recipe.encoder, kind.token_spec(recipe.method), recipe.views.global_size)
    _check_fit(recipe, encoder)
    if recipe.encoder.weights:
        load_weights(encoder, recipe.encoder.weights)
    method = methods.build(encoder, recipe.method)
    if recipe.encoder.weights and isinstance(method, Supervised):
        keep_head(method, recipe.encoder.weights)
    return method


def of_source(recipe: Recipe, source: Source) -> Recipe:
    """The recipe with what only the images tell: the number of classes of supervised training.

    Raises UserError where they do not fit, or where fine-tuning has nothing to start from.
    """
    c = recipe.method
    if not isinstance(c, SupervisedConfig):
        return recipe
    if (c.projection or c.classifier == "kept") and not recipe.encoder.weights:
        what = f"projection {c.projection}" if c.projection else "classifier kept"
        raise UserError(f"--method.{what} is kept from what training starts from: give --encoder.weights")
    if not source.classes:
        raise UserError(f"{source.name} has no labels: put the images of each class in a sub-folder of its own")
    found, asked = len(source.classes), c.classes
    if asked not in (None, found):
        raise UserError(f"--method.classes {asked}: {source.name} has {found} classes; leave the setting out")
    return recipe.model_copy(update={"method": c.model_copy(update={"classes": found})})


def _check_fit(recipe: Recipe, encoder: Encoder) -> None:
    """What only encoder, views and method together tell: an error now, not in a worker at step 0."""
    spec, views = METHODS[type(recipe.method)].view_spec(recipe.method), recipe.views
    base = getattr(recipe.method, "base", recipe.method)  # what mte wraps
    name, where = base.name, "--method" if base is recipe.method else "--method.base"
    if views.global_crops != spec.global_crops:
        raise UserError(
            f"--views.global_crops {views.global_crops}: {name} compares {spec.global_crops} of them"
            if spec.global_crops > 1
            else f"--views.global_crops {views.global_crops}: {name} takes one view of an image, set it to 1"
        )
    if views.local_crops and not spec.local_crops:
        raise UserError(f"--views.local_crops {views.local_crops}: {name} makes no use of local crops, set it to 0")
    sides = {"global": (views.global_size, spec.window_global)}
    if views.local_crops:
        sides["local"] = views.local_size, spec.window_local
    for level, (size, window) in sides.items():
        side = encoder.grid(size, size)[0]
        if window > side:
            raise UserError(
                f"{where}.window_{level} {window} is larger than the {side}x{side} patches of a {level} crop"
            )
    side = encoder.grid(views.global_size, views.global_size)[0]
    if spec.corruption is not None and views.global_size % spec.corruption.align:
        raise UserError(
            f"{where}.corruption.align {spec.corruption.align} does not divide the {views.global_size} px of a crop"
        )
    if spec.drop is not None and isinstance(encoder, Swin):
        raise UserError(f"{name} drops patches, and a Swin's windows need whole grids: set --encoder.name vit")
    if spec.drop is not None and not 1 <= int(side * side * (1 - spec.drop)) < side * side:
        raise UserError(f"{where}.drop {spec.drop} drops all or none of the {side}x{side} patches of a global crop")
    heads = getattr(base, "srs_heads", None)
    if heads and encoder.width % heads:
        raise UserError(f"{where}.srs_heads {heads} does not divide the encoder's width of {encoder.width}")
    queue = getattr(base, "queue", 0)
    if queue and queue < recipe.batch:
        raise UserError(f"{where}.queue {queue} is shorter than a step's batch of {recipe.batch}: make it longer")
