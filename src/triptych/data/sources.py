"""Where images come from: folders, zip and tar files, lists of paths, torchvision's data sets and drawn scenes.

A source is one store of images (files, archive, torchvision set) behind one class, with labels read off the paths by
one rule, whatever the store, unless the data set brings a list of its own.  Sources are picklable, and stay usable in
forked and spawned DataLoader workers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from triptych.data.images import UnreadableImage, to_rgb
from triptych.data.inaturalist import inaturalist
from triptych.data.parts import Place
from triptych.data.scenes_source import ScenesSource
from triptych.data.stanford_cars import stanford_cars
from triptych.data.stored import Stored, reason
from triptych.data.stores import Files, exists, is_stored
from triptych.data.subsets import HELD_OUT, SUBSETS, Subset, of_list, positions
from triptych.data.torchvision_sets import SETS, TorchvisionStore, split_of
from triptych.errors import UserError, nearest


@dataclass(frozen=True)
class ListedSet:
    """A data set whose own annotation files list images and labels."""

    about: str  # one line for `triptych list`
    splits: tuple[str, ...]  # the first is the training one and the default
    test: str  # the split to measure on
    read: Callable[[Path, str], tuple[Files, list[int], tuple[str, ...]]]  # root, split -> images, labels, class names


LISTED: dict[str, ListedSet] = {
    f"inat{year % 100}": ListedSet(
        f"iNaturalist {year}, {count} species, as its competition lays it out in ROOT",
        ("train", "val"),
        "val",
        partial(inaturalist, year),
    )
    for year, count in ((2018, "8 142"), (2019, "1 010"))
}
LISTED["stanford-cars"] = ListedSet(
    "16 185 photographs of 196 models of cars, in ROOT", ("train", "test"), "test", stanford_cars
)

SOURCES: dict[str, str] = {
    "FOLDER": "image files, flat or nested; sub-folders are classes, train/ and val/ or test/ splits (or .zip, .tar)",
    "FILE.zip": "the same inside a zip file, read without unpacking",
    "FILE.tar": "the same inside an uncompressed tar file, read without unpacking",
    "SHARDS/*.tar": "several of them as one (in quotes), or a folder that holds nothing but .tar files",
    "FILE.txt": "a list (.txt or .lst): one image path per line, and after a TAB its label if there is one",
    "scenes[:N][@SEED]": "N (1000) labelled drawings of 96 x 96 pixels, made on the fly: for trials without data",
    "imagenet100[:SPLIT]@ROOT": "100 classes of the ImageNet that lies in the folder or archive ROOT",
    "subset:FILE.txt@DATA": "the training images of DATA that a file names, one on a line (as SimCLR's 1percent.txt)",
    "leaf[:FOLDERS]@PATH": "a folder or archive whose classes are whole folder paths; of some folders (A,B) or a split",
    **{f"{name}[:SPLIT]@ROOT": known.about for name, known in LISTED.items()},
    **{name: known.about for name, known in SETS.items()},
}


class Source(Protocol):
    """Images by index, 0 .. len - 1.

    A source may also have `stored(index)`: what `image` decodes, for those who decode it otherwise; bytes of a file,
    pixels (H, W, 3) uint8 of an upright RGB image, or None.  Raises UnreadableImage.
    """

    @property
    def name(self) -> str: ...  # what the user gave

    @property
    def classes(self) -> tuple[str, ...] | None: ...  # names by label; None = unlabelled

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image: ...  # wholly decoded, in the file's own mode; raises UnreadableImage

    def label(self, index: int) -> int | None: ...  # position in classes

    def key(self, index: int) -> str: ...  # path within the source

    def fingerprint(self) -> str: ...  # 16 hex digits over keys, labels and file sizes


def load_rgb(source: Source, index: int) -> Image.Image:
    """An image of a source as upright 8-bit RGB; raises UnreadableImage, also for what cannot be converted."""
    image = source.image(index)
    try:
        return to_rgb(image)
    except Exception as error:  # of any kind: Pillow's converters meet the file's own metadata here
        raise UnreadableImage(source.key(index), reason(error)) from error


def open_source(spec: str | Path, *, split: str | None = None) -> Source:
    """The source that a specification names; SOURCES lists the kinds.

    A path that exists always wins, so a folder ./cifar10 or ./scenes hides the data set of that name (cifar10:train and
    scenes:1000 still mean the data sets).  Otherwise the text before the first ":" or "@", in any case, is the name:
    NAME[:SPLIT][@ROOT] for data sets, leaf[:FOLDERS]@PATH, subset:FILE@DATA, scenes[:N][@SEED] for the renderer.

    split: a part (train, test, val ...) of a folder or a data set's split; None is the part to train on where there are
    parts.  "test" also finds the part to measure on under its other names.  Raises UserError.
    """
    spec, path = str(spec), Path(spec).expanduser()
    name = spec if split is None else f"{spec} [{split}]"
    if is_stored(path):
        if not _is_list(path):
            return Place(path).source(name, split)
        if split is not None:
            raise UserError(f"{path} is a list and has no split {split!r}; write one list per split")
        return _from_list(path, name)
    kind, of, root = _named(spec)
    if kind == "scenes":
        return ScenesSource(name, spec, split)
    if kind == "leaf":
        return _leaf(name, of, root, split)
    if kind == "subset":
        return _of_list(name, of, root, split)
    if kind in SUBSETS:
        return _part_of_set(name, kind, root, split or of or None)
    if kind not in SETS and kind not in LISTED:
        known = ["scenes", *SUBSETS, *SETS, *LISTED, "subset", "leaf"]
        raise UserError(
            f"{spec!r} is neither an existing path nor a data set{nearest(kind, known)}\n"
            f"Give a folder of images, a .zip, a .tar, a list of paths (.txt), or one of: {', '.join(known)}"
        )
    if split and of:
        raise UserError(f"{spec} names a split already, and split {split!r} is asked for; give {kind} without :{of}")
    if kind in LISTED:
        return _listed(name, kind, root, split or of)
    store = TorchvisionStore(kind, split or of, root)
    return Stored(name, store, range(len(store.keys)), store.labels, store.classes)


def splits(spec: str | Path) -> tuple[Source, Source] | None:
    """(train, test) of a folder or archive with a training and a held-out part, a data set that has both, or scenes.

    None for everything else, and for a data set given with its split.  Of several held-out parts the first labelled
    one of HELD_OUT counts.
    """
    spec, path = str(spec), Path(spec).expanduser()
    if is_stored(path):
        return None if _is_list(path) else Place(path).pair(spec)
    kind, of, root = _named(spec)
    if kind == "subset":
        pair = splits(root)
        return (open_source(spec), pair[1]) if pair else None
    if of and kind != "scenes":
        return None
    if kind == "leaf":
        return _leaf_place(spec, root).pair(spec)
    if kind in SUBSETS:
        return (open_source(spec), open_source(spec, split="test")) if splits(root) else None
    known = LISTED.get(kind) or SETS.get(kind)
    if kind != "scenes" and not (known and known.test):
        return None
    return open_source(spec, split=known.splits[0] if known else "train"), open_source(spec, split="test")


def _part_of_set(name: str, kind: str, root: str, split: str | None) -> Subset:
    if not root:
        raise UserError(f"{name}: say where ImageNet lies: {kind}@FOLDER")
    whole = open_source(root, split=split)
    return Subset(whole, positions(whole, SUBSETS[kind]), f" [{kind}]", SUBSETS[kind])


def _of_list(name: str, file: str, root: str, split: str | None) -> Source:
    """The named images to train on; other parts are whole."""
    if not file or not root:
        raise UserError(f"{name}: say which images of which data: subset:FILE.txt@DATA")
    if split not in (None, "train"):
        return open_source(root, split=split)
    pair = splits(root)
    return of_list(pair[0] if pair else open_source(root), file)


def _listed(name: str, kind: str, root: str, split: str) -> Stored:
    if not root:
        raise UserError(f"{name}: say where its files lie: {kind}@FOLDER")
    known = LISTED[kind]
    store, labels, classes = known.read(Path(root).expanduser(), split_of(kind, known, split))
    return Stored(name, store, range(len(labels)), labels, classes)


def _leaf(name: str, of: str, root: str, split: str | None) -> Source:
    """All images, those of one split (leaf:train@PATH), or those of the classes in or below some folders."""
    place = _leaf_place(name, root)
    if split or not of or of.lower() in ("train", *HELD_OUT):
        return place.source(name, split or of or None)
    whole, folders = place.source(name), of.split(",")
    classes = [c for c in whole.classes or () if any(f"{c}/".startswith(f"{folder}/") for folder in folders)]
    for folder in folders:
        if not any(f"{c}/".startswith(f"{folder}/") for c in classes):
            tops = sorted({c.partition("/")[0] for c in whole.classes or ()})
            raise UserError(f"{name}: no class lies in a folder {folder!r}; there are {', '.join(tops[:20]) or 'none'}")
    return Subset(whole, positions(whole, tuple(classes)), "", tuple(classes))


def _leaf_place(name: str, root: str) -> Place:
    path = Path(root).expanduser()
    if not root or not is_stored(path) or _is_list(path):
        raise UserError(f"{name}: leaf takes a folder or archive whose folders of images are classes: leaf@PATH")
    return Place(path, leaf=True)


def _named(spec: str) -> tuple[str, str, str]:
    """NAME[:SPLIT][@ROOT] -> (name in lower case, split or "", root or "")."""
    head, _, root = spec.partition("@")
    name, _, split = head.partition(":")
    return name.lower(), split, root


def _is_list(path: Path) -> bool:
    return path.suffix.lower() in (".txt", ".lst") and not path.is_dir()


def _from_list(path: Path, name: str) -> Source:
    """A text file of paths, relative to its folder or absolute, each with an optional TAB and label."""
    keys, names = [], []
    for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"):
        if line.strip() and not line.startswith("#"):
            key, _, label = line.partition("\t")
            keys.append(key.strip())
            names.append(label.strip())
    store = Files(path.parent, keys)
    missing = [key for key in keys if not exists(path.parent / key)]
    if missing or not keys:
        what = f"{len(missing)} of {len(keys)} files of {path} do not exist: {', '.join(missing[:3])}"
        raise UserError(
            f"{what if missing else f'no paths in {path}'}{' ...' if len(missing) > 3 else ''}\nWrite one path per "
            f"line, absolute or relative to {path.parent.absolute()}, then a TAB and a label if there is one"
        )
    known = set(names) - {""}
    numbers = all(label.isdecimal() for label in known)
    classes = tuple(sorted(known, key=int if numbers else None))  # so that 10 follows 9
    labels = [classes.index(label) if label else None for label in names] if classes else None
    return Stored(name, store, range(len(keys)), labels, classes or None)
