"""The training steps of DINO, iBOT and UDI as their authors' scripts run them: their modules, their order, our weights.

The modules come from a checkout (checkouts.py).  What a script does between two of their calls is written here once,
since the three share it.  Left out on both sides: DistributedDataParallel (one process), loading, logging to files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from checkouts import Checkout
from triptych.data.views import View, Views, ends_box
from triptych.encoders import Encoder
from triptych.methods.base import Tower
from triptych.methods.dino import DINO
from triptych.methods.ibot import iBOT
from triptych.methods.udi import UDI
from triptych.recipe import Recipe
from triptych.schedules import Progress


@dataclass
class Networks:
    """What a script builds before its loop, and the functions that its loop calls."""

    student: nn.Module
    teacher: nn.Module
    criterion: nn.Module
    loss: Callable[[], Tensor]  # both networks' forward passes and the criterion
    average: Callable[[float], object]  # given the momentum: move the teacher
    groups: list[dict]  # of parameters: decayed, not decayed
    clip: Callable[[float], object]
    freeze: Callable[[int], object]  # given the epoch: drop the prototypes' gradient in the first one
    statistics: Callable[[], object] = lambda: None  # what the script computes between loss and backward


class Step:
    """One iteration of a script's loop; calling it returns the loss."""

    def __init__(self, n: Networks, recipe: Recipe, t: Progress, momentum: float, device: str, dtype: torch.dtype):
        """Rates, clipping and the teacher's momentum are those of our side at `t`."""
        self.networks, self.epoch, self.momentum, self.clip = n, t.epoch, momentum, recipe.optim.clip
        lr, weight_decay = recipe.optim.rates(recipe.batch)
        self.lr, self.weight_decay, self.device, self.dtype = lr(t), weight_decay(t), device, dtype
        self.optimizer = torch.optim.AdamW(n.groups)
        self.scaler = torch.amp.GradScaler(device) if dtype == torch.float16 else None

    def __call__(self) -> float:
        n = self.networks
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.lr
            if i == 0:
                group["weight_decay"] = self.weight_decay
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            loss = n.loss()
        assert math.isfinite(loss.item())
        n.statistics()
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self._clip_and_freeze()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            self._clip_and_freeze()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        n.average(self.momentum)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def _clip_and_freeze(self) -> None:
        if self.clip:
            self.networks.clip(self.clip)
        self.networks.freeze(self.epoch)


def dino(code: Checkout, ours: DINO, views: Views, t: Progress, drop_path: float) -> Networks:
    """main_dino.py"""
    c, utils, vits = ours.config, code["utils"], code["vision_transformer"]

    def network(tower: Tower, drop_path: float = 0.0, **head) -> nn.Module:
        vit = vit_like(vits, tower.encoder, drop_path_rate=drop_path)
        made = utils.MultiCropWrapper(vit, vits.DINOHead(*_sizes(ours), **_head_sizes(ours), **head))
        made.load_state_dict(_prefixed("backbone.", trunk_state(tower.encoder)) | _prefixed("head.", head_state(tower)))
        return made

    student, teacher = network(ours.student, drop_path, norm_last_layer=c.norm_last_layer), network(ours.teacher)
    temps = c.teacher_temp_start, c.teacher_temp, c.teacher_temp_warmup
    crops = [v.images for v in views.all]
    criterion = code["main_dino"].DINOLoss(c.prototypes, len(crops), *temps, _epochs(t))

    def loss() -> Tensor:
        teacher_output = teacher(crops[:2])
        return criterion(student(crops), teacher_output, t.epoch)

    return _networks(code, student, teacher, criterion, loss, crops[0].device)


