"""Encoders from files and names: Triptych runs and exports, timm models, state dicts of other code bases."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from triptych.encoders import load_swin
from triptych.encoders.base import Encoder
from triptych.encoders.state import State, read_state, split_positions, take_registers
from triptych.encoders.swin import Swin, set_norm_eps
from triptych.encoders.vit import ViT
from triptych.errors import UserError, nearest
from triptych.tokens import TokenSpec

if TYPE_CHECKING:
    from triptych.methods import Method
    from triptych.recipe import Recipe

Weights = Literal["teacher", "student", "untrained"]


@dataclass(frozen=True)
class Loaded:
    """An encoder with what an evaluation needs to know of it."""

    encoder: Encoder
    name: str  # as the user gave it, with which weights
    size: int  # pixels of the images it was trained on
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


def load_encoder(
    model: str, *, weights: Weights = "teacher", arch: str | None = None, heads: int | None = None
) -> Loaded:
    """model: a run's folder, a checkpoint of one, an exported folder, a state dict (.pt .pth .safetensors) or a timm
    name (its published weights; weights="untrained" leaves them out).

    arch (a timm name) or heads say what a bare state dict leaves open.  Raises UserError.
    """
    path = Path(model)
    is_checkpoint = path.suffix == ".pt" and (path.parent.parent / "recipe.yaml").exists()
    if arch is not None and (is_checkpoint or not path.is_file()):
        raise UserError("--arch says what a bare file of weights leaves open; this model needs none")
    known = timm.list_models(module="vision_transformer") + timm.list_models(module="swin_transformer")
    if arch is not None and arch not in known:
        raise UserError(f"--arch {arch}: timm has no such vision transformer or Swin{nearest(arch, known)}")
    if is_checkpoint or (path / "recipe.yaml").exists():
        return _of_run(path, weights)
    if weights == "student":
        raise UserError(f"{model} is not a Triptych run: only runs hold a student beside the teacher")
    if weights == "untrained" and path.exists():
        raise UserError(f"{model} holds trained weights only: --weights untrained needs a run or a timm name")
    if (path / "config.json").exists():
        return _of_export(path)
    if path.is_file():
        encoder = encoder_of(read_state(path), arch=arch, heads=heads)
        return Loaded(encoder, model, encoder.native_size[0])
    name = model.removeprefix("timm:")
    if not timm.is_model(name.split(".")[0]):
        raise UserError(
            f"{model!r} is neither a run, an export, a file of weights nor a timm model{nearest(name, known)}"
        )
    return _of_timm(name, pretrained=weights != "untrained")


def load_method(model: str | Path, weights: Weights = "teacher") -> "tuple[Recipe, Method, str]":
    """A run's folder or one of its checkpoints -> recipe, whole method (teacher and student), name with the step."""
    from triptych import checkpoint  # here, because the loop imports this module
    from triptych.recipe import Recipe, build_method

    path = Path(model)
    folder, file = (path.parent.parent, path) if path.suffix == ".pt" else (path, None)
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{model} is not a Triptych run: give the folder that `triptych train` wrote, or a checkpoint")
    try:
        recipe = Recipe.model_validate(yaml.safe_load((folder / "recipe.yaml").read_text()))
    except (yaml.YAMLError, ValueError) as error:  # pydantic's and Unicode's errors are ValueErrors
        said = " ".join(str(error).split())
        raise UserError(f"{folder / 'recipe.yaml'} is no recipe of this version of Triptych: {said}") from error
    if weights == "untrained":
        return recipe, build_method(recipe), f"{path}"
    method = build_method(recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"weights": None})}))
    steps = checkpoint.steps(folder / "checkpoints")
    if file is None and not steps:
        raise UserError(f"{folder} has no checkpoint yet")
    state = checkpoint.load(file or checkpoint.path_of(folder / "checkpoints", steps[-1]))
    method.load_state_dict(state["method"])
    return recipe, method, f"{path}@{state['step']}"


