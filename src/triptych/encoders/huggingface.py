"""Folders of Hugging Face's transformers: config.json beside model.safetensors or pytorch_model.bin."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from triptych.encoders.official import VITS, Origin
from triptych.errors import UserError

FILES = ("model.safetensors", "pytorch_model.bin")
# model_type -> key of official.VITS
ORIGINS = {
    "vit": "hf_vit",
    "vit_mae": "hf_vit_mae",
    "vit_msn": "hf_vit_mae",  # of the same colours and positions
    "dinov2": "hf_dinov2",
    "dinov2_with_registers": "hf_dinov2_with_registers",
}


def config_of(folder: Path) -> dict[str, Any] | None:
    """config.json of transformers in this folder; None where there is none, or another library's."""
    try:
        about = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) and "model_type" in about and "triptych" not in about else None


def weights_of(folder: Path) -> Path:
    """The file of weights in a folder."""
    for name in FILES:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder} has neither {' nor '.join(FILES)}: weights in several files must be joined into one")


def origin_of(folder: Path, config: dict[str, Any]) -> Origin:
    """What the config says of a ViT: its heads and ε; of images mean and deviation, from preprocessor_config.json.

    Raises UserError for another architecture or activation.
    """
    kind, act = config["model_type"], config.get("hidden_act", "gelu")
    if kind not in ORIGINS:
        raise UserError(
            f"{folder} holds a model of type {kind}; of transformers' these can be read: {', '.join(ORIGINS)}"
        )
    if act != "gelu":
        raise UserError(f"{folder} has the activation {act}; only gelu (the exact one) can be read")
    origin = next(row for row in VITS if row.key == ORIGINS[kind])
    said: dict[str, Any] = {"name": f"Hugging Face {kind}"}
    for ours, theirs in (("norm_eps", "layer_norm_eps"), ("heads", "num_attention_heads")):
        if theirs in config:
            said[ours] = config[theirs]
    try:
        images = json.loads((folder / "preprocessor_config.json").read_text())
    except (OSError, ValueError):
        images = {}
    said |= {key: tuple(images[f"image_{key}"]) for key in ("mean", "std") if f"image_{key}" in images}
    return replace(origin, **said)
