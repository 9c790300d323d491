"""A plain ViT's weights in, from tensors under timm's names."""

from functools import partial as bound
from typing import Any

import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from triptych.encoders.official import Found
from triptych.encoders.positions import resampled
from triptych.encoders.report import Report
from triptych.encoders.state import own_randomness
from triptych.encoders.vit import ViT, mlp_ratio
from triptych.errors import UserError
from triptych.tokens import TokenSpec

# Not width / 64: ViT-H, ViT-g, ViT-G.
_HEADS = {1280: 16, 1408: 16, 1664: 16}


def encoder_of(
    found: Found, file: str, *, arch: str | None = None, heads: int | None = None, partial: bool = False
) -> tuple[ViT, Report]:
    """An encoder whose sizes are read off the tensors of a file.

    Heads: given, or arch's, or the origin's, or by width.  UDI's second class token becomes class+, the first of the
    registers.  Raises UserError; `Report.check`.
    """
    state, sources = dict(found.state), dict(found.sources)
    lacking = {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"} - set(
        state
    )
    if lacking or state["patch_embed.proj.weight"].ndim != 4:
        raise UserError(
            f"{file}: not the state dict of a plain ViT: it lacks {', '.join(sorted(lacking)) or 'a kernel'}"
        )
    plus = int("cls_token" in state and state["cls_token"].shape[1] == 2)
    if plus:
        state["cls_token"], class_plus = state["cls_token"].split(1, 1)
        state["reg_token"] = torch.cat([class_plus, *([state["reg_token"]] if "reg_token" in state else [])], 1)
        sources["reg_token"] = (*sources["cls_token"], *sources.get("reg_token", ()))
    cls, extra = int("cls_token" in state), state["reg_token"].shape[1] if "reg_token" in state else 0
    slots, table = split_positions(state["pos_embed"], cls, extra)
    if slots.shape[1] not in (0, cls + extra):  # registers without positions: a slot of zeros is the same
        slots = torch.cat([slots, slots.new_zeros(1, extra, slots.shape[-1])], 1)
    state["pos_embed"] = torch.cat([slots, table], 1)

    (width, _, _, patch), hidden = state["patch_embed.proj.weight"].shape, state["blocks.0.mlp.fc1.weight"].shape[0]
    gated = hidden == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    options: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if gated else {}
    eps = found.origin.norm_eps
    if arch:
        with torch.device("meta"):
            named: Any = timm.create_model(arch, num_classes=0)
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        meant = {"width": named.embed_dim, "depth": len(named.blocks), "patch": named.patch_embed.patch_size[0]}
        for what, here in (("width", width), ("depth", depth), ("patch", patch)):
            if meant[what] != here:
                raise UserError(f"--arch {arch}: it has {what} {meant[what]}, {file} has {here}")
        heads = heads or int(named.blocks[0].attn.num_heads)
        eps = named.blocks[0].norm1.eps if found.origin.key == "timm" else eps
    try:
        with own_randomness():
            vit = VisionTransformer(
                img_size=round(table.shape[1] ** 0.5) * patch,
                patch_size=patch,
                embed_dim=width,
                depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
                num_heads=heads or found.origin.heads or _HEADS.get(width) or max(1, width // 64),
                mlp_ratio=mlp_ratio(hidden, width),
                qkv_bias="blocks.0.attn.qkv.bias" in state,
                init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
                class_token=bool(cls),
                no_embed_class=not slots.shape[1],
                reg_tokens=extra,
                pre_norm="norm_pre.weight" in state,
                num_classes=0,
                global_pool="token" if cls else "",
                norm_layer=bound(nn.LayerNorm, eps=eps),
                **options,
            )
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"{file}: timm cannot build a ViT of width {width}: {error}; give its heads or --arch"
        ) from error
    if table.dtype == torch.float64:
        vit.double()
    ours = vit.state_dict()
    report = Found(**{**vars(found), "state": state, "sources": sources}).report(ours, state)
    report.check(file, "a plain ViT", partial)
    vit.load_state_dict(ours | {k: v for k, v in state.items() if k in ours and v.shape == ours[k].shape})
    spec = TokenSpec(cls=cls, cls_plus=plus, register=extra - plus)
    return ViT(vit, spec, found.origin.positions).eval(), report


def split_positions(table: Tensor, cls: int, extra: int) -> tuple[Tensor, Tensor]:
    """-> slots of prefix tokens (1, 0 or cls or cls + extra, D), square table of the patches (1, N, D)

    Rows that make a square with several numbers of slots are of as many prefix tokens as can be.
    """
    for slots in (cls + extra, cls, 0):  # all prefix tokens have slots (timm), only the class token (DINOv2), or none
        if round((table.shape[1] - slots) ** 0.5) ** 2 == table.shape[1] - slots:
            return table[:, :slots], table[:, slots:]
    raise UserError(f"a position table of {table.shape[1]} rows is no square grid beside {cls} + {extra} prefix tokens")


def load_weights(encoder: ViT, source: ViT, file: str, *, same_heads: bool) -> None:
    """Start from another ViT: positions are resampled to the encoder's grid by its own rule, tokens it adds stay fresh.

    same_heads: the source's heads are known, not guessed.  Raises UserError where anything else does not fit.
    """
    for what in ("heads", "depth", "width") if same_heads else ("depth", "width"):
        found, here = getattr(source, what), getattr(encoder, what)
        if found != here:
            raise UserError(f"{file} does not fit the encoder: it has {what} {found}, the encoder {here}")
    found, here = (e.spec.register + e.spec.cls_plus for e in (source, encoder))
    if found not in (0, here):
        raise UserError(f"{file} has {found} registers (class+ counts as one), the encoder {here}: --encoder.registers")
    vit, state = encoder.vit, source.vit.state_dict()
    ours, grid, native = vit.state_dict(), vit.patch_embed.grid_size, source.vit.patch_embed.grid_size
    slots, table = state["pos_embed"].split(
        [state["pos_embed"].shape[1] - native[0] * native[1], native[0] * native[1]], 1
    )
    if grid != native:
        table = resampled(table, native, grid, encoder.positions)
    own = ours["pos_embed"].shape[1] - table.shape[1]
    kept = min(own, slots.shape[1])
    state["pos_embed"] = torch.cat([slots[:, :kept], ours["pos_embed"][:, kept:own], table], 1)
    fresh = {"cls_token", "reg_token"} - set(state)
    state |= {name: ours[name] for name in fresh if name in ours}
    wrong = [
        f"{n}: {tuple(state[n].shape) if n in state else 'absent'} in the file, "
        f"{tuple(ours[n].shape) if n in ours else 'absent'} here"
        for n in {**state, **ours}
        if n not in state or n not in ours or state[n].shape != ours[n].shape
    ]
    if wrong:
        raise UserError(f"{file} does not fit the encoder:\n  " + "\n  ".join(wrong[:8]))
    vit.load_state_dict(state)
