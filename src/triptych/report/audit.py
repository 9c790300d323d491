"""What the training images are: numbers, sizes, formats, what cannot be read, what is there twice."""

import hashlib
import io
import statistics
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from triptych.data.images import UnreadableImage, to_rgb
from triptych.data.sources import Source
from triptych.data.stored import reason
from triptych.progress import progress

DECODED, HASHED = 1000, 20000
"""Images that are decoded, and whose stored bytes are compared: all of a small set, else a sample."""
NEAR = 4
"""Of the 64 bits of a difference hash: two images that differ in so many or fewer may be the same."""


@dataclass(frozen=True)
class Audit:
    images: int
    classes: list[tuple[str, int]]  # every class and its images; [] without labels
    unlabelled: int
    decoded: int  # of the sample: that were tried
    sides: list[tuple[int, int]]  # width, height in pixels, as stored (orientation not applied)
    modes: list[tuple[str, int]]  # Pillow's names, most frequent first
    formats: list[tuple[str, int]]
    unreadable: list[str]  # "key: reason"
    hashed: int  # whose bytes were compared
    duplicates: list[list[str]]  # keys of images with equal bytes
    near: list[tuple[str, str, int]]  # keys of two images, bits that differ; closest first, without exact duplicates
    flat: int  # images too even for a difference hash

    def aspects(self) -> tuple[float, float, float]:
        """Width over height: smallest, median, largest."""
        found = [w / h for w, h in self.sides]
        return min(found), statistics.median(found), max(found)

    def by_area(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Width and height of the image of the smallest, the median and the largest area."""
        ordered = sorted(self.sides, key=lambda s: (s[0] * s[1], s))
        return ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]


@dataclass
class _Seen:
    sides: list[tuple[int, int]] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    hashes: dict[int, np.ndarray] = field(default_factory=dict)
    flat: int = 0


def audit(source: Source, *, decode: int = DECODED, compare: int = HASHED, seed: int = 0) -> Audit:
    """At most `decode` images are decoded and the bytes of at most `compare` are compared, both drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    chosen, seen = sorted(order[:decode]), _Seen()
    for index in progress(chosen, f"audit of {source.name}:", len(chosen)):
        _look(source, index, seen)
    same, hashed = _duplicates(source, sorted(order[:compare]), chosen)
    labels = Counter(source.label(i) for i in range(len(source)))
    twins = {frozenset(pair) for group in same for pair in _pairs(group)}
    near = [(a, b, bits) for a, b, bits in _near(seen.hashes) if frozenset((a, b)) not in twins]
    return Audit(
        len(source),
        [(name, labels.get(i, 0)) for i, name in enumerate(source.classes or ())],
        labels.get(None, 0),
        len(chosen),
        seen.sides,
        seen.modes.most_common(),
        seen.formats.most_common(),
        seen.unreadable,
        hashed,
        [[source.key(i) for i in group] for group in same],
        [(source.key(a), source.key(b), bits) for a, b, bits in near],
        seen.flat,
    )


def _look(source: Source, index: int, seen: _Seen) -> None:
    try:
        image, kind = _opened(source, index)
        size, mode = image.size, image.mode
        bits = difference_hash(image)
    except UnreadableImage as error:
        seen.unreadable.append(str(error))
        return
    except Exception as error:  # of any kind: each of Pillow's decoders raises its own
        seen.unreadable.append(f"{source.key(index)}: {reason(error)}")
        return
    seen.sides.append(size)
    seen.modes[mode] += 1
    seen.formats[kind] += 1
    if bits is None:
        seen.flat += 1
    else:
        seen.hashes[index] = bits


def _opened(source: Source, index: int) -> tuple[Image.Image, str]:
    """-> the image, of a file not yet decoded; its format"""
    data = getattr(source, "stored", lambda _: None)(index)
    if isinstance(data, bytes):
        image = Image.open(io.BytesIO(data))
        return image, image.format or "?"
    if data is not None:
        return Image.fromarray(data), "pixels"
    image = source.image(index)
    return image, image.format or "pixels"


def difference_hash(image: Image.Image) -> np.ndarray | None:
    """(64,) bool: is each of 8 x 8 cells brighter than the next one to the right?  None of an image too even to tell.

    A JPEG file is decoded at a fraction of its size.
    """
    image.draft("RGB", (128, 128))
    small = to_rgb(image).convert("L").resize((9, 8), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.int16)
    if np.abs(np.diff(values, axis=1)).mean() < 1:
        return None
    return (values[:, 1:] < values[:, :-1]).ravel()


def _duplicates(source: Source, indices: list[int], chosen: list[int]) -> tuple[list[list[int]], int]:
    """-> groups of images with equal bytes or pixels; how many were compared.

    Images without bytes of their own (drawn, or decoded from one big file) cost more: only those of `chosen`.
    """
    stored = getattr(source, "stored", lambda _: None)
    found: dict[bytes, list[int]] = {}
    compared = 0
    cheap = _is_file(stored, indices)
    for index in indices if cheap else chosen:
        try:
            data = stored(index)
            data = np.asarray(source.image(index)) if data is None else data
        except Exception:  # of any kind; told of those that are decoded
            continue
        data = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
        found.setdefault(hashlib.blake2b(data).digest(), []).append(index)
        compared += 1
    return [group for group in found.values() if len(group) > 1], compared


def _is_file(stored, indices: list[int]) -> bool:
    """Do the images have bytes of their own?  As the first readable one tells."""
    for index in indices[:10]:
        try:
            return isinstance(stored(index), bytes)
        except Exception:  # of any kind: the next one may tell
            continue
    return False


def _pairs(group: list[int]) -> list[tuple[int, int]]:
    return [(a, b) for i, a in enumerate(group) for b in group[i + 1 :]]


def _near(hashes: dict[int, np.ndarray]) -> list[tuple[int, int, int]]:
    """Pairs of images whose hashes differ in at most NEAR bits, closest first."""
    if len(hashes) < 2:
        return []
    indices = list(hashes)
    bits = np.stack(list(hashes.values())).astype(np.float32)
    found = []
    for start in range(0, len(bits), 256):  # 256 x 1000 numbers at a time
        block = bits[start : start + 256]
        differ = block @ (1 - bits).T + (1 - block) @ bits.T
        for a, b in zip(*np.nonzero(differ <= NEAR), strict=True):
            if start + a < b:
                found.append((indices[start + a], indices[b], int(differ[a, b])))
    return sorted(found, key=lambda pair: (pair[2], pair[0], pair[1]))
