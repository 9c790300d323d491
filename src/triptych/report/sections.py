"""The sections of the page.  What is missing is said, with the command that makes it."""

import shlex
from collections.abc import Sequence

from triptych.cost import COLUMNS, cost
from triptych.errors import UserError
from triptych.recipes import RECIPES
from triptych.report.charts import Line, chart
from triptych.report.frames import frames
from triptych.report.html import Html, el, facts, folded, join, number, table
from triptych.report.run import RunData
from triptych.report.tables import PROVENANCE
from triptych.report.terms import meaning, methods, unit
from triptych.report.verdict import stepping, verdict
from triptych.settings import flat

GROUPS = {"lr": "Rates", "weight_decay": "Rates", "images_per_second": "Speed", "data_wait": "Speed"}
SIGNS = {"good": "✓", "note": "•", "warning": "▲"}
FEW = 12  # settings that differ: more are folded


def swatch(colour: int) -> Html:
    return el("span", class_=f"swatch swatch-{colour}", aria_hidden="true")


def each(runs: Sequence[RunData], parts: Sequence[Html]) -> Html:
    """A part for every run, under its name where there are several."""
    if len(runs) == 1:
        return parts[0]
    return join(el("h3", swatch(i), run.label) + part for i, (run, part) in enumerate(zip(runs, parts, strict=True)))


def verdicts(runs: Sequence[RunData], unreadable: Sequence[list[str] | None]) -> Html:
    def of_run(run: RunData, met: list[str] | None) -> Html:
        items = (
            el("li", el("span", SIGNS[f.level], class_="sign", aria_label=f.level), f.text, class_=f.level)
            for f in verdict(run, met)
        )
        more = folded(f"The {len(met)} unreadable images", el("ul", *(el("li", x) for x in met))) if met else ""
        return el("ul", *items, class_="verdict") + more

    return each(runs, [of_run(run, met) for run, met in zip(runs, unreadable, strict=True)])


