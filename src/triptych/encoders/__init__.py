"""Encoders: the only list of architecture families."""

from typing import Annotated

from pydantic import Field

from triptych.encoders import swin_build, vit_build
from triptych.encoders.base import Encoder
from triptych.encoders.swin import Swin
from triptych.encoders.swin_build import SwinConfig
from triptych.encoders.vit import ViT
from triptych.encoders.vit_build import ViTConfig
from triptych.tokens import TokenSpec

EncoderConfig = Annotated[ViTConfig | SwinConfig, Field(discriminator="name")]

ENCODERS = {
    "vit": "any plain ViT by timm's name: --encoder.arch vit_small_patch16_224",
    "swin": "any Swin (not V2) by timm's name: --encoder.name swin --encoder.arch swin_tiny_patch4_window7_224",
}


def build(config: ViTConfig | SwinConfig, spec: TokenSpec, image_size: int | None = None) -> Encoder:
    """A freshly initialised encoder with the tokens of `spec`, for images of image_size pixels where it matters."""
    if isinstance(config, SwinConfig):
        return swin_build.build(config, spec, image_size)
    return vit_build.build(config, spec, image_size)


__all__ = ["ENCODERS", "Encoder", "EncoderConfig", "Swin", "SwinConfig", "ViT", "ViTConfig", "build"]
