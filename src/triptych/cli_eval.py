"""`triptych eval`: one command per protocol.  Nothing heavy is imported before a command needs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

evaluate = App(name="eval", help="Measure a frozen encoder on labelled images.")

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


@evaluate.command(name="patches")
def eval_patches(
    model: Model,
    *,
    data: str,
    images: int = 2000,
    head: bool = False,
    weights: Literal["teacher", "student", "untrained"] = "teacher",
    size: int | None = None,
    arch: str | None = None,
    seed: int = 0,
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
    seed: int = 0,
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
