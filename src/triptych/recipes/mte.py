"""Recipes of MTE (Li et al. 2024): every base's own recipe, wrapped."""

from collections.abc import Callable

from triptych.encoders import SwinConfig
from triptych.methods import HSSLConfig, MSNConfig, MTEConfig
from triptych.recipe import Recipe
from triptych.recipes import contrastive, dino, ibot, masked, mmc, udi

# Base recipe -> what the authors report for MTE over it (k-NN / linear); "" = no such row.
BASES: dict[Callable[[], Recipe], str] = {
    dino.dino_vits16_2crop_in1k_100ep: "k-NN 66.6, linear 70.6",
    dino.dino_vits16_2crop_in1k_300ep: "k-NN 70.8, linear 73.7",
    dino.dino_swint_in1k_100ep: "k-NN 67.1, linear 72.1",
    ibot.ibot_vits16_in1k_100ep: "k-NN 68.8, linear 73.1",
    ibot.ibot_vits16_in1k_300ep: "k-NN 72.4, linear 75.4",
    ibot.ibot_vits16_multicrop_in1k_100ep: "k-NN 74.1, linear 76.7",
    ibot.ibot_vitb16_multicrop_in1k_100ep: "k-NN 76.0, linear 78.9",
    ibot.hssl_vits16_in1k_100ep: "k-NN 69.3, linear 73.6",
    contrastive.mocov3_vits16_in1k_300ep: "k-NN 67.9, linear 73.3",
    contrastive.byol_vits16_in1k_100ep: "k-NN 65.5, linear 70.7",
    contrastive.moby_swint_in1k_100ep: "k-NN 66.0, linear 72.8",
    contrastive.moby_swint_in1k_300ep: "k-NN 71.4, linear 76.1",
    udi.udi_vits16_in1k_100ep: "",
    udi.udi_small: "",
    dino.dino_small: "",
    ibot.ibot_small: "",
    ibot.hssl_small: "",
    contrastive.byol_small: "",
    contrastive.mocov3_small: "",
    contrastive.moby_small: "",
    contrastive.swav_small: "",
    contrastive.simclr_small: "",
    mmc.mmc_small: "",
    masked.sit_small: "",
    masked.mcssl_small: "",
    masked.msn_small: "",
}


def mte(recipe: Recipe, **options) -> Recipe:
    """The recipe with MTE over its method; on a Swin without auxiliary class tokens, for which it has no place."""
    if isinstance(recipe.encoder, SwinConfig):
        options = {"aux": 0} | options
    if isinstance(recipe.method, HSSLConfig):
        options = {"weights": (2.0, 1.0)} | options  # its loss between global tokens counts half: (4) is to count whole
    if isinstance(recipe.method, MSNConfig):
        options |= {"pooled": 0}  # without a whole grid of patches nothing can be pooled
    wrapped = MTEConfig(base=recipe.method, **options)  # type: ignore[arg-type]
    return recipe.model_copy(update={"name": f"mte_{recipe.name}", "method": wrapped})


def _named(base: Callable[[], Recipe], expected: str) -> Callable[[], Recipe]:
    def make() -> Recipe:
        # Small crops have grids on which the paper's 11 x 11 kernel is mostly padding.
        return mte(base(), pool_kernel=5) if base.__name__.endswith("_small") else mte(base())

    make.__name__ = f"mte_{base.__name__}"
    make.__doc__ = f"""MTE over {(base.__doc__ or "").split(chr(10))[0]}

    triptych train --recipe {make.__name__} --data DATA
    Expect: {expected + " (authors)" if expected else "no published number"}.  Status: docs/log.md.
    """
    return make


RECIPES: tuple[Callable[[], Recipe], ...] = tuple(_named(base, expected) for base, expected in BASES.items())
