"""Recipes of MoCo v3, BYOL, MoBY, SimCLR and SwAV on transformers."""

from triptych.data.loader import ViewsConfig
from triptych.encoders import SwinConfig, ViTConfig
from triptych.methods import BYOLConfig, MoBYConfig, MoCoV3Config, SimCLRConfig, SwAVConfig
from triptych.optim import OptimConfig
from triptych.recipe import Recipe
from triptych.recipes.dino import dino_small, without_local_crops

# MoCo v3's: fixed positions, a frozen patch projection, and as many heads as its authors' ViT-S has.
MOCO_VITS = ViTConfig(
    arch="vit_small_patch16_224", heads=12, init="mocov3", position_table="sincos", freeze_patches=True
)
TWO_CROPS = ViewsConfig(global_scale=(0.08, 1.0), local_crops=0, interpolation="bilinear")


def moco_optim(warmup: float) -> OptimConfig:
    return OptimConfig(
        lr=1.5e-4,
        min_lr=0.0,
        warmup=warmup,
        schedule="mocov3",
        weight_decay=0.1,
        weight_decay_end=0.1,
        decay="all",
        clip=None,
    )


def mocov3_vits16_in1k_300ep() -> Recipe:
    """MoCo v3, ViT-S/16, ImageNet-1k, 300 epochs, 2 x 224 crops.

    torchrun --nproc-per-node 8 --nnodes 4 -m triptych train --recipe mocov3_vits16_in1k_300ep --data /data/imagenet
    Expect (authors): linear 73.2 (72.5 in the paper).  Status: not run here.
    """
    return Recipe(
        name="mocov3_vits16_in1k_300ep",
        method=MoCoV3Config(),
        encoder=MOCO_VITS,
        views=TWO_CROPS,
        optim=moco_optim(40),
        batch=4096,
        epochs=300,
    )


def byol_vits16_in1k_100ep() -> Recipe:
    """BYOL, ViT-S/16, ImageNet-1k, 100 epochs, 2 x 224 crops; encoder and optimiser are MoCo v3's.

    torchrun --nproc-per-node 8 --nnodes 4 -m triptych train --recipe byol_vits16_in1k_100ep --data /data/imagenet
    Expect (MTE paper, whose settings are not public): k-NN 56.1, linear 65.1.  Status: not run here.
    """
    return mocov3_vits16_in1k_300ep().model_copy(
        update={
            "name": "byol_vits16_in1k_100ep",
            "method": BYOLConfig(),
            "optim": moco_optim(10),
            "epochs": 100,
        }
    )


def moby_swint_in1k_100ep() -> Recipe:
    """MoBY, Swin-T, ImageNet-1k, 100 epochs, 2 x 224 crops.

    torchrun --nproc-per-node 8 -m triptych train --recipe moby_swint_in1k_100ep --data /data/imagenet
    Expect (authors): linear 70.9.  Status: not run here.
    """
    return Recipe(
        name="moby_swint_in1k_100ep",
        method=MoBYConfig(),
        encoder=SwinConfig(arch="swin_tiny_patch4_window7_224", drop_path=0.2),
        views=TWO_CROPS,
        optim=OptimConfig(  # the authors' rates are per 512 images
            lr=5e-4,
            min_lr=5e-6,
            warmup=5,
            warmup_start=2.5e-7,
            schedule="moby",
            weight_decay=0.05,
            weight_decay_end=0.05,
            clip=5.0,
            clipping="global",
        ),
        batch=512,
        epochs=100,
    )


def moby_swint_in1k_300ep() -> Recipe:
    """MoBY, Swin-T, ImageNet-1k, 300 epochs, 2 x 224 crops.

    torchrun --nproc-per-node 8 -m triptych train --recipe moby_swint_in1k_300ep --data /data/imagenet
    Expect (authors): linear 75.3; k-NN 67.4 (MTE paper).  Status: not run here.
    """
    return moby_swint_in1k_100ep().model_copy(update={"name": "moby_swint_in1k_300ep", "epochs": 300})


