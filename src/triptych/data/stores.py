"""Where a source's images lie: a folder, an archive or a set of tar shards, read in place.

Stores are picklable; every process opens its own file handles.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from triptych.data.archives import INDEX, Tars, Zip
from triptych.data.keys import EXTENSIONS, decode, image_keys, is_hidden
from triptych.errors import UserError

_COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|txz|tbz2?|tzst)$", re.IGNORECASE)


class Store(Protocol):
    """Images by position; classes and labels are the business of what selects from it."""

    keys: Sequence[str]

    def image(self, position: int) -> Image.Image: ...  # may still be lazy; raises anything

    def encoded(self, position: int) -> bytes | None: ...  # the image's file; None where it has none; raises anything

    def size(self, position: int) -> int: ...  # bytes of the encoded image


def open_store(path: Path) -> Store:
    """The store at an existing path that is no list, or of the tar files that a pattern names.  Raises UserError."""
    try:
        if not exists(path):
            return Tars(_matching(path))
        if path.is_dir():
            shards = _shards(path)
            return Tars(shards) if shards else Files(path, image_keys(path, walk(str(path))))
        if _COMPRESSED_TAR.search(path.name):
            raise UserError(
                f"{path} is compressed, so its images cannot be read one by one; unpack it and give the folder, or "
                "pack it again without compression (tar -cf images.tar FOLDER)"
            )
        if path.suffix.lower() == ".zip":
            return Zip(path)
        if path.suffix.lower() == ".tar":
            return Tars([path])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error
    is_image = path.suffix.lower() in EXTENSIONS
    advice = f"give its folder: {path.parent}" if is_image else "a list has one path per line, a label after a TAB"
    raise UserError(f"{path} is no folder, .zip, uncompressed .tar or list of paths (.txt, .lst); {advice}")


def is_stored(path: Path) -> bool:
    """Does it exist, or is it a pattern (SHARDS/*.tar)?"""
    return exists(path) or (path.suffix.lower() == ".tar" and glob.has_magic(str(path)))


def exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises for forbidden and over-long paths


def _matching(pattern: Path) -> list[Path]:
    """The tar files that a pattern names, in order."""
    paths = [Path(path) for path in sorted(glob.glob(str(pattern)))]  # noqa: PTH207 - Path.glob takes no absolute one
    if not paths:
        raise UserError(f"no file is named like {pattern}: check the folder and the pattern")
    return paths


def _shards(folder: Path) -> list[Path]:
    """The tar files of a folder that holds nothing else, in order; empty for every other folder."""
    paths = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name) or entry.name.endswith(INDEX):
                continue
            if not entry.name.lower().endswith(".tar") or not entry.is_file():
                return []
            paths.append(Path(entry.path))
    return sorted(paths)


class Files:
    """Files by path, relative to a folder or absolute."""

    def __init__(self, folder: Path, keys: Sequence[str]) -> None:
        self.keys = keys
        self._folder = str(folder.absolute())  # so a later change of directory does no harm

    def image(self, position: int) -> Image.Image:
        return decode(self.encoded(position))

    def encoded(self, position: int) -> bytes:
        return Path(self._folder, self.keys[position]).read_bytes()

    def size(self, position: int) -> int:
        try:
            return Path(self._folder, self.keys[position]).stat().st_size
        except OSError:  # a broken link: reported when it is read
            return -1


def walk(folder: str, inner: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Paths of all files below, with "/" between folders.  Links are followed, except to a folder that they lie in."""
    here = Path(folder, inner)
    identity = (here.stat().st_dev, here.stat().st_ino)
    if identity in above:
        return
    with os.scandir(here) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from walk(folder, f"{inner}{entry.name}/", (*above, identity))
            elif entry.is_file() or entry.is_symlink():  # a broken link is reported when it is read
                yield inner + entry.name
