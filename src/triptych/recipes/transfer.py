"""Recipes after DeiT, without layer decay, as iBOT and UDI have them: transfer to smaller sets, low-shot fine-tuning.

Learning rates of OptimConfig are per 256 images, those that the authors state and those of SETS per 512.  The cosine
ends at 1e-5, not scaled: where the peak lies below it the rate rises, as it does in the authors' code.
"""

from collections.abc import Callable
from dataclasses import dataclass

from triptych.encoders import ViTConfig
from triptych.methods import SupervisedConfig
from triptych.optim import OptimConfig
from triptych.recipe import CheckpointConfig, HealthConfig, Recipe
from triptych.recipes.supervised import ONE_VIEW

SMALL, BASE = "vit_small_patch16_224", "vit_base_patch16_224"
NOT_AT_HAND = "see the authors' paper"


def lowshot_ibot_vits16() -> Recipe:
    """Low-shot fine-tuning (iBOT), ViT-S/16, 1 % or 10 % of ImageNet-1k's labels: the head's first layer is kept.

    triptych train --recipe lowshot_ibot_vits16 --data PART --encoder.weights RUN
    RUN: a run, or a checkpoint with its head.  PART: the images of SimCLR's list.
    Expect (UDI's slides, 1 % and 10 %): iBOT 61.9 and 75.1, DINO 60.3 and 74.3.  Status: not run here.
    """
    method = SupervisedConfig(erase=0.25, average=0.99996, projection=2048)
    # 5e-6 per 512 images
    return _deit("lowshot_ibot_vits16", 1000, ViTConfig(arch=SMALL, drop_path=0.1), 5e-6, method, batch=1024)


def lowshot_udi_vits16() -> Recipe:
    """Low-shot fine-tuning (UDI), ViT-S/16, 1 % or 10 % of ImageNet-1k's labels: the head's first layer is kept.

    triptych train --recipe lowshot_udi_vits16 --data PART --encoder.weights RUN
    RUN: a run, or a checkpoint with its head.  PART: the images of SimCLR's list.
    As iBOT's, but for half the batch and no repeated augmentation.  class+ stays, as a register.
    Expect (authors, 1 % and 10 %): 65.8 and 76.4.  Status: not run here.
    """
    method = SupervisedConfig(erase=0.25, average=0.99996, projection=2048)
    encoder = ViTConfig(arch=SMALL, drop_path=0.1, registers=1)
    return _deit("lowshot_udi_vits16", 1000, encoder, 5e-6, method, batch=512, repeats=1)


@dataclass(frozen=True)
class Set:
    """What the authors chose for one set of images, and what they reached."""

    data: str  # of --data
    epochs: int
    ibot: float  # peak learning rate of iBOT's ViT-B/16, per 512 images
    udi: float  # of UDI's ViT-S/16
    erase: float = 0.25  # iBOT's; UDI has 0.1 everywhere
    expect_ibot: str = NOT_AT_HAND  # top-1 %
    expect_udi: str = NOT_AT_HAND


SETS = {
    "cifar10": Set("cifar10", 1000, 7.5e-6, 5e-6, expect_udi="99.1"),
    "cifar100": Set("cifar100", 1000, 7.5e-6, 7.5e-6, expect_udi="90.8"),
    "flowers102": Set("flowers102", 1000, 7.5e-6, 7.5e-5, expect_udi="98.6"),
    "cars": Set("stanford-cars@ROOT", 1000, 7.5e-5, 7.5e-5, expect_udi="94.1"),
    # Neither iBOT nor UDI transfers to Pets: these are their rates for Flowers.
    "pets": Set("oxford-iiit-pet", 1000, 7.5e-6, 7.5e-5, expect_ibot="none published", expect_udi="none published"),
    "inat18": Set("inat18@ROOT", 360, 7.5e-6, 3e-5, 0.1, expect_ibot="74.6", expect_udi="74.1"),
    "inat19": Set("inat19@ROOT", 360, 7.5e-6, 5e-5, 0.1, expect_ibot="79.6", expect_udi="78.9"),
}


def _ibot(name: str, s: Set) -> Recipe:
    method = SupervisedConfig(erase=s.erase, average=0.99996)
    return _deit(name, s.epochs, ViTConfig(arch=BASE, drop_path=0.1), s.ibot, method)


def _udi(name: str, s: Set) -> Recipe:
    method = SupervisedConfig(erase=0.1, average=0.99996)
    return _deit(name, s.epochs, ViTConfig(arch=SMALL, drop_path=0.1, registers=1), s.udi, method)


def _deit(
    name: str,
    epochs: int,
    encoder: ViTConfig,
    lr: float,
    method: SupervisedConfig,
    *,
    batch: int = 768,  # 96 on each of 8 GPUs
    repeats: int = 3,
) -> Recipe:
    """lr: peak, per 512 images.  Some of these epochs are short: every tenth is measured and saved."""
    return Recipe(
        name=name,
        method=method,
        encoder=encoder,
        views=ONE_VIEW.model_copy(update={"repeats": repeats}),
        optim=OptimConfig(
            lr=lr / 2,
            min_lr=1e-5,
            warmup=5,
            warmup_start=1e-6 * 256 / batch,  # 1e-6, whatever the batch
            schedule="moby",  # timm's
            weight_decay=0.05,
            weight_decay_end=0.05,
            decay="no_tokens",
            clip=None,
        ),
        batch=batch,
        epochs=epochs,
        health=HealthConfig(every=10),
        checkpoint=CheckpointConfig(every=10),
    )


def _transfer(name: str, s: Set, whose: str, arch: str, expect: str, make: Callable[[str, Set], Recipe]):
    """The recipe's function, which the table stands for."""

    def recipe() -> Recipe:
        return make(name, s)

    recipe.__name__ = recipe.__qualname__ = name
    recipe.__doc__ = f"""Transfer to {s.data.partition("@")[0]} of a {arch}, {s.epochs} epochs ({whose}'s settings).

    triptych train --recipe {name} --data {s.data} --encoder.weights RUN
    Expect ({whose}, top-1): {expect}.  Status: not run here.
    """
    return recipe


RECIPES: tuple[Callable[[], Recipe], ...] = (
    lowshot_ibot_vits16,
    lowshot_udi_vits16,
    *(_transfer(f"transfer_{n}_ibot_vitb16", s, "iBOT", "ViT-B/16", s.expect_ibot, _ibot) for n, s in SETS.items()),
    *(_transfer(f"transfer_{n}_udi_vits16", s, "UDI", "ViT-S/16", s.expect_udi, _udi) for n, s in SETS.items()),
)
