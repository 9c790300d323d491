"""`triptych eval` of runs and of patches: what needs more than one vector of each image."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from triptych.cli_eval import Measured, Model, Pixels, Seed, evaluate

Run = Annotated[str, Parameter(help="A run's folder or one of its checkpoints.")]


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
    size: Pixels = None,
    weights: Literal["teacher", "student", "untrained"] = "teacher",
    arch: str | None = None,
    seed: Seed = 0,
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
    seed: Seed = 0,
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


@evaluate.command(name="patches")
def eval_patches(
    model: Model,
    *,
    data: str,
    images: int = 2000,
    head: bool = False,
    weights: Literal["teacher", "student", "untrained"] = "teacher",
    size: Pixels = None,
    arch: str | None = None,
    seed: Seed = 0,
    out: Path = Path("results.jsonl"),
) -> None:
    """What patch tokens share within an image and between images, and whether they tell where they stand.

    Parameters
    ----------
    data
        Images; labels are not used.
    images
        At most so many, drawn at random.
    head
        Of a run of MMC: the embeddings after its head for patches instead of the tokens.
    weights
        Of a run: the teacher, the student, or before training.
    size
        Pixels of the evaluated images.  Default: what the encoder was trained on.
    arch
        timm name of the architecture, where a bare file of weights leaves the heads open.
    seed
        Of the draw.
    out
        File that the result is appended to as one JSON line.
    """
    from triptych import run_experiments

    options = {"weights": weights, "size": size, "arch": arch, "images": images, "head": head, "seed": seed}
    run_experiments.eval_patches(model, data, out, **options)


@evaluate.command(name="gradients")
def eval_gradients(
    run: Run,
    *,
    data: str,
    batches: int = 8,
    weights: Literal["teacher", "untrained"] = "teacher",
    seed: Seed = 0,
    out: Path = Path("results.jsonl"),
) -> None:
    """How hard each term of a run's loss pulls at the encoder's last block, and whether the terms agree.

    Parameters
    ----------
    data
        Images, made into views as in training; labels are used where the method does.
    batches
        Number of the recipe's batches that are averaged over.
    weights
        The run as trained, or before training.
    seed
        Of crops, corruption and noise.
    out
        File that the result is appended to as one JSON line.
    """
    from triptych import run_experiments

    run_experiments.eval_gradients(run, data, out, weights=weights, batches=batches, seed=seed)


@evaluate.command(name="prototypes")
def eval_prototypes(
    run: Run,
    *,
    data: str,
    weights: Literal["teacher", "student", "untrained"] = "teacher",
    size: Pixels = None,
    seed: Seed = 0,
    out: Path = Path("results.jsonl"),
) -> None:
    """The prototype that a run gives each image as its class: unsupervised classification (iBOT), without k-means.

    Parameters
    ----------
    data
        Labelled images; of data with a held-out part, that part.  Labels are only compared with.
    weights
        The teacher, the student, or before training.
    size
        Pixels of the evaluated images.  Default: what the encoder was trained on.
    seed
        Of the shuffled labels that tell what chance gives.
    out
        File that the result is appended to as one JSON line.
    """
    from triptych import run_evals

    run_evals.eval_prototypes(run, data, out, weights=weights, size=size, seed=seed)


@evaluate.command(name="finetune")
def eval_finetune(
    model: Model,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    data: str,
    test: str | None = None,
    recipe: str = "finetune_small",
    share: float | None = None,
    per_class: int | None = None,
    labels: str | None = None,
    draw: Seed = 0,
    run: Path | None = None,
    out: Path = Path("results.jsonl"),
) -> None:
    """Train the whole encoder on labels by a recipe, then measure its classifier after the last epoch.

    The same command goes on with what was stopped.  Settings of the recipe are given as for `train`: `--epochs 50`.

    Parameters
    ----------
    data
        Labelled images to train on; a folder with train/ and val/ is both.
    test
        Labelled images to measure on.  Default: the data's own held-out part.
    recipe
        Of fine-tuning, transfer or low-shot; see `triptych list`.
    share
        Train on some labels only: a share of each class (0.01) ...
    per_class
        ... or so many images of each ...
    labels
        ... or those that a file lists, such as SimCLR's 1percent.txt.
    draw
        Number of the random choice of these images.
    run
        Folder of the run.  Default: runs/RECIPE-MODEL-DATA, and which labels.
    out
        File that the result is appended to as one JSON line.
    """
    from triptych import run_finetune
    from triptych.evals.protocols import Labels

    some = share is not None or per_class is not None or labels is not None
    few = Labels(share=share, per_class=per_class, file=labels, draws=1) if some else None
    options = {"recipe": recipe, "run": run, "overrides": list(overrides), "few": few, "draw": draw}
    run_finetune.eval_finetune(model, data, test, out, **options)