def differences(runs: Sequence[RunData]) -> Html:
    """Settings and data in which the runs differ."""
    settings = [flat(run.recipe.model_dump(mode="json")) if run.recipe else {} for run in runs]
    settings = [s | {"data": run.data.get("name", "?")} for s, run in zip(settings, runs, strict=True)]
    names = dict.fromkeys(name for s in settings for name in s)
    rows = [[name, *(str(s.get(name, "-")) for s in settings)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return el("p", "No setting differs.")
    drawn = table(["setting", *(run.label for run in runs)], rows)
    return folded(f"{len(rows)} settings", drawn, open_=len(rows) <= FEW)


def curves(runs: Sequence[RunData]) -> Html:
    names = dict.fromkeys(name for run in runs for name in run.columns)
    groups: dict[str, list[Html]] = {"Losses": [], "Health": []}
    for name in sorted(names, key=lambda n: n != "loss"):
        head, slash, tail = name.partition("/")
        group = "Health" if head == "health" and slash else GROUPS.get(name, head.capitalize() if slash else "Losses")
        found = [
            Line(run.label, i, run.columns[name], run.steps_per_epoch)
            for i, run in enumerate(runs)
            if name in run.columns
        ]
        groups.setdefault(group, []).append(chart(tail if slash else name, unit(name), found))
    parts = []
    for group, charts in groups.items():
        missing = "Nothing was measured yet: it is at the end of an epoch (health.every)." if group == "Health" else ""
        body = el("div", *charts, class_="charts") if charts else el("p", missing or "Nothing was logged.")
        parts.append(el("h3", group) + body)
    note = (
        "Pale: every step, where there are more than 1000 the smallest and largest of each bucket; bold: means of 60 "
        "equal parts. Touch a curve, or use the arrow keys on it, to read its values."
    )
    return el("p", note, class_="note") + join(parts)


def terms(runs: Sequence[RunData]) -> Html:
    rows: dict[str, str] = {}
    pages = dict.fromkeys(page for run in runs for page in methods(run.recipe))
    for run in runs:
        for name in sorted(run.columns, key=lambda n: (n in GROUPS, "/" in n, n != "loss")):
            said = meaning(name, run.recipe) or "not written down in this version"
            alike = rows.setdefault(name, said) == said
            rows |= {} if alike else {f"{name} ({' over '.join(methods(run.recipe))})": said}
    where = ", ".join(f"docs/methods/{page}.md" for page in pages)
    more = el("p", f"More in the documentation: {where}") if where else ""
    return facts((el("code", name), said) for name, said in rows.items()) + more


def pictures(runs: Sequence[RunData]) -> Html:
    return each(runs, [_pictures(run) for run in runs])


def _pictures(run: RunData) -> Html:
    found = frames(run.folder)
    lost = el("p", f"Cannot be read: {', '.join(found.damaged)}", class_="warn") if found.damaged else ""
    if not found.shown:
        why = "No pictures found: runs that `triptych train` starts with health.pictures above 0 have them."
        return el("p", why) + lost
    figures = []
    for frame in found.shown:
        name = f"after {frame.step} steps, epoch {number(run.epoch(frame.step), 3)}"
        image = el("img", src=frame.data, width=frame.size[0], height=frame.size[1], loading="lazy",
                   alt=f"what the tokens see in fixed images, {name}")  # fmt: skip
        figures.append(el("figure", el("figcaption", name), image))
    note = (
        "A row is an image that the seed chose: the image, what the class tokens attend to in the last block (mean "
        "over heads), and the first three principal components of the patch tokens as colours. Components are found "
        "anew for each picture: within one, equal colours mean similar tokens; from one to the next colours may swap."
    )
    some = f"{len(found.shown)} of {found.there} pictures" if len(found.shown) < found.there else "All pictures"
    return el("p", note, class_="note") + folded(some, el("div", *figures, class_="frames"), open_=True) + lost


def costs(runs: Sequence[RunData]) -> Html:
    return each(runs, [_cost(run) for run in runs])


def _cost(run: RunData) -> Html:
    speed = facts([*stepping(run), *_memory(run)])
    if run.recipe is None:
        return speed + el("p", f"Parameters and MACs cannot be counted: {run.recipe_error}")
    try:
        found = cost(run.recipe)
    except UserError as error:
        return speed + el("p", f"Parameters and MACs cannot be counted: {error}")
    caption = f"The student on one {found.size} × {found.size} crop; MACs of its forward pass"
    more = facts(
        [
            ("trained parameters", f"{found.trained / 1e6:.2f} M"),
            ("copies (teacher, or average of weights)", f"{found.copies / 1e6:.2f} M"),
        ]
    )
    notes = el("ul", *(el("li", note) for note in found.notes)) if found.notes else ""
    return speed + table(["part", *COLUMNS[1:]], found.rows(), 3, caption) + more + notes


def _memory(run: RunData) -> list[tuple[str, str]]:
    """The peak that was logged, in whatever unit its name tells."""
    found = [(name, max(s.finite())) for name, s in run.columns.items() if "memory" in name and s.finite()]
    return [(f"{name}, largest", number(peak)) for name, peak in found] or [("peak memory", "not logged")]


def environment(runs: Sequence[RunData]) -> Html:
    def of_run(run: RunData) -> Html:
        images, mark = run.data.get("images", "?"), run.data.get("fingerprint", "?")
        rows = [
            ("folder", run.folder.resolve()),
            ("data", f"{run.data.get('name', 'not told')} ({images} images, fingerprint {mark})"),
            *((key, run.about.get(key, "not told")) for key in PROVENANCE),
        ]
        if run.recipe:
            rows += [
                ("precision", run.recipe.precision),
                ("torch.compile", run.recipe.compile),
                ("seed", run.recipe.seed),
            ]
        kept = f"of steps {', '.join(map(str, run.saved))}" if run.saved else "none"
        return facts([*rows, ("checkpoints kept", kept)])

    return each(runs, [of_run(run) for run in runs])


def commands(runs: Sequence[RunData]) -> Html:
    def of_run(run: RunData) -> Html:
        known = ["--recipe", run.recipe.name] if run.recipe and run.recipe.name in RECIPES else []
        words = ["triptych", "train", *known, "--config", str(run.folder / "recipe.yaml")]
        words += ["--data", str(run.data.get("name", "DATA"))]
        again = shlex.join([*words, "--out", str(run.folder)])
        new = shlex.join([*words, "--out", f"{run.folder}-again"])
        where = "In the folder that this report was written from. The first goes on where the run stopped (or says "
        where += "that it is finished); the second repeats it."
        return el("p", where) + el("pre", again) + el("pre", new)

    return each(runs, [of_run(run) for run in runs])


def recipes(runs: Sequence[RunData]) -> Html:
    def of_run(run: RunData) -> Html:
        warn = el("p", run.recipe_error, class_="warn") if run.recipe_error else ""
        return Html(warn) + folded("recipe.yaml, with every setting resolved", el("pre", run.recipe_text))

    return each(runs, [of_run(run) for run in runs])
