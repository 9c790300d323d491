"""Where images with masks, boxes and videos come from: one rule for their specifications.

A specification is a path, whose layout is recognised by what it holds, or KIND[:SPLIT]@PATH to say it; `ANNOTATED`
lists the kinds.  PATH is a folder, a .zip, or a folder with the layout packed in zip files, all read in place.  Sources
are picklable, and stay usable in forked and spawned DataLoader workers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from triptych.data.coco import CocoSource, coco_splits_of, open_file, open_split
from triptych.data.davis import AnnotatedFrames, Video, davis_splits, read_videos
from triptych.data.regions import IGNORE, Annotated, Region, Segmented
from triptych.data.segmented_layouts import LAYOUTS
from triptych.data.stores import exists
from triptych.data.tree import Layout, Tree
from triptych.errors import UserError, nearest

__all__ = [
    "ANNOTATED",
    "IGNORE",
    "Annotated",
    "Region",
    "Segmented",
    "coco_splits",
    "open_annotated",
    "open_coco",
    "open_segmented",
    "open_videos",
    "segmented_splits",
]

_KINDS: dict[str, Layout[Annotated]] = {  # a path is of the first whose splits it has
    **LAYOUTS,
    "coco": Layout(
        "boxes and instance masks in COCO's format",
        "instances_SPLIT.json at the top or in annotations/, images in SPLIT/, images/SPLIT/, images/ or at the top",
        coco_splits_of,
        open_split,
    ),
    "davis": Layout(
        "videos with masks of objects: DAVIS-2017, or davis:2016/val@PATH with one object each",
        "JPEGImages/480p/SEQUENCE/, Annotations/480p/SEQUENCE/, and lists such as ImageSets/2017/val.txt if some count",
        davis_splits,
        lambda name, tree, split: AnnotatedFrames(name, read_videos(tree, split)),
    ),
}

ANNOTATED: dict[str, str] = {f"{kind}[:SPLIT]@PATH": layout.about for kind, layout in _KINDS.items()}
ANNOTATED["coco:FILE.json@IMAGES"] = "the same of one file, with its images in a folder or .zip"
"""Specifications and what they are, for `triptych list`."""


class _Place(NamedTuple):
    name: str  # what the user gave
    kind: str
    tree: Tree
    splits: list[str]  # those that are there
    of: str  # the one that the specification names, or ""


def open_annotated(spec: str | Path, split: str | None = None) -> Annotated:
    """Images with regions of any kind: instances (coco), classes (index masks), objects in frames (davis).

    split: None is the part to measure on, as nothing learns from regions: val, else test, else what is there.
    Raises UserError, also for a COCO file without masks.
    """
    source: Annotated | None = _coco_file(spec, split)
    if source is None:
        place = _place(spec, tuple(_KINDS))
        found = _chosen(place, split, _measured(place.splits))
        source = _KINDS[place.kind].open(_name(spec, split), place.tree, found)
    if isinstance(source, CocoSource):
        source.check_masks()
    return source


def open_segmented(spec: str | Path, split: str | None = None, *, measured: bool = False) -> Segmented:
    """Images with a class for every pixel.  split: None is the part to train on, or, if so wanted, to measure on.

    Raises UserError.
    """
    place = _place(spec, tuple(LAYOUTS))
    found = _chosen(place, split, _measured(place.splits) if measured else place.splits[0])
    return LAYOUTS[place.kind].open(_name(spec, split), place.tree, found)


def segmented_splits(spec: str | Path) -> tuple[Segmented, Segmented]:
    """(to train on, to measure on).  A split in the specification replaces the one of its purpose: camvid:test@PATH is
    measured on, voc:train@PATH learnt from.  Raises UserError where either is missing.
    """
    place = _place(spec, tuple(LAYOUTS))
    train, measured = (LAYOUTS[place.kind].open(f"{spec} [{split}]", place.tree, split) for split in _pair(place))
    return train, measured


def open_coco(spec: str | Path, split: str | None = None, *, measured: bool = False) -> CocoSource:
    """Images with boxes, and masks where the file has them.  split: as of `open_segmented`.  Raises UserError."""
    if (coco := _coco_file(spec, split)) is not None:
        return coco
    place = _place(spec, ("coco",))
    found = _chosen(place, split, _measured(place.splits) if measured else place.splits[0])
    return open_split(_name(spec, split), place.tree, found)


def coco_splits(spec: str | Path) -> tuple[CocoSource, CocoSource]:
    """(to train on, to measure on), as `segmented_splits`; raises UserError also where their categories differ."""
    place = _place(spec, ("coco",))
    train, measured = (open_split(f"{spec} [{split}]", place.tree, split) for split in _pair(place))
    if train.classes != measured.classes:
        raise UserError(
            f"{train.json_path.name} and {measured.json_path.name} of {place.tree.path} have other categories: they "
            "must have the same names"
        )
    return train, measured


def open_videos(spec: str | Path, split: str | None = None) -> list[Video]:
    """Videos with masks.  split: a list of ImageSets; None is validation, of 2017 where it is there.

    Raises UserError.
    """
    place = _place(spec, ("davis",))
    return read_videos(place.tree, _chosen(place, split, place.splits[0]))


# --- specifications ---


def _place(spec: str | Path, kinds: Sequence[str]) -> _Place:
    """What a specification names, if it is of one of the kinds."""
    spec, path = str(spec), Path(spec).expanduser()
    if exists(path):
        tree = Tree(path)
        found = {kind: splits for kind in _KINDS if (splits := _KINDS[kind].splits(tree))}
        kind = next((kind for kind in found if kind in kinds), None)
        if kind is None:
            what = f"lies as {' or '.join(found)}, which will not do here" if found else "has no layout that is known"
            raise UserError(f"{path} {what}; it must hold one of\n{_needs(kinds)}")
        tree.check_unique()
        return _Place(spec, kind, tree, found[kind], "")
    head, _, root = spec.partition("@")
    kind, _, of = head.partition(":")
    kind = kind.lower()
    if kind not in kinds:
        what = "of a kind that will not do here" if kind in _KINDS else "neither an existing path nor a known KIND@PATH"
        near = "" if kind in _KINDS else nearest(kind, kinds)
        raise UserError(f"{spec!r} is {what}{near}\nGive a path, or KIND[:SPLIT]@PATH, that holds\n{_needs(kinds)}")
    if not root:
        raise UserError(f"{spec}: say where its files lie: {kind}@FOLDER")
    tree = Tree(Path(root).expanduser())
    if not (splits := _KINDS[kind].splits(tree)):
        raise UserError(f"{root} does not lie as {kind}; it must hold\n{_needs((kind,))}")
    tree.check_unique()
    return _Place(spec, kind, tree, splits, of)


def _coco_file(spec: str | Path, split: str | None) -> CocoSource | None:
    """coco:FILE.json@IMAGES, or FILE.json beside its images; None for other specifications."""
    head, at, images = str(spec).partition(".json@")
    path = Path(spec).expanduser()
    if at and head.lower().startswith("coco:"):
        file, folder = Path(f"{head[len('coco:') :]}.json").expanduser(), Path(images).expanduser()
    elif path.suffix.lower() == ".json" and exists(path):
        file, folder = path, path.absolute().parent
        folder = folder.parent if folder.name == "annotations" else folder
    else:
        return None
    if split is not None:
        raise UserError(f"{spec} is one file and has no split {split!r}; give a folder with instances_{split}.json")
    return open_file(str(spec), file, folder)


def _needs(kinds: Sequence[str]) -> str:
    return "\n".join(f"  {kind}: {_KINDS[kind].holds}" for kind in kinds)


def _name(spec: str | Path, split: str | None) -> str:
    return str(spec) if split is None else f"{spec} [{split}]"


# --- splits ---


def _chosen(place: _Place, split: str | None, default: str) -> str:
    if split and place.of:
        raise UserError(f"{place.name} names a split already, and split {split!r} is asked for; give one of them")
    wanted = split or place.of
    return _matching(place, wanted) if wanted else default


def _matching(place: _Place, wanted: str) -> str:
    """A split by its name; else train2017 or training for train, 2017/val, valid or validation for val."""
    others = {"train": "training", "val": ("valid", "validation"), "valid": "val", "validation": "val"}.get(wanted, ())
    found = [split for split in place.splits if split == wanted]
    found += [s for s in place.splits if wanted in (s.rstrip("0123456789"), s.rpartition("/")[2])]
    found += [split for split in place.splits if split and split in others]
    if not found:
        known = ", ".join(filter(None, place.splits)) or "none: all images are one part"
        raise UserError(f"{place.name} has no split {wanted!r}; there are {known}")
    return found[0]


def _measured(splits: Sequence[str]) -> str:
    """val, else test, else the last one."""
    for start in ("val", "test"):
        for split in splits:
            if split.rpartition("/")[2].startswith(start):
                return split
    return splits[-1]


def _pair(place: _Place) -> tuple[str, str]:
    of = _matching(place, place.of) if place.of else ""
    learns = [split for split in place.splits if split.startswith("train")]
    measures = [split for split in place.splits if split and split not in learns]
    if not learns or not measures:
        known = ", ".join(filter(None, place.splits)) or "none: all images are one part"
        raise UserError(f"{place.name} needs a part to train on and one to measure on (train, val); there are {known}")
    return (of, _measured(measures)) if of in learns else (learns[0], of or _measured(measures))
