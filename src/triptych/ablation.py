"""MMC's Table 4 on anybody's images: every combination of its three losses, trained, measured and fine-tuned."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from triptych import distributed
from triptych.errors import UserError
from triptych.recipe import Recipe
from triptych.run_finetune import for_run
from triptych.settings import Flat, resolve

# Row of the table -> weights of L_MIM, L_PAT, L_CLS (`--method.weights`); the rows in the paper's order.
COMBINATIONS: dict[str, tuple[int, int, int]] = {
    "pixels": (1, 0, 0),
    "class": (0, 0, 1),
    "patch": (0, 1, 0),
    "patch+class": (0, 1, 1),
    "pixels+patch": (1, 1, 0),
    "pixels+class": (1, 0, 1),
    "pixels+patch+class": (1, 1, 1),
}
TAKEN = ("views.global_size", "views.mean", "views.std")  # with the encoder, from the pre-trained run
TUNING = "tuning."  # overrides of the fine-tuning recipe begin with it


def ablate(
    data: str,
    test: str | None,
    *,
    recipe: str,
    finetune: str | None,
    rows: Sequence[str] | None,
    out: Path,
    k: int,
    overrides: Flat,
) -> list[dict[str, Any]]:
    """Trains (or goes on with) every row under out/ROW, fine-tunes it under out/ROW-finetuned, and measures.

    -> one dict per row: losses, knn_class, knn_patch, finetuned (top-1 percent; None without fine-tuning).
    Under torchrun all processes train; the first one measures and returns the rows, the others return none.
    """
    from triptych.evaluation import labelled_pair
    from triptych.train import check_run, train

    chosen = list(COMBINATIONS) if rows is None else list(dict.fromkeys(rows))
    if not chosen:
        raise UserError(f"--rows without a name: give some of {', '.join(COMBINATIONS)}, or leave it out for all")
    if k < 1:
        raise UserError(f"--k {k}: give a number of neighbours from 1")
    if unknown := [row for row in chosen if row not in COMBINATIONS]:
        raise UserError(f"no row {unknown[0]!r} in the table; there are {', '.join(COMBINATIONS)}")
    recipes = {row: row_recipe(recipe, row, overrides) for row in chosen}
    tuned = {row: tuning_recipe(finetune, recipes[row], out / row, overrides) for row in chosen} if finetune else {}
    distributed.start()
    try:
        pair = distributed.first_process_first(lambda: labelled_pair(data, test))
        for one in recipes.values():
            check_run(one, pair[0])
        with _of_tuning():
            for one in tuned.values():
                check_run(one, pair[0])
        if k > len(pair[0]):
            raise UserError(f"--k {k} neighbours of {len(pair[0])} training images: use fewer")
        for row in chosen:
            _say(f"{row}: pre-training")
            train(recipes[row], pair[0], out / row)
        for row, one in tuned.items():
            _say(f"{row}: fine-tuning")
            train(one, pair[0], out / f"{row}-finetuned")
        main = distributed.is_main()
    finally:
        distributed.stop()
    return [measure(row, out, data, test, k, row in tuned) for row in chosen] if main else []


def row_recipe(name: str, row: str, overrides: Flat) -> Recipe:
    """The MMC recipe with the row's losses.  Raises UserError for the recipe of another method."""
    own = {key: value for key, value in overrides.items() if not key.startswith(TUNING)}
    if "method.weights" in own:
        raise UserError("--method.weights are what the table varies: leave them out, or choose --rows")
    found, _ = resolve(name, None, own)
    if found.method.name != "mmc":
        raise UserError(f"--recipe {name} trains {found.method.name}: the table is about the losses of mmc")
    if not COMBINATIONS[row][2] and found.views.local_crops:
        own["views.local_crops"] = 0  # without L_CLS nothing reads them
    found, _ = resolve(name, None, own | {"method.weights": list(COMBINATIONS[row])})
    return found


def tuning_recipe(name: str, trained: Recipe, run: Path, overrides: Flat) -> Recipe:
    """The fine-tuning recipe for what a run trained: its encoder, image size and normalisation."""
    own = {key.removeprefix(TUNING): value for key, value in overrides.items() if key.startswith(TUNING)}
    taken = [k for k in own if k in TAKEN or (k.startswith("encoder.") and k != "encoder.drop_path")]
    if taken:
        raise UserError(f"--{TUNING}{taken[0]}: fine-tuning takes it from the pre-trained run, leave it out")
    with _of_tuning():
        found, _ = resolve(name, None, own)
    if found.method.name != "supervised":
        raise UserError(f"--finetune {name} trains {found.method.name}: give a recipe of supervised training, or none")
    found = for_run(found, trained, own)
    return found.model_copy(update={"encoder": found.encoder.model_copy(update={"weights": str(run)})})


@contextmanager
def _of_tuning() -> Iterator[None]:
    """What goes wrong here is to be mended with options that begin with `tuning.`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"fine-tuning, whose options begin with --{TUNING}: {error}") from error


def measure(row: str, out: Path, data: str, test: str | None, k: int, tuned: bool) -> dict[str, Any]:
    """The teacher's class token and mean patch by k-NN, the fine-tuned classifier as it is."""
    from triptych.run_evals import eval_classify
    from triptych.run_frozen import Asked, eval_knn

    results = out / "results.jsonl"
    asked = Asked(data, test, results, token=("cls", "patch_mean"))
    values = [found["top1"][k] for found in eval_knn(str(out / row), asked, k=[k])]
    top1 = None
    if tuned:
        found = eval_classify(str(out / f"{row}-finetuned"), data, test, results, weights="teacher", size=None)
        top1 = found["top1"]["global"]
    return {"losses": row, "knn_class": values[0], "knn_patch": values[1], "finetuned": top1}


def table(rows: list[dict[str, Any]], k: int) -> Table:
    """Percent, a row per combination."""
    shown = Table("losses", f"{k}-NN, class token", f"{k}-NN, mean patch", "fine-tuned, top-1", title="MMC's losses, %")
    for row in rows:
        numbers = (row["knn_class"], row["knn_patch"], row["finetuned"])
        shown.add_row(row["losses"], *("-" if x is None else f"{x:.2f}" for x in numbers))
    return shown


def _say(text: str) -> None:
    if distributed.is_main():
        Console().print(text, highlight=False, markup=False)
