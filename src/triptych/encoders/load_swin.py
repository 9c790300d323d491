"""Swin's weights in: timm's names and those of the official Swin, MoBY and iBOT code."""

import math
import re
from typing import cast

import timm
from timm.layers import resize_rel_pos_bias_table
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor

from triptych.encoders.swin import Swin, patch_embed, window_argument
from triptych.encoders.windows import Pair
from triptych.errors import UserError
from triptych.tokens import TokenSpec

State = dict[str, Tensor]
_TABLE = "attn.relative_position_bias_table"
_FIRST_TABLE = f"layers.0.blocks.0.{_TABLE}"


def is_swin(raw: State) -> bool:
    return any(name.endswith(_FIRST_TABLE) for name in raw)


def timm_names(raw: State) -> State:
    """The trunk under timm's names, without prefixes, heads, mask token and buffers.

    Official code merges patches at the end of a stage, timm at the start of the next; the four neighbours have the same
    order in both.  Where a file holds two encoders: the teacher; else the shortest prefix (MoBY's online encoder).
    """
    prefixes = [name.removesuffix(_FIRST_TABLE) for name in raw if name.endswith(_FIRST_TABLE)]
    prefix = min(prefixes, key=lambda p: ("teacher" not in p, len(p)))
    state = {name.removeprefix(prefix): value for name, value in raw.items() if name.startswith(prefix)}
    if "absolute_pos_embed" in state:
        raise UserError("this Swin has absolute positions besides its bias tables (ape), which timm's Swin lacks")
    official = "layers.0.downsample.reduction.weight" in state
    kept = {}
    for name, value in state.items():
        if not name.startswith(("patch_embed.", "layers.", "norm.")) or name.endswith("relative_position_index"):
            continue
        if official:
            name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        kept[name] = value
    return kept


def official_names(state: State) -> State:
    """The reverse, for files: before 1.0.31 timm takes every Swin file without a classifier for an official one."""
    return {
        re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name): value
        for name, value in state.items()
    }


def encoder_of(state: State, *, arch: str | None = None) -> Swin:
    """An encoder whose sizes are read off a timm-named state dict, except its native size.

    That decides which blocks shift.  It is the size of `arch`, else what the shift masks in the file say, else the
    smallest at which the last stage is one window, as in all published Swins.  Layer norms get Swin's ε of 1e-5.
    """
    masks, state = _split_masks(state)
    kernel = state["patch_embed.proj.weight"]
    n = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    depths = [
        len({m for name in state if (m := re.match(rf"layers\.{s}\.blocks\.(\d+)\.norm1\.weight", name))})
        for s in range(n)
    ]
    tables = [state[f"layers.{s}.blocks.0.{_TABLE}"] for s in range(n)]
    windows = [(math.isqrt(len(table)) + 1) // 2 for table in tables]
    if arch is not None:
        size = cast(Pair, patch_embed(cast(SwinTransformer, timm.create_model(arch, num_classes=0))).img_size)[0]
    else:
        across = math.isqrt(
            max((len(m) for name, m in masks.items() if name.startswith(f"layers.{n - 1}.")), default=1)
        )
        size = across * windows[-1] * kernel.shape[-1] * 2 ** (n - 1)
    try:
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
        swin.load_state_dict(state, strict=True)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"not the state dict of a Swin: {error}") from error
    return Swin(swin, TokenSpec(cls=0)).eval()


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
