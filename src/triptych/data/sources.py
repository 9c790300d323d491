"""Where images come from: folders, zip and tar files, lists of paths, torchvision's data sets and drawn scenes.

A source is one store of images (files, archive, torchvision set) behind one class, with labels read off the paths by
one rule, whatever the store.  Sources are picklable, and stay usable in forked and spawned DataLoader workers.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image, UnidentifiedImageError

from triptych.data.images import UnreadableImage, to_rgb
from triptych.data.scenes_source import ScenesSource
from triptych.data.stores import Files, Store, exists, is_stored, open_store
from triptych.data.subsets import HELD_OUT, SUBSETS, Subset, digest, positions
from triptych.data.torchvision_sets import SETS, TorchvisionStore
from triptych.errors import UserError, nearest

SOURCES: dict[str, str] = {
    "FOLDER": "image files, flat or nested; sub-folders are classes, train/ and val/ or test/ are splits",
    "FILE.zip": "the same inside a zip file, read without unpacking",
    "FILE.tar": "the same inside an uncompressed tar file, read without unpacking",
    "SHARDS/*.tar": "several of them as one (in quotes), or a folder that holds nothing but .tar files",
    "FILE.txt": "a list (.txt or .lst): one image path per line, and after a TAB its label if there is one",
    "scenes[:N][@SEED]": "N (1000) labelled drawings of 96 x 96 pixels, made on the fly: for trials without data",
    "imagenet100[:SPLIT]@ROOT": "100 classes of the ImageNet that lies in the folder or archive ROOT",
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
        raise UnreadableImage(source.key(index), _reason(error)) from error


def open_source(spec: str | Path, *, split: str | None = None) -> Source:
    """The source that a specification names; SOURCES lists the kinds.

    A path that exists always wins, so a folder ./cifar10 or ./scenes hides the data set of that name (cifar10:train and
    scenes:1000 still mean the data sets).  Otherwise the text before the first ":" or "@", in any case, is the name:
    NAME[:SPLIT][@ROOT] for torchvision's sets, scenes[:N][@SEED] for the renderer.

    split: a folder's part (train, test, val ...) or a data set's split; None is the part to train on where there are
    parts.  "test" also finds the part to measure on under its other names.  Raises UserError.
    """
    spec, path = str(spec), Path(spec).expanduser()
    name = spec if split is None else f"{spec} [{split}]"
    if is_stored(path):
        return _from_path(path, name, split)
    kind, of, root = _named(spec)
    if kind == "scenes":
        return ScenesSource(name, spec, split)
    if kind in SUBSETS:
        return _part_of_set(name, kind, root, split or of or None)
    if kind not in SETS:
        known = ["scenes", *SUBSETS, *SETS]
        raise UserError(
            f"{spec!r} is neither an existing path nor a data set{nearest(kind, known)}\n"
            f"Give a folder of images, a .zip, a .tar, a list of paths (.txt), or one of: {', '.join(known)}"
        )
    if split and of:
        raise UserError(f"{spec} names a split already, and split {split!r} is asked for; give {kind} without :{of}")
    store = TorchvisionStore(kind, split or of, root)
    return _Stored(name, store, range(len(store.keys)), store.labels, store.classes)


def splits(spec: str | Path) -> tuple[Source, Source] | None:
    """(train, test) of a folder or archive with train/ and a held-out folder, a data set that has both, or scenes.

    None for everything else, and for a data set given with its split.  Of several held-out folders the first labelled
    one of HELD_OUT counts.
    """
    spec, path = str(spec), Path(spec).expanduser()
    if not is_stored(path):
        kind, of, root = _named(spec)
        if kind in SUBSETS and not of:
            return (open_source(spec), open_source(spec, split="test")) if splits(root) else None
        both = kind == "scenes" or (kind in SETS and SETS[kind].test is not None and not of)
        return (open_source(spec, split="train"), open_source(spec, split="test")) if both else None
    if _is_list(path):
        return None
    store = open_store(path)
    folders = {folder.lower() for folder in _folders(_inner(store))}
    held_out = [name for name in HELD_OUT if name in folders]
    if "train" not in folders or not held_out:
        return None
    train, *tests = [_part(path, store, f"{spec} [{name}]", name) for name in ("train", *held_out)]
    return train, next((test for test in tests if test.classes), tests[0])


def _part_of_set(name: str, kind: str, root: str, split: str | None) -> Subset:
    if not root:
        raise UserError(f"{name}: say where ImageNet lies: {kind}@FOLDER")
    whole = open_source(root, split=split)
    return Subset(whole, positions(whole, SUBSETS[kind]), f" [{kind}]", SUBSETS[kind])


# --- sources ---


class _Stored:
    """The images of a store at `positions`; labels go with the positions' order, None = no image has one."""

    def __init__(
        self,
        name: str,
        store: Store,
        positions: Sequence[int],
        labels: Sequence[int | None] | None,
        classes: tuple[str, ...] | None,
    ) -> None:
        self.name, self.classes = name, classes
        self.open_store, self._positions, self._labels = store, positions, labels

    def __len__(self) -> int:
        return len(self._positions)

    def image(self, index: int) -> Image.Image:
        position = self._positions[index]
        try:
            image = self.open_store.image(position)
            image.load()
        except Exception as error:  # of any kind: each of Pillow's decoders raises its own
            raise UnreadableImage(self.key(index), _reason(error)) from error
        return image

    def stored(self, index: int) -> bytes | None:
        try:
            return self.open_store.encoded(self._positions[index])
        except Exception as error:  # of any kind, as above
            raise UnreadableImage(self.key(index), _reason(error)) from error

    def label(self, index: int) -> int | None:
        return self._labels[index] if self._labels else None

    def key(self, index: int) -> str:
        return self.open_store.keys[self._positions[index]]

    def fingerprint(self) -> str:
        sizes = (self.open_store.size(position) for position in self._positions)
        return digest(f"{self.key(i)}\0{self.label(i)}\0{size}" for i, size in enumerate(sizes))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text names a buffer in memory
        return "not an image, or of a format that Pillow cannot read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _named(spec: str) -> tuple[str, str, str]:
    """NAME[:SPLIT][@ROOT] -> (name in lower case, split or "", root or "")."""
    head, _, root = spec.partition("@")
    name, _, split = head.partition(":")
    return name.lower(), split, root


