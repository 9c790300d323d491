"""The section of the training images."""

from collections.abc import Sequence

from triptych.report.audit import NEAR, Audit
from triptych.report.html import Html, el, facts, folded, join, number, table


def data(found: Audit | None, why: str, notes: Sequence[str]) -> Html:
    said = join(el("p", note, class_="warn") for note in notes)
    if found is None:
        return said + el("p", f"No audit: {why}")
    sizes: list[tuple[object, object]] = []
    if found.sides:
        names = ("smallest", "median", "largest")
        each_size = zip(names, found.by_area(), strict=True)
        sizes.append(("width × height, by area", "; ".join(f"{name} {w} × {h}" for name, (w, h) in each_size)))
        shapes = zip(names, found.aspects(), strict=True)
        sizes.append(("width / height", "; ".join(f"{name} {number(a, 3)}" for name, a in shapes)))
    counts = sorted(n for _, n in found.classes)
    spread = f", of {counts[0]} to {counts[-1]} images (median {counts[len(counts) // 2]})" if counts else ""
    copies = sum(len(group) - 1 for group in found.duplicates)
    near = f"{len(found.near)} pairs whose difference hashes differ in at most {NEAR} of 64 bits"
    rows = [
        ("images", number(found.images, 9)),
        ("classes", f"{len(counts)}{spread}" if counts else "no labels"),
        *([("without a label", found.unlabelled)] if counts and found.unlabelled else []),
        *sizes,
        ("modes", _counted(found.modes)),
        ("formats", _counted(found.formats)),
        ("unreadable", f"{len(found.unreadable)} of {found.decoded} decoded"),
        ("exact duplicates", f"{copies} of {found.hashed} compared are copies of others"),
        ("possible near duplicates", f"{near}, of {len(found.sides)} decoded ({found.flat} too even to tell)"),
    ]
    drawn = f"{found.decoded} of {found.images} images were decoded, drawn by seed 0"
    sample = "All images were decoded" if found.decoded == found.images else drawn
    note = f"{sample}; sizes, modes, formats and near duplicates are of these."
    return join([said, facts(rows), el("p", note, class_="note"), *_lists(found)])


def _lists(found: Audit) -> list[Html]:
    """What is named, folded."""
    parts = []
    if found.classes:
        parts.append(folded("Images of each class", table(["class", "images"], found.classes, 1)))
    if found.unreadable:
        parts.append(folded("Unreadable images", el("ul", *(el("li", x) for x in found.unreadable[:100]))))
    if found.duplicates:
        groups = (el("li", " = ".join(group[:10])) for group in found.duplicates[:50])
        parts.append(folded("Exact duplicates (first 50)", el("ul", *groups)))
    if found.near:
        pairs = table(["image", "image", "bits that differ"], found.near[:50], 1)
        parts.append(folded("Possible near duplicates (closest 50)", pairs))
    return parts


def _counted(pairs: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count}" for name, count in pairs) or "-"
