"""A fresh Swin from a config."""

from typing import Literal, cast

import timm
from pydantic import BaseModel, ConfigDict, Field
from timm.models.swin_transformer import SwinTransformer

from triptych.encoders.swin import Swin, check_spec, init_encoder, set_norm_eps
from triptych.errors import UserError, nearest
from triptych.tokens import TokenSpec


class SwinConfig(BaseModel):
    """Any Swin (not V2) by timm's name, optionally at another size.  None = what the architecture says."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["swin"] = "swin"
    arch: str = "swin_tiny_patch4_window7_224"  # timm's name
    image_size: int | tuple[int, int] | None = None  # pixels; with window_size it fixes each block's window and shift
    patch_size: int | None = Field(default=None, ge=1)  # pixels of the first tokens; every later stage doubles them
    window_size: int | None = Field(default=None, ge=1)  # tokens per side; a stage with fewer is one window
    width: int | None = Field(default=None, ge=1)  # of the first stage; every later stage doubles it
    depths: tuple[int, ...] | None = None  # blocks of each stage
    heads: tuple[int, ...] | None = None  # of each stage
    drop_path: float = Field(default=0.0, ge=0, lt=1)  # stochastic depth of the last block; linear from 0; student only
    checkpoint: bool = False  # compute activations again in the backward pass: less memory, about a third more time
    norm_eps: float = Field(default=1e-5, gt=0)  # ε of every layer norm: 1e-5 Swin and MoBY, 1e-6 iBOT
    init: Literal["dino", "xavier"] = "dino"  # linear weights: σ 0.02, which suits widths from 384; or Xavier-uniform
    weights: str | None = None  # to start from: a run, an export, or a file of timm, official Swin, MoBY, iBOT


def build(config: SwinConfig, spec: TokenSpec, image_size: int | None = None) -> Swin:
    """A freshly initialised encoder (config.weights is loaded by `encoders.load`).

    image_size (pixels) is the native size where the config leaves it open: the size of the global crops.
    """
    names = timm.list_models(module="swin_transformer")
    if config.arch not in names:
        raise UserError(f"timm has no Swin {config.arch!r}{nearest(config.arch, names)}")
    spec = TokenSpec(**{**vars(spec), "cls": 0})
    check_spec(spec)
    given = {
        "img_size": config.image_size or image_size,
        "patch_size": config.patch_size,
        "window_size": config.window_size,
        "embed_dim": config.width,
        "depths": config.depths,
        "num_heads": config.heads,
    }
    options = {name: value for name, value in given.items() if value is not None}
    try:
        swin = timm.create_model(
            config.arch, pretrained=False, num_classes=0, drop_path_rate=config.drop_path, **options
        )
    except (TypeError, AssertionError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"timm cannot build {config.arch} with {options}: {error}") from error
    set_norm_eps(cast(SwinTransformer, swin), config.norm_eps)
    encoder = Swin(swin, spec)  # type: ignore[arg-type]
    encoder.checkpoint = config.checkpoint
    init_encoder(encoder, config.init)
    return encoder
