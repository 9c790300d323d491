"""`triptych eval tokens`, `classify`, `variance`, `reconstruction`: protocols beyond one vector of each image."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from triptych.data.sources import Source, open_source, splits
from triptych.encoders import Encoder
from triptych.encoders.load import load_encoder, load_method
from triptych.errors import UserError
from triptych.evals.classify import check_supervised, classify
from triptych.evals.features import encoder_hash, labels_of
from triptych.evals.outcome import about_images
from triptych.evals.pseudo_labels import pseudo_labels
from triptych.evals.reconstruction import corrupted_view, reconstruct, with_pixel_head
from triptych.evals.token_analysis import COLUMNS
from triptych.evals.tokens import Side, TokensResult, extract_tokens, measure_tokens
from triptych.evals.transform import EvalTransform
from triptych.evals.variance import variance
from triptych.evaluation import console, device, labelled_pair, report, say_unreadable, writable
from triptych.recipe import Recipe


def eval_tokens(run: str, data: str, test: str | None, out: Path, *, weights, size, k: int, probe: bool) -> dict:
    writable(out)
    pair = labelled_pair(data, test)
    recipe, method, name = load_method(run, weights)
    side = Side.of(method.to(device()).eval(), weights == "student")
    shown = "untrained" if weights == "untrained" else side.weights
    transform = _transform(recipe, side.encoder, size)
    # Pseudo-labels are those of the test images alone.
    train, held = (
        extract_tokens(side, source, transform, embeddings=source is pair[1], device=device()) for source in pair
    )
    labels = []
    for source, features in zip(pair, (train, held), strict=True):
        say_unreadable(source, features.indices)
        labels.append(labels_of(source, features.indices))
    options: dict[str, Any] = {"prototypes": side.prototypes, "k": k, "probe": probe, "device": device()}
    result = measure_tokens(train, labels[0], held, labels[1], **options)
    kept = side.encoder.without("aux").without("mask")  # the encoder of eval knn and of exports
    about = {"model": f"{name} ({shown})", "encoder": encoder_hash(kept), "heads": kept.heads}
    about |= about_images(train=pair[0], test=pair[1]) | {
        "size": transform.size,
        "resize": transform.resize,
        "recipe": recipe.name,
    }
    for table in token_tables(result, pair[1].classes or ()):
        console.print(table)
    if side.weights == "student" and weights == "teacher":
        console.print(
            "the ensemble of a supervised run has no average: all tokens are of the weights as trained", soft_wrap=True
        )
    whole = sum(len(features.indices) for features in (train, held))
    of = "every image" if result.removal_images == whole else f"{result.removal_images} images of {whole}"
    same = "is the same to the last bit" if result.removal_is_exact else "is NOT the same"
    console.print(
        f"without the auxiliary tokens the global token of {of} {same}",
        highlight=False,
        soft_wrap=True,
    )
    if not result.removal_is_exact:
        sees = " (aux_sees uncut: other tokens attend to them)" if side.encoder.spec.aux_sees == "uncut" else ""
        console.print(f"largest difference {result.removal_difference:.3g}{sees}", highlight=False, soft_wrap=True)
    table = Table("", "top-1 %", title=f"k-NN, k = {k}, {about['model']}")
    for looked_at, top1 in result.knn.items():
        table.add_row(looked_at, f"{top1:.2f}")
    for looked_at, probed in result.linear.items():
        table.add_row(f"linear probe, {looked_at}", f"{probed.top1:.2f}")
    return report("tokens", asdict(result), about, table, out)


def token_tables(result: TokensResult, classes: Sequence[str]) -> list[Table]:
    """Each token beside the others; linear CKA; the accuracy on each class, where the classes are few."""
    analysis, numbers = result.analysis, [str(i) for i in range(len(result.analysis.names))]
    tables = [Table(*COLUMNS, title=f"tokens, k = {result.k}"), Table("", *numbers, title="linear CKA")]
    for row in analysis.rows():
        tables[0].add_row(*row)
    for i, (name, row) in enumerate(zip(analysis.names, analysis.cka, strict=True)):
        tables[1].add_row(f"{i} {name}", *("" if x is None else f"{x:.2f}" for x in row))
    if len(classes) <= 20:
        tables.append(Table("", *numbers, title="k-NN of each class, %"))
        for label, column in zip(classes, zip(*analysis.per_class, strict=True), strict=False):
            tables[2].add_row(label, *("" if x is None else f"{x:.0f}" for x in column))
    return tables


def eval_classify(run: str, data: str, test: str | None, out: Path, *, weights, size) -> dict:
    writable(out)
    own = splits(data) if test is None else labelled_pair(data, test)
    source = own[1] if own else open_source(data)
    recipe, method, name = load_method(run, weights)
    supervised = check_supervised(method, source)
    used = supervised.model if weights == "student" else supervised.classifier
    transform = _transform(recipe, used.encoder, size)
    result = classify(supervised, source, transform, average=weights != "student", device=device())
    kind = "average of weights" if result.averaged else "weights as trained"
    about = {"model": f"{name} ({weights})", "recipe": recipe.name}
    about |= {"encoder": encoder_hash(used.encoder.without("aux")), "heads": used.encoder.heads}
    about |= about_images(test=source) | {"size": transform.size}
    table = Table("classifier", "top-1 %", "top-5 %", title=f"{result.images} images of {source.name}, {name}")
    for token in result.top1:
        what = f"global token, {kind}: what inference uses" if token == "global" else token
        table.add_row(what, f"{result.top1[token]:.2f}", f"{result.top5[token]:.2f}")
    return report("classify", asdict(result), about, table, out)


def eval_prototypes(run: str, data: str, out: Path, *, weights, size, seed: int) -> dict:
    writable(out)
    source, (recipe, method, name) = _held_out(data), load_method(run, weights)
    transform = _transform(recipe, method.encoder, size)
    result = pseudo_labels(method, source, transform, student=weights == "student", seed=seed, device=device())
    about = {"model": f"{name} ({weights})", "recipe": recipe.name, "seed": seed, "size": transform.size}
    about |= {"encoder": encoder_hash(method.encoder.without("aux"))} | about_images(test=source)
    title = (
        f"{result.metrics.clusters} of {result.prototypes} prototypes chosen, {result.metrics.images} images, {name}"
    )
    table = Table("", "", "labels shuffled", title=title)
    for measure, scale in (("accuracy", 1), ("nmi", 100), ("ari", 100), ("fowlkes_mallows", 100)):
        texts = [f"{scale * getattr(m, measure):.2f}" for m in (result.metrics, result.shuffled)]
        table.add_row(f"{measure}, %", *texts)
    return report("prototypes", asdict(result), about, table, out)


def eval_variance(model: str, data: str, out: Path, *, size, weights, arch, **options) -> dict:
    writable(out)
    source, loaded = _held_out(data), load_encoder(model, weights=weights, arch=arch)
    pixels = size or loaded.size
    loaded.encoder.grid(pixels, pixels)
    transform = EvalTransform.of(pixels, loaded.mean, loaded.std)
    result = variance(loaded.encoder, source, transform, device=device(), **options)
    about = {"model": loaded.name, "encoder": encoder_hash(loaded.encoder), "heads": loaded.encoder.heads}
    about |= about_images(test=source) | {"resize": transform.resize}
    if result.unreadable:
        asked = result.images + result.unreadable
        console.print(f"{result.unreadable} of {asked} images of {source.name} cannot be read: left out", markup=False)
    title = f"{result.images} images of {source.name}, {loaded.name}"
    table = Table("tokens of the last block", "variance", title=title)
    token = "class token" if loaded.encoder.spec.cls else "mean patch (there is no class token)"
    table.add_row(f"{token}, over {result.views} random crops", f"{result.image:.4f}")
    table.add_row(f"patch, over {result.views} maskings of half the pixels", f"{result.patch:.4f}")
    return report("variance", asdict(result), about, table, out)


def eval_reconstruction(
    run: str, data: str | Source, out: Path, *, images: int, blocks: Sequence[int], norm: bool, seed: int
):
    from PIL import Image

    from triptych.pictures import reconstruction_sheet
    from triptych.show.saving import save_picture

    if out.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--out {out}: name a picture file, such as reconstruction.png")
    source = _held_out(data) if isinstance(data, str) else data
    recipe, method, name = load_method(run, "student")
    base, look = with_pixel_head(method.to(device())), recipe.views
    transform = _transform(recipe, base.encoder, None)
    view = corrupted_view(source, base.config.corruption, transform, images=images, seed=seed, device=device())
    result = reconstruct(method, view, blocks, norm=norm)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_picture(reconstruction_sheet(result, view, look.mean, look.std), out)
    title = escape(f"{len(view.images)} images of {source.name}, {name} (student)")
    table = Table("head reads", "masked L1", title=title)
    for block, error in zip(result.blocks, result.errors, strict=True):
        table.add_row(f"block {block}", f"{error:.4f}")
    table.add_row(f"as trained: block {' '.join(map(str, result.read))}", f"{result.trained_error:.4f}")
    console.print(table)
    console.print(f"picture: {out}", highlight=False, markup=False, soft_wrap=True)


def _held_out(data: str) -> Source:
    """The data's own held-out part, where it has one."""
    own = splits(data)
    return own[1] if own else open_source(data)


def _transform(recipe: Recipe, encoder: Encoder, size: int | None) -> EvalTransform:
    """Of the images that the run was trained on, at its size or another."""
    pixels = size or recipe.views.global_size
    encoder.grid(pixels, pixels)
    return EvalTransform.of(pixels, recipe.views.mean, recipe.views.std)
