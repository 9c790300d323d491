"""Recipes of iBOT (Zhou et al. 2022) and HSSL (Li et al. 2023)."""

from triptych.data.loader import ViewsConfig
from triptych.encoders import SwinConfig, ViTConfig
from triptych.methods import HSSLConfig, iBOTConfig
from triptych.optim import OptimConfig
from triptych.recipe import Recipe
from triptych.recipes.dino import dino_small, shared_settings, without_local_crops

TWO_CROPS = ViewsConfig(global_scale=(0.14, 1.0), local_crops=0)
OPTIM = OptimConfig(lr=5e-4, min_lr=1e-6, warmup=10, weight_decay=0.04, weight_decay_end=0.4, clip=3.0)


def ibot_vits16_in1k_100ep() -> Recipe:
    """iBOT, ViT-S/16, ImageNet-1k, 100 epochs, 2 x 224 crops.

    torchrun --nproc-per-node 8 -m triptych train --recipe ibot_vits16_in1k_100ep --data /data/imagenet
    Expect (MTE paper): k-NN 65.2, linear 71.3.  Status: not run here.
    """
    return Recipe(
        name="ibot_vits16_in1k_100ep",
        method=iBOTConfig(),
        encoder=ViTConfig(arch="vit_small_patch16_224", drop_path=0.1, positions="dino"),
        views=TWO_CROPS,
        optim=OPTIM,
        batch=1024,
        epochs=100,
    )


def ibot_vits16_in1k_300ep() -> Recipe:
    """iBOT, ViT-S/16, ImageNet-1k, 300 epochs, 2 x 224 crops.

    torchrun --nproc-per-node 8 -m triptych train --recipe ibot_vits16_in1k_300ep --data /data/imagenet
    Expect (authors): k-NN 70.3, linear 74.8.  Status: not run here.
    """
    return ibot_vits16_in1k_100ep().model_copy(update={"name": "ibot_vits16_in1k_300ep", "epochs": 300})


def ibot_vits16_multicrop_in1k_100ep() -> Recipe:
    """iBOT, ViT-S/16, ImageNet-1k, 100 epochs, 2 x 224 + 10 x 96 crops.

    torchrun --nproc-per-node 8 -m triptych train --recipe ibot_vits16_multicrop_in1k_100ep --data /data/imagenet
    Expect (MTE paper): k-NN 71.5, linear 74.4.  Status: not run here.
    """
    views = ViewsConfig(global_scale=(0.25, 1.0), local_scale=(0.05, 0.25), local_crops=10)
    return ibot_vits16_in1k_100ep().model_copy(update={"name": "ibot_vits16_multicrop_in1k_100ep", "views": views})


def ibot_vitb16_multicrop_in1k_100ep() -> Recipe:
    """iBOT, ViT-B/16, ImageNet-1k, 100 epochs, 2 x 224 + 10 x 96 crops.

    torchrun --nproc-per-node 8 --nnodes 2 -m triptych train --recipe ibot_vitb16_multicrop_in1k_100ep --data ...
    Expect (MTE paper): k-NN 74.0, linear 77.8.  Status: not run here.
    """
    return Recipe(
        name="ibot_vitb16_multicrop_in1k_100ep",
        method=iBOTConfig(norm_last_layer=True, teacher_temp_warmup=50, freeze_prototypes=3),
        encoder=ViTConfig(arch="vit_base_patch16_224", drop_path=0.1, positions="dino"),
        views=ViewsConfig(global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), local_crops=10),
        optim=OPTIM.model_copy(update={"lr": 7.5e-4, "min_lr": 2e-6, "clip": 0.3}),
        batch=1024,
        epochs=100,
    )


def ibot_swint_in1k_300ep() -> Recipe:
    """iBOT, Swin-T (window 7), ImageNet-1k, 300 epochs, 2 x 224 + 10 x 96 crops, masking from epoch 50.

    torchrun --nproc-per-node 8 -m triptych train --recipe ibot_swint_in1k_300ep --data /data/imagenet
    Expect (authors): k-NN 75.3, linear 78.6.  Status: not run here.
    """
    views = ViewsConfig(global_scale=(0.25, 1.0), local_scale=(0.05, 0.25), local_crops=10)
    return ibot_vits16_in1k_300ep().model_copy(
        update={
            "name": "ibot_swint_in1k_300ep",
            "method": iBOTConfig(mask_start=50),
            "encoder": SwinConfig(drop_path=0.1, norm_eps=1e-6),
            "views": views,
        }
    )


def ibot_small() -> Recipe:
    """iBOT for about 10 000 images at 64-128 px on a modest GPU or a CPU: small ViT/8 at 64 px, 2 + 6 crops.

    triptych train --recipe ibot_small --data images/
    Status: not run at its full size.
    """
    small = dino_small()
    method = iBOTConfig(**shared_settings(small.method), teacher_patch_temp=0.04)
    return small.model_copy(update={"name": "ibot_small", "method": method})


def hssl_vits16_in1k_100ep() -> Recipe:
    """HSSL, ViT-S/16 with a convolutional head, ImageNet-1k, 100 epochs, 2 x 224 crops.

    torchrun --nproc-per-node 8 -m triptych train --recipe hssl_vits16_in1k_100ep --data /data/imagenet
    Expect (MTE paper): k-NN 67.3, linear 72.6.  Status: not run here.
    """
    return ibot_vits16_in1k_100ep().model_copy(update={"name": "hssl_vits16_in1k_100ep", "method": HSSLConfig()})


def hssl_small() -> Recipe:
    """HSSL for about 10 000 images at 64-128 px on a modest GPU or a CPU: small ViT/8 at 64 px, 2 crops.

    triptych train --recipe hssl_small --data images/
    Status: not run at its full size.
    """
    small = dino_small()
    method = HSSLConfig(**shared_settings(small.method), head_kernel=3)
    return without_local_crops(small).model_copy(update={"name": "hssl_small", "method": method})
