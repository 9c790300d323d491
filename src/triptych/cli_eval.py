"""`triptych eval`: one command per protocol.  Nothing heavy is imported before a command needs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter, validators

if TYPE_CHECKING:
    from triptych.run_frozen import Asked

evaluate = App(name="eval", help="Measure a frozen encoder on labelled images.")

Seed = Annotated[int, Parameter(validator=validators.Number(gte=0))]
Pixels = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]
Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Model = Annotated[str, Parameter(help="A run's folder, an export, a file of weights or a timm name.")]
MODELS = Parameter(help="Runs' folders, exports, files of weights or timm names.")


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
    size: Pixels = None
    out: Path = Path("results.jsonl")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which weights of a model, and what a bare file of them leaves open.

    Parameters
    ----------
    weights
        Of a run, or a checkpoint that holds both: the teacher, the student; of a run or a timm name: before training.
    arch
        timm name of the architecture of a bare file of weights, which leaves the number of heads open.
    heads
        That number itself, of an architecture that timm does not name.
    origin
        Whose a bare file of weights is, where its names do not tell; see docs/encoders.md.
    partial
        Of a bare file of weights take what fits, and leave the rest random.
    """

    weights: Literal["teacher", "student", "untrained"] = "teacher"
    arch: str | None = None
    heads: Count | None = None
    origin: str | None = None
    partial: Annotated[bool, Parameter(negative="")] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Encoder(Weights):
    """Which encoder, and where its results go.

    Parameters
    ----------
    cache
        Keep and reuse extracted features under ~/.cache/triptych (or $TRIPTYCH_CACHE).
    out
        File that results are appended to as JSON lines.
    """

    cache: bool = True
    out: Path = Path("results.jsonl")

    def subject(self) -> dict:
        """As of `evaluation.subject_of`."""
        return {name: getattr(self, name) for name in ("weights", "cache", "arch", "heads", "origin", "partial")}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Frozen(Encoder):
    """What the protocols on one vector per image take.

    Parameters
    ----------
    data
        Labelled images to learn from; a folder with train/ and val/ is both.
    test
        Labelled images to measure on.  Default: the data's own held-out part.
    size
        Pixels of the evaluated images.  Default: what the encoder was trained on.
    token
        One or several of cls, cls_plus (UDI), patch_mean, cls+patch_mean, cls_raw (before the final norm), cls+gem,
        attended_N (mean of the N patches that the class token attends to most).
        Default: cls, or what a preset says.
    layers
        Class tokens of so many last blocks, concatenated.  Default: 1, or what a preset says.
    more
        Further models, whose features are put beside the first one's, each of unit length.
    """

    data: str
    test: str | None = None
    size: Pixels = None
    token: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None
    layers: Count | None = None
    more: Annotated[list[str] | None, Parameter(name="--with", consume_multiple=True, negative="")] = None

    def asked(self, *default: str) -> "Asked":
        """default: tokens where none is given; none of them: the preset's."""
        from triptych.run_frozen import Asked

        encoder = self.subject() | {"more": self.more, "size": self.size}
        tokens = list(dict.fromkeys(self.token or default))
        return Asked(self.data, self.test, self.out, tokens, self.layers, encoder)


@evaluate.command(name="knn")
def eval_knn(
    model: Model,
    *,
    k: Annotated[list[int] | None, Parameter(consume_multiple=True, negative="")] = None,
    preset: Literal["dino", "udi", "mte", "mmc"] | None = None,
    temperature: float = 0.07,
    options: Frozen,
) -> None:
    """Weighted nearest neighbours on frozen features.

    Parameters
    ----------
    k
        Numbers of neighbours, default 10 20 100 200.
    preset
        The numbers of neighbours of a paper instead.
    temperature
        Of the votes exp(cosine / T).
    """
    from triptych import run_frozen

    run_frozen.eval_knn(model, options.asked("cls"), k=k, preset=preset, temperature=temperature)