def _of_run(model: Path, weights: Weights) -> Loaded:
    recipe, method, name = load_method(model, weights)
    trained: Any = getattr(method, "student", None) or getattr(method, "model", method)
    encoder = (trained if weights == "student" else method).encoder.requires_grad_(False).without("aux").without("mask")
    return Loaded(encoder.eval(), f"{name} ({weights})", recipe.views.global_size, recipe.views.mean, recipe.views.std)


def _of_export(folder: Path) -> Loaded:
    about = json.loads((folder / "config.json").read_text())
    ours = about.get("triptych")
    if ours is None:
        raise UserError(f"{folder}/config.json was not written by `triptych export`; give its weights file instead")
    trunk: Any = timm.create_model(about["architecture"], pretrained=False, num_classes=0, **about["model_args"])
    state, spec = load_file(folder / "model.safetensors"), TokenSpec(**ours["tokens"])
    if load_swin.is_swin(state):
        trunk.load_state_dict(load_swin.timm_names(state), strict=True)
        set_norm_eps(trunk, ours["norm_eps"])
        encoder = Swin(trunk, spec)
    else:
        trunk.load_state_dict(state, strict=True)
        encoder = ViT(trunk, spec, ours["positions"])
    cfg = about["pretrained_cfg"]
    return Loaded(encoder.eval(), str(folder), cfg["input_size"][-1], tuple(cfg["mean"]), tuple(cfg["std"]))


def _of_timm(name: str, pretrained: bool) -> Loaded:
    torch.manual_seed(0)  # untrained weights are the same every time
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # the hub's client has many kinds of network errors
        raise UserError(
            f"timm could not provide {name}: {error}\nGive a file of weights where there is no network"
        ) from error
    encoder = Swin(model, TokenSpec(cls=0)) if isinstance(model, SwinTransformer) else _plain_vit(name, model)
    shown, cfg = name if pretrained else f"{name} (untrained)", cast(Any, model.pretrained_cfg)
    return Loaded(encoder.eval(), shown, encoder.native_size[0], tuple(cfg["mean"]), tuple(cfg["std"]))


def _plain_vit(name: str, model: nn.Module) -> ViT:
    if not hasattr(model, "num_reg_tokens"):
        raise UserError(
            f"{name} is neither a plain ViT (timm's VisionTransformer and Block) nor a Swin (first version)"
        )
    vit = cast(VisionTransformer, model)  # where it is another model, ViT refuses it
    if isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.LayerNorm):
        vit.norm, vit.fc_norm = vit.fc_norm, nn.Identity()  # mean-pooling models keep their final norm there
    return ViT(vit, TokenSpec(cls=int(vit.has_class_token), register=vit.num_reg_tokens))


