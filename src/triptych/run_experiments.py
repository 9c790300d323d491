"""`triptych eval gradients` and `eval patches`: what tells apart the readings of a loss (docs/methods/mmc.md)."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor

from triptych.data.batches import Batches
from triptych.data.loader import ViewDataset, collate
from triptych.data.sources import open_source
from triptych.encoders.load import load_encoder, load_method
from triptych.errors import UserError
from triptych.evals.features import encoder_hash
from triptych.evals.gradients import gradients, trained_encoder
from triptych.evals.outcome import about_images
from triptych.evals.patches import patches
from triptych.evals.transform import EvalTransform
from triptych.evaluation import device, report, writable
from triptych.health import sample_of
from triptych.methods import METHODS, Method
from triptych.methods.base import Tower
from triptych.recipe import of_source
from triptych.schedules import Progress
from triptych.step import seed_all


def eval_gradients(run: str, data: str, out: Path, *, weights: str, batches: int, seed: int) -> dict:
    """Of the run's own batches, made from the images as in training, at its last step."""
    check_numbers(batches=batches, seed=seed)
    writable(out)
    source = open_source(data)
    recipe, method, name = load_method(run, weights)  # type: ignore[arg-type]
    recipe = of_source(recipe, source)
    part = recipe.batch // recipe.accumulate  # images of one forward pass
    if len(source) < part:
        raise UserError(f"{source.name} has {len(source)} images: the run's batches take {part}, give at least as many")
    per_epoch = len(source) // part
    step = int(name.rpartition("@")[2]) - 1 if "@" in name else 0
    t = Progress(max(step, 0), max(recipe.epochs * per_epoch, step + 1), per_epoch)
    spec = METHODS[type(recipe.method)].view_spec(recipe.method)
    images = ViewDataset(source, recipe.views, spec, method.encoder.patch_size, seed)
    mean, std = (torch.tensor(x, device=device()) for x in (recipe.views.mean, recipe.views.std))

    def drawn():
        keys = iter(Batches(len(source), part, 1 + batches // per_epoch, seed, repeats=recipe.views.repeats))
        for number in range(batches):
            seed_all(hash((seed, number)))
            yield collate([images[key] for key in next(keys)])[0].on_device(device(), mean, std)

    result = gradients(method.to(device()), drawn(), t)
    table = Table("", "", title=f"gradient at the encoder's last block, {result.batches} batches of {part}")
    for term, norm in result.norms.items():
        table.add_row(f"norm of {term}, before its weight", f"{norm:.4g}")
    table.add_row("norm of the whole loss", f"{result.loss:.4g}")
    for pair, cosine in result.cosines.items():
        table.add_row(f"cosine of {pair}", f"{cosine:.3f}")
    about = {"model": f"{name} ({weights})", "encoder": encoder_hash(trained_encoder(method)), "seed": seed}
    about |= about_images(train=source)
    return report("gradients", asdict(result), about, table, out)


def eval_patches(model: str, data: str, out: Path, *, weights, size, arch, images: int, head: bool, seed: int) -> dict:
    check_numbers(images=images, seed=seed)
    writable(out)
    loaded = load_encoder(model, weights=weights, arch=arch)
    loaded.encoder.to(device())
    tower = patch_tower(load_method(model, weights)[1], weights).to(device()).eval() if head else None

    def embed(x: Tensor) -> Tensor:
        if tower is None:
            return loaded.encoder(x).patch
        return tower.patch_projector(tower.encoder(x).patch.flatten(0, 1)).unflatten(0, (len(x), -1))

    pixels = size or loaded.size
    loaded.encoder.grid(pixels, pixels)
    source = sample_of(open_source(data), images, seed)
    transform = EvalTransform.of(pixels, loaded.mean, loaded.std)
    result = patches(embed, source, transform, device=device())
    what = "embeddings of the patch head" if head else "patch tokens"
    table = Table("", "", title=f"{what} of {result.images} images, {loaded.name}")
    table.add_row("similarity within an image", f"{result.within:.4f}")
    table.add_row("between images", f"{result.between:.4f}")
    table.add_row("between images, same position", f"{result.same_position:.4f}")
    table.add_row("position told by a linear map, top-1 %", f"{result.position_top1:.2f} (chance {result.chance:.2f})")
    about = {"model": loaded.name, "encoder": encoder_hash(loaded.encoder), "head": head, "seed": seed}
    about |= about_images(test=source) | {"size": transform.size}
    return report("patches", asdict(result), about, table, out)


def check_numbers(*, seed: int, **at_least_one: int) -> None:
    for name, number in at_least_one.items():
        if number < 1:
            raise UserError(f"--{name} {number}: give at least 1")
    if seed < 0:
        raise UserError(f"--seed {seed}: give a number of 0 or more")


def patch_tower(method: Method, weights: str) -> Tower:
    """The branch with a head of its own for patches.  Raises UserError."""
    base: Any = getattr(method, "base", method)
    tower = getattr(base, "student" if weights == "student" else "teacher", None)
    if not hasattr(tower, "patch_projector"):
        raise UserError(f"{base.config.name} has no head of its own for patches (mmc has): leave out --head")
    if not any(p.requires_grad for p in base.student.patch_projector.parameters()):
        raise UserError(f"this run ({base.config.name}) never trained its head for patches: its loss has weight 0")
    return cast(Tower, tower)