# --- paths on disk ---


def _from_path(path: Path, name: str, split: str | None) -> Source:
    if not _is_list(path):
        return _part(path, open_store(path), name, split)
    if split is not None:
        raise UserError(f"{path} is a list and has no split {split!r}; write one list per split")
    return _from_list(path, name)


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
    return _Stored(name, store, range(len(keys)), labels, classes or None)


# --- the one rule for classes and splits, over paths ---


def _part(path: Path, store: Store, name: str, split: str | None) -> Source:
    """The images of one split of a folder or archive, or all, with labels where sub-folders are classes."""
    paths = _inner(store)
    folders = {folder.lower(): folder for folder in _folders(paths)}
    if split is None and "train" in folders and len(folders) > 1 and folders.keys() <= {"train", *HELD_OUT}:
        split = "train"
    if split is None:
        return _labelled(path, store, name, dict(enumerate(paths)), None)
    wanted = [split.lower(), *(HELD_OUT if split.lower() == "test" else ())]
    folder = next((folders[n] for n in wanted if n in folders), None)
    if not folder:
        raise UserError(f"no images in a folder {split!r} of {path}; there are {', '.join(sorted(folders)) or 'none'}")
    inside = _below(paths, folder)
    train = _classes(_below(paths, folders["train"]).values()) if "train" in folders else None
    return _labelled(path, store, name, inside, train)


def _labelled(path: Path, store: Store, name: str, paths: dict[int, str], train: tuple[str, ...] | None) -> Source:
    """A source of `paths`, by position in the store; labels count in `train` if given, as those of the training part.

    A held-out part without any folder of a training class is unlabelled; one with some others besides is a mistake.
    """
    classes = train or _classes(paths.values())
    found = _folders(paths.values())
    if not classes or "" in found or not found & set(classes):
        return _Stored(name, store, list(paths), None, None)
    if unknown := sorted(found - set(classes)):
        raise UserError(f"{name} has class folders that its train folder lacks: {', '.join(unknown[:5])}; move them")
    number = {folder: label for label, folder in enumerate(classes)}
    return _Stored(name, store, list(paths), [number[p.partition("/")[0]] for p in paths.values()], classes)


def _classes(paths: Iterable[str]) -> tuple[str, ...] | None:
    """First-level folders when there are two or more and no image lies beside them; else None."""
    folders = _folders(paths)
    return tuple(sorted(folders)) if len(folders) > 1 and "" not in folders else None


def _folders(paths: Iterable[str]) -> set[str]:
    """First-level folders; "" where an image lies at the top."""
    return {path.partition("/")[0] if "/" in path else "" for path in paths}


def _below(paths: Sequence[str], folder: str) -> dict[int, str]:
    """The paths within one first-level folder, without it, by position."""
    start = f"{folder}/"
    return {i: path[len(start) :] for i, path in enumerate(paths) if path.startswith(start)}


def _inner(store: Store) -> Sequence[str]:
    """The paths that the rule looks at: of an archive without its one common top-level folder."""
    folders = _folders(store.keys)
    if isinstance(store, Files) or len(folders) > 1 or "" in folders:
        return store.keys
    return [key.partition("/")[2] for key in store.keys]
