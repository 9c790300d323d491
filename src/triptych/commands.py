"""What the commands do; `cli.py` only describes them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from triptych.data.sources import SOURCES, Source, Subset, open_source, splits
from triptych.encoders import ENCODERS
from triptych.encoders.load import Loaded, load_encoder
from triptych.errors import UserError
from triptych.evals import EVALS
from triptych.evals.features import EvalTransform, cached, check_token, extract, labels_of, weights_hash
from triptych.evals.knn import knn
from triptych.evals.linear import linear
from triptych.methods import METHODS
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


def _features(model: str, data: str, test: str | None, *, weights, arch, size, token, layers, cache: bool):
    """-> loaded encoder, (train features, labels), (test features, labels), what identifies them"""
    pair = labelled_pair(data, test)
    loaded = load_encoder(model, weights=weights, arch=arch)
    check_token(loaded.encoder, token)
    loaded.encoder.grid(size or loaded.size, size or loaded.size)
    transform = EvalTransform.of(size or loaded.size, loaded.mean, loaded.std)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets = []
    for source in pair:
        options: dict[str, Any] = {"token": token, "layers": layers, "device": device}
        features, indices = (cached if cache else extract)(loaded.encoder, source, transform, **options)
        if len(indices) < len(source):
            console.print(
                f"{len(source) - len(indices)} of {len(source)} images of {source.name} cannot be read: left out"
            )
        sets.append((features, labels_of(source, indices)))
    about = {
        "model": loaded.name,
        "encoder": weights_hash(loaded.encoder),
        "heads": loaded.encoder.heads,
        "train": {"name": pair[0].name, "fingerprint": pair[0].fingerprint()},
        "test": {"name": pair[1].name, "fingerprint": pair[1].fingerprint()},
        "token": token,
        "layers": layers,
        "size": transform.size,
        "resize": transform.resize,
    }
    return loaded, sets, about


def eval_knn(model: str, data: str, test: str | None, out: Path, *, k, temperature: float, **options) -> dict:
    _writable(out)
    _, ((train, y), (held, z)), about = _features(model, data, test, **options)
    result = knn(train, y, held, z, k=k, temperature=temperature)
    table = Table("k", "top-1 %", "top-5 %", title=f"k-NN, {about['model']}, {about['token']}")
    for n in result.top1:
        table.add_row(str(n), f"{result.top1[n]:.2f}", f"{result.top5[n]:.2f}")
    return report("knn", asdict(result), about, table, out)


def eval_linear(model: str, data: str, test: str | None, out: Path, probe: dict[str, Any], **options) -> dict:
    _writable(out)
    _, ((train, y), (held, z)), about = _features(model, data, test, **options)
    result = linear(train, y, held, z, **probe)
    table = Table("", "", title=f"linear probe, {about['model']}, {about['token']}")
    table.add_row("top-1 %, last epoch", f"{result.top1:.2f}")
    table.add_row("top-5 %, last epoch", f"{result.top5:.2f}")
    table.add_row("learning rate (per 256 images)", f"{result.lr:g}, chosen on {result.selected_on}")
    table.add_row("best of all epochs and rates on test", f"{result.best_epoch_top1:.2f} (optimistic)")
    return report("linear", asdict(result), about | probe, table, out)


def _writable(out: Path) -> None:
    """A results file that cannot be written is an error now, not after the work."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.open("a").close()


def report(protocol: str, result: dict, about: dict, table: Table, out: Path) -> dict:
    """Print the table and append one JSON line that identifies the result."""
    from triptych.run_folder import provenance

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
