"""Which files count as images, and how their bytes are opened: the same in folders and archives."""

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from triptych.errors import UserError

_LOOKED_FOR = (
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .avif .tga"
)
EXTENSIONS = frozenset(_LOOKED_FOR.split())


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def image_keys(path: Path, names: Iterable[str]) -> list[str]:
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


def decode(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty (0 bytes)")
    return Image.open(io.BytesIO(data))
