"""What a method costs beside its encoder: multiply-accumulates and parameters of every part (MTE paper, Table 12).

Every number is measured on the modules themselves.  They run on torch's "meta" device, where only shapes flow: no
memory, no arithmetic, a second for any model.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from triptych.data.crops import stratified_sample
from triptych.encoders.base import Encoder
from triptych.ensemble import Ensemble
from triptych.methods import METHODS, Method, SupervisedConfig
from triptych.methods.base import Siamese, Tower
from triptych.methods.mte import MTE
from triptych.methods.supervised import Supervised
from triptych.recipe import Recipe, build_method
from triptych.tokens import Tokens

Group = Literal["base", "tokens", "ensemble"]
T = TypeVar("T")
COLUMNS = ("", "G MACs", "M parameters, training only", "M parameters, kept")


@dataclass(frozen=True)
class Part:
    name: str
    macs: int  # multiply-accumulates of one image in the student's forward pass
    parameters: int = 0  # of one copy
    group: Group = "base"  # the base method; what makes auxiliary tokens; what only uses them (TEN, heads, predictor)
    kept: bool = False  # after training, in exports


@dataclass(frozen=True)
class Cost:
    """Of one global crop of size x size pixels in the student.  The teacher, losses and gradients are not counted."""

    recipe: str
    size: int
    parts: tuple[Part, ...]
    trained: int  # parameters that the optimiser moves
    copies: int  # parameters of the teacher, its ensemble, or the average of weights
    notes: tuple[str, ...] = ()

    def macs(self, *groups: Group) -> int:
        """Of the parts of these groups; of all parts without one."""
        return sum(p.macs for p in self.parts if not groups or p.group in groups)

    @property
    def inference_macs(self) -> int:
        return sum(p.macs for p in self.parts if p.kept)

    @property
    def inference_parameters(self) -> int:
        return sum(p.parameters for p in self.parts if p.kept)

    @property
    def training_only_parameters(self) -> int:
        return sum(p.parameters for p in self.parts if not p.kept)

    def rows(self) -> list[tuple[str, ...]]:
        """Text under COLUMNS: the parts, then the sums."""
        kept, dropped = ("", f"{self.inference_parameters / 1e6:.3f}"), f"{self.training_only_parameters / 1e6:.3f}"
        rows = []
        for part in self.parts:
            macs, parameters = (f"{n:.3f}" if n else "" for n in (part.macs / 1e9, part.parameters / 1e6))
            rows.append((part.name, macs, *(("", parameters) if part.kept else (parameters, ""))))
        if self.macs("tokens", "ensemble"):
            rows.append(("training without the ensemble", f"{self.macs('base') / 1e9:.3f}", "", ""))
            rows.append(("training, tokens only", f"{self.macs('base', 'tokens') / 1e9:.3f}", "", ""))
        rows.append(("training, everything", f"{self.macs() / 1e9:.3f}", dropped, kept[1]))
        rows.append(("inference", f"{self.inference_macs / 1e9:.3f}", *kept))
        return rows


def cost(recipe: Recipe, size: int | None = None) -> Cost:
    """size: pixels of the crop, default the recipe's global crops.  Raises UserError for a size that does not fit."""
    pixels, notes = size or recipe.views.global_size, []
    method = _on_meta(recipe, notes)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    method.requires_grad_(False)  # torch's counter trips over views of trained parameters
    module: nn.Module = method.base if isinstance(method, MTE) else method
    siamese = isinstance(module, Siamese)
    tower: nn.Module = method.model if isinstance(method, Supervised) else module.student if siamese else module
    encoder = cast(Encoder, tower.encoder)
    encoder.grid(pixels, pixels)
    parts, x = _encoder_parts(encoder, torch.empty(1, 3, pixels, pixels, device="meta"), notes)
    if isinstance(method, Supervised):
        macs, _ = measure(lambda: method.model.logits(x))
        own = count(method.model.projection) + count(method.model.head)
        parts.append(Part("classifier of the global token", macs, own))
        notes.append("Exports keep the encoder; `triptych eval classify` also uses the classifier of the global token.")
        ensemble = method.ensemble
    elif not siamese:
        ensemble = None
    else:
        window = METHODS[type(module.config)].view_spec(module.config).window_global  # type: ignore[index]
        own = getattr(module, "prototypes", None)  # MSN's, which both towers use
        more, x = _tower_parts(cast(Tower, tower), module.predictor, own, x, window, notes)
        parts += more
        ensemble = method.student_ensemble if isinstance(method, MTE) else None
    parts += _pixel_parts(module, encoder, x, notes)
    if ensemble is not None:
        more, z_a = _ensemble_parts(ensemble, x)
        parts += more
        if isinstance(method, MTE):
            parts += _fused_parts(method, z_a)
        notes.append(
            '"Tokens only" leaves out TEN and what follows the auxiliary tokens (heads, prototypes, predictor): the '
            "paper's way of counting is not known."
        )
    own, copied = ("teacher", "teacher_ensemble", "average"), 0
    for name, p in method.named_parameters():
        copied += p.numel() if any(word in own for word in name.split(".")) else 0
    return Cost(recipe.name, pixels, tuple(parts), trained, copied, tuple(notes))


