"""Recipes of supervised training: DeiT, MAE's training from scratch, and MTE's variants of both."""

from triptych.data.loader import ViewsConfig
from triptych.encoders import ViTConfig
from triptych.methods import SupervisedConfig
from triptych.optim import OptimConfig
from triptych.recipe import Recipe
from triptych.recipes.dino import dino_small

ONE_VIEW = ViewsConfig(global_crops=1, local_crops=0, global_scale=(0.08, 1.0), colour="randaug")


def supervised_vits16_in1k_300ep() -> Recipe:
    """Supervised (DeiT), ViT-S/16, ImageNet-1k, 300 epochs.

    torchrun --nproc-per-node 8 -m triptych train --recipe supervised_vits16_in1k_300ep --data /data/imagenet
    Expect (authors): top-1 79.8.  Status: not run here.
    """
    return Recipe(
        name="supervised_vits16_in1k_300ep",
        method=SupervisedConfig(erase=0.25, average=0.99996),
        encoder=ViTConfig(arch="vit_small_patch16_224", drop_path=0.1),
        views=ONE_VIEW,
        optim=OptimConfig(
            lr=2.5e-4,  # 5e-4 per 512 images
            min_lr=1e-5,
            warmup=5,
            schedule="mocov3",
            weight_decay=0.05,
            weight_decay_end=0.05,
            clip=None,
        ),
        batch=1024,
        epochs=300,
    )


def supervised_vitb16_in1k_300ep() -> Recipe:
    """Supervised (MAE's training from scratch), ViT-B/16, ImageNet-1k, 300 epochs.

    torchrun --nproc-per-node 8 --nnodes 4 -m triptych train --recipe supervised_vitb16_in1k_300ep --data ...
    Expect (authors): top-1 82.3.  Status: not run here.
    """
    return Recipe(
        name="supervised_vitb16_in1k_300ep",
        method=SupervisedConfig(average=0.9999),
        encoder=ViTConfig(arch="vit_base_patch16_224", drop_path=0.2, init="xavier"),
        views=ONE_VIEW,
        optim=OptimConfig(
            lr=1e-4,
            min_lr=0.0,
            warmup=20,
            schedule="mocov3",
            weight_decay=0.3,
            weight_decay_end=0.3,
            betas=(0.9, 0.95),
            clip=None,
        ),
        batch=4096,
        epochs=300,
    )


def mte_supervised_vits16_in1k_300ep() -> Recipe:
    """Supervised with MTE's ensemble, ViT-S/16, ImageNet-1k, 300 epochs.

    torchrun --nproc-per-node 8 -m triptych train --recipe mte_supervised_vits16_in1k_300ep --data /data/imagenet
    Expect (authors): top-1 80.4.  Status: not run here.
    """
    return with_ensemble(supervised_vits16_in1k_300ep())


def mte_supervised_vitb16_in1k_300ep() -> Recipe:
    """Supervised with MTE's ensemble, ViT-B/16, ImageNet-1k, 300 epochs.

    torchrun --nproc-per-node 8 --nnodes 4 -m triptych train --recipe mte_supervised_vitb16_in1k_300ep --data ...
    Expect (authors): top-1 82.7.  Status: not run here.
    """
    return with_ensemble(supervised_vitb16_in1k_300ep())


def supervised_small() -> Recipe:
    """Supervised, for about 10 000 labelled images at 64-128 px on a modest GPU or a CPU: small ViT/8 at 64 px.

    triptych train --recipe supervised_small --data images/
    Status: not run at its full size.
    """
    small = dino_small()
    views = ONE_VIEW.model_copy(update={"global_size": 64, "global_scale": (0.35, 1.0)})
    return small.model_copy(
        update={
            "name": "supervised_small",
            "method": SupervisedConfig(average=0.999, mixup=0.2),
            "views": views,
            "optim": OptimConfig(lr=1e-3, min_lr=1e-5, warmup=1, weight_decay=0.05, weight_decay_end=0.05),
            "batch": 64,
        }
    )


def mte_supervised_small() -> Recipe:
    """Supervised with MTE's ensemble, for about 10 000 labelled images at 64-128 px: small ViT/8 at 64 px.

    triptych train --recipe mte_supervised_small --data images/
    Status: not run at its full size.
    """
    return with_ensemble(supervised_small())


def with_ensemble(recipe: Recipe) -> Recipe:
    """MTE's 4 auxiliary class tokens and 6 pooled ones beside the global token."""
    method = recipe.method.model_copy(update={"aux": 4, "pooled": 6})
    return recipe.model_copy(update={"name": f"mte_{recipe.name}", "method": method})
