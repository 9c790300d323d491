"""`triptych eval finetune`: train an encoder on labels, then measure the classifier."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from triptych import distributed
from triptych.data.sources import Source
from triptych.data.subsets import Subset
from triptych.encoders import ViTConfig
from triptych.encoders.load import load_encoder, load_method, of_run
from triptych.errors import UserError
from triptych.evals.features import encoder_hash
from triptych.evals.finetune import finetune
from triptych.evals.outcome import about_images
from triptych.evals.protocols import Labels
from triptych.evals.published import known_set, published
from triptych.evaluation import console, labelled_pair, report, say, writable
from triptych.methods import METHODS
from triptych.recipe import Recipe
from triptych.run_folder import slug
from triptych.settings import Flat, flat, nested, parse_overrides, resolve


def eval_finetune(
    model: str,
    data: str,
    test: str | None,
    out: Path,
    *,
    recipe: str,
    run: Path | None,
    overrides: list[str],
    few: Labels | None = None,
    draw: int = 0,
) -> dict | None:
    """Under torchrun all processes train; the first one measures."""
    writable(out)
    if not Path(model).exists():
        raise UserError(f"{model}: fine-tuning starts from a run, a checkpoint, an export or a file of weights")
    own = parse_overrides(overrides)
    found, _ = resolve(recipe, None, own)
    if of_run(model):
        trained = load_method(model, "untrained")[0]
        found = for_run(found, trained, own, size=found.name.endswith("_small"))  # the others state theirs
    distributed.start()
    try:
        train, held = distributed.first_process_first(lambda: labelled_pair(data, test))
        if few is not None:
            train = _labelled_part(train, few, draw)
        part = "" if few is None else f"-{few.name}-{draw}"
        folder = run or Path("runs") / slug(f"{found.name}-{Path(model).name}-{Path(data).name}{part}")
        result = finetune(model, train, held, recipe=found, out=folder, console=console)
    finally:
        distributed.stop()
    if result is None:  # not the first process
        return None
    table = Table("", "", title=f"fine-tuned, {model}, {found.name}")
    table.add_row("top-1 %, after the last epoch", f"{result.top1:.2f}")
    table.add_row("top-5 %, after the last epoch", f"{result.top5:.2f}")
    if result.average_top1 is not None:
        table.add_row("top-1 % of the average of weights", f"{result.average_top1:.2f}")
    start = encoder_hash(load_encoder(model).encoder)
    about: dict[str, Any] = {"model": model, "encoder": start, "labels": vars(few) if few else None}
    about |= {"draw": draw, "seed": found.seed}
    for row in published(known_set(held), {"finetune"}):
        say(f"reported by the papers, not measured here: {row.figure}, {row.encoder}: {row.value:.1f}")
    return report("finetune", asdict(result), about | about_images(train=train, test=held), table, out)


def for_run(recipe: Recipe, trained: Recipe, own: Flat, *, size: bool = True) -> Recipe:
    """A recipe of fine-tuning with the encoder, normalisation and image size (if so wanted) of what a run trained.

    own: settings that the user gave, which win.
    """
    encoder: dict[str, Any] = {"drop_path": recipe.encoder.drop_path}
    if isinstance(trained.encoder, ViTConfig):  # class+ stays, as a register
        plus = METHODS[type(trained.method)].token_spec(trained.method).cls_plus
        encoder["registers"] = trained.encoder.registers + plus
    taken: dict[str, Any] = {"encoder": trained.encoder.model_copy(update=encoder)}
    views = {"mean": trained.views.mean, "std": trained.views.std}
    if size:
        views |= {"global_size": trained.views.global_size}
    taken["views"] = recipe.views.model_copy(update=views)
    if trained.encoder.name == "swin" and recipe.method.name == "supervised":  # its class token is the mean patch
        taken["method"] = recipe.method.model_copy(update={"token": "cls"})
    return Recipe.model_validate(nested(flat(recipe.model_copy(update=taken).model_dump()) | own))


def _labelled_part(train: Source, few: Labels, draw: int) -> Source:
    every = torch.arange(len(train))
    labels = [train.label(i) for i in range(len(train))]
    if any(label is None for label in labels):
        raise UserError(f"{train.name} has images without labels: a part of them cannot be chosen by class")
    (rows,) = few.subsets(train, every, torch.tensor(labels), draw)
    return Subset(train, rows.tolist(), f" [{few.name}, draw {draw}]")
