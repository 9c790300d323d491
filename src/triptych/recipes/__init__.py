"""Recipes: functions that return a typed value.  The docstring's first line is what `triptych list` prints."""

from collections.abc import Callable

from triptych.recipe import Recipe
from triptych.recipes import dino, udi

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
    )
}
DEFAULT = "udi_small"