def ibot(code: Checkout, ours: iBOT, views: Views, t: Progress, drop_path: float) -> Networks:
    """main_ibot.py, both networks with a shared head, as its README trains them"""
    c, utils, vits = ours.config, code["utils"], code["models.vision_transformer"]

    def network(tower: Tower, masked: bool, drop_path: float = 0.0, **head) -> Any:
        more = {"return_all_tokens": True, "masked_im_modeling": masked, "drop_path_rate": drop_path}
        vit = vit_like(vits, tower.encoder, **more)
        head = code["models.head"].iBOTHead(*_sizes(ours), **_head_sizes(ours), shared_head=True, **head)
        made, own = utils.MultiCropWrapper(vit, head), head_state(tower)
        state = _prefixed("backbone.", trunk_state(tower.encoder)) | _prefixed("head.", own)
        state |= {f"head.{k.replace('last_layer', 'last_layer2')}": v for k, v in own.items() if "last_layer" in k}
        if masked:
            state["backbone.masked_embed"] = cast(Tensor, tower.encoder.mask_token)[0]
        made.load_state_dict(state)
        return made

    student = network(ours.student, True, drop_path, norm_last_layer=c.norm_last_layer)
    teacher = network(ours.teacher, False)
    temps = c.teacher_temp_start, c.teacher_temp, c.teacher_temp_start, c.teacher_patch_temp, c.teacher_temp_warmup
    criterion = code["main_ibot"].iBOTLoss(c.prototypes, c.prototypes, 2, len(views.local_crops), *temps, _epochs(t))
    whole, local = [v.images for v in views.global_crops], [v.images for v in views.local_crops]
    side = ours.encoder.grid(*whole[0].shape[-2:])
    masks = [cast(Tensor, v.mask).unflatten(1, side) for v in views.global_crops]
    labels = torch.zeros(len(views), dtype=torch.int64)
    out: dict[str, Any] = {}

    def loss() -> Tensor:
        teacher_output = teacher(whole)
        student_output = student(whole, mask=masks)
        student.backbone.masked_im_modeling = False
        student_local = student(local)[0] if local else None
        student.backbone.masked_im_modeling = True
        out.update(teacher=teacher_output[0], student=student_output[0])
        return criterion(student_output, teacher_output, student_local, masks, t.epoch)["loss"]

    def statistics() -> Tensor:
        """Pseudo-labels of both networks, which the script gathers for its mutual information."""
        first, second = out["teacher"].chunk(2)[0], out["student"].chunk(2)[1]
        a, b = (utils.concat_all_gather(x.max(dim=1)[1]) for x in (first, second))
        utils.concat_all_gather(labels.to(a.device))
        return (a == b).sum() / a.size(0)

    return _networks(code, student, teacher, criterion, loss, whole[0].device, statistics)


def udi(code: Checkout, ours: UDI, views: Views, t: Progress, drop_path: float) -> Networks:
    """main_udi.py; its maps between crops are made by its augmentation from our boxes and samples"""
    c, utils, vits = ours.config, code["utils"], code["vision_transformer"]
    width, local = ours.encoder.width, len(views.local_crops)

    def network(tower: Tower, drop_path: float = 0.0, **head) -> nn.Module:
        attention = vits.MaskedAttention(dim=width, num_heads=tower.srs.heads, qkv_bias=True)
        vit = vit_like(vits, tower.encoder, num_class_token=2, drop_path_rate=drop_path)
        backbone = utils.UDIWrapper(vit, attn=attention, embed_dim=width)
        head = vits.DINOHead(*_sizes(ours), **_head_sizes(ours), **head)
        made, own = utils.MultiCropWrapper(backbone, head, num_local_crops=local), head_state(tower)
        state = _prefixed("backbone.backbone.", trunk_state(tower.encoder)) | _prefixed("backbone.", srs_state(tower))
        for i in range(3):  # the same head thrice
            state |= _prefixed(f"head.{i}.", own)
        made.load_state_dict(state)
        return made

    student, teacher = network(ours.student, drop_path, norm_last_layer=c.norm_last_layer), network(ours.teacher)
    temps = [ours.teacher_temp(Progress(e, _epochs(t))) for e in range(_epochs(t))]
    criterion = code["main_udi"].UDILoss(local, c.prototypes, temps, alpha=c.alpha, weights=list(c.weights))
    crops = [v.images for v in views.all]
    source, target = udi_maps(code, views, ours.encoder, (c.window_global, c.window_local))

    def loss() -> Tensor:
        teacher_output = teacher(crops[:2], target, branch=1)
        return criterion(student(crops, source), teacher_output, t.epoch)[0]

    return _networks(code, student, teacher, criterion, loss, crops[0].device)


NETWORKS = {"dino": dino, "ibot": ibot, "udi": udi}
MODULES = {
    "dino": ("utils", "vision_transformer", "main_dino"),
    "ibot": ("utils", "models.vision_transformer", "models.head", "main_ibot"),
    "udi": ("utils", "vision_transformer", "udi_augmentation", "main_udi"),
}


