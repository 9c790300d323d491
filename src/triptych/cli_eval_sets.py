"""`triptych eval` on sets with a ground truth of their own, and over everything: retrieval, copy, all."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from triptych.cli_eval import MODELS, Count, Encoder, Model, Pixels, Seed, evaluate

DEFAULT = Encoder()


@evaluate.command(name="retrieval")
def eval_retrieval(
    model: Model,
    *,
    data: str,
    queries: str | None = None,
    crop_queries: Annotated[bool, Parameter(negative="")] = False,
    preset: Literal["dino", "ibot"] | None = None,
    size: Pixels = None,
    scales: Annotated[list[float] | None, Parameter(consume_multiple=True, negative="")] = None,
    token: str = "cls",
    layers: Count = 1,
    seed: Seed = 0,
    options: Encoder = DEFAULT,
) -> None:
    """Rank a gallery by similarity to each query: mean average precision.

    Parameters
    ----------
    data
        The folder of revisited Oxford or Paris (gnd_NAME.pkl, jpg/), a ground truth in JSON (see
        docs/protocols/retrieval.md), or labelled images: those of a query's class are wanted.
    queries
        Of labelled images: queries of their own.  Default: the held-out part, or every image for itself.
    crop_queries
        Of revisited sets: crop queries to the building, the benchmark's rule; DINO and iBOT do not.
    preset
        Size and scales that a paper describes revisited Oxford and Paris with.
    size
        Pixels of the longest side, aspect kept.  Default: the centre crop that other protocols see.
    scales
        Describe each image at several scales, such as 1 0.7071 0.5, and take the mean.
    seed
        Of the confidence interval over the queries.
    """
    from triptych import run_sets

    settings = {"size": size, "scales": scales, "token": token, "layers": layers, "seed": seed}
    sets = {"crop_queries": crop_queries, "preset": preset, "subject": options.subject()}
    run_sets.eval_retrieval(model, data, queries, options.out, **sets, **settings)


@evaluate.command(name="copy")
def eval_copy(
    model: Model,
    *,
    data: Path,
    attacks: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    distractors: str | None = None,
    whiten_on: str | None = None,
    size: Pixels = 320,
    token: str = "cls+gem",
    layers: Count = 1,
    seed: Seed = 0,
    options: Encoder = DEFAULT,
) -> None:
    """Copy detection: find the original of each altered copy (Copydays).

    Parameters
    ----------
    data
        Folder with original/ and folders of copies that are named like them.
    attacks
        Folders of copies, such as strong or jpeg/3.  Default: strong.
    distractors
        Further images to search in.
    whiten_on
        Images that a whitening of the descriptors is learned from.
    size
        Pixels of the square that images become.
    seed
        Of the confidence interval over the copies.
    """
    from triptych import run_sets

    settings = {"size": size, "token": token, "layers": layers, "seed": seed}
    sets = {"distractors": distractors, "whiten_on": whiten_on}
    run_sets.eval_copy(model, data, attacks or ["strong"], options.out, subject=options.subject(), **sets, **settings)


@evaluate.command(name="all")
def eval_all(
    models: Annotated[list[str], MODELS],
    /,
    *,
    data: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    episodes: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    retrieval: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    masks: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    videos: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    protocols: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    preset: str | None = None,
    untrained: bool = True,
    size: Pixels = None,
    dense_size: Count = 480,
    seed: Seed = 0,
    markdown: Path | None = None,
    options: Encoder = DEFAULT,
) -> None:
    """Every frozen protocol over encoders and sets of images, in one table, beside the untrained encoder.

    Parameters
    ----------
    data
        Sets of labelled images to learn from and to measure on: k-NN, linear, few labels, and what `episodes` have.
    episodes
        Sets of labelled images without parts: few-shot episodes, clustering, CKA of tokens.
    retrieval
        Sets of queries and a gallery, as of `eval retrieval`.
    masks
        Images with masks, as of `eval click`: clicks, similarity of objects and, where every pixel has a class, the
        probe of patches.
    videos
        Videos with masks, as of `eval video`.
    protocols
        Some of knn, linear, logistic, fewshot, clustering, cka, retrieval, click, similarity, probe, video.
        Default: all.
    preset
        A paper (dino, ibot, udi, mte, mmc, mae, msn), whose settings are taken wherever it has some.
    untrained
        Measure each run and timm model before training too.
    size
        Pixels of the evaluated images.  Default: what each encoder was trained on.
    dense_size
        Pixels of the images that clicks, similarity and videos are measured on.
    seed
        Of everything that is drawn.
    markdown
        File that the tables are written to.
    """
    from triptych import run_suite
    from triptych.evals.suite import PROTOCOLS, Plan

    plan = Plan(protocols or PROTOCOLS, preset, seed, dense_size)
    sets = {"data": data or (), "episodes": episodes or (), "retrieval": retrieval or ()}
    sets |= {"masks": masks or (), "videos": videos or ()}
    places = {"out": options.out, "markdown": markdown}
    run_suite.eval_all(models, **sets, plan=plan, untrained=untrained, size=size, **places, **options.subject())
