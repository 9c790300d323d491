"""The command line.  Nothing heavy is imported before a command needs it: --help and completion stay quick."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from triptych import __version__
from triptych.errors import Interrupted, NonFinite, UserError

app = App(
    name="triptych",
    help="Pre-train vision encoders on your own images, and see how good they are.",
    version=__version__,
)
evaluate = App(name="eval", help="Measure a frozen encoder on labelled images.")
app.command(evaluate)

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]


@app.command
def train(
    *overrides: Overrides,
    data: str | None = None,
    recipe: str = "udi_small",
    config: Path | None = None,
    out: Path | None = None,
    show: bool = False,
) -> None:
    """Pre-train an encoder on images.  The same command goes on with a run that was stopped.

    Every field of the recipe can be set by its dotted name: `--epochs 50 --method.alpha 0.3`; `--show` lists them.

    Parameters
    ----------
    data
        Folder, .zip, .tar, list of paths (.txt) or data set name; see `triptych list`.  The only required argument.
    recipe
        Name of a recipe; see `triptych list`.
    config
        YAML file of recipe fields, such as a run's recipe.yaml; the command line wins over it.
    out
        Folder of the run.  Default: runs/RECIPE-DATA.
    show
        Print the resolved recipe and where each value comes from, then stop.
    """
    from triptych import commands

    commands.train(data, recipe, config, out, show, list(overrides))


@app.command
def ablate(
    *overrides: Overrides,
    data: str,
    test: str | None = None,
    recipe: str = "mmc_small",
    finetune: str = "finetune_small",
    rows: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    k: int = 10,
    out: Path = Path("runs/ablation"),
) -> None:
    """MMC's Table 4: train every combination of its three losses, k-NN on class and patch tokens, fine-tune.

    The same command goes on with what was stopped.  Settings of the recipe are given as for `train`, those of the
    fine-tuning with the prefix `tuning.`: `--epochs 50 --tuning.epochs 20`.

    Parameters
    ----------
    data
        Labelled images; labels are used by k-NN and fine-tuning only.
    test
        Labelled images to measure on.  Default: the data's own held-out part.
    recipe
        A recipe of MMC; see `triptych list`.
    finetune
        A recipe of supervised training, or none.
    rows
        Combinations such as pixels or patch+class.  Default: all seven.
    k
        Number of neighbours.
    out
        Folder of the runs.
    """
    from triptych import commands

    tuned = None if finetune == "none" else finetune
    commands.ablate(data, test, out, list(overrides), recipe=recipe, finetune=tuned, rows=rows, k=k)


@app.command
def cost(*overrides: Overrides, recipe: str = "udi_small", config: Path | None = None, size: int | None = None) -> None:
    """Print what each part of a method costs: multiply-accumulates and parameters, in training and after it.

    Fields of the recipe are set as for `train`: `--encoder.arch vit_base_patch16_224 --method.pooled 3`.

    Parameters
    ----------
    recipe
        Name of a recipe; see `triptych list`.
    config
        YAML file of recipe fields, such as a run's recipe.yaml; the command line wins over it.
    size
        Pixels of the image.  Default: the recipe's global crops.
    """
    from triptych import commands

    commands.cost(recipe, config, list(overrides), size)


@app.command(name="list")
def list_() -> None:
    """Print all methods, encoders, recipes, sources and evaluations."""
    from triptych import commands

    commands.list_all()


@app.command
def quickstart(out: Path = Path("quickstart")) -> None:
    """Draw a small data set, pre-train a small ViT on it with UDI, and show what it learned (under 3 minutes).

    Parameters
    ----------
    out
        Folder that receives the images, the run, the picture and the exported encoder; must be new or empty.
    """
    from triptych.quickstart import quickstart as run

    run(out)


Model = Annotated[str, Parameter(help="A run's folder, an export, a file of weights or a timm name.")]
Run = Annotated[str, Parameter(help="A run's folder or one of its checkpoints.")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Measured:
    """What every evaluation takes.

    Parameters
    ----------
    data
        Labelled images to learn from; a folder with train/ and val/ is both.
    test
        Labelled images to measure on.  Default: the data's own held-out part.
    weights
        Of a run: the teacher (of a supervised run the average of weights), the student, or before training.
    size
        Pixels of the evaluated images.  Default: what the encoder was trained on.
    out
        File that the result is appended to as one JSON line.
    """

    data: str
    test: str | None = None
    weights: Literal["teacher", "student", "untrained"] = "teacher"
    size: int | None = None
    out: Path = Path("results.jsonl")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Frozen(Measured):
    """What the protocols on one vector per image take.

    Parameters
    ----------
    token
        cls_plus is UDI's class+ token.
    layers
        Class tokens of so many last blocks, concatenated (linear in the papers: 4 for ViT-S).
    more
        Further models, whose features are put beside the first one's, each of unit length.
    arch
        timm name of the architecture, where a bare file of weights leaves the heads open.
    cache
        Keep and reuse extracted features under ~/.cache/triptych (or $TRIPTYCH_CACHE).
    """

    token: Literal["cls", "cls_plus", "patch_mean", "cls+patch_mean"] = "cls"
    layers: int = 1
    more: Annotated[list[str] | None, Parameter(name="--with", consume_multiple=True, negative="")] = None
    arch: str | None = None
    cache: bool = True


@evaluate.command(name="knn")
def eval_knn(
    model: Model,
    *,
    k: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
    temperature: float = 0.07,
    options: Frozen,
) -> None:
    """Weighted nearest neighbours on frozen features.

    Parameters
    ----------
    k
        Numbers of neighbours, default 10 20 100 200.
    temperature
        Of the votes exp(cosine / T).
    """
    from triptych import commands

    commands.eval_knn(model, k=k, temperature=temperature, **vars(options))


@evaluate.command(name="linear")
def eval_linear(
    model: Model,
    *,
    epochs: int = 100,
    batch: int = 256,
    select: Literal["held_out", "test"] = "held_out",
    norm: Literal["none", "batch"] = "none",
    seed: int = 0,
    options: Frozen,
) -> None:
    """A linear classifier on frozen features; several learning rates at once, one chosen.

    Parameters
    ----------
    select
        What the rate is chosen on: a held-out tenth of the training images, or the test images (the papers' way).
    norm
        "batch" standardises features with the training mean and deviation (MAE's way).
    """
    from triptych import commands

    probe = {"epochs": epochs, "batch": batch, "select": select, "norm": norm, "seed": seed}
    commands.eval_linear(model, probe=probe, **vars(options))


@evaluate.command(name="tokens")
def eval_tokens(run: Run, *, k: int = 10, linear: bool = False, options: Measured) -> None:
    """What each auxiliary token of a run knows, alone, in pairs and together, and that removing them costs nothing.

    Parameters
    ----------
    k
        Number of neighbours.
    linear
        Linear classifiers too, on the global token and on all auxiliary tokens together.
    """
    from triptych import run_evals

    run_evals.eval_tokens(run, k=k, probe=linear, **vars(options))


@evaluate.command(name="classify")
def eval_classify(run: Run, *, options: Measured) -> None:
    """The classifiers that a supervised run trained: nothing is learned here.

    Without `--test` it measures on the data's own held-out part or, where it has none, on all of the data.
    """
    from triptych import run_evals

    run_evals.eval_classify(run, **vars(options))


@evaluate.command(name="variance")
def eval_variance(
    model: Model,
    *,
    data: str,
    views: int = 128,
    images: int | None = None,
    scale: Annotated[tuple[float, float], Parameter(negative="")] = (0.25, 1.0),
    size: int | None = None,
    weights: Literal["teacher", "student", "untrained"] = "teacher",
    arch: str | None = None,
    seed: int = 0,
    out: Path = Path("results.jsonl"),
) -> None:
    """How much the global token varies under random crops of an image, and patch tokens where half of it is hidden.

    Parameters
    ----------
    data
        Images, labelled or not; of data with a held-out part, that part.
    views
        Crops of each image, and as many maskings.
    images
        At most so many images, drawn by the seed.  Default: all.
    scale
        Smallest and largest share of the image's area that a crop has.
    size
        Pixels of the crops.  Default: what the encoder was trained on.
    weights
        Of a run: the teacher, the student, or before training.
    arch
        timm name of the architecture, where a bare file of weights leaves the heads open.
    out
        File that the result is appended to as one JSON line.
    """
    from triptych import run_evals

    options = {"views": views, "images": images, "scale": scale, "seed": seed}
    run_evals.eval_variance(model, data, out, size=size, weights=weights, arch=arch, **options)


@evaluate.command(name="reconstruction")
def eval_reconstruction(
    run: Run,
    *,
    data: str,
    out: Path = Path("reconstruction.png"),
    images: int = 4,
    blocks: Annotated[list[int] | None, Parameter(consume_multiple=True, negative="")] = None,
    norm: bool = True,
    seed: int = 0,
) -> None:
    """A picture of what the pixel head of MMC, SiT, GMML or MC-SSL makes of the student's patches after each block.

    Parameters
    ----------
    data
        Images, labelled or not; of data with a held-out part, that part.
    out
        File of the picture.
    images
        Rows of the picture, drawn by the seed.
    blocks
        Counted from 1.  Default: the upper half.
    norm
        The patches pass the encoder's final norm before the head.
    """
    from triptych import run_evals

    run_evals.eval_reconstruction(run, data, out, images=images, blocks=blocks or (), norm=norm, seed=seed)


@app.command
def export(
    model: Model, *, out: Path, weights: Literal["teacher", "student"] = "teacher", size: int | None = None
) -> None:
    """Write an encoder for other software: safetensors, config and model card; loads in timm.

    Parameters
    ----------
    out
        New folder.
    weights
        Of a run.
    size
        Pixels of the images that the written config expects.  Default: what it was trained on.
    """
    from triptych import commands

    commands.export(model, out, weights, size)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: users' mistakes end with a message and exit code 2."""
    try:
        app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        sys.exit(2)
    except (UserError, OSError) as error:  # OSError: a path that cannot be read or written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        print(f"{stopped}; the same command goes on from here")
        sys.exit(stopped.exit_code)
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
