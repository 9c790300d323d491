"""Pictures over time: small enough for one page, in it as base64."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from triptych import snapshots

MOST, BYTES = 24, 4_000_000
"""Pictures of a run on the page, and bytes of all of them together, at most."""


@dataclass(frozen=True)
class Frame:
    step: int
    size: tuple[int, int]  # width, height
    data: str  # a data: address


@dataclass(frozen=True)
class Frames:
    shown: list[Frame]
    there: int  # pictures in the folder
    damaged: list[str]


def frames(run: Path, most: int = MOST, limit: int = BYTES) -> Frames:
    """The first picture, the last, and evenly spaced ones between, as WebP."""
    steps = snapshots.steps(run)
    found, damaged = [], []
    for step in spread(steps, most):
        try:
            found.append((step, *_webp(snapshots.path_of(run, step))))
        except Exception as error:  # of any kind: each of Pillow's decoders raises its own
            damaged.append(f"{snapshots.path_of(run, step).name} ({type(error).__name__})")
    while len(found) > 1 and sum(len(data) for _, _, data in found) > limit:
        found = spread(found, max(1, len(found) * 3 // 4))
    return Frames([Frame(step, size, _address(data)) for step, size, data in found], len(steps), damaged)


def spread(items: list, most: int) -> list:
    """At most so many, evenly spaced, the last one always and the first one where two fit."""
    if len(items) <= most:
        return items
    if most == 1:
        return items[-1:]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _webp(path: Path) -> tuple[tuple[int, int], bytes]:
    with Image.open(path) as image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="WEBP", quality=85)
        return image.size, buffer.getvalue()


def _address(data: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"
