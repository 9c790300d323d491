"""`triptych report`: reads runs, puts the sections together, and writes one file."""

import base64
import hashlib
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from triptych import __version__, checkpoint
from triptych.data.sources import Source, open_source
from triptych.encoders.load import load_encoder
from triptych.errors import UserError
from triptych.evals.features import encoder_hash
from triptych.report import audited, evaluated, sections
from triptych.report.audit import Audit, audit
from triptych.report.charts import COLOURS
from triptych.report.html import Html, el, join
from triptych.report.run import RunData, read_run
from triptych.report.tables import of_runs, read_results
from triptych.run_folder import commit


def report(
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    results: Sequence[Path] | None = None,
    data: str | None = None,
    sample: int = 1000,
) -> Path:
    """Write the page of these runs; returns its path, default report.html in the first run's folder.

    results: files of results, default results.jsonl here and in each run's folder where they exist.  data: the training
    images, default where the first run found them.  sample: images that the audit decodes, 0 = no audit.  Raises
    UserError before anything is measured.
    """
    out = out or folders[0] / "report.html"
    runs = _read(folders)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: give the file the ending .html, so that a browser opens it")
    for path in results or ():
        if not path.is_file():
            raise UserError(f"--results {path}: no such file")
    source, why = _source(runs[0], data)
    lines, broken = read_results(_results_files(folders) if results is None else results)
    hashes, notes = [], [f"{broken} lines of results cannot be read"] if broken else []
    for run in runs:
        found, note = _hashes(run) if lines else ({}, "")
        hashes.append(found)
        notes += [note] if note else []
    measured = audit(source, decode=sample) if source is not None and sample else None
    body = [
        ("verdict", "Verdict", sections.verdicts(runs, [_unreadable(run) for run in runs])),
        *([("differences", "What differs", sections.differences(runs))] if len(runs) > 1 else []),
        ("curves", "Curves", sections.curves(runs)),
        ("terms", "What the terms mean", sections.terms(runs)),
        ("evaluations", "Evaluations", evaluated.evaluations(runs, of_runs(lines, folders, hashes), notes)),
        ("pictures", "Pictures over time", sections.pictures(runs)),
        ("data", "Data", _data(runs, source, measured, why)),
        ("cost", "Cost", sections.costs(runs)),
        ("environment", "Environment", sections.environment(runs)),
        ("commands", "Commands", sections.commands(runs)),
        ("recipe", "Recipe", sections.recipes(runs)),
    ]
    _write(out, page(runs, body))
    return out


def _read(folders: Sequence[Path]) -> list[RunData]:
    if len(folders) > COLOURS:
        raise UserError(f"{len(folders)} runs on one page: at most {COLOURS}, so that their colours can be told apart")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is given twice: name each once")
    names = [folder.resolve().name for folder in folders]
    alike = len(set(names)) < len(names)
    return [read_run(folder, str(folder) if alike else None) for folder in folders]


def _results_files(folders: Sequence[Path]) -> list[Path]:
    places = [*(folder / "results.jsonl" for folder in folders), Path("results.jsonl")]
    found = {path.resolve(): path for path in places if path.is_file()}
    return list(found.values())


def _source(run: RunData, data: str | None) -> tuple[Source | None, str]:
    """-> the training images, or why there are none.  Raises UserError for --data only."""
    if data is not None:
        return open_source(data), ""
    name = run.data.get("name")
    if not isinstance(name, str):
        return None, "the run does not tell its data; give it with --data"
    if not Path(name).exists() and not name.startswith("scenes"):  # what else it may be would be downloaded
        return None, f"{name} is not here; give the images with --data"
    try:
        return open_source(name), ""
    except (UserError, OSError) as error:
        return None, f"{name} cannot be opened ({error})"


def _data(runs: Sequence[RunData], source: Source | None, found: Audit | None, why: str) -> Html:
    notes = []
    if source is not None:
        mark = source.fingerprint()
        others = [run.label for run in runs if run.data.get("fingerprint") != mark]
        if others:
            notes.append(f"These images ({source.name}) are not those that {', '.join(others)} was trained on.")
    return audited.data(found, why or "it was switched off (--sample 0)", notes)


def _hashes(run: RunData) -> tuple[dict[str, str], str]:
    """-> the hash of the run's encoder with each weights, which; what went wrong"""
    found: dict[str, str] = {}
    try:
        for weights in ("untrained", "student", "teacher"):  # the last name counts where two are the same
            loaded = load_encoder(str(run.folder), weights=weights)
            step = f", step {run.saved[-1]}" if run.saved and weights != "untrained" else ""
            found[encoder_hash(loaded.encoder)] = f"{weights}{step}"
    except (UserError, RuntimeError) as error:  # RuntimeError: tensors of another version
        return (
            found,
            f"{run.label}: results are found by the run's path only, as its encoder cannot be loaded ({error})",
        )
    return found, ""


def _unreadable(run: RunData) -> list[str] | None:
    if not run.saved:
        return None
    try:
        state = checkpoint.load(checkpoint.path_of(run.folder / "checkpoints", run.saved[-1]))
    except UserError:
        return None
    return [str(reason) for reason in state.get("unreadable", [])]


def page(runs: Sequence[RunData], body: Sequence[tuple[str, str, Html]]) -> str:
    """The whole document; body: id, heading, content of each section."""
    style, script = (files("triptych.report").joinpath(name).read_text("utf-8") for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing but what is in this file: no network, and no other script than ours, whatever a file's name may hold.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    named = ", ".join(run.label for run in runs)
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{named} · Triptych report"),
        el("style", Html(style)),
    )
    legend = join(el("li", sections.swatch(i), run.label) for i, run in enumerate(runs))
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    made = f"Written {now} by triptych {__version__} ({commit() or 'installed'})"
    header = el("header", el("h1", "Triptych report"), el("ul", legend, class_="legend"), el("p", made, class_="note"))
    links = el("nav", *(el("a", name, href=f"#{id_}") for id_, name, _ in body), aria_label="Sections")
    main = el("main", *(el("section", el("h2", name), content, id=id_) for id_, name, content in body))
    whole = el("html", head, el("body", header, links, main, el("script", Html(script))), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def _write(out: Path, text: str) -> None:
    """Atomically: a reader never sees half of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(text.encode("utf-8", errors="backslashreplace"))  # a file's name may be no Unicode
    part.replace(out)
