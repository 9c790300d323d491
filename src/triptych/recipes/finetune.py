"""Recipes of fine-tuning: supervised training that starts from a pre-trained encoder, slower in its early layers."""

from triptych.data.loader import ViewsConfig
from triptych.encoders import ViTConfig
from triptych.methods import SupervisedConfig
from triptych.optim import OptimConfig
from triptych.recipe import Recipe
from triptych.recipes.dino import dino_small


def finetune_vits16_in100_200ep() -> Recipe:
    """MMC's fine-tuning of a ViT-S/16 on ImageNet-100, 200 epochs: class token and mean patch side by side.

    triptych train --recipe finetune_vits16_in100_200ep --data imagenet100@/data/imagenet --encoder.weights RUN
    Expect (authors, after MMC of 200 epochs): top-1 91.02.  Status: not run here.
    """
    return Recipe(
        name="finetune_vits16_in100_200ep",
        method=SupervisedConfig(token="cls+patch_mean", average=0),
        encoder=ViTConfig(arch="vit_small_patch16_224", drop_path=0.1),
        views=ViewsConfig(global_crops=1, local_crops=0, global_scale=(0.08, 1.0), colour="three_augment"),
        optim=OptimConfig(
            lr=1e-3,  # 5e-4 for the authors' 128 images per step
            min_lr=1e-6,
            warmup=5,
            schedule="mocov3",
            weight_decay=0.05,
            weight_decay_end=0.05,
            layer_decay=0.65,
            decay="no_tokens",
            clip=None,
        ),
        batch=128,
        epochs=200,
    )


def finetune_small() -> Recipe:
    """Fine-tuning for about 10 000 images at 64-128 px: small ViT/8 at 64 px, class token and mean patch side by side.

    triptych train --recipe finetune_small --data images/ --encoder.weights RUN
    Status: not run at its full size.
    """
    whole, small = finetune_vits16_in100_200ep(), dino_small()
    return whole.model_copy(
        update={
            "name": "finetune_small",
            "encoder": small.encoder.model_copy(update={"drop_path": 0.1}),
            "views": whole.views.model_copy(update={"global_size": 64, "global_scale": (0.2, 1.0), "blur_scale": 0.25}),
            "optim": whole.optim.model_copy(update={"lr": 2e-3}),
            "batch": 64,
            "epochs": 30,
        }
    )
