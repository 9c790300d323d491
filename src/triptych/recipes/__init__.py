"""Recipes: functions that return a typed value.  The docstring's first line is what `triptych list` prints."""

from collections.abc import Callable

from triptych.recipe import Recipe
from triptych.recipes import contrastive, dino, finetune, ibot, masked, mmc, mte, supervised, transfer, udi

RECIPES: dict[str, Callable[[], Recipe]] = {
    f.__name__: f
    for f in (
        udi.udi_small,
        udi.udi_quickstart,
        udi.udi_vits16_in1k_100ep,
        udi.udi_vits16_in1k_300ep,
        dino.dino_small,
        dino.dino_vits16_in1k_100ep,
        dino.dino_vits16_in1k_300ep,
        dino.dino_vits16_2crop_in1k_100ep,
        dino.dino_vits16_2crop_in1k_300ep,
        dino.dino_swint_in1k_100ep,
        ibot.ibot_small,
        ibot.ibot_vits16_in1k_100ep,
        ibot.ibot_vits16_in1k_300ep,
        ibot.ibot_vits16_multicrop_in1k_100ep,
        ibot.ibot_vitb16_multicrop_in1k_100ep,
        ibot.ibot_swint_in1k_300ep,
        ibot.hssl_small,
        ibot.hssl_vits16_in1k_100ep,
        contrastive.mocov3_small,
        contrastive.mocov3_vits16_in1k_300ep,
        contrastive.byol_small,
        contrastive.byol_vits16_in1k_100ep,
        contrastive.moby_small,
        contrastive.moby_swint_in1k_100ep,
        contrastive.moby_swint_in1k_300ep,
        contrastive.simclr_small,
        contrastive.simclr_vits16_in1k_300ep,
        contrastive.swav_small,
        contrastive.swav_vits16_in1k_300ep,
        mmc.mmc_small,
        mmc.mmc_vits16_in100_200ep,
        mmc.mmc_vits16_in100_500ep,
        mmc.mmc_vitb16_in1k_400ep,
        *masked.RECIPES,
        *mte.RECIPES,
        *finetune.RECIPES,
        *transfer.RECIPES,
        supervised.supervised_small,
        supervised.supervised_vits16_in1k_300ep,
        supervised.supervised_vitb16_in1k_300ep,
        supervised.mte_supervised_small,
        supervised.mte_supervised_vits16_in1k_300ep,
        supervised.mte_supervised_vitb16_in1k_300ep,
    )
}
DEFAULT = "udi_small"
