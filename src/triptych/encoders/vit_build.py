"""A fresh ViT from a config."""

from typing import Literal

import timm
from pydantic import BaseModel, ConfigDict, Field

from triptych.encoders.positions import Positions
from triptych.encoders.vit import ViT
from triptych.encoders.vit_init import Init, fix_positions, init_vit
from triptych.errors import UserError, nearest
from triptych.tokens import TokenSpec


class ViTConfig(BaseModel):
    """Any plain ViT by timm's name, optionally at another size.  None = what the architecture says."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["vit"] = "vit"
    arch: str = "vit_small_patch16_224"  # timm's name
    image_size: int | tuple[int, int] | None = None  # pixels; fixes the native grid of the position table
    patch_size: int | None = Field(default=None, ge=1)  # pixels
    width: int | None = Field(default=None, ge=1)  # D
    depth: int | None = Field(default=None, ge=1)  # blocks
    heads: int | None = Field(default=None, ge=1)
    registers: int = Field(default=0, ge=0)
    drop_path: float = Field(default=0.0, ge=0, lt=1)  # stochastic depth of the last block; linear from 0; student only
    drop_path_skips: bool = False  # leave a fixed share of the images out of the work (DINOv2), instead of zeroing it
    checkpoint: bool = False  # compute activations again in the backward pass: less memory, about a third more time
    init: Init = "dino"  # linear weights σ 0.02, which suits widths from 384; or Xavier
    position_table: Literal["learned", "sincos", "sincos_mae"] = "learned"  # or fixed: MoCo v3's, MAE's
    freeze_patches: bool = False  # the patch projection keeps its random start (MoCo v3: training is stabler)
    positions: Positions = "timm"  # how the position table is resampled for other grids
    weights: str | None = None  # to start from: a run, an export, or a file of weights (docs/encoders.md)


def build(config: ViTConfig, spec: TokenSpec, image_size: int | None = None) -> ViT:
    """A freshly initialised encoder (config.weights is loaded by `encoders.load`).

    image_size (pixels) sets the native grid where the config leaves it open: the size of the global crops.
    """
    if not timm.is_model(config.arch):
        names = timm.list_models("vit*")
        raise UserError(f"timm has no model {config.arch!r}{nearest(config.arch, names)}")
    spec = spec | TokenSpec(cls=0, register=config.registers)
    given = {
        "img_size": config.image_size or image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    options = {name: value for name, value in given.items() if value is not None}
    try:
        vit = timm.create_model(
            config.arch,
            pretrained=False,
            num_classes=0,
            class_token=bool(spec.cls),
            global_pool="token" if spec.cls else "",
            reg_tokens=spec.cls_plus + spec.register,
            drop_path_rate=config.drop_path,
            **options,
        )
    except (TypeError, AssertionError) as error:
        raise UserError(f"timm cannot build {config.arch} with {options}: {error}") from error
    encoder = ViT(vit, spec, config.positions)  # type: ignore[arg-type]
    init_vit(encoder.vit, config.init)
    encoder.checkpoint, encoder.skip = config.checkpoint, config.drop_path_skips
    if config.freeze_patches:
        encoder.vit.patch_embed.proj.requires_grad_(False)
    if config.position_table != "learned":
        fix_positions(encoder.vit, "column" if config.position_table == "sincos_mae" else "row")
    return encoder
