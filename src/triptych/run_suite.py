"""`triptych eval all`: every frozen protocol over encoders and sets of images, in one table."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from triptych.data.annotated import open_annotated, open_videos, segmented_splits
from triptych.data.retrieval_sets import RetrievalSet, open_retrieval
from triptych.data.sources import Source, open_source
from triptych.encoders.load import Weights, of_run
from triptych.errors import UserError
from triptych.evals.protocols import Pair
from triptych.evals.published import known_set
from triptych.evals.published_dense import known_annotated, known_videos
from triptych.evals.subject import Subject
from triptych.evals.suite import Job, Plan, on_images, on_masks, on_pair, on_retrieval, on_videos
from triptych.evals.tables import SideBySide
from triptych.evaluation import (
    check_file_options,
    console,
    for_model,
    labelled_pair,
    say,
    subject_of,
    writable,
    write_line,
)

Measured = tuple[str, str, list[Source], Callable[[Subject], list[Job]]]
"""A set of images: as the reader named it, as papers do, what features are taken of, and its jobs for a subject."""


def eval_all(
    models: Sequence[str],
    *,
    data: Sequence[str],
    episodes: Sequence[str],
    retrieval: Sequence[str],
    masks: Sequence[str] = (),
    videos: Sequence[str] = (),
    plan: Plan,
    untrained: bool,
    out: Path,
    markdown: Path | None,
    weights: Weights,
    **options: Any,
) -> list[SideBySide]:
    """Everything is opened before anything is measured: a mistake costs no time.

    A protocol that a set does not suit (too few images, say) is left out, and said to be.
    """
    writable(out)
    if markdown is not None:
        if markdown.resolve() == out.resolve():
            raise UserError(f"--markdown {markdown} is --out too: the one would overwrite the other")
        writable(markdown, "--markdown")
    check_file_options(models, options)
    sets = [*map(_of_pair(plan), data), *map(_of_images(plan), episodes)]
    sets += [_of_retrieval(plan, images) for name in retrieval for images in open_retrieval(name)]
    sets += [*map(_of_masks(plan), masks), *map(_of_videos(plan), videos)]
    if not sets:
        raise UserError("nothing to measure on: give --data, --episodes, --retrieval, --masks or --videos")
    tables = []
    with ExitStack() as stack:
        subjects = {}
        for model, which in _with_untrained(models, weights, untrained):
            label = Path(model).name + ("" if which == "teacher" else f" ({which})")
            subjects[label if label not in subjects else f"{model} ({which})"] = stack.enter_context(
                subject_of(model, weights=which, **for_model(model, options))
            )
        for name, known, sources, jobs in sets:
            table = SideBySide(name, known)
            if not any(jobs(subject) for subject in subjects.values()):
                asked = ", ".join(plan.protocols)
                raise UserError(f"--protocols {asked} measure nothing on {name}: add others, or leave the set out")
            for label, subject in subjects.items():
                measure(table, label, subject, sources, jobs(subject), out)
            console.print(shown(table))
            for remark in table.remarks():
                say(f"  {remark}")
            tables.append(table)
            if markdown is not None:  # after every set: what is stopped keeps what it has
                markdown.write_text("\n".join(t.markdown() for t in tables))
    if not any(table.rows for table in tables):
        raise UserError("nothing could be measured; see above why")
    say(f"appended to {out}" + (f", tables in {markdown}" if markdown else ""))
    return tables


def measure(
    table: SideBySide, label: str, subject: Subject, sources: Sequence[Source], jobs: Sequence[Job], out: Path
) -> None:
    """Fill a column."""
    try:
        for source in sources:
            subject.features_of(source, subject.tokens())
    except UserError as error:
        table.left_out.setdefault(str(error))
        return
    for protocol, job in jobs:
        try:
            outcome = job()
        except UserError as error:
            say(f"{table.data}, {label}: {protocol} left out: {error}")
            table.left_out.setdefault(f"{protocol}: {error}")
            continue
        table.add(label, outcome)
        write_line(outcome.protocol, asdict(outcome.result), outcome.about, out)


def _with_untrained(models: Sequence[str], weights: Weights, untrained: bool) -> list[tuple[str, Weights]]:
    """Each model, and what it was before training where that can be built: of runs and timm's names."""
    found: list[tuple[str, Weights]] = [(model, weights) for model in dict.fromkeys(models)]
    for model in dict.fromkeys(models):
        known = of_run(model) or not Path(model).exists()
        if untrained and weights != "untrained" and known:
            found.append((model, "untrained"))
    return found


def _of_pair(plan: Plan) -> Callable[[str], Measured]:
    def opened(data: str) -> Measured:
        pair = Pair(*labelled_pair(data, None))
        return data, known_set(pair.test), plan.read(pair), lambda subject: on_pair(subject, pair, plan)

    return opened


def _of_images(plan: Plan) -> Callable[[str], Measured]:
    def opened(data: str) -> Measured:
        source = open_source(data)
        if not source.classes:
            raise UserError(f"{source.name} has no labels: put the images of each class in a sub-folder of its own")
        return data, known_set(source), [], lambda subject: on_images(subject, source, plan)

    return opened


def _of_retrieval(plan: Plan, images: RetrievalSet) -> Measured:
    return images.name, images.name, [], lambda subject: on_retrieval(subject, images, plan)


def _of_masks(plan: Plan) -> Callable[[str], Measured]:
    def opened(data: str) -> Measured:
        source = open_annotated(data)
        pair: Any = None
        try:
            pair = segmented_splits(data)
        except UserError as error:  # instances or videos, or no part to learn from: the table tells
            pair = UserError(str(error).splitlines()[0].partition(";")[0])  # not the list of all layouts
        return data, known_annotated(source) or data, [], lambda subject: on_masks(subject, source, pair, plan)

    return opened


def _of_videos(plan: Plan) -> Callable[[str], Measured]:
    def opened(data: str) -> Measured:
        found = open_videos(data)
        return data, known_videos(found) or data, [], lambda subject: on_videos(subject, data, found, plan)

    return opened


def shown(table: SideBySide) -> Table:
    drawn = Table(*map(escape, table.head()), title=escape(table.data))
    before = None
    for line in table.lines():
        if before not in (None, line[0]):
            drawn.add_section()
        before = line[0]
        drawn.add_row(*map(escape, line))
    return drawn
