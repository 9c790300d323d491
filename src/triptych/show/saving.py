"""Pictures and videos into files: whole, or not at all."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from triptych.errors import UserError

STILLS = (".png", ".jpg", ".jpeg", ".webp")
FILM = ".mp4"
CODECS = {"vp09": "VP9", "avc1": "H.264", "mp4v": "MPEG-4 part 2, which browsers do not play"}
"""Tags of what may be in an .mp4, the first that OpenCV can write here is taken; pip's OpenCV can write VP9."""


def check_out(out: Path, *, film: bool) -> None:
    """Raises UserError for a file that could not be written.  film: is there something that moves?"""
    allowed = (*STILLS, FILM) if film else STILLS
    if out.is_dir() or out.suffix.lower() not in allowed:
        still = " (.mp4 is for videos: give one, or the frames' rate with --fps)" if out.suffix == FILM else ""
        raise UserError(f"--out {out}: name a file that ends in {', '.join(allowed)}{still}")
    out.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def finished(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes `out` when all went well."""
    part = out.with_name(f"{out.stem}.part{out.suffix}")
    try:
        yield part
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def save_picture(image: Image.Image, out: Path) -> None:
    with finished(out) as part:
        image.save(part)


def save_film(frames: Iterable[np.ndarray], rate: float, out: Path) -> str:
    """frames (H, W, 3) uint8 RGB of one size, which come one at a time; rate: per second.  Returns the codec's name.

    An odd last row or column is doubled: codecs want even sides.  Raises UserError where OpenCV can write no video,
    and for no frames.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise UserError("this video has no frames")
    height, width = (side + side % 2 for side in first.shape[:2])
    with finished(out) as part:
        writer, codec = _writer(part, rate, (width, height))
        try:
            for frame in itertools.chain([first], frames):
                assert frame.shape == first.shape, "a video has one size"
                edges = (0, height - frame.shape[0], 0, width - frame.shape[1])
                even = cv2.copyMakeBorder(frame, *edges, cv2.BORDER_REPLICATE)
                writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))
        finally:
            writer.release()
    return codec


def _writer(part: Path, rate: float, size: tuple[int, int]) -> tuple[cv2.VideoWriter, str]:
    for tag, name in CODECS.items():
        writer = cv2.VideoWriter(str(part), cv2.VideoWriter.fourcc(*tag), rate, size)
        if writer.isOpened():
            return writer, name
    raise UserError("OpenCV can write no .mp4 on this machine: give --out a .png for a strip of frames")