def encoder_of(state: State, *, arch: str | None = None, heads: int | None = None) -> Encoder:
    """An encoder whose sizes are read off a timm-named state dict.  A ViT's heads cannot be: width/64 unless given."""
    swin_arch = arch in timm.list_models(module="swin_transformer")
    if load_swin.is_swin(state):
        if heads is not None or (arch is not None and not swin_arch):
            raise UserError("these are a Swin's weights: its bias tables say the heads; --arch may name a Swin only")
        return load_swin.encoder_of(state, arch=arch)
    if swin_arch:
        raise UserError(f"--arch {arch}: these are a ViT's weights, not a Swin's")
    plus = int("cls_plus_token" in state)
    registers = take_registers(state)
    kernel, cls = state["patch_embed.proj.weight"], int("cls_token" in state)
    extra = 0 if registers is None else registers.shape[1]
    slots, table = split_positions(state, cls + extra)
    if slots.shape[1] not in (0, cls + extra):  # registers without positions: a slot of zeros is the same
        slots = torch.cat([slots, slots.new_zeros(1, extra, slots.shape[-1])], 1)
    if registers is not None:
        state = {**state, "reg_token": registers}
    width, patch = kernel.shape[0], kernel.shape[-1]
    if heads is None and arch:
        named: Any = timm.create_model(arch, num_classes=0)
        heads = int(named.blocks[0].attn.num_heads)
    elif heads is None:
        heads = max(1, width // 64)
    vit = VisionTransformer(
        img_size=round(table.shape[1] ** 0.5) * patch,
        patch_size=patch,
        embed_dim=width,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        num_heads=heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
        class_token=bool(cls),
        no_embed_class=not slots.shape[1],
        reg_tokens=extra,
        pre_norm="norm_pre.weight" in state,
        num_classes=0,
        global_pool="token" if cls else "",
    )
    try:
        vit.load_state_dict({**state, "pos_embed": torch.cat([slots, table], 1)}, strict=True)
    except RuntimeError as error:
        raise UserError(f"not the state dict of a plain ViT: {error}") from error
    return ViT(vit, TokenSpec(cls=cls, cls_plus=plus, register=extra - plus)).eval()


def load_weights(encoder: Encoder, file: str) -> None:
    """Start an encoder from a file of weights, a run's folder (its teacher), a checkpoint of one or an export.

    Positions are resampled to its grid or windows, tokens it adds stay fresh.  Raises UserError where anything else
    does not fit.
    """
    path = Path(file)
    if not path.exists():
        raise UserError(
            f"--encoder.weights {file}: no such file; give a run's folder, an export, or a .pt, .pth or .safetensors "
            "state dict"
        )
    ours = path.is_dir() or (path.parent.parent / "recipe.yaml").exists()
    state = read_state(path) if not ours else _state_of_ours(load_encoder(file).encoder, encoder, file)
    if load_swin.is_swin(state) != isinstance(encoder, Swin):
        kinds = ("a ViT", "a Swin") if isinstance(encoder, Swin) else ("a Swin", "a ViT")
        raise UserError(f"{file} does not fit the encoder: it holds {kinds[0]}, the encoder is {kinds[1]}")
    if isinstance(encoder, Swin):
        load_swin.load_weights(encoder, state, file)
    elif isinstance(encoder, ViT):
        _load_vit(encoder, state, file)


def _state_of_ours(loaded: Encoder, encoder: Encoder, file: str) -> State:
    """Of an encoder whose heads and tokens are known, unlike those of a bare file."""
    for what in ("heads", "depth", "width"):
        found, here = getattr(loaded, what), getattr(encoder, what)
        if found != here:
            raise UserError(f"{file} does not fit the encoder: it has {what} {found}, the encoder {here}")
    found, here = (e.spec.register + e.spec.cls_plus for e in (loaded, encoder))
    if found not in (0, here):
        raise UserError(f"{file} has {found} registers (class+ counts as one), the encoder {here}: --encoder.registers")
    return cast(State, loaded.trunk.state_dict())


def _load_vit(encoder: ViT, state: State, file: str) -> None:
    vit, registers = encoder.vit, take_registers(state)
    extra = 0 if registers is None else registers.shape[1]
    slots, table = split_positions(state, int("cls_token" in state) + extra)
    ours = vit.state_dict()
    if registers is not None and "reg_token" in ours and registers.shape == ours["reg_token"].shape:
        state["reg_token"] = registers
    if table.shape[-1] != encoder.width:
        raise UserError(
            f"{file} does not fit the encoder: its width is {table.shape[-1]}, the encoder's {encoder.width}"
        )
    grid, side = vit.patch_embed.grid_size, round(table.shape[1] ** 0.5)
    table = resample_abs_pos_embed(table, list(grid), [side, side], num_prefix_tokens=0)
    own = ours["pos_embed"].shape[1] - table.shape[1]
    kept = min(own, slots.shape[1])
    state["pos_embed"] = torch.cat([slots[:, :kept], ours["pos_embed"][:, kept:own], table], 1)
    fresh = [name for name in ours if name not in state]
    wrong = [name for name in state if name not in ours or state[name].shape != ours[name].shape]
    if wrong or set(fresh) - {"cls_token", "reg_token"}:
        lines = [
            f"{n}: {tuple(state[n].shape)} in the file, {tuple(ours[n].shape) if n in ours else 'absent'} here"
            for n in wrong
        ]
        lines += [f"{n}: not in the file" for n in fresh if n not in ("cls_token", "reg_token")]
        raise UserError(f"{file} does not fit the encoder:\n  " + "\n  ".join(lines[:8]))
    vit.load_state_dict({**ours, **state})
