"""Encoders: the only list of architectures families."""

from triptych.encoders.base import Encoder
from triptych.encoders.vit import ViT, ViTConfig, build

ENCODERS = {"vit": "any plain ViT by timm's name: --encoder.arch vit_small_patch16_224"}

__all__ = ["ENCODERS", "Encoder", "ViT", "ViTConfig", "build"]
