"""Where a source's images lie: a folder or an archive, read in place.

Stores are picklable; every process opens its own file handles.
"""

import io
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from triptych.errors import UserError

_LOOKED_FOR = (
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .avif .tga"
)
EXTENSIONS = frozenset(_LOOKED_FOR.split())
_COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|txz|tbz2?|tzst)$", re.IGNORECASE)


class Store(Protocol):
    """Images by position; classes and labels are the business of what selects from it."""

    keys: Sequence[str]

    def image(self, position: int) -> Image.Image: ...  # may still be lazy; raises anything

    def size(self, position: int) -> int: ...  # bytes of the encoded image


def open_store(path: Path) -> Store:
    """The store at an existing path that is no list."""
    try:
        if path.is_dir():
            return Files(path, _image_keys(path, _walk(str(path))))
        if _COMPRESSED_TAR.search(path.name):
            raise UserError(
                f"{path} is compressed, so its images cannot be read one by one; unpack it and give the folder, or "
                "pack it again without compression (tar -cf images.tar FOLDER)"
            )
        if path.suffix.lower() == ".zip":
            return _Archive(path, _zip_members(path))
        if path.suffix.lower() == ".tar":
            return _Archive(path, _tar_members(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error
    is_image = path.suffix.lower() in EXTENSIONS
    advice = f"give its folder: {path.parent}" if is_image else "a list has one path per line, a label after a TAB"
    raise UserError(f"{path} is no folder, .zip, uncompressed .tar or list of paths (.txt, .lst); {advice}")


class Files:
    """Files by path, relative to a folder or absolute."""

    def __init__(self, folder: Path, keys: Sequence[str]) -> None:
        self.keys = keys
        self._folder = str(folder.absolute())  # so a later change of directory does no harm

    def image(self, position: int) -> Image.Image:
        return _decode(Path(self._folder, self.keys[position]).read_bytes())

    def size(self, position: int) -> int:
        try:
            return Path(self._folder, self.keys[position]).stat().st_size
        except OSError:  # a broken link: reported when it is read
            return -1


def _walk(folder: str, inner: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Paths of all files below, with "/" between folders.  Links are followed, except to a folder that they lie in."""
    here = Path(folder, inner)
    identity = (here.stat().st_dev, here.stat().st_ino)
    if identity in above:
        return
    with os.scandir(here) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(folder, f"{inner}{entry.name}/", (*above, identity))
            elif entry.is_file() or entry.is_symlink():  # a broken link is reported when it is read
                yield inner + entry.name


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _image_keys(path: Path, names: Iterable[str]) -> list[str]:
    """The names with an image's extension, sorted; raises UserError when there are none."""
    keys, others = [], Counter()
    for name in names:
        _, dot, ending = name.rpartition("/")[2].rpartition(".")
        extension = dot + ending.lower() if dot else ""
        if extension in EXTENSIONS:
            keys.append(name)
        else:
            others[extension or "without extension"] += 1
    if not keys:
        found = ", ".join(f"{count} {extension}" for extension, count in others.most_common(5)) or "no files"
        raise UserError(f"no images in {path}; looked for {_LOOKED_FOR}; found instead {found}")
    return sorted(keys)


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty (0 bytes)")
    return Image.open(io.BytesIO(data))


_Member = tuple[int, int, int, int, int]  # offset, packed bytes, bytes, compression (_TAR or zip's), CRC-32
_TAR = -1


class _Archive:
    """Members of a zip or tar file, read at their offsets; the index is (N, 5) int64 in the order of the keys."""

    def __init__(self, path: Path, members: dict[str, _Member]) -> None:
        shown = (name for name in members if not any(map(_is_hidden, name.split("/"))))
        self.keys: Sequence[str] = _image_keys(path, shown)
        self._index = np.array([members[key] for key in self.keys], dtype=np.int64)
        self._path = str(path.absolute())
        self._file: BinaryIO | None = None
        self._pid = 0

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def image(self, position: int) -> Image.Image:
        offset, packed, size, compression, crc = map(int, self._index[position])
        if compression == _TAR:
            return _decode(self._read(packed, offset))
        name, extra = struct.unpack("<26x2H", self._read(30, offset))  # lengths differ from the central directory's
        data = self._read(packed, offset + 30 + name + extra)
        if compression == zipfile.ZIP_DEFLATED:
            data = zlib.decompress(data, -15, size)
        if zlib.crc32(data) != crc:
            raise ValueError("damaged in the zip file: its CRC differs")
        return _decode(data)

    def size(self, position: int) -> int:
        return int(self._index[position, 2])

    def _read(self, count: int, offset: int) -> bytes:
        if self._file is None or self._pid != os.getpid():  # every process has a handle of its own
            self._file, self._pid = Path(self._path).open("rb"), os.getpid()  # noqa: SIM115 - closed with the source
        return os.pread(self._file.fileno(), count, offset)


def _zip_members(path: Path) -> dict[str, _Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is broken or no zip file ({error}); copy or download it again") from error
    readable = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if any(info.flag_bits & 1 or info.compress_type not in readable for info in infos):
        raise UserError(f"{path} is encrypted or not packed with deflate; unpack it and give the folder")
    return {i.filename: (i.header_offset, i.compress_size, i.file_size, i.compress_type, i.CRC) for i in infos}


def _tar_members(path: Path) -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    total = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                name = info.name.removeprefix("./").lstrip("/")
                if info.isreg():
                    members[name] = (info.offset_data, info.size, info.size, _TAR, 0)
                    if info.offset_data + info.size > total:
                        raise tarfile.ReadError(f"it ends within {name}")
                elif info.islnk():  # a hard link has no data of its own, and comes after its target
                    members[name] = members[info.linkname.removeprefix("./").lstrip("/")]
                archive.members = []  # else tarfile keeps a kilobyte for every member  # pyright: ignore
    except (tarfile.TarError, KeyError) as error:
        raise UserError(f"{path} is broken or no uncompressed tar file ({error}); copy or pack it again") from error
    return members
