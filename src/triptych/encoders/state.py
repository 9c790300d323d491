"""State dicts of other code bases, under timm's names."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from triptych.encoders import load_swin
from triptych.errors import UserError

State = dict[str, Tensor]


def read_state(path: Path) -> State:
    """Tensors of a file under timm's names, from whichever nesting and prefixes it uses.

    Checkpoints of DINO, iBOT, UDI and MSN: the teacher's backbone; of MoBY: the online encoder.  UDI's two class tokens
    become the class token and the first register (class+).  Heads and MAE's decoder are left out.
    """
    try:
        raw: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise UserError(f"{path} is not a file of weights that can be read safely: {error}") from error
    for key in ("teacher", "target_encoder", "model", "state_dict"):
        if isinstance(raw, dict) and isinstance(raw.get(key), dict):
            raw = raw[key]
    if not isinstance(raw, dict) or not all(isinstance(v, Tensor) for v in raw.values()):
        raise UserError(f"{path} holds no state dict; looked at its top level and under teacher, model, state_dict")
    return load_swin.timm_names(raw) if load_swin.is_swin(raw) else timm_names(raw)


HEADS = ("head", "fc.", "projector", "prototypes", "srs", "mask_token", "decoder")


def timm_names(raw: State) -> State:
    """Prefixes off, heads off; `reg_token` holds registers, `cls_plus_token` UDI's second class token."""
    state = {}
    for name, value in raw.items():
        for prefix in ("module.", "backbone.", "backbone.", "encoder.", "vit."):
            name = name.removeprefix(prefix)
        if not name.startswith(HEADS):
            state[name] = value
    for old, new in (
        ("fc_norm.weight", "norm.weight"),
        ("fc_norm.bias", "norm.bias"),
        ("register_tokens", "reg_token"),
    ):
        if old in state:
            state.setdefault(new, state.pop(old))
    if "cls_token" in state and state["cls_token"].shape[1] == 2:
        state["cls_token"], state["cls_plus_token"] = state["cls_token"].split(1, 1)
    missing = [n for n in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight") if n not in state]
    if missing:
        raise UserError(f"not the state dict of a plain ViT or Swin: it lacks {', '.join(missing)}")
    return state


def split_positions(state: State, prefix: int) -> tuple[Tensor, Tensor]:
    """-> slots of prefix tokens (1, 0..prefix, D), square table of the patches (1, N, D)"""
    table = state["pos_embed"]
    cls = int("cls_token" in state)
    for slots in (prefix, cls, 0):  # all prefix tokens have slots (timm), only the class token (DINOv2), or none
        if round((table.shape[1] - slots) ** 0.5) ** 2 == table.shape[1] - slots:
            return table[:, :slots], table[:, slots:]
    raise UserError(f"a position table of {table.shape[1]} rows is no square grid beside {prefix} class tokens")


def take_registers(state: State) -> Tensor | None:
    """class+ and registers side by side, the order of our encoders; taken out of the state."""
    found = [state.pop(name) for name in ("cls_plus_token", "reg_token") if name in state]
    return torch.cat(found, 1) if found else None
