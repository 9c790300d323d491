"""Protocols on sets with a ground truth of their own; beside `protocols`, which has those on labels."""

from typing import Any

from triptych.data.retrieval_sets import RetrievalSet
from triptych.data.sources import Source
from triptych.evals.copy_detection import SIZE, TOKEN, copy_detection
from triptych.evals.outcome import Figure, Outcome, about_images
from triptych.evals.protocols import on_text
from triptych.evals.retrieval import of_readable, retrieval
from triptych.evals.selection import Token
from triptych.evals.subject import Subject


def of_retrieval(
    subject: Subject,
    images: RetrievalSet,
    token: Token = "cls",
    *,
    layers: int = 1,
    size: int | None = None,
    scales: tuple[float, ...] = (1.0,),
    seed: int = 0,
) -> Outcome:
    """size: pixels of the longest side, aspect kept; None = the centre crop that other protocols see."""
    form: dict[str, Any] = {} if size is None else {"shape": "longest", "size": size}
    found = [
        subject.features(source, token, layers, scales=scales, **form) for source in (images.gallery, images.queries)
    ]
    truth = of_readable(images.truth, *(f.indices for f in found))
    gallery, queries = (f.x.to(subject.device) for f in found)
    result = retrieval(gallery, queries, truth, seed=seed)
    about = subject.about(**form) | about_images(gallery=images.gallery, queries=images.queries)
    about |= {"token": token, "layers": layers, "scales": scales, "seed": seed, "set": images.name}
    seen = "centre crop" if size is None else f"longest side {size} px"
    seen += "" if len(scales) == 1 else f", {len(scales)} scales"
    figures = []
    for level, scores in result.scores.items():
        of = "" if level == "all" else f" {level}"
        low, high = scores.interval
        note = f"{result.query_images} queries, {result.gallery_images} images; {seen}"
        note += f"; {scores.skipped} queries without positives" if scores.skipped else ""
        several = len(scores.ap) - scores.skipped > 1
        margin, detail = ((high - low) / 2, f"95 % {low:.2f} to {high:.2f}") if several else (None, "one query")
        figures.append(Figure(f"mAP{of}, %", scores.mean_ap, margin, note, detail))
        figures += [Figure(f"mP@{k}{of}, %", value, main=False) for k, value in scores.precision_at.items()]
    return Outcome("retrieval", on_text(token, layers), about, result, figures)


def of_copy_detection(
    subject: Subject,
    images: RetrievalSet,
    token: Token = TOKEN,
    *,
    layers: int = 1,
    size: int = SIZE,
    distractors: Source | None = None,
    whiten_on: Source | None = None,
    seed: int = 0,
) -> Outcome:
    """Images become squares of `size` pixels."""
    form: dict[str, Any] = {"shape": "square", "size": size}
    sources = {"gallery": images.gallery, "queries": images.queries, "distractors": distractors, "whitening": whiten_on}
    given = {name: source for name, source in sources.items() if source is not None}
    found = {name: subject.features(source, token, layers, **form) for name, source in given.items()}
    x = {name: features.x.to(subject.device) for name, features in found.items()}
    ((attack, _),) = images.truth.items()
    wanted = of_readable(images.truth, found["gallery"].indices, found["queries"].indices)[attack]
    options = {"distractors": x.get("distractors"), "whiten_on": x.get("whitening"), "seed": seed}
    result = copy_detection(x["gallery"], x["queries"], wanted, **options)
    about = subject.about(**form) | about_images(**given) | {"token": token, "layers": layers, "seed": seed}
    about |= {"set": images.name}
    low, high = result.interval
    white = f"whitened on {result.whitening_images} images" if result.whitening_images else "not whitened"
    note = f"{result.copies - result.skipped} copies with an original, {result.distractor_images} distractors, {white}"
    figures = [Figure(f"mAP {attack}, %", result.mean_ap, (high - low) / 2, note, f"95 % {low:.2f} to {high:.2f}")]
    return Outcome("copy", on_text(token, layers), about, result, figures)
