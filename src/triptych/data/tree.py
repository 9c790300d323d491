"""All files of a data set by path, whether they lie in a folder or are still packed in zip files."""

import posixpath
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from triptych.data.archives import Zip
from triptych.data.keys import EXTENSIONS, is_hidden
from triptych.data.stores import Files, Store, exists, walk
from triptych.errors import UserError


class Tree:
    """The files of a folder or of a zip file; a store of the images among them.

    The zip files of a folder without images in sub-folders count as unpacked there.  root is the folder ("" or
    "A/B/") that all images lie in: archives often hold one folder around everything, and users give the folder above.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError for what is neither, cannot be read or has no images."""
        self.path = path
        stores, self._texts = _opened(path)
        self.keys: Sequence[str] = [key for store in stores for key in store.keys]
        self._stores = stores
        # (N, 2): store, position in it
        self._where = np.array([(s, i) for s, store in enumerate(stores) for i in range(len(store.keys))])
        self.positions = {key: position for position, key in enumerate(self.keys)}
        folders = {key.rpartition("/")[0] for key in self.keys}
        common = posixpath.commonpath(folders)
        self.root = f"{common}/" if common else ""
        self._folders = {folder[:end] for folder in folders for end in _ends(folder)}

    def check_unique(self) -> None:
        """Raises UserError for an image in two zip files."""
        if len(self.positions) < len(self.keys):
            twice = next(key for i, key in enumerate(self.keys) if self.positions[key] != i)
            raise UserError(
                f"two zip files of {self.path} both have {twice}: keep one of them there, or give one of them"
            )

    def image(self, position: int) -> Image.Image:
        store, inner = self._where[position]
        return self._stores[store].image(int(inner))

    def encoded(self, position: int) -> bytes | None:
        store, inner = self._where[position]
        return self._stores[store].encoded(int(inner))

    def size(self, position: int) -> int:
        store, inner = self._where[position]
        return self._stores[store].size(int(inner))

    def below(self, folder: str) -> dict[str, int]:
        """Positions of the images in or below a folder of the root, by path within it without extension, sorted.

        Raises UserError where two differ by nothing but the extension.
        """
        start, found = f"{self.root}{folder}/", {}
        for key in sorted(self.keys):
            if key.startswith(start):
                stem = without_extension(key[len(start) :])
                if stem in found:
                    raise UserError(f"{self.path}: {self.keys[found[stem]]} and {key} have one name; remove one")
                found[stem] = self.positions[key]
        return found

    def has(self, *folders: str) -> bool:
        """Does every one of these folders of the root hold images, at any depth?"""
        return all(self.root + folder in self._folders for folder in folders)

    def texts(self) -> list[str]:
        """Paths of all files that are no images, sorted: those within the root are relative to it."""
        return sorted({name.removeprefix(self.root) for name in self._texts})

    def text(self, name: str) -> str | None:
        """A text file by path as in `texts`; None where there is none."""
        archive, member = self._texts.get(self.root + name) or self._texts.get(name) or (None, "")
        if archive is None:
            return None
        if archive.is_dir():
            data = (archive / member).read_bytes()
        else:
            with zipfile.ZipFile(archive) as opened:
                data = opened.read(member)
        return data.decode("utf-8-sig", errors="surrogateescape")

    def file(self, name: str) -> Path | None:
        """Where a file of `texts` lies; None where it is inside a zip file."""
        archive, member = self._texts.get(self.root + name) or self._texts[name]
        return archive / member if archive.is_dir() else None


T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Layout(Generic[T_co]):
    """How data sets of one kind lie on disk."""

    about: str  # one line for `triptych list`
    holds: str  # what it is recognised by, for messages
    splits: Callable[[Tree], list[str]]  # those that are there, the default one first; none = another layout
    open: Callable[[str, Tree, str], T_co]  # name, tree, split -> source


def _opened(path: Path) -> tuple[list[Store], dict[str, tuple[Path, str]]]:
    """The stores of images, and for every other file the folder or zip file that it lies in and its name there."""
    if not exists(path):
        raise UserError(f"{path} does not exist; check its name")
    if path.is_dir():
        names = _readable_names(path)
        keys = sorted(name for name in names if _is_image(name))
        zips = sorted(path / name for name in names if "/" not in name and name.lower().endswith(".zip"))
        zips = [] if any("/" in key for key in keys) else zips
    elif path.suffix.lower() == ".zip":
        names, keys, zips = [], [], [path]
    else:
        raise UserError(f"{path} is neither a folder nor a .zip; unpack other archives and give the folder")
    texts = {name: (path, name) for name in names if not _is_image(name)}
    stores: list[Store] = [Files(path, keys)] if keys else []
    for archive in zips:
        members = _members(archive)
        texts = {name: (archive, name) for name in members if not _is_image(name)} | texts
        if any(map(_is_image, members)):
            stores.append(Zip(archive))
    if not stores:
        raise UserError(f"no images in {path}: give the folder or the .zip of a data set")
    return stores, texts


def _readable_names(path: Path) -> list[str]:
    try:
        return list(walk(str(path)))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error


def _members(archive: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as opened:
            names = [info.filename for info in opened.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{archive} is broken or no zip file ({error}); copy or download it again") from error
    return [name for name in names if not any(map(is_hidden, name.split("/")))]


def without_extension(name: str) -> str:
    """Of an image; other names stay as they are."""
    stem, dot, ending = name.rpartition(".")
    return stem if dot + ending.lower() in EXTENSIONS else name


def _is_image(name: str) -> bool:
    return without_extension(name) != name


def _ends(folder: str) -> list[int]:
    """Where the names of a folder and of those around it end: "a/b" -> 1, 3."""
    return [i for i, letter in enumerate(f"{folder}/") if letter == "/"]
