"""Recipes of MMC (Wu et al. 2023)."""

from triptych.data.loader import ViewsConfig
from triptych.encoders import ViTConfig
from triptych.methods import MMCConfig
from triptych.optim import OptimConfig
from triptych.recipe import Recipe
from triptych.recipes.dino import dino_small, without_local_crops


def mmc_vits16_in100_200ep() -> Recipe:
    """MMC, ViT-S/16, ImageNet-100, 200 epochs, 2 x 224 crops: the paper's ablation.

    triptych train --recipe mmc_vits16_in100_200ep --data imagenet100@/data/imagenet
    Expect (authors): k-NN 77.54 on the class token, 76.96 on the mean patch.  Status: not run here.
    """
    return Recipe(
        name="mmc_vits16_in100_200ep",
        method=MMCConfig(),
        encoder=ViTConfig(arch="vit_small_patch16_224", drop_path=0.1),
        views=ViewsConfig(global_scale=(0.2, 1.0), local_crops=0, colour="mmc"),
        # Rates are lost in the stored paper: SiT's, from which MMC was made.
        optim=OptimConfig(lr=5e-4, min_lr=1e-6, warmup=10, weight_decay=0.04, weight_decay_end=0.04, clip=3.0),
        batch=48,  # of the paper, which does not say of how many processes
        epochs=200,
    )


def mmc_vits16_in100_500ep() -> Recipe:
    """MMC, ViT-S/16, ImageNet-100, 500 epochs, 2 x 224 crops.

    triptych train --recipe mmc_vits16_in100_500ep --data imagenet100@/data/imagenet
    Expect: the authors print no k-NN of this run.  Status: not run here.
    """
    return mmc_vits16_in100_200ep().model_copy(update={"name": "mmc_vits16_in100_500ep", "epochs": 500})


def mmc_vitb16_in1k_400ep() -> Recipe:
    """MMC, ViT-B/16, ImageNet-1k, 400 epochs, 2 x 224 crops.

    torchrun --nproc-per-node 8 -m triptych train --recipe mmc_vitb16_in1k_400ep --data /data/imagenet
    Expect (authors, probably on ImageNet-100): k-NN 89.94 on the class token, 90.04 on the mean patch.
    Status: not run here.
    """
    return mmc_vits16_in100_200ep().model_copy(
        update={
            "name": "mmc_vitb16_in1k_400ep",
            "encoder": ViTConfig(arch="vit_base_patch16_224", drop_path=0.1),
            "batch": 8 * 48,
            "epochs": 400,
        }
    )


def mmc_small() -> Recipe:
    """MMC for about 10 000 images at 64-128 px on a modest GPU or a CPU: small ViT/8 at 64 px, 2 crops.

    triptych train --recipe mmc_small --data images/
    Status: run on a CPU at a reduced size (benchmarks/results); not run at its full size.
    """
    small = without_local_crops(dino_small())
    return small.model_copy(
        update={
            "name": "mmc_small",
            "method": MMCConfig(hidden=512, embedding=128, teacher_momentum=0.99),
            "views": small.views.model_copy(update={"global_scale": (0.2, 1.0), "colour": "mmc"}),
            "optim": OptimConfig(lr=2e-3, min_lr=1e-5, warmup=1, weight_decay=0.04, weight_decay_end=0.04, clip=3.0),
            "batch": 64,
        }
    )
