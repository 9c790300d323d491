"""Recipes of DINO (Caron et al. 2021)."""

from triptych.data.loader import ViewsConfig
from triptych.encoders import SwinConfig, ViTConfig
from triptych.methods import DINOConfig, MethodConfig
from triptych.optim import OptimConfig
from triptych.recipe import Recipe


def dino_vits16_in1k_100ep() -> Recipe:
    """DINO, ViT-S/16, ImageNet-1k, 100 epochs, 2 x 224 + 8 x 96 crops.

    torchrun --nproc-per-node 8 -m triptych train --recipe dino_vits16_in1k_100ep --data /data/imagenet
    Expect (authors): k-NN 69.3, linear 74.0.  Hardware (authors): 8 GPUs, 1.75 days.  Status: not run here.
    """
    return Recipe(
        name="dino_vits16_in1k_100ep",
        method=DINOConfig(teacher_temp=0.04, teacher_temp_warmup=0),
        encoder=ViTConfig(arch="vit_small_patch16_224", drop_path=0.1, positions="dino"),
        views=ViewsConfig(global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), local_crops=8),
        optim=OptimConfig(lr=5e-4, min_lr=1e-6, warmup=10, weight_decay=0.04, weight_decay_end=0.4, clip=3.0),
        batch=512,
        epochs=100,
    )


def dino_vits16_in1k_300ep() -> Recipe:
    """DINO, ViT-S/16, ImageNet-1k, 300 epochs, the authors' boosted settings.

    torchrun --nproc-per-node 8 --nnodes 2 -m triptych train --recipe dino_vits16_in1k_300ep --data /data/imagenet
    Expect (authors): k-NN 73.3, linear 76.0.  Hardware (authors): 16 GPUs, 2.6 days.  Status: not run here.
    """
    return dino_vits16_in1k_100ep().model_copy(
        update={
            "name": "dino_vits16_in1k_300ep",
            "method": DINOConfig(teacher_temp=0.07, teacher_temp_warmup=30, norm_last_layer=False),
            "batch": 1024,
            "epochs": 300,
        }
    )


def dino_small() -> Recipe:
    """DINO for about 10 000 images at 64-128 px on a modest GPU or a CPU: small ViT/8 at 64 px, 2 + 6 crops.

    triptych train --recipe dino_small --data images/
    Status: run on a CPU at 48 px, width 128, depth 4, 4 epochs (benchmarks/results); not run at its full size.
    """
    return Recipe(
        name="dino_small",
        method=DINOConfig(
            hidden=512,
            embedding=128,
            prototypes=1024,
            norm_last_layer=False,
            teacher_temp=0.03,
            teacher_temp_start=0.03,
            teacher_temp_warmup=0,
            teacher_momentum=0.99,
            freeze_prototypes=0.2,
        ),
        encoder=ViTConfig(arch="vit_tiny_patch16_224", patch_size=8, width=192, depth=6, heads=3, init="xavier"),
        views=ViewsConfig(
            global_size=64,
            local_size=32,
            local_crops=6,
            global_scale=(0.5, 1.0),  # small images have less to cut away than ImageNet's
            local_scale=(0.2, 0.5),
            blur_scale=0.25,
        ),
        optim=OptimConfig(lr=4e-3, min_lr=1e-5, warmup=0.5, weight_decay=0.04, weight_decay_end=0.2, clip=3.0),
        batch=32,
        epochs=30,
    )


def dino_vits16_2crop_in1k_100ep() -> Recipe:
    """DINO without multi-crop, ViT-S/16, ImageNet-1k, 100 epochs, 2 x 224 crops: the base of MTE's tables.

    torchrun --nproc-per-node 8 -m triptych train --recipe dino_vits16_2crop_in1k_100ep --data /data/imagenet
    Expect (MTE paper): k-NN 61.2, linear 67.8.  Status: not run here.
    """
    return dino_vits16_in1k_100ep().model_copy(
        update={
            "name": "dino_vits16_2crop_in1k_100ep",
            "method": DINOConfig(teacher_temp=0.07, teacher_temp_warmup=50, norm_last_layer=False),
            "views": ViewsConfig(global_scale=(0.14, 1.0), local_crops=0),
            "batch": 1024,
        }
    )


def dino_vits16_2crop_in1k_300ep() -> Recipe:
    """DINO without multi-crop, ViT-S/16, ImageNet-1k, 300 epochs, 2 x 224 crops: the base of MTE's tables.

    torchrun --nproc-per-node 8 -m triptych train --recipe dino_vits16_2crop_in1k_300ep --data /data/imagenet
    Expect (iBOT paper): k-NN 67.9, linear 72.5.  Status: not run here.
    """
    return dino_vits16_2crop_in1k_100ep().model_copy(update={"name": "dino_vits16_2crop_in1k_300ep", "epochs": 300})


def dino_swint_in1k_100ep() -> Recipe:
    """DINO without multi-crop, Swin-T, ImageNet-1k, 100 epochs, 2 x 224 crops.

    torchrun --nproc-per-node 8 -m triptych train --recipe dino_swint_in1k_100ep --data /data/imagenet
    Expect (MTE paper): k-NN 62.5, linear 70.1.  Status: not run here.
    """
    return dino_vits16_2crop_in1k_100ep().model_copy(
        update={"name": "dino_swint_in1k_100ep", "encoder": SwinConfig(drop_path=0.1)}
    )


def shared_settings(method: MethodConfig) -> dict:
    """The settings that every method with DINO's targets has under the same names."""
    return {name: value for name, value in method.model_dump().items() if name != "name"}


def without_local_crops(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"views": recipe.views.model_copy(update={"local_crops": 0})})
