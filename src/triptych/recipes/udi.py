"""Recipes of UDI (Su and Ji 2024)."""

from triptych.data.loader import ViewsConfig
from triptych.encoders import ViTConfig
from triptych.methods import UDIConfig
from triptych.optim import OptimConfig
from triptych.recipe import HealthConfig, Recipe
from triptych.recipes.dino import dino_small, shared_settings


def udi_vits16_in1k_300ep() -> Recipe:
    """UDI, ViT-S/16, ImageNet-1k, 300 epochs, 2 x 224 + 10 x 96 crops, geometry and centres as released.

    torchrun --nproc-per-node 8 -m triptych train --recipe udi_vits16_in1k_300ep --data /data/imagenet
    Expect (authors): k-NN 75.6, linear 77.6.  Hardware (authors): 8 A100.  Status: not run here.
    """
    return Recipe(
        name="udi_vits16_in1k_300ep",
        method=UDIConfig(token_coords="ends", rank_weighting="rank_mean"),
        encoder=ViTConfig(arch="vit_small_patch16_224", drop_path=0.1, positions="dino"),
        views=ViewsConfig(
            local_crops=10,
            global_scale=(0.25, 1.0),
            local_scale=(0.05, 0.25),
            overlap="official",
            local_reference="official",
            colour="udi",
        ),
        optim=OptimConfig(lr=5e-4, min_lr=1e-5, warmup=10, weight_decay=0.04, weight_decay_end=0.1, clip=3.0),
        batch=1024,
        epochs=300,
    )


def udi_vits16_in1k_100ep() -> Recipe:
    """UDI, ViT-S/16, ImageNet-1k, 100 epochs; the authors' arguments are not public, so those of 300 epochs.

    torchrun --nproc-per-node 8 -m triptych train --recipe udi_vits16_in1k_100ep --data /data/imagenet
    Expect (authors): k-NN 74.9, linear 76.3.  Hardware (authors): 8 A100.  Status: not run here.
    """
    return udi_vits16_in1k_300ep().model_copy(update={"name": "udi_vits16_in1k_100ep", "epochs": 100})


def udi_small() -> Recipe:
    """UDI for about 10 000 images at 64-128 px on a modest GPU or a CPU: small ViT/8 at 64 px, 2 + 6 crops.

    triptych train --recipe udi_small --data images/
    Status: run on a CPU at 48 px, width 128, depth 4, 4 epochs (benchmarks/results); not run at its full size.
    """
    small = dino_small()
    return small.model_copy(
        update={
            "name": "udi_small",
            "method": UDIConfig(**shared_settings(small.method), window_global=2, window_local=2),
            "views": small.views.model_copy(update={"overlap": "fixed", "colour": "udi"}),
        }
    )


def udi_quickstart() -> Recipe:
    """UDI as `triptych quickstart` runs it, for 2 000 drawn scenes on two cores: ViT/8 at 48 px, 2 + 4 crops.

    triptych train --recipe udi_quickstart --data scenes:2000
    Status: run by `triptych quickstart` and by the tests.
    """
    return Recipe(
        name="udi_quickstart",
        method=UDIConfig(
            hidden=256,
            embedding=64,
            prototypes=256,
            window_global=2,
            window_local=1,
            teacher_temp=0.02,
            teacher_temp_start=0.02,
            teacher_temp_warmup=0,
            center_momentum=0.3,  # so few steps leave the centre no time to lag
            teacher_momentum=0.98,
            freeze_prototypes=0.1,
        ),
        encoder=ViTConfig(arch="vit_tiny_patch16_224", patch_size=8, width=128, depth=4, heads=4, init="xavier"),
        views=ViewsConfig(
            global_size=48,
            local_size=24,
            local_crops=4,
            global_scale=(0.4, 1.0),
            local_scale=(0.1, 0.4),
            overlap="fixed",
            colour="form",  # the scenes' colours tell nothing of their classes
            blur_scale=0.25,
        ),
        optim=OptimConfig(lr=4e-3, min_lr=1e-5, warmup=0.3, weight_decay_end=0.1),
        batch=16,
        epochs=2,
        health=HealthConfig(every=0),
    )