def measure(run: Callable[[], T]) -> tuple[int, T]:
    """-> multiply-accumulates of matrix products, convolutions and attention; what `run` returns"""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = run()
    return counter.get_total_flops() // 2, out


def count(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def _on_meta(recipe: Recipe, notes: list[str]) -> Method:
    """The method in eval mode (BatchNorm of one image, no stochastic depth), without its weights."""
    config = recipe.method
    if isinstance(config, SupervisedConfig) and config.classes is None:
        config = config.model_copy(update={"classes": 1000})
        notes.append("Counted for 1000 classes; --method.classes sets another number.")
    encoder = recipe.encoder.model_copy(update={"weights": None})
    with torch.device("meta"):
        return build_method(recipe.model_copy(update={"method": config, "encoder": encoder})).eval()


def _encoder_parts(encoder: Encoder, images: Tensor, notes: list[str]) -> tuple[list[Part], Tokens]:
    """-> what removal keeps and what it saves, all tokens"""
    kept = encoder.without("aux").without("mask")
    base, _ = measure(lambda: kept(images))
    whole, x = measure(lambda: encoder(images))
    parts = [Part("encoder", base, count(kept), kept=True)]
    if encoder.mask_token is not None:
        parts.append(Part("mask token", 0, encoder.mask_token.numel()))
    if encoder.aux_tokens is not None:
        name = f"{encoder.spec.aux} auxiliary class tokens"
        parts.append(Part(name, whole - base, encoder.aux_tokens.numel(), "tokens"))
        if encoder.spec.aux_sees != "uncut":
            dense = copy.copy(encoder)
            dense.spec = replace(encoder.spec, aux_sees="uncut")
            macs, _ = measure(lambda: dense(images))
            notes.append(
                f"The {name} are a stream of their own here: {(whole - base) / 1e9:.3f} G; as rows and columns of one "
                f"attention over all tokens, masked or not, they take {(macs - base) / 1e9:.3f} G."
            )
    return parts, x


def _tower_parts(
    tower: Tower, predictor: nn.Module, prototypes: nn.Module | None, x: Tokens, window: int, notes: list[str]
) -> tuple[list[Part], Tokens]:
    """-> what follows the encoder in the base method, the tokens with those that the base adds"""
    modules = dict(tower.named_children())
    macs, z = measure(lambda: tower.projector(x.global_token))
    parts, compared = [Part("global head", macs, count(tower.projector))], [z]
    if x.cls_plus is not None:
        macs, z_plus = measure(lambda: tower.projector(x.cls_plus))
        parts.append(Part("global head on class+", macs))
        compared.append(z_plus)
    more, z_patch = _patch_parts(tower, x, window, notes)
    parts += more
    if "head" in modules:
        macs, token = measure(lambda: modules["head"](x))
        parts.append(Part("convolutional head", macs, count(modules["head"])))
        macs, z_head = measure(lambda: modules["head_projector"](token))
        parts.append(Part("convolutional head's projector", macs, count(modules["head_projector"])))
        compared.append(z_head)
        x = replace(x, aux=token[:, None] if x.aux is None else torch.cat([x.aux, token[:, None]], 1))
    own_set = modules.get("patch_prototypes")
    prototypes = modules.get("prototypes", prototypes)
    if z_patch is not None and own_set is None:
        compared.append(z_patch)
    if prototypes is not None:
        macs, _ = measure(lambda: [F.linear(u, cast(Tensor, prototypes.weight)) for u in compared])
        parts.append(Part("prototypes", macs, count(prototypes)))
    if z_patch is not None and own_set is not None:
        macs, _ = measure(lambda: F.linear(z_patch, cast(Tensor, own_set.weight)))
        parts.append(Part("prototypes of patches", macs, count(own_set)))
    if not isinstance(predictor, nn.Identity):
        macs, _ = measure(lambda: predictor(z))
        parts.append(Part("predictor", macs, count(predictor)))
    return parts, x


def _patch_parts(tower: Tower, x: Tokens, window: int, notes: list[str]) -> tuple[list[Part], Tensor | None]:
    """-> parts and embeddings (1, M, P) of the patches that the method projects; None where it projects none"""
    parts, patches = [], x.patch
    if hasattr(tower, "srs"):
        places = len(stratified_sample(cast(tuple[int, int], x.grid), window, np.random.default_rng(0)))
        at = x.patch.new_empty(1, places, x.patch.shape[1])
        macs, patches = measure(lambda: tower.srs(x.patch_raw, at))
        parts.append(Part(f"SRS, {places} sampled patches", macs, count(tower.srs)))
        notes.append(f"UDI's student projects the {places} patches that are sampled of a global crop.")
    elif hasattr(tower, "patch_projector"):  # MMC
        macs, _ = measure(lambda: tower.patch_projector(patches.flatten(0, 1)))
        return [Part(f"patch head on {patches.shape[1]} patches", macs, count(tower.patch_projector))], None
    elif tower.encoder.spec.mask:  # methods that hide patches project them
        notes.append(
            f"All {patches.shape[1]} patches are counted through head and prototypes, as the paper counts; here the "
            "student projects the masked ones only."
        )
    elif not hasattr(tower, "patch_prototypes"):  # MC-SSL projects all patches, others none
        return [], None
    macs, z_patch = measure(lambda: tower.projector(patches))
    return [*parts, Part(f"global head on {patches.shape[1]} patches", macs)], z_patch


def _pixel_parts(module: nn.Module, encoder: Encoder, x: Tokens, notes: list[str]) -> list[Part]:
    """What reconstructs pixels, and what is saved where patches are dropped."""
    parts = []
    if hasattr(module, "pixels"):
        head = cast(nn.Module, module.pixels)
        macs, _ = measure(lambda: head(x.patch, x.grid))
        parts.append(Part("pixel head", macs, count(head)))
    drop = METHODS[type(module.config)].view_spec(module.config).drop  # type: ignore[index]
    if drop is not None:
        rows, columns = cast(tuple[int, int], x.grid)
        keep = torch.arange(int(rows * columns * (1 - drop)), device="meta")[None]
        images = torch.empty(1, 3, *(n * encoder.patch_size for n in (rows, columns)), device="meta")
        whole, _ = measure(lambda: encoder(images))
        macs, kept = measure(lambda: encoder(images, keep=keep))
        parts.append(Part(f"{rows * columns - keep.shape[1]} dropped patches", macs - whole))
        notes.append(f"The student sees {keep.shape[1]} of {rows * columns} patches; the encoder's row is of all.")
        if hasattr(module, "decoder"):
            decoder = cast(nn.Module, module.decoder)
            macs, _ = measure(lambda: decoder(kept.global_token, kept.patch, keep, (rows, columns)))
            parts.append(Part("decoder", macs, count(decoder)))
    return parts


def _ensemble_parts(ensemble: Ensemble, x: Tokens) -> tuple[list[Part], Tensor]:
    """-> its parts, the fused vector z_a (1, P)"""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        z_a = ensemble([x])[0]
    counts = counter.get_flop_counts()

    def macs(child: str) -> int:
        return sum(counts[f"Ensemble.{child}"].values()) // 2

    parts = []
    if ensemble.ten is not None:
        parts.append(Part("TEN", macs("ten"), count(ensemble.ten), "ensemble"))
    if ensemble.pool is not None:
        parts.append(Part(f"{ensemble.config.pooled} pooled tokens", macs("pool"), count(ensemble.pool), "tokens"))
    heads = sum(macs(f"heads.{i}") for i in range(len(ensemble.heads)))
    parts.append(Part(f"{ensemble.count} auxiliary heads", heads, count(ensemble.heads), "ensemble"))
    return parts, z_a


def _fused_parts(method: MTE, z_a: Tensor) -> list[Part]:
    """What the base method does with the fused vector."""
    parts, tower = [], method.student
    if hasattr(tower, "prototypes"):
        macs, _ = measure(lambda: F.linear(z_a, tower.prototypes.weight))
        parts.append(Part("prototypes of the fused vector", macs, 0, "ensemble"))
    predictor = method.aux_predictor or cast(Siamese, method.base).predictor
    if not isinstance(predictor, nn.Identity):
        macs, _ = measure(lambda: predictor(z_a))
        parts.append(Part("predictor of the fused vector", macs, count(method.aux_predictor), "ensemble"))
    return parts
