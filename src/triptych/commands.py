"""What the commands do; `cli.py` only describes them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from triptych.data.sources import SOURCES, Source, open_source, splits
from triptych.data.subsets import Subset
from triptych.encoders import ENCODERS
from triptych.encoders.load import Loaded, load_encoder
from triptych.errors import UserError
from triptych.evals import EVALS
from triptych.evals.features import cached, extract, labels_of, weights_hash
from triptych.evals.knn import knn
from triptych.evals.linear import linear
from triptych.evals.selection import check_token
from triptych.evals.transform import EvalTransform
from triptych.losses import unit
from triptych.methods import METHODS
from triptych.precision import fast_precision
from triptych.recipes import RECIPES
from triptych.settings import flat, parse_overrides, resolve

console = Console()


def first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def name_of(config: type) -> str:
    return config.model_fields["name"].default  # type: ignore[attr-defined]


def list_all() -> None:
    """Everything by name, one line each."""
    import sys

    groups = {
        "methods": {
            c.model_fields["name"].default: first_line(sys.modules[m.__module__].__doc__) for c, m in METHODS.items()
        },
        "encoders": ENCODERS,
        "recipes": {name: first_line(f.__doc__) for name, f in RECIPES.items()},
        "sources": SOURCES,
        "evaluations": EVALS,
    }
    for group, entries in groups.items():
        console.print(f"[bold]{group}[/bold]")
        for name, about in entries.items():
            console.print(f"  {name:<24} {about}", highlight=False, markup=False, soft_wrap=True)


def train(
    data: str | None, recipe: str, config: Path | None, out: Path | None, show: bool, overrides: list[str]
) -> None:
    from triptych import distributed
    from triptych import train as loop

    resolved, origin = resolve(recipe, config, parse_overrides(overrides))
    if show:
        for key, value in flat(resolved.model_dump()).items():
            console.print(f"{key:<32} {value!r:<40} {origin[key]}", highlight=False, markup=False, soft_wrap=True)
        return
    if data is None:
        raise UserError("--data is required: a folder of images, a .zip, a .tar, a list of paths or a data set's name")
    distributed.start()
    try:
        source = distributed.first_process_first(lambda: open_source(data))  # it may download
        out = out or Path("runs") / f"{resolved.name}-{_slug(data)}"
        result = loop.train(resolved, source, out, console)
        main = distributed.is_main()
    finally:
        distributed.stop()
    if main:
        rate = f", {result.images_per_second:.1f} images/s" if result.images_per_second else ""
        print(f"{out}: {result.steps} steps{rate}")
        print(f"next: triptych eval knn {out} --data DATA   or   triptych export {out} --out FOLDER")


def ablate(data: str, test: str | None, out: Path, overrides: list[str], *, k: int, **options) -> None:
    from triptych import ablation

    writable(out / "results.jsonl")
    rows = ablation.ablate(data, test, out=out, k=k, overrides=parse_overrides(overrides), **options)
    if rows:
        console.print(ablation.table(rows, k))


def cost(recipe: str, config: Path | None, overrides: list[str], size: int | None) -> None:
    from triptych.cost import COLUMNS as COST_COLUMNS
    from triptych.cost import cost as measured

    resolved, _ = resolve(recipe, config, parse_overrides(overrides))
    c = measured(resolved, size)
    table = Table(*COST_COLUMNS, title=f"{c.recipe}: the student on one {c.size} x {c.size} crop")
    for row in c.rows():
        table.add_row(*row)
        if row[0] == c.parts[-1].name:
            table.add_section()
    console.print(table)
    console.print(f"trained parameters: {c.trained / 1e6:.2f} M", highlight=False)
    console.print(f"copies (teacher, or average of weights): {c.copies / 1e6:.2f} M", highlight=False)
    for note in c.notes:
        console.print(f"- {note}", highlight=False)


def _slug(data: str) -> str:
    path = Path(data)
    name = (
        f"{path.resolve().parent.name}-{path.stem}"
        if path.exists() and path.suffix
        else path.name or path.resolve().name
    )
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def labelled_pair(data: str, test: str | None, seed: int = 0) -> tuple[Source, Source]:
    """(train, test) images: as given, the data's own held-out part, or a seeded fifth that is held out here."""
    if test is not None:
        pair = open_source(data), open_source(test)
    else:
        pair = splits(data) or held_out_fifth(open_source(data), seed)
    for source in pair:
        if not source.classes:
            raise UserError(f"{source.name} has no labels: put the images of each class in a sub-folder of its own")
    if pair[0].classes != pair[1].classes:
        counts = " and ".join(str(len(s.classes or ())) for s in pair)
        raise UserError(
            f"{pair[0].name} and {pair[1].name} do not have the same classes ({counts}): labels would not fit"
        )
    return pair


def held_out_fifth(source: Source, seed: int) -> tuple[Source, Source]:
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, len(order) // 5)
    return Subset(source, order[held:], " [four fifths]"), Subset(
        source, order[:held], f" [held-out fifth, seed {seed}]"
    )


