"""Encoders from files and names: Triptych runs and exports, timm models, state dicts of other code bases."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from triptych.encoders import huggingface, load_swin, load_vit
from triptych.encoders.base import Encoder
from triptych.encoders.official import Part, find_encoder, is_swin, origin_named, swin_names
from triptych.encoders.report import Report
from triptych.encoders.state import read_tensors
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
    report: Report | None = None  # of a file of weights: which of its tensors were taken


def of_run(path: str | Path) -> bool:
    """Is it a run's folder or one of its checkpoints?"""
    path = Path(path)
    folder = path.parent.parent if path.suffix == ".pt" else path
    return (folder / "recipe.yaml").exists()


def load_encoder(
    model: str,
    *,
    weights: Weights = "teacher",
    arch: str | None = None,
    heads: int | None = None,
    origin: str | None = None,
    partial: bool = False,
) -> Loaded:
    """model: a run's folder, a checkpoint of one, an exported folder, a folder of transformers, a file of weights (.pt
    .pth .bin .safetensors; whose: `official.VITS`) or a timm name (its published weights).

    weights: of what holds two encoders; "untrained" is for runs and timm names.  Of a file: arch (a timm name) or heads
    say what it leaves open; origin (a key of `official.VITS`) whose it is, where its names do not tell; partial takes
    what fits, and leaves the rest random, where otherwise every tensor must match.  Raises UserError.
    """
    path = Path(model)
    if arch is not None and (of_run(path) or not path.is_file()):
        raise UserError("--arch says what a bare file of weights leaves open; this model needs none")
    known = timm.list_models(module="vision_transformer") + timm.list_models(module="swin_transformer")
    if arch is not None and arch not in known:
        raise UserError(f"--arch {arch}: timm has no such vision transformer or Swin{nearest(arch, known)}")
    if of_run(path):
        return _of_run(path, weights)
    if weights == "untrained" and path.exists():
        raise UserError(f"{model} holds trained weights only: --weights untrained needs a run or a timm name")
    if path.is_file() or huggingface.config_of(path):
        loaded = _of_file(path, "student" if weights == "student" else "teacher", arch, heads, origin, partial)
        loaded.encoder.float()
        return loaded
    if weights == "student":
        raise UserError(f"{model} holds no student: runs and some checkpoints of papers do")
    if (path / "config.json").exists():
        return _of_export(path)
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
    if not of_run(path):
        raise UserError(f"{model} is not a Triptych run: give the folder that `triptych train` wrote, or a checkpoint")
    try:
        recipe = Recipe.model_validate(yaml.safe_load((folder / "recipe.yaml").read_text()))
    except (yaml.YAMLError, ValueError) as error:  # pydantic's and Unicode's errors are ValueErrors
        said = " ".join(str(error).split())
        raise UserError(f"{folder / 'recipe.yaml'} is no recipe of this version of Triptych: {said}") from error
    fresh = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"weights": None})})
    method = build_method(fresh)
    if weights == "untrained":  # also of a run that started from another's weights
        return recipe, method, f"{path}"
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
    try:
        return _read_export(folder)
    except UserError:
        raise
    except Exception as error:  # of any kind: JSON, safetensors, timm and torch each raise their own
        raise UserError(f"{folder} is a damaged export ({type(error).__name__}: {error}): export it again") from error


def _read_export(folder: Path) -> Loaded:
    about = json.loads((folder / "config.json").read_text())
    ours = about.get("triptych")
    if ours is None and "architecture" in about:
        return _of_timm(f"local-dir:{folder}", pretrained=True)
    if ours is None:
        raise UserError(
            f"{folder}/config.json is neither Triptych's, timm's nor transformers': give the file of weights"
        )
    trunk: Any = timm.create_model(about["architecture"], pretrained=False, num_classes=0, **about["model_args"])
    state, spec = load_file(folder / "model.safetensors"), TokenSpec(**ours["tokens"])
    if is_swin(state):
        names = swin_names(state)
        trunk.load_state_dict({names[name]: value for name, value in state.items()}, strict=True)
        set_norm_eps(trunk, ours["norm_eps"])
        encoder = Swin(trunk, spec)
    else:
        trunk.load_state_dict(state, strict=True)
        encoder = ViT(trunk, spec, ours["positions"])
        set_norm_eps(trunk, ours.get("norm_eps", encoder.norm_eps))  # older exports do not tell
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


def _of_file(
    path: Path,
    part: Part = "teacher",
    arch: str | None = None,
    heads: int | None = None,
    origin: str | None = None,
    partial: bool = False,
) -> Loaded:
    """A file, or a folder of transformers, where config.json says the heads.  float64 stays float64."""
    folder = path if path.is_dir() else path.parent
    about = huggingface.config_of(folder) if path.is_dir() or path.name in huggingface.FILES else None
    said = huggingface.origin_of(folder, about) if about else origin_named(origin) if origin else None
    found = find_encoder(read_tensors(huggingface.weights_of(path) if path.is_dir() else path), str(path), part, said)
    swin_arch = arch in timm.list_models(module="swin_transformer")
    if found.swin:
        if heads is not None or (arch is not None and not swin_arch):
            raise UserError("these are a Swin's weights: its bias tables say the heads; --arch may name a Swin only")
        encoder, report = load_swin.encoder_of(found, str(path), arch=arch, partial=partial)
    elif swin_arch:
        raise UserError(f"--arch {arch}: these are a ViT's weights, not a Swin's")
    else:
        encoder, report = load_vit.encoder_of(found, str(path), arch=arch, heads=heads, partial=partial)
    name = f"{path} ({found.role})" if found.role else str(path)
    return Loaded(encoder, name, encoder.native_size[0], found.origin.mean, found.origin.std, report)


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
    bare = path.is_file() and not of_run(path)
    loaded = _of_file(path) if bare else load_encoder(file)
    source = loaded.encoder
    if isinstance(source, Swin) and isinstance(encoder, Swin):
        load_swin.load_weights(encoder, source.swin.state_dict(), file)
    elif isinstance(source, ViT) and isinstance(encoder, ViT):
        load_vit.load_weights(encoder, source, file, same_heads=loaded.report is None)
    else:
        kinds = ("a ViT", "a Swin") if isinstance(encoder, Swin) else ("a Swin", "a ViT")
        raise UserError(f"{file} does not fit the encoder: it holds {kinds[0]}, the encoder is {kinds[1]}")