@evaluate.command(name="linear")
def eval_linear(
    model: Model,
    *,
    preset: Literal["sweep", "dino", "ibot", "mae", "msn", "udi"] = "sweep",
    augment: Annotated[bool, Parameter(negative="")] = False,
    epochs: int | None = None,
    batch: int | None = None,
    lrs: Annotated[list[float] | None, Parameter(consume_multiple=True, negative="")] = None,
    norm: Literal["none", "batch", "unit"] | None = None,
    select: Literal["held_out", "test", "paper"] = "held_out",
    seed: Seed = 0,
    options: Frozen,
) -> None:
    """A linear classifier on frozen features; several learning rates at once, one chosen.

    Parameters
    ----------
    preset
        Whose token, head, optimiser, rates, schedule and epochs.  sweep: SGD at eleven rates.
    augment
        Train on freshly augmented images as the paper does, instead of stored features: a pass of the encoder over the
        training images in every epoch.
    epochs
        Instead of the preset's.
    batch
        Instead of the preset's.
    lrs
        Instead of the preset's, per 256 images.
    norm
        Instead of the preset's: "batch" standardises features, "unit" makes them of unit length.
    select
        What rate and epoch are chosen on: a held-out tenth of the training images (the last epoch counts), the test
        images (the last epoch counts), or as the preset's authors do: mostly the best of all epochs on the test images.
    """
    from triptych import run_frozen

    probe = {"preset": preset, "augmented": augment, "select": select, "seed": seed}
    probe |= {"epochs": epochs, "batch": batch, "lrs": lrs, "norm": norm}
    run_frozen.eval_linear(model, options.asked(), **probe)


@evaluate.command(name="logistic")
def eval_logistic(
    model: Model,
    *,
    share: Annotated[list[float] | None, Parameter(consume_multiple=True, negative="")] = None,
    per_class: Annotated[list[int] | None, Parameter(consume_multiple=True, negative="")] = None,
    labels: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    draws: int = 3,
    preset: Literal["udi", "dino", "msn", "msn_few"] | None = None,
    lam: float | None = None,
    seed: Seed = 0,
    options: Frozen,
) -> None:
    """Logistic regression on few labels, solved to the optimum.  Default: 1 % and 10 % of the labels.

    Parameters
    ----------
    share
        Shares of the labels, 0 to 1, drawn by class.
    per_class
        Numbers of labelled images of each class.
    labels
        Files that list the labelled images, such as SimCLR's 1percent.txt.
    draws
        Random choices of the labelled images; their mean and its 95 % interval are told.
    preset
        Whose strength, rows and token: udi (λ = 0.1 / images), dino (λ = 0.1), msn (centred rows).  Default: udi.
    lam
        Another strength λ.
    """
    from triptych import run_frozen
    from triptych.evals.protocols import labels_asked

    few = labels_asked(share, per_class, labels, draws, default=(0.01, 0.1))
    run_frozen.eval_logistic(model, options.asked(), few, preset=preset, lam=lam, seed=seed)


@evaluate.command(name="fewshot")
def eval_few_shot(
    model: Model,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    averaging: Literal["pairs", "episodes"] = "pairs",
    seed: Seed = 0,
    options: Frozen,
) -> None:
    """Episodes of few classes and support images: nearest support, and F1 of a threshold on the similarity (MMC).

    Of data with a held-out part, that part.

    Parameters
    ----------
    ways
        Classes of an episode.
    shots
        Support images of each.
    queries
        Queries of each.
    averaging
        F1 of all pairs of all episodes together, or the mean of the episodes' F1.
    """
    from triptych import run_frozen

    settings = {"ways": ways, "shots": shots, "queries": queries, "episodes": episodes, "averaging": averaging}
    run_frozen.eval_few_shot(model, options.asked("cls"), seed=seed, **settings)


@evaluate.command(name="clustering")
def eval_clustering(
    model: Model, *, clusters: int | None = None, restarts: int = 10, seed: Seed = 0, options: Frozen
) -> None:
    """k-means of frozen features: do its clusters agree with the classes?  Of data with a held-out part, that part.

    Parameters
    ----------
    clusters
        Default: as many as there are classes.
    restarts
        Starts of k-means; the one of least inertia counts.
    """
    from triptych import run_frozen

    run_frozen.eval_clustering(model, options.asked("cls"), clusters=clusters, restarts=restarts, seed=seed)


@evaluate.command(name="cka")
def eval_cka(models: Annotated[list[str], MODELS], /, *, unbiased: bool = False, options: Frozen) -> None:
    """Linear CKA: how alike is what tokens and encoders know?  Of every `--token` of every model, on the same images.

    Parameters
    ----------
    unbiased
        The estimator that has expectation near 0 for unrelated features, also of few images.
    """
    from triptych import run_frozen

    run_frozen.eval_cka(models, options.asked("cls"), unbiased=unbiased)