def _of_model(model: str, pair: tuple[Source, Source], *, weights, arch, size, token, layers, cache: bool):
    """-> [(train features, labels), (test features, labels)], what identifies the encoder"""
    loaded = load_encoder(model, weights=weights, arch=arch)
    check_token(loaded.encoder, token)
    loaded.encoder.grid(size or loaded.size, size or loaded.size)
    transform = EvalTransform.of(size or loaded.size, loaded.mean, loaded.std)
    sets, precision = [], fast_precision(device())
    for source in pair:
        options: dict[str, Any] = {"token": token, "layers": layers, "device": device(), "precision": precision}
        features, indices = (cached if cache else extract)(loaded.encoder, source, transform, **options)
        say_unreadable(source, indices)
        sets.append((features, labels_of(source, indices)))
    about = {"model": loaded.name, "encoder": weights_hash(loaded.encoder), "heads": loaded.encoder.heads}
    return sets, about | {"size": transform.size, "resize": transform.resize, "precision": str(precision)[6:]}


def _features(model: str, data: str, test: str | None, *, more: list[str] | None = None, arch, **options):
    """-> (train features, labels), (test features, labels), what identifies them.

    Of several models: features of unit length side by side, and lists of what identifies each.
    """
    pair, models = labelled_pair(data, test), [model, *(more or [])]
    bare = [m for m in models if Path(m).is_file() and not (Path(m).parent.parent / "recipe.yaml").exists()] or models
    found = [_of_model(m, pair, arch=arch if m in bare else None, **options) for m in models]
    sets, about = found[0]
    if len(found) > 1:
        # An image that cannot be read is missing for every model: rows and labels fit.
        sets = [(torch.cat([unit(s[i][0]) for s, _ in found], 1), labels) for i, (_, labels) in enumerate(sets)]
        about = {key: [a[key] for _, a in found] for key in about}
    about |= about_images(pair) | {"token": options["token"], "layers": options["layers"]}
    return sets, about


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def say_unreadable(source: Source, indices: torch.Tensor) -> None:
    if len(indices) < len(source):
        missing = len(source) - len(indices)
        console.print(f"{missing} of {len(source)} images of {source.name} cannot be read: left out", markup=False)


def about_images(pair: tuple[Source, Source]) -> dict[str, dict[str, str]]:
    return {
        name: {"name": source.name, "fingerprint": source.fingerprint()}
        for name, source in zip(("train", "test"), pair, strict=True)
    }


def _title(protocol: str, about: dict[str, Any]) -> str:
    models = about["model"] if isinstance(about["model"], list) else [about["model"]]
    return f"{protocol}, {' + '.join(models)}, {about['token']}"


def eval_knn(model: str, data: str, test: str | None, out: Path, *, k, temperature: float, **options) -> dict:
    writable(out)
    ((train, y), (held, z)), about = _features(model, data, test, **options)
    result = knn(train, y, held.to(device()), z, k=k, temperature=temperature)
    table = Table("k", "top-1 %", "top-5 %", title=_title("k-NN", about))
    for n in result.top1:
        table.add_row(str(n), f"{result.top1[n]:.2f}", f"{result.top5[n]:.2f}")
    return report("knn", asdict(result), about, table, out)


def eval_linear(model: str, data: str, test: str | None, out: Path, probe: dict[str, Any], **options) -> dict:
    writable(out)
    ((train, y), (held, z)), about = _features(model, data, test, **options)
    result = linear(train.to(device()), y, held, z, **probe)
    table = Table("", "", title=_title("linear probe", about))
    table.add_row("top-1 %, last epoch", f"{result.top1:.2f}")
    table.add_row("top-5 %, last epoch", f"{result.top5:.2f}")
    table.add_row("learning rate (per 256 images)", f"{result.lr:g}, chosen on {result.selected_on}")
    table.add_row("best of all epochs and rates on test", f"{result.best_epoch_top1:.2f} (optimistic)")
    return report("linear", asdict(result), about | probe, table, out)


def writable(out: Path) -> None:
    """A results file that cannot be written is an error now, not after the work."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.open("a").close()


def report(protocol: str, result: dict, about: dict, table: Table, out: Path) -> dict:
    """Print the table and append one JSON line that identifies the result."""
    from triptych.run_folder import provenance

    table.title = Text(str(table.title))  # brackets in names are no markup
    row = {"protocol": protocol, **about, **result, **provenance()}
    console.print(table)
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    console.print(f"appended to {out}", highlight=False)
    return row


def export(model: str, out: Path, weights: str, size: int | None) -> None:
    from triptych.export import export as write

    loaded: Loaded = load_encoder(model, weights=weights)  # type: ignore[arg-type]
    difference = write(loaded, out, size=size)
    print(f"{out}: model.safetensors, config.json, README.md")
    print(f"timm in a fresh process gives the same tokens: maximum difference {difference:.3g}")
    print(f'load it with timm.create_model("local-dir:{out}", pretrained=True)')