def trunk_state(encoder: Encoder) -> dict[str, Tensor]:
    """A ViT's weights under the authors' names, which are timm's; UDI has two class tokens in one tensor."""
    state = dict(encoder.trunk.state_dict())
    if "reg_token" in state:
        state["cls_token"] = torch.cat([state["cls_token"], state.pop("reg_token")], 1)
    return state


def head_state(tower: Tower) -> dict[str, Tensor]:
    """Projector and prototypes as their DINOHead names them."""
    state = _prefixed("mlp.", dict(tower.projector.state_dict()))
    return state | {"last_layer.weight_v": tower.prototypes.direction, "last_layer.weight_g": tower.prototypes.gain}


def srs_state(tower: Tower) -> dict[str, Tensor]:
    """The sampled attention as UDIWrapper names it."""
    names = {"norm_in": "norm1", "norm_out": "attn.norm", "qkv": "attn.qkv", "out": "attn.proj"}
    parts = ((k.rpartition("."), v) for k, v in tower.srs.state_dict().items())
    return {f"{names[module]}.{leaf}": v for (module, _, leaf), v in parts}


def udi_maps(code: Checkout, views: Views, encoder, windows: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """(source, target): bilinear maps (B, M, N) as their loader collates them, between the crops of `views`."""
    device = views.all[0].images.device
    sizes = [v.images.shape[-1] for v in (views.all[0], views.all[-1])]
    augmentation = code["udi_augmentation"].DataAugmentation(
        local_crops_number=len(views.local_crops),
        global_size=sizes[0],
        local_size=sizes[1],
        sampling_window_size_g=windows[0],
        sampling_window_size_l=windows[1],
        patch_size=encoder.patch_size,
    )

    def maps(source: View, target: View) -> tuple[Tensor, Tensor]:
        sides = source.images.shape[-1] // encoder.patch_size
        samples = cast(Tensor, source.samples).cpu()
        drawn = torch.zeros(len(samples), sides * sides, dtype=torch.bool).scatter_(1, samples, True)
        # Their boxes go from 0 at the first pixel's centre to 1 at the last one's: ours, stretched along each axis,
        # and maps do not change when all boxes are stretched alike.
        boxes = (ends_box(v.box, v.pixel).cpu() for v in (source, target))
        each = [augmentation._create_map(*pair, mask) for *pair, mask in zip(*boxes, drawn, strict=True)]
        return torch.stack([s for s, _ in each]).to(device), torch.stack([t for _, t in each]).to(device)

    first, second = views.global_crops
    pairs = [maps(first, second), maps(second, first)]
    locals_ = [(maps(v, second), maps(v, first)) for v in views.local_crops]
    source = [s for s, _ in pairs] + [x[0][0] for x in locals_] + [x[1][0] for x in locals_]
    return source, [m for _, m in pairs] + [m for both in locals_ for _, m in both]


def _networks(code: Checkout, student, teacher, criterion, loss, device: torch.device, *statistics) -> Networks:
    for module in (student, teacher.requires_grad_(False), criterion):
        module.to(device)
    theirs, utils = dict(teacher.named_parameters()), code["utils"]
    pairs = [(p, theirs[name]) for name, p in student.named_parameters() if name in theirs]

    @torch.no_grad()
    def average(m: float) -> None:
        for q, k in pairs:
            k.data.mul_(m).add_((1 - m) * q.detach().data)

    clip, freeze = partial(utils.clip_gradients, student), partial(_freeze, utils, student)
    groups = utils.get_params_groups(student)
    return Networks(student, teacher, criterion, loss, average, groups, clip, freeze, *statistics)


def _freeze(utils: ModuleType, student: nn.Module, epoch: int) -> None:
    utils.cancel_gradients_last_layer(epoch, student, 1)


def vit_like(vits: ModuleType, encoder: Encoder, **more) -> nn.Module:
    """Their vision transformer with the sizes of ours."""

    return vits.VisionTransformer(
        img_size=[encoder.native_size[0]],
        patch_size=encoder.patch_size,
        embed_dim=encoder.width,
        depth=encoder.depth,
        num_heads=encoder.heads,
        mlp_ratio=4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **more,
    )


def _sizes(ours: DINO | iBOT | UDI) -> tuple[int, int]:
    return ours.encoder.width, ours.config.prototypes


def _head_sizes(ours: DINO | iBOT | UDI) -> dict[str, int]:
    return {"hidden_dim": ours.config.hidden, "bottleneck_dim": ours.config.embedding}


def _epochs(t: Progress) -> int:
    return t.total // t.steps_per_epoch


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}
