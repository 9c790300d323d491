"""lightly's DINO step as in its ImageNet benchmark for ViT-S (benchmarks/imagenet/vitb16/dino.py), our weights.

Left out on both sides: Lightning, its logging, the online classifier.
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from checkouts import Checkout
from theirs import Networks, head_state, trunk_state
from triptych.data.views import Views
from triptych.methods.base import Tower
from triptych.methods.dino import DINO
from triptych.recipe import Recipe
from triptych.schedules import Progress

MODULES = (
    "lightly.loss.dino_loss",
    "lightly.models.modules.heads",
    "lightly.models.modules.masked_vision_transformer_timm",
    "lightly.models.utils",
)


def as_theirs(recipe: Recipe) -> Recipe:
    """DINO's recipe with that script's settings: trained gains, no clipping, timm's resampling of positions."""
    parts = {
        "method": {"norm_last_layer": False},
        "optim": {"clip": None},
        "encoder": {"positions": "timm"},
    }
    return recipe.model_copy(update={k: getattr(recipe, k).model_copy(update=v) for k, v in parts.items()})


def networks(code: Checkout, ours: DINO, views: Views, t: Progress, drop_path: float) -> Networks:
    """What `theirs.Step` runs."""
    c, utils = ours.config, code["lightly.models.utils"]
    vit = code["lightly.models.modules.masked_vision_transformer_timm"].MaskedVisionTransformerTIMM
    projector = code["lightly.models.modules.heads"].DINOProjectionHead
    crops, device = [v.images for v in views.all], views.all[0].images.device

    def network(tower: Tower, rate: float) -> Any:
        name, arguments = tower.encoder.timm_arguments()
        made = timm.create_model(
            name, **(arguments | {"dynamic_img_size": True, "drop_path_rate": rate, "num_classes": 0})
        )
        head = projector(ours.encoder.width, c.hidden, c.embedding, c.prototypes, False, 1, c.norm_last_layer)
        made.load_state_dict(trunk_state(tower.encoder))
        # Their linear layers are `layers` where the authors' are `mlp`.
        head.load_state_dict({k.replace("mlp.", "layers."): v for k, v in head_state(tower).items()})
        backbone = vit(made, weight_initialization="skip", pos_embed_initialization="skip")
        return nn.ModuleList([backbone, head]).to(device)

    student, teacher = network(ours.student, drop_path), network(ours.teacher, 0.0)
    criterion = code["lightly.loss.dino_loss"].DINOLoss(c.prototypes, c.teacher_temp, c.teacher_temp).to(device)
    student[0].mask_token.requires_grad_(False)  # of masked image modelling; not used here

    def project(network: nn.ModuleList, x: Tensor) -> Tensor:
        return network[1](network[0](x).flatten(start_dim=1))

    def loss() -> Tensor:
        whole, local = torch.cat(crops[:2]), crops[2:]
        with torch.no_grad():
            of_teacher = project(teacher, whole)
        of_student = torch.cat([project(student, whole), *([project(student, torch.cat(local))] if local else [])])
        chunks = of_teacher.chunk(2), of_student.chunk(len(crops))
        return criterion(*chunks, teacher_temp=c.teacher_temp, epoch=t.epoch)

    def average(momentum: float) -> None:  # at the start of their next step, which is the same
        for s, k in zip(student, teacher, strict=True):
            utils.update_momentum(s, k, m=momentum)

    decayed, not_decayed = utils.get_weight_decay_parameters(student)
    groups = [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]
    freeze = student[1].cancel_last_layer_gradients
    return Networks(student, teacher, criterion, loss, average, groups, clip=lambda limit: None, freeze=freeze)
