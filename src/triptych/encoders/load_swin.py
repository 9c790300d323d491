"""Swin's weights in: timm's names and those of the official Swin, MoBY and iBOT code."""

import math
import re
from typing import cast

import timm
import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models.swin_transformer import SwinTransformer, WindowAttention

from triptych.encoders.official import Found
from triptych.encoders.report import Report
from triptych.encoders.state import State, own_randomness
from triptych.encoders.swin import Swin, patch_embed, set_norm_eps, window_argument
from triptych.encoders.windows import Pair
from triptych.errors import UserError
from triptych.tokens import TokenSpec

_TABLE = "attn.relative_position_bias_table"


def official_names(state: State) -> State:
    """The reverse of `official.swin_names`, for files: before 1.0.31 timm takes every Swin file without a classifier
    for an official one.
    """
    return {
        re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name): value
        for name, value in state.items()
    }


def encoder_of(found: Found, file: str, *, arch: str | None = None, partial: bool = False) -> tuple[Swin, Report]:
    """An encoder whose sizes are read off the tensors of a file, except its native size.

    That decides which blocks shift.  It is the size of `arch`, else what the shift masks in the file say, else the
    smallest at which the last stage is one window, as in all published Swins.  Raises UserError; `Report.check`.
    """
    masks, state = _split_masks(found.state)
    kernel = state["patch_embed.proj.weight"]
    n = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    depths = [
        len({m for name in state if (m := re.match(rf"layers\.{s}\.blocks\.(\d+)\.norm1\.weight", name))})
        for s in range(n)
    ]
    try:
        tables = [state[f"layers.{s}.blocks.0.{_TABLE}"] for s in range(n)]
        windows = [(math.isqrt(len(table)) + 1) // 2 for table in tables]
        if arch is not None:
            size = cast(Pair, patch_embed(cast(SwinTransformer, timm.create_model(arch, num_classes=0))).img_size)[0]
        else:
            across = math.isqrt(
                max((len(m) for name, m in masks.items() if name.startswith(f"layers.{n - 1}.")), default=1)
            )
            size = across * windows[-1] * kernel.shape[-1] * 2 ** (n - 1)
        with own_randomness():
            swin = SwinTransformer(
                img_size=size,
                patch_size=kernel.shape[-1],
                embed_dim=kernel.shape[0],
                depths=tuple(depths),
                num_heads=tuple(table.shape[1] for table in tables),
                window_size=window_argument([(w, w) for w in windows]),  # type: ignore[arg-type]
                mlp_ratio=state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / kernel.shape[0],
                qkv_bias="layers.0.blocks.0.attn.qkv.bias" in state,
                drop_path_rate=0.0,
                num_classes=0,
            )
    except (KeyError, RuntimeError, AssertionError) as error:
        raise UserError(f"{file}: not the state dict of a Swin: {error}") from error
    if kernel.dtype == torch.float64:
        swin.double()
    ours = swin.state_dict()
    report = found.report(ours, state)
    report.check(file, "a Swin", partial)
    swin.load_state_dict(ours | {k: v for k, v in state.items() if k in ours and v.shape == ours[k].shape})
    set_norm_eps(swin, found.origin.norm_eps)
    return Swin(swin, TokenSpec(cls=0)).eval(), report


def _split_masks(state: State) -> tuple[State, State]:
    masks = {name: value for name, value in state.items() if name.endswith("attn_mask")}
    return masks, {name: value for name, value in state.items() if name not in masks}


def load_weights(encoder: Swin, state: State, file: str) -> None:
    """Start from a timm-named state dict: bias tables of other windows are resampled.

    Raises UserError where anything else does not fit.
    """
    swin, (_, state) = encoder.swin, _split_masks(state)
    ours = swin.state_dict()
    for name, value in state.items():
        if name.endswith(_TABLE) and name in ours and value.shape[1:] == ours[name].shape[1:]:
            attn = cast(WindowAttention, swin.get_submodule(name.rpartition(".")[0]))
            if value.shape != ours[name].shape:
                state[name] = resize_rel_pos_bias_table(value, cast(Pair, attn.window_size), tuple(ours[name].shape))
    wrong = [
        f"{name}: {tuple(state[name].shape) if name in state else 'absent'} in the file, "
        f"{tuple(ours[name].shape) if name in ours else 'absent'} here"
        for name in {**state, **ours}
        if name not in state or name not in ours or state[name].shape != ours[name].shape
    ]
    if wrong:
        raise UserError(f"{file} does not fit the encoder:\n  " + "\n  ".join(wrong[:8]))
    swin.load_state_dict(state)
