"""Zip files, tar files and sets of tar shards, whose images are read in place at their offsets.

What lies where in a tar file is only known to who reads all of it, so that is written down: beside the file as
NAME.tar.index, or in the cache folder where that is not writable, and valid while size and time of the file stay.
"""

import hashlib
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from triptych.cache import cache_folder
from triptych.data.keys import decode, image_keys, is_hidden
from triptych.errors import UserError

INDEX = ".index"  # after the name of a tar file
_VERSION = 1  # of the index file; another one is written anew
_HANDLES = 256  # open files of one process


class _Reader:
    """Parts of files by path; every process has handles of its own."""

    def __init__(self) -> None:
        self._files: dict[str, BinaryIO] = {}
        self._pid = 0

    def __getstate__(self) -> dict[str, object]:
        return {"_files": {}, "_pid": 0}

    def read(self, path: str, count: int, offset: int) -> bytes:
        if self._pid != os.getpid() or len(self._files) >= _HANDLES:
            self._files, self._pid = {}, os.getpid()
        if path not in self._files:
            self._files[path] = Path(path).open("rb")  # noqa: SIM115 - closed with the source
        return os.pread(self._files[path].fileno(), count, offset)


class Zip:
    """The images of a zip file."""

    def __init__(self, path: Path) -> None:
        members = _zip_members(path)
        self.keys: Sequence[str] = image_keys(path, _shown(members))
        # (N, 5): offset of the local header, packed bytes, bytes, compression, CRC-32
        self._index = np.array([members[key] for key in self.keys], dtype=np.int64)
        self._path, self._reader = str(path.absolute()), _Reader()

    def image(self, position: int) -> Image.Image:
        return decode(self.encoded(position))

    def encoded(self, position: int) -> bytes:
        offset, packed, size, compression, crc = map(int, self._index[position])
        # Lengths of name and extra differ from the central directory's.
        name, extra = struct.unpack("<26x2H", self._reader.read(self._path, 30, offset))
        data = self._reader.read(self._path, packed, offset + 30 + name + extra)
        if compression == zipfile.ZIP_DEFLATED:
            data = zlib.decompress(data, -15, size)
        if zlib.crc32(data) != crc:
            raise ValueError("damaged in the zip file: its CRC differs")
        return data

    def size(self, position: int) -> int:
        return int(self._index[position, 2])


class Tars:
    """The images of one or more uncompressed tar files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises UserError where two of them have an image of the same name."""
        parts = [_tar_index(path) for path in paths]
        keys = [key for part, _ in parts for key in part]
        shards = np.repeat(np.arange(len(parts)), [len(part) for part, _ in parts])
        index = np.column_stack([shards, np.concatenate([rows for _, rows in parts])])  # (N, 3): shard, offset, bytes
        if len(paths) > 1:
            order = sorted(range(len(keys)), key=keys.__getitem__)
            keys, index = [keys[i] for i in order], index[order]
            _check_unique(keys, index[:, 0], paths)
        self.keys: Sequence[str] = keys
        self._index, self._paths, self._reader = index, [str(path.absolute()) for path in paths], _Reader()

    def image(self, position: int) -> Image.Image:
        return decode(self.encoded(position))

    def encoded(self, position: int) -> bytes:
        shard, offset, size = map(int, self._index[position])
        return self._reader.read(self._paths[shard], size, offset)

    def size(self, position: int) -> int:
        return int(self._index[position, 2])


def _check_unique(keys: Sequence[str], shards: np.ndarray, paths: Sequence[Path]) -> None:
    for i in range(1, len(keys)):
        if keys[i - 1] == keys[i]:
            both = " and ".join(paths[shard].name for shard in shards[i - 1 : i + 1])
            raise UserError(f"{both} both have {keys[i]}: names must differ between shards; pack them again")


def _shown(names: Iterable[str]) -> Iterable[str]:
    return (name for name in names if not any(map(is_hidden, name.split("/"))))


def _zip_members(path: Path) -> dict[str, tuple[int, int, int, int, int]]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is broken or no zip file ({error}); copy or download it again") from error
    readable = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if any(info.flag_bits & 1 or info.compress_type not in readable for info in infos):
        raise UserError(f"{path} is encrypted or not packed with deflate; unpack it and give the folder")
    return {i.filename: (i.header_offset, i.compress_size, i.file_size, i.compress_type, i.CRC) for i in infos}


# --- the index of a tar file ---


def _tar_index(path: Path) -> tuple[list[str], np.ndarray]:
    """Names of the images, sorted, and (N, 2) int64 offsets and sizes: as written down, or read from the file now."""
    stat = path.stat()
    about = np.array([_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
    places = [path.with_name(path.name + INDEX), _in_cache(path)]
    for place in places:
        if (found := _load_index(place, about)) is not None:
            return found
    members = _tar_members(path)
    keys = image_keys(path, _shown(members))
    index = np.array([members[key] for key in keys], np.int64)
    for place in places:
        if _save_index(place, about, keys, index):
            break
    return keys, index


def _in_cache(path: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=16).hexdigest()
    return cache_folder("tar") / f"{name}{INDEX}"


def _load_index(place: Path, about: np.ndarray) -> tuple[list[str], np.ndarray] | None:
    """None where there is none, it is of another file or state of the file, or it is damaged."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            if not np.array_equal(stored["about"], about):
                return None
            index = stored["index"]
            keys = stored["keys"].tobytes().decode(errors="surrogateescape").split("\0")
    except Exception:  # of any kind: whatever is wrong with it, the tar file itself can be read
        return None
    if index.shape != (len(keys), 2) or index.dtype != np.int64:
        return None
    return (keys, index) if (index >= 0).all() and (index.sum(1) <= about[1]).all() else None


def _save_index(place: Path, about: np.ndarray, keys: Sequence[str], index: np.ndarray) -> bool:
    """False where the place cannot be written to."""
    names = np.frombuffer("\0".join(keys).encode(errors="surrogateescape"), np.uint8)
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, about=about, keys=names, index=index)
        part.replace(place)
    except OSError:
        part.unlink(missing_ok=True)
        return False
    return True


def _tar_members(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and bytes of every file in it."""
    members: dict[str, tuple[int, int]] = {}
    total = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                name = info.name.removeprefix("./").lstrip("/")
                if info.isreg():
                    members[name] = (info.offset_data, info.size)
                    if info.offset_data + info.size > total:
                        raise tarfile.ReadError(f"it ends within {name}")
                elif info.islnk():  # a hard link has no data of its own, and comes after its target
                    members[name] = members[info.linkname.removeprefix("./").lstrip("/")]
                archive.members = []  # else tarfile keeps a kilobyte for every member  # pyright: ignore
    except (tarfile.TarError, KeyError) as error:
        raise UserError(f"{path} is broken or no uncompressed tar file ({error}); copy or pack it again") from error
    return members
