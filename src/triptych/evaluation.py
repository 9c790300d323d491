"""What the evaluating commands share: images to learn from and to measure on, and how a result is written down."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from triptych.data.sources import Source, open_source, splits
from triptych.data.subsets import Subset
from triptych.encoders.load import Loaded, Weights, load_encoder, of_run
from triptych.errors import UserError
from triptych.evals.features import left_out
from triptych.evals.subject import Subject
from triptych.progress import reporting
from triptych.run_folder import provenance

console = Console()


def labelled_pair(data: str, test: str | None, seed: int = 0) -> tuple[Source, Source]:
    """(train, test) images: as given, the data's own held-out part, or a seeded fifth that is held out here."""
    if test is not None:
        pair = open_source(data), open_source(test)
        tell_same(*pair)
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


def tell_same(train: Source, test: Source) -> None:
    if train.fingerprint() == test.fingerprint():
        names = f"{train.name} and {test.name}"
        say(f"be aware: {names} are the same images, so nothing here is measured on unseen ones")


def held_out_fifth(source: Source, seed: int) -> tuple[Source, Source]:
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, len(order) // 5)
    return Subset(source, order[held:], " [four fifths]"), Subset(
        source, order[:held], f" [held-out fifth, seed {seed}]"
    )


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def subject_of(
    model: str,
    *,
    more: Sequence[str] | None = None,
    weights: Weights = "teacher",
    size: int | None = None,
    cache: bool = True,
    **file: Any,
) -> Iterator[Subject]:
    """The encoder, with further ones whose features stand beside its own.  Within, progress is told.

    file: arch, heads, origin and partial of `load_encoder`, for the bare files of weights among them.  Without cache,
    features are kept until the end.  Raises UserError.
    """
    models = [model, *(more or [])]
    check_file_options(models, file)
    loaded = [load_one(m, weights=weights, **(file if is_bare(m) else {})) for m in models]
    with TemporaryDirectory() as scratch, reporting(console):
        folder = None if cache else Path(scratch)
        yield Subject(loaded, size=size, device=device(), folder=folder, say=say)


def load_one(model: str, **options: Any) -> Loaded:
    """An encoder, by `load_encoder`; told is what of a bare file's tensors was taken.  Raises UserError."""
    check_file_options([model], options)
    loaded = load_encoder(model, **options)
    if loaded.report is not None:
        say(f"{loaded.name}: {loaded.report.text()}")
    return loaded


def is_bare(model: str) -> bool:
    """A file of weights, which may leave open what a run tells."""
    return Path(model).is_file() and not of_run(model)


FILE = ("arch", "heads", "origin", "partial")
"""Options of `load_encoder` about bare files of weights."""


def for_model(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `subject_of` that concern this one of several models."""
    return {name: value for name, value in options.items() if name not in FILE or is_bare(model)}


def check_file_options(models: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raises UserError where options about bare files of weights are given and no model is one."""
    given = [name for name in FILE if options.get(name)]
    if given and not any(map(is_bare, models)):
        raise UserError(f"--{given[0]} is about bare files of weights; {', '.join(models)}: none, leave it out")


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def say_unreadable(source: Source, indices: torch.Tensor) -> None:
    if len(indices) < len(source):
        say(left_out(source, len(indices)))


def writable(out: Path, option: str = "--out") -> None:
    """A results file that cannot be written is an error now, not after the work."""
    if out.is_dir():
        raise UserError(f"{option} {out} is a folder: name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.open("a").close()


def report(protocol: str, result: dict, about: dict, table: Table, out: Path) -> dict:
    """Print the table and append one JSON line that identifies the result."""
    table.title = Text(str(table.title))  # brackets in names are no markup
    console.print(table)
    row = write_line(protocol, result, about, out)
    console.print(f"appended to {out}", highlight=False)
    return row


def write_line(protocol: str, result: dict, about: dict, out: Path) -> dict:
    """One JSON line: what was measured, of what, and where."""
    assert not about.keys() & result.keys(), "one would hide the other"
    row = {"protocol": protocol, **about, **result, **provenance()}
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row