def simclr_vits16_in1k_300ep() -> Recipe:
    """SimCLR, ViT-S/16, ImageNet-1k, 300 epochs, 2 x 224 crops; encoder and optimiser are MoCo v3's.

    torchrun --nproc-per-node 8 --nnodes 4 -m triptych train --recipe simclr_vits16_in1k_300ep --data /data/imagenet
    Expect (MoCo v3 paper, its own rates): linear 69.0.  Status: not run here.
    """
    views = TWO_CROPS.model_copy(update={"colour": "simclr", "interpolation": "bicubic"})
    return mocov3_vits16_in1k_300ep().model_copy(
        update={"name": "simclr_vits16_in1k_300ep", "method": SimCLRConfig(), "views": views}
    )


def swav_vits16_in1k_300ep() -> Recipe:
    """SwAV, ViT-S/16, ImageNet-1k, 300 epochs, 2 x 224 + 6 x 96 crops; optimiser is DINO's.

    torchrun --nproc-per-node 8 --nnodes 2 -m triptych train --recipe swav_vits16_in1k_300ep --data /data/imagenet
    Expect (DINO paper, its own rates): k-NN 66.3, linear 73.5.  Status: not run here.
    """
    return Recipe(
        name="swav_vits16_in1k_300ep",
        method=SwAVConfig(),
        encoder=ViTConfig(arch="vit_small_patch16_224", drop_path=0.1),
        views=ViewsConfig(
            global_scale=(0.14, 1.0),
            local_scale=(0.05, 0.14),
            local_crops=6,
            colour="simclr",
            std=(0.228, 0.224, 0.225),  # as released
        ),
        optim=OptimConfig(lr=5e-4, min_lr=1e-6, warmup=10, weight_decay=0.04, weight_decay_end=0.4),
        batch=1024,
        epochs=300,
    )


def byol_small() -> Recipe:
    """BYOL for about 10 000 images at 64-128 px on a modest GPU or a CPU: small ViT/8 at 64 px, 2 crops.

    triptych train --recipe byol_small --data images/
    Status: run on a CPU at a reduced size (benchmarks/results); not run at its full size.
    """
    small = without_local_crops(dino_small())
    return small.model_copy(
        update={
            "name": "byol_small",
            "method": BYOLConfig(hidden=512, embedding=128),
            "views": small.views.model_copy(update={"global_scale": (0.2, 1.0)}),
            "optim": OptimConfig(lr=2e-3, min_lr=1e-5, warmup=1, weight_decay=0.05, weight_decay_end=0.05, clip=1.0),
            "batch": 64,
        }
    )


def mocov3_small() -> Recipe:
    """MoCo v3 for about 10 000 images at 64-128 px on a modest GPU or a CPU: small ViT/8 at 64 px, 2 crops.

    triptych train --recipe mocov3_small --data images/
    Status: not run at its full size.
    """
    return byol_small().model_copy(
        update={"name": "mocov3_small", "method": MoCoV3Config(hidden=512, embedding=128), "batch": 128}
    )


def simclr_small() -> Recipe:
    """SimCLR for about 10 000 images at 64-128 px on a modest GPU or a CPU: small ViT/8 at 64 px, 2 crops.

    triptych train --recipe simclr_small --data images/
    Status: not run at its full size.
    """
    return byol_small().model_copy(
        update={
            "name": "simclr_small",
            "method": SimCLRConfig(hidden=512, embedding=128, temperature=0.2),
            "batch": 128,
        }
    )


def swav_small() -> Recipe:
    """SwAV for about 10 000 images at 64-128 px on a modest GPU or a CPU: small ViT/8 at 64 px, 2 + 6 crops.

    triptych train --recipe swav_small --data images/
    Status: not run at its full size.
    """
    return dino_small().model_copy(
        update={
            "name": "swav_small",
            "method": SwAVConfig(hidden=512, embedding=128, prototypes=300, queue=1024, queue_start=5),
            "batch": 64,
        }
    )


def moby_small() -> Recipe:
    """MoBY for about 10 000 images at 64-128 px on a modest GPU or a CPU: small Swin at 64 px, 2 crops.

    triptych train --recipe moby_small --data images/
    Status: not run at its full size.
    """
    return byol_small().model_copy(
        update={
            "name": "moby_small",
            "method": MoBYConfig(hidden=512, embedding=128, queue=1024),
            "encoder": SwinConfig(
                patch_size=2, window_size=4, width=48, depths=(2, 2, 2), heads=(2, 4, 8), init="xavier"
            ),
        }
    )
