"""The one rule for classes and splits, over the paths of a folder or archive."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from triptych.data.stored import Stored
from triptych.data.stores import Files, Store, open_store
from triptych.data.subsets import HELD_OUT
from triptych.errors import UserError

Inside = tuple[Store, dict[int, str]]  # a store, and paths of some of its images by position


class Place:
    """The images of a folder or archive, with its parts: first-level folders such as train/ and val/, or archives of a
    folder that are named so (train.zip, val.zip), whatever else lies beside them.

    leaf: an image's class is the whole path of its folder, not the first-level folder alone.
    """

    def __init__(self, path: Path, leaf: bool = False) -> None:
        """Raises UserError for what is neither, and for two archives of one part."""
        self.path, self.leaf = path, leaf
        self._archives = _archives(path)
        self._opened: dict[str, Inside] = {}

    @cached_property
    def _whole(self) -> Inside:
        store = open_store(self.path)
        return store, dict(enumerate(_inner(store)))

    @cached_property
    def parts(self) -> dict[str, str]:
        """Folders or archives, by name in lower case."""
        return {name.lower(): name for name in self._archives or _top_folders(self._whole[1].values())}

    def source(self, name: str, split: str | None = None) -> Stored:
        """The images of one part, with labels where sub-folders are classes.  "test" also finds a held-out part of
        another name; None is the training part where all parts are splits, else everything.
        """
        splits_alone = "train" in self.parts and self.parts.keys() <= {"train", *HELD_OUT}
        if split is None and splits_alone and (self._archives or len(self.parts) > 1):
            split = "train"
        if split is None:
            return self._labelled(name, self._whole, None)
        wanted = [split.lower(), *(HELD_OUT if split.lower() == "test" else ())]
        part = next((n for n in wanted if n in self.parts), None)
        if not part:
            what = "part" if self._archives else "folder"
            known = ", ".join(sorted(self.parts)) or "none"
            raise UserError(f"no images in a {what} {split!r} of {self.path}; there are {known}")
        train = self._classes(self._inside("train")) if "train" in self.parts else None
        return self._labelled(name, self._inside(part), train)

    def pair(self, name: str) -> tuple[Stored, Stored] | None:
        """(train, test), of several held-out parts the first labelled one; None where one of the two is missing."""
        held_out = [part for part in HELD_OUT if part in self.parts]
        if "train" not in self.parts or not held_out:
            return None
        train, *tests = [self.source(f"{name} [{part}]", part) for part in ("train", *held_out)]
        return train, next((test for test in tests if test.classes), tests[0])

    def _inside(self, part: str) -> Inside:
        if part not in self._opened:
            if self._archives:
                store = open_store(self._archives[self.parts[part]])
                self._opened[part] = store, dict(enumerate(_inner(store)))
            else:
                store, paths = self._whole
                start = f"{self.parts[part]}/"
                self._opened[part] = store, {i: p[len(start) :] for i, p in paths.items() if p.startswith(start)}
        return self._opened[part]

    def _labelled(self, name: str, inside: Inside, train: tuple[str, ...] | None) -> Stored:
        """labels count in `train` if given, as those of the training part.

        A held-out part without any folder of a training class is unlabelled; one with some others besides is a mistake.
        """
        classes, (store, paths) = train or self._classes(inside), inside
        folders = [self._class(path) for path in paths.values()]
        found = set(folders)
        if not classes or "" in found or not found & set(classes):
            return Stored(name, store, list(paths), None, None)
        if unknown := sorted(found - set(classes)):
            raise UserError(
                f"{name} has class folders that its train folder lacks: {', '.join(unknown[:5])}; move them"
            )
        number = {folder: label for label, folder in enumerate(classes)}
        return Stored(name, store, list(paths), [number[folder] for folder in folders], classes)

    def _class(self, path: str) -> str:
        """The folder that is an image's class; "" at the top."""
        return path.rpartition("/")[0] if self.leaf else _top(path)

    def _classes(self, inside: Inside) -> tuple[str, ...] | None:
        """Folders of images when there are two or more and no image lies beside them; else None."""
        folders = {self._class(path) for path in inside[1].values()}
        return tuple(sorted(folders)) if len(folders) > 1 and "" not in folders else None


def _top(path: str) -> str:
    return path.partition("/")[0] if "/" in path else ""


def _top_folders(paths: Iterable[str]) -> set[str]:
    """First-level folders; "" where an image lies at the top."""
    return {_top(path) for path in paths}


def _inner(store: Store) -> Sequence[str]:
    """The paths that the rule looks at: of an archive without its one common top-level folder."""
    folders = _top_folders(store.keys)
    if isinstance(store, Files) or len(folders) > 1 or "" in folders:
        return store.keys
    return [key.partition("/")[2] for key in store.keys]


def _archives(path: Path) -> dict[str, Path]:
    """Archives of a folder that are parts, train among them, by name; none where a folder of such a name lies there."""
    found: dict[str, Path] = {}
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError:  # no folder, or forbidden: the store says what is wrong
        return {}
    for name in names:
        stem, _, kind = name.lower().rpartition(".")
        if name.lower() in ("train", *HELD_OUT) and (path / name).is_dir():
            return {}
        if stem in ("train", *HELD_OUT) and kind in ("zip", "tar") and (path / name).is_file():
            if stem in found:
                raise UserError(f"{path} has {found[stem].name} and {name}, both its part {stem}: keep one")
            found[stem] = path / name
    return found if "train" in found else {}
