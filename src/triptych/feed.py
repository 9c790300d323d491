"""What a run is fed with: batches of a recipe's views, from the source or its cache, as fast as this machine can."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from triptych import distributed
from triptych.data import placement
from triptych.data.batches import Batches
from triptych.data.loader import ViewDataset, make_loader
from triptych.data.sources import Source
from triptych.data.views import Views
from triptych.data.workers import close, default_workers, next_of
from triptych.methods import METHODS
from triptych.recipe import Recipe
from triptych.run_folder import stored


def settle_colour(
    recipe: Recipe, source: Source, patch_size: int, device: torch.device, out: Path, say: Callable[[str], None]
) -> Recipe:
    """The recipe with "auto" in `loader.colour` settled: as in the run that `out` holds, else by a measurement here.

    Raises UserError where colours are asked of the device and cannot be changed there.
    """
    spec = METHODS[type(recipe.method)].view_spec(recipe.method)
    placement.check(recipe.loader.colour, recipe.views.colour, spec.corruption)
    if recipe.loader.colour != "auto":
        return recipe
    place = distributed.from_main(lambda: stored(out, "loader.colour", "workers"))
    if place is None:
        dataset = ViewDataset(source, recipe.views, spec, patch_size, recipe.seed)
        workers = default_workers() if recipe.loader.workers is None else recipe.loader.workers
        place, why = distributed.from_main(lambda: placement.choose(dataset, device, workers))
        say(f"colours are changed by the {place} ({why})")
    return recipe.model_copy(update={"loader": recipe.loader.model_copy(update={"colour": place})})


def view_batches(
    recipe: Recipe,
    source: Source,
    patch_size: int,
    device: torch.device,
    start: int = 0,
    show: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[Views, list[str]]]:
    """This process's views of every batch from optimiser step `start` on, and reasons of images that cannot be read.

    show: what the making of a cache is told to.
    """
    source = _cached(recipe, source, show)
    spec = METHODS[type(recipe.method)].view_spec(recipe.method)
    on_device = recipe.loader.colour == "device"
    dataset = ViewDataset(source, recipe.views, spec, patch_size, recipe.seed, colour_on_device=on_device)
    world = distributed.rank(), distributed.world_size()
    drawn = len(source), recipe.batch, recipe.epochs, recipe.seed, recipe.accumulate
    batches = Batches(*drawn, *world, start, recipe.views.repeats)
    return iter(make_loader(dataset, batches, recipe.loader, pin=device.type == "cuda"))


def first_views(recipe: Recipe, source: Source, patch_size: int, device: torch.device) -> Views:
    """This process's views of the first batch."""
    batches = view_batches(recipe, source, patch_size, device)
    try:
        return next_of(batches)[0]
    finally:
        close(batches)


def _cached(recipe: Recipe, source: Source, show: Callable[[str], None]) -> Source:
    side = recipe.loader.cache_side
    if side is None:
        return source
    from triptych.data.shrunk import shrunk  # here: its file locks exist on Unix alone

    def progress(images: int, size: int) -> None:
        show(f"making a cache of {side} pixels: {images} of {len(source)} images, {size / 1e9:.2f} GB")

    workers = recipe.loader.workers
    return distributed.first_process_first(lambda: shrunk(source, side, workers=workers, show=progress))
