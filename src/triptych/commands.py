"""What the commands do; `cli.py` only describes them."""

from pathlib import Path

from rich.table import Table

from triptych.data.annotated import ANNOTATED
from triptych.data.sources import SOURCES, open_source
from triptych.encoders import ENCODERS
from triptych.encoders.load import Loaded, load_encoder
from triptych.errors import UserError
from triptych.evals import EVALS
from triptych.evaluation import console, writable
from triptych.methods import METHODS
from triptych.recipes import RECIPES
from triptych.run_folder import slug
from triptych.settings import flat, parse_overrides, resolve


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
        "sources with masks, boxes, videos": ANNOTATED,
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
        out = out or Path("runs") / f"{resolved.name}-{_run_name(data)}"
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


def _run_name(data: str) -> str:
    path = Path(data)
    name = (
        f"{path.resolve().parent.name}-{path.stem}"
        if path.exists() and path.suffix
        else path.name or path.resolve().name
    )
    return slug(name)


def export(model: str, out: Path, weights: str, size: int | None) -> None:
    from triptych.export import export as write

    loaded: Loaded = load_encoder(model, weights=weights)  # type: ignore[arg-type]
    difference = write(loaded, out, size=size)
    print(f"{out}: model.safetensors, config.json, README.md")
    print(f"timm in a fresh process gives the same tokens: maximum difference {difference:.3g}")
    print(f'load it with timm.create_model("local-dir:{out}", pretrained=True)')
